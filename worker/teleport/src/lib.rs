//! The page cache teleportation codec: pure, no tokio, no sockets, no files, no clock.
//!
//! Most of a data-intensive guest's memory lies byte for byte on its disk, and the disk's replica lies at the
//! destination. The encoder turns QEMU's migration stream into frames in which such pages are references; the decoder
//! reads them from the replica and gives the stream back.
//!
//! ```text
//! QEMU ─▶ Encoder { parser ─▶ batch ─▶ literals } ─▶ frames ═▶ FrameReader ─▶ Decoder { plan ─▶ literals ─▶ rebuild } ─▶ QEMU
//!                      ▲                                ▲                       │      ▲
//!                 BlockLookup                    encode_fallback ◀── Mismatch ──┘  ReplicaRead
//! ```
//! Guarantees:
//! - what comes out is what went in, byte for byte: each batch is given out only if its BLAKE3 digest is the one that
//!   the source took of its own bytes, and [`StreamDigest`] covers all batches in order;
//! - what the parser does not understand passes through verbatim and still arrives;
//! - memory is bounded by the limits in [`wire::limits`], whatever the size of the guest and whatever a peer sends.
//!
//! Does not move bytes, keep time or decide anything: transport, windows, order and retries are the worker's.

mod batch;
mod counts;
mod decoder;
mod digest;
mod encoder;
pub mod index;
mod literals;
mod page;
pub mod qemu;
mod rebuild;
pub mod wire;

pub use counts::PageCounts;
pub use decoder::{DecodeError, Decoded, Decoder, ReplicaRead, Verified};
pub use digest::{BatchDigest, BatchSummary, OutOfOrder, StreamDigest};
pub use encoder::{EncodeError, EncodedBatch, Encoder, EncoderParams, Retained, encode_fallback};
pub use index::{BlockIndex, BlockLookup, BlockRef, KEPT_MEMORY};
pub use literals::{Level, LiteralSizer};
pub use page::{BlockDigest, PAGE_SIZE, Page, PageHash, ZERO_PAGE, is_zero};
pub use wire::{Frame, FrameError, FrameKind, FrameReader};
