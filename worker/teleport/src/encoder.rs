//! The source's half: QEMU's stream in, frames out.
//!
//! ```text
//! push(bytes, index) ─▶ parse ─▶ classify ─▶ batch ──full, flush(), finish()──▶ digest, compress ─▶ next_batch()
//!                                  zero │ teleported (index) │ literal
//! ```
//! Guarantees: the batches in order stand for exactly the bytes pushed; each is within the limits of the wire; what is
//! held back after `flush` is less than one record of QEMU's. What answers a fallback is given out with the batch: the
//! encoder keeps nothing of a batch that it gave out. Does not send, does not know which batches were acknowledged.

use std::collections::VecDeque;
use std::io;

use crate::batch::Batch;
use crate::counts::PageCounts;
use crate::digest::{BatchSummary, StreamDigest};
use crate::index::BlockLookup;
use crate::literals::{self, Compressor, Level};
use crate::qemu::{Item, Mode, StreamParser};
use crate::wire::{self, FrameKind, OpsError, ops};

/// Why encoding cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// zstd failed to start.
    #[error("start the compression of literals")]
    Start {
        /// What zstd says.
        #[source]
        source: io::Error,
    },
    /// zstd failed.
    #[error("compress the literals of batch {sequence}")]
    Compress {
        /// The batch.
        sequence: u64,
        /// What zstd says.
        #[source]
        source: io::Error,
    },
    /// A batch does not read as it was written.
    #[error("read the operations of batch {sequence}")]
    Ops {
        /// The batch.
        sequence: u64,
        /// What is wrong.
        #[source]
        source: OpsError,
    },
    /// A batch was counted wrongly.
    #[error("digest the stream")]
    Digest(#[from] crate::digest::OutOfOrder),
}

/// What an encoder is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct EncoderParams {
    /// How hard literals are compressed at first.
    pub level: Level,
    /// Batches are to carry their pages of memory: see [`EncodedBatch::memory_pages`].
    pub memory_pages: bool,
}

/// A batch, ready to be sent.
#[derive(Debug)]
pub struct EncodedBatch {
    /// What identifies it: sequence, raw length, digest.
    pub summary: BatchSummary,
    /// The bytes to send, after [`wire::stream_header`] at the start of the stream.
    pub frame: Vec<u8>,
    /// What answers a request for fallback; nothing if the batch refers to no replica. Keep it until the batch is
    /// acknowledged.
    pub retained: Option<Retained>,
    /// Its pages.
    pub counts: PageCounts,
    /// Its pages that lie on no disk, one behind the other: what [`crate::Verified::memory_pages`] tells the digests of, in the same
    /// order. Empty unless [`EncoderParams::memory_pages`] asks for them.
    pub memory_pages: Vec<u8>,
}

/// All that is needed to send a batch again as bytes.
#[derive(Clone, Debug)]
pub struct Retained {
    summary: BatchSummary,
    ops: Vec<u8>,
    content: Vec<u8>,
}

impl Retained {
    /// What identifies the batch.
    pub fn summary(&self) -> &BatchSummary {
        &self.summary
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.ops.capacity() + self.content.capacity()
    }
}

/// Encodes one stream.
#[derive(Debug)]
pub struct Encoder {
    parser: StreamParser,
    packer: Packer,
}

impl Encoder {
    /// An encoder at the start of a stream.
    pub fn new(params: EncoderParams) -> Result<Self, EncodeError> {
        Ok(Self { parser: StreamParser::new(), packer: Packer::new(params)? })
    }

    /// Takes in more of the stream; take the batches that this completes with [`Encoder::next_batch`] before the next
    /// push, so that they do not pile up.
    pub fn push(&mut self, mut bytes: &[u8], index: &dyn BlockLookup) -> Result<(), EncodeError> {
        while !bytes.is_empty() {
            let (used, item) = self.parser.next(bytes);
            bytes = &bytes[used..];
            let Some(item) = item else { break };
            self.packer.add(item, index)?;
            if self.packer.batch.is_full(index) {
                self.packer.close()?;
            }
        }
        self.packer.batch.settle(index);
        Ok(())
    }

