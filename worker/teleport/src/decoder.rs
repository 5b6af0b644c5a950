//! The destination's half: frames in, QEMU's stream out.
//!
//! ```text
//!                                        ┌─ digest agrees ──▶ Verified(bytes)
//! frame ─▶ check ─▶ decompress ─▶ rebuild┤
//!                        (replica)       └─ it does not ────▶ Mismatch ─▶ request ─▶ decode_fallback ─▶ Rebuilt
//! ```
//! Guarantees: bytes are given out only if they are those that the source digested. A batch that does not verify holds up
//! no other: later ones go on being decoded, the caller puts the bytes back in order. No frame, however hostile, makes it
//! panic or allocate beyond the limits of the wire. Does not write to the hypervisor, does not order what is missing.

use std::collections::BTreeMap;
use std::io;

use crate::counts::PageCounts;
use crate::digest::{BatchSummary, Transcript};
use crate::index::BlockRef;
use crate::literals::{self, Decompressor};
use crate::page::BlockDigest;
use crate::rebuild::{self, Plan, Rebuilt};
use crate::wire::limits::{BATCH_LITERAL_MAX, PENDING_FALLBACKS_MAX};
use crate::wire::{Frame, FrameKind, OpsError};

/// The replica, as the decoder reads it.
pub trait ReplicaRead {
    /// Reads `count` blocks of 4 KiB from `at` on; `into` is exactly that long. An error means only that the batch does
    /// not verify.
    fn read(&mut self, at: BlockRef, count: u32, into: &mut [u8]) -> io::Result<()>;
}

/// Why a stream cannot be decoded any further.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// zstd failed to start.
    #[error("start the decompression of literals")]
    Start {
        /// What zstd says.
        #[source]
        source: io::Error,
    },
    /// A frame of another kind than belongs on this stream.
    #[error("decode batch {sequence}: it is a {kind:?} frame on the wrong stream")]
    Kind {
        /// The batch.
        sequence: u64,
        /// What it is.
        kind: FrameKind,
    },
    /// A batch is missing or comes twice.
    #[error("decode batch {found}: {expected} is next")]
    Sequence {
        /// The batch whose turn it is.
        expected: u64,
        /// The batch that came.
        found: u64,
    },
    /// Operations without sense.
    #[error("read the operations of batch {sequence}")]
    Ops {
        /// The batch.
        sequence: u64,
        /// What is wrong.
        #[source]
        source: OpsError,
    },
    /// Literals that are not zstd's, or need too large a window.
    #[error("decompress the literals of batch {sequence}")]
    Literals {
        /// The batch.
        sequence: u64,
        /// What zstd says.
        #[source]
        source: io::Error,
    },
    /// Literals of another length than the operations take.
    #[error("decompress the literals of batch {sequence}: they are not {expected} bytes")]
    LiteralLength {
        /// The batch.
        sequence: u64,
        /// What the operations take.
        expected: usize,
    },
    /// The digest differs although no replica was read.
    #[error("verify batch {sequence}: its own bytes do not have its digest")]
    Digest {
        /// The batch.
        sequence: u64,
    },
    /// A fallback that nobody asked for.
    #[error("decode fallback of batch {sequence}: it was not asked for")]
    Unasked {
        /// The batch.
        sequence: u64,
    },
    /// A fallback that differs from its batch in more than how it is sent.
    #[error("decode fallback of batch {sequence}: it is not the batch that was announced")]
    NotAsAnnounced {
        /// The batch.
        sequence: u64,
    },
    /// More batches wait for their fallback than may.
    #[error("decode batch {sequence}: {PENDING_FALLBACKS_MAX} batches wait for their fallback")]
    TooManyPending {
        /// The batch.
        sequence: u64,
    },
}

/// A batch whose bytes are those of the source.
#[derive(Debug)]
pub struct Verified {
    /// What identifies it; feed it to [`crate::StreamDigest`] in order of sequence.
    pub summary: BatchSummary,
    /// The stretch of QEMU's stream.
    pub bytes: Vec<u8>,
    /// Its pages.
    pub counts: PageCounts,
    /// Of each page that lies on no disk, in the order of [`crate::EncodedBatch::memory_pages`], the digest, if it is known.
    pub memory_pages: Vec<Option<BlockDigest>>,
}

