//! One frame: the header of a batch and its two parts, bounded and taken apart but not interpreted.

use std::ops::Range;

use super::limits::{BATCH_OPS_MAX, BATCH_RAW_MAX, COMPRESSED_MAX, FRAME_LENGTH_MAX};
use super::varint;
use crate::digest::{BatchDigest, BatchSummary};

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// A batch of the main stream; its literals go on from those of the batch before.
    Batch,
    /// A batch sent again with all its bytes; it stands alone.
    Fallback,
}

impl FrameKind {
    const BATCH: u8 = 1;
    const FALLBACK: u8 = 2;

    fn code(self) -> u8 {
        match self {
            Self::Batch => Self::BATCH,
            Self::Fallback => Self::FALLBACK,
        }
    }
}

/// What is wrong with a stream of frames. None of it can be recovered from: the stream is to be given up.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream does not begin as one of ours.
    #[error("read stream header: found {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// A version that is not spoken here.
    #[error("read stream header: version {version} is not accepted")]
    Version {
        /// The version.
        version: u8,
    },
    /// A kind of frame that is not known.
    #[error("read frame: unknown kind {kind}")]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// A frame ends within one of its fields.
    #[error("read frame: it ends within its {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// A length above its limit.
    #[error("read frame: {field} of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// The length.
        length: u64,
        /// The limit.
        limit: usize,
    },
    /// Bytes behind the last field.
    #[error("read frame: {length} bytes after its end")]
    Trailing {
        /// How many.
        length: usize,
    },
}

/// A frame off the wire.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// The batch that it carries.
    pub summary: BatchSummary,
    body: Vec<u8>,
    ops: Range<usize>,
    literals: Range<usize>,
}

impl Frame {
    /// Takes a frame apart, without the length before it.
    pub(super) fn parse(body: &[u8]) -> Result<Self, FrameError> {
        let mut rest = body;
        let kind = match take(&mut rest, 1, "kind")?[0] {
            FrameKind::BATCH => FrameKind::Batch,
            FrameKind::FALLBACK => FrameKind::Fallback,
            kind => return Err(FrameError::Kind { kind }),
        };
        let sequence = number(&mut rest, "sequence")?;
        let raw_length = bounded(&mut rest, "raw length", BATCH_RAW_MAX)? as u32;
        let mut digest = [0; BatchDigest::LENGTH];
        digest.copy_from_slice(take(&mut rest, BatchDigest::LENGTH, "digest")?);
        let ops = part(body, &mut rest, "operations", BATCH_OPS_MAX)?;
        let literals = part(body, &mut rest, "literals", COMPRESSED_MAX)?;
        if !rest.is_empty() {
            return Err(FrameError::Trailing { length: rest.len() });
        }
        let summary = BatchSummary { sequence, raw_length, digest: BatchDigest(digest) };
        Ok(Self { kind, summary, body: body.to_vec(), ops, literals })
    }

    /// The operations, not checked.
    pub(crate) fn ops(&self) -> &[u8] {
        &self.body[self.ops.clone()]
    }

    /// The compressed literals, not checked.
    pub(crate) fn literals(&self) -> &[u8] {
        &self.body[self.literals.clone()]
    }

    /// Bytes that the frame took on the wire, its length included.
    pub fn wire_length(&self) -> usize {
        4 + self.body.len()
    }
}

fn take<'a>(rest: &mut &'a [u8], length: usize, field: &'static str) -> Result<&'a [u8], FrameError> {
    let (front, back) = rest.split_at_checked(length).ok_or(FrameError::Truncated { field })?;
    *rest = back;
    Ok(front)
}

fn number(rest: &mut &[u8], field: &'static str) -> Result<u64, FrameError> {
    varint::read(rest).ok_or(FrameError::Truncated { field })
}

fn bounded(rest: &mut &[u8], field: &'static str, limit: usize) -> Result<usize, FrameError> {
    let length = number(rest, field)?;
    match usize::try_from(length) {
        Ok(length) if length <= limit => Ok(length),
        _ => Err(FrameError::TooLong { field, length, limit }),
    }
}

fn part(body: &[u8], rest: &mut &[u8], field: &'static str, limit: usize) -> Result<Range<usize>, FrameError> {
    let length = bounded(rest, field, limit)?;
    let start = body.len() - rest.len();
    take(rest, length, field)?;
    Ok(start..start + length)
}

/// Writes a frame with its length.
pub(crate) fn write_frame(kind: FrameKind, summary: &BatchSummary, ops: &[u8], literals: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(4 + 64 + ops.len() + literals.len());
    frame.extend_from_slice(&[0; 4]);
    frame.push(kind.code());
    varint::write(summary.sequence, &mut frame);
    varint::write(u64::from(summary.raw_length), &mut frame);
    frame.extend_from_slice(&summary.digest.0);
    varint::write(ops.len() as u64, &mut frame);
    frame.extend_from_slice(ops);
    varint::write(literals.len() as u64, &mut frame);
    frame.extend_from_slice(literals);
    let length = frame.len() - 4;
    debug_assert!(length <= FRAME_LENGTH_MAX, "a frame of {length} bytes");
    frame[..4].copy_from_slice(&(length as u32).to_be_bytes());
    frame
}