    /// Closes the batch under way: for when the hypervisor goes quiet, so that nothing waits.
    pub fn flush(&mut self) -> Result<(), EncodeError> {
        if self.packer.batch.is_empty() { Ok(()) } else { self.packer.close() }
    }

    /// The stream has ended: closes the last batch, whatever it ends within.
    pub fn finish(&mut self, index: &dyn BlockLookup) -> Result<(), EncodeError> {
        if let Some(item) = self.parser.finish() {
            self.packer.add(item, index)?;
            self.packer.batch.settle(index);
        }
        self.flush()
    }

    /// The next batch to send.
    pub fn next_batch(&mut self) -> Option<EncodedBatch> {
        self.packer.ready.pop_front()
    }

    /// The level of compression from the next batch on.
    pub fn set_level(&mut self, level: Level) {
        self.packer.compressor.set_level(level);
    }

    /// What the parser makes of the stream.
    pub fn mode(&self) -> Mode {
        self.parser.mode()
    }

    /// The digest of all batches closed so far.
    pub fn stream_digest(&self) -> &StreamDigest {
        &self.packer.digest
    }
}

/// Items in, batches out.
#[derive(Debug)]
struct Packer {
    batch: Batch,
    compressor: Compressor,
    memory_pages: bool,
    digest: StreamDigest,
    ready: VecDeque<EncodedBatch>,
}

impl Packer {
    fn new(params: EncoderParams) -> Result<Self, EncodeError> {
        Ok(Self {
            batch: Batch::default(),
            compressor: Compressor::new(params.level).map_err(|source| EncodeError::Start { source })?,
            memory_pages: params.memory_pages,
            digest: StreamDigest::new(),
            ready: VecDeque::new(),
        })
    }

    /// Adds an item, to as many batches as it takes.
    fn add(&mut self, mut item: Item<'_>, index: &dyn BlockLookup) -> Result<(), EncodeError> {
        while let Some(rest) = self.batch.add(item, index) {
            item = rest;
            self.close()?;
        }
        Ok(())
    }

    /// Turns the batch under way into a frame and begins the next one.
    fn close(&mut self) -> Result<(), EncodeError> {
        let sequence = self.digest.batches();
        let closed = self.batch.close();
        let summary = BatchSummary { sequence, raw_length: closed.raw_length, digest: closed.digest };
        self.digest.append(&summary)?;
        let mut memory_pages = Vec::new();
        for stretch in closed.stretches() {
            let stretch = stretch.map_err(|source| EncodeError::Ops { sequence, source })?;
            if stretch.literal {
                let added = self.compressor.add(stretch.bytes);
                added.map_err(|source| EncodeError::Compress { sequence, source })?;
            }
            if stretch.of_memory && self.memory_pages {
                memory_pages.extend_from_slice(stretch.bytes);
            }
        }
        let literals = self.compressor.flush().map_err(|source| EncodeError::Compress { sequence, source })?;
        let frame = wire::write_frame(FrameKind::Batch, &summary, &closed.ops, &literals);
        let counts = closed.counts;
        let retained =
            (counts.teleported > 0).then_some(Retained { summary, ops: closed.ops, content: closed.content });
        self.ready.push_back(EncodedBatch { summary, frame, retained, counts, memory_pages });
        Ok(())
    }
}

/// The frame that answers a request for fallback: the batch with all its bytes, standing alone.
pub fn encode_fallback(retained: &Retained) -> Result<Vec<u8>, EncodeError> {
    let Retained { summary, ops, content } = retained;
    let sequence = summary.sequence;
    let ops = ops::all_literal(ops, summary.raw_length).map_err(|source| EncodeError::Ops { sequence, source })?;
    let literals = literals::compress_alone(content).map_err(|source| EncodeError::Compress { sequence, source })?;
    Ok(wire::write_frame(FrameKind::Fallback, summary, &ops, &literals))
}