/// What became of a batch.
#[derive(Debug)]
pub enum Decoded {
    /// It is as it was at the source.
    Verified(Verified),
    /// The replica does not hold what the source took it to hold: ask for a fallback.
    Mismatch {
        /// The batch.
        sequence: u64,
        /// Its pages that were to come from the replica.
        teleported_pages: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    summary: BatchSummary,
    counts: PageCounts,
    memory_pages: usize,
}

/// Decodes one stream and its fallbacks.
#[derive(Debug)]
pub struct Decoder {
    decompressor: Decompressor,
    next: u64,
    pending: BTreeMap<u64, Pending>,
    literals: Vec<u8>,
    transcript: Transcript,
    scratch: Vec<u8>,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Result<Self, DecodeError> {
        let decompressor = Decompressor::new().map_err(|source| DecodeError::Start { source })?;
        Ok(Self {
            decompressor,
            next: 0,
            pending: BTreeMap::new(),
            literals: Vec::new(),
            transcript: Transcript::default(),
            scratch: Vec::new(),
        })
    }

    /// Batches that wait for their fallback.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Decodes the next batch of the main stream. After an error the stream is to be given up.
    pub fn decode(&mut self, frame: &Frame, replica: &mut dyn ReplicaRead) -> Result<Decoded, DecodeError> {
        let summary = frame.summary;
        let sequence = summary.sequence;
        if frame.kind != FrameKind::Batch {
            return Err(DecodeError::Kind { sequence, kind: frame.kind });
        }
        if sequence != self.next {
            return Err(DecodeError::Sequence { expected: self.next, found: sequence });
        }
        let plan = plan(frame)?;
        if plan.literal_length > BATCH_LITERAL_MAX {
            return Err(DecodeError::LiteralLength { sequence, expected: BATCH_LITERAL_MAX });
        }
        self.decompress(frame, plan.literal_length)?;
        self.next += 1;
        let rebuilt =
            rebuild::rebuild(frame.ops(), &summary, &self.literals, replica, &mut self.transcript, &mut self.scratch)
                .map_err(|source| DecodeError::Ops { sequence, source })?;
        match rebuilt {
            Rebuilt::Verified(bytes, digests) => {
                let memory_pages = digests.into_iter().map(Some).collect();
                Ok(Decoded::Verified(Verified { summary, bytes, counts: plan.counts, memory_pages }))
            }
            Rebuilt::Differs if plan.counts.teleported == 0 => Err(DecodeError::Digest { sequence }),
            Rebuilt::Differs if self.pending.len() == PENDING_FALLBACKS_MAX => {
                Err(DecodeError::TooManyPending { sequence })
            }
            Rebuilt::Differs => {
                let Plan { counts, memory_pages, .. } = plan;
                self.pending.insert(sequence, Pending { summary, counts, memory_pages });
                Ok(Decoded::Mismatch { sequence, teleported_pages: plan.counts.teleported })
            }
        }
    }

    fn decompress(&mut self, frame: &Frame, expected: usize) -> Result<(), DecodeError> {
        let sequence = frame.summary.sequence;
        match self.decompressor.batch(frame.literals(), expected, &mut self.literals) {
            Ok(true) => Ok(()),
            Ok(false) => Err(DecodeError::LiteralLength { sequence, expected }),
            Err(source) => Err(DecodeError::Literals { sequence, source }),
        }
    }

    /// Decodes a batch that was asked for again, against the digest that was announced with it at first.
    pub fn decode_fallback(&mut self, frame: &Frame) -> Result<Verified, DecodeError> {
        let sequence = frame.summary.sequence;
        if frame.kind != FrameKind::Fallback {
            return Err(DecodeError::Kind { sequence, kind: frame.kind });
        }
        let Some(Pending { summary, counts, memory_pages }) = self.pending.get(&sequence).copied() else {
            return Err(DecodeError::Unasked { sequence });
        };
        let plan = plan(frame)?;
        if frame.summary != summary || plan.counts.teleported > 0 {
            return Err(DecodeError::NotAsAnnounced { sequence });
        }
        let expected = plan.literal_length;
        let literals = literals::decompress_alone(frame.literals(), expected)
            .map_err(|source| DecodeError::Literals { sequence, source })?;
        if literals.len() != expected {
            return Err(DecodeError::LiteralLength { sequence, expected });
        }
        let (transcript, scratch) = (&mut self.transcript, &mut self.scratch);
        let rebuilt = rebuild::rebuild(frame.ops(), &summary, &literals, &mut rebuild::NoReplica, transcript, scratch)
            .map_err(|source| DecodeError::Ops { sequence, source })?;
        let Rebuilt::Verified(bytes, _) = rebuilt else { return Err(DecodeError::Digest { sequence }) };
        self.pending.remove(&sequence);
        // A fallback has all pages as bytes: which of them lie on no disk is not told.
        let memory_pages = vec![None; memory_pages];
        Ok(Verified { summary, bytes, counts: counts.fallen_back(), memory_pages })
    }
}

fn plan(frame: &Frame) -> Result<Plan, DecodeError> {
    let BatchSummary { sequence, raw_length, .. } = frame.summary;
    Plan::of(frame.ops(), raw_length).map_err(|source| DecodeError::Ops { sequence, source })
}
