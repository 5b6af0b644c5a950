//! What crosses the link: a stream of frames, each a batch of operations with its literal bytes.
//!
//! ```text
//! stream := "PGPT" version:u8  frame*
//! frame  := length:u32be  kind:u8  sequence:varint  raw_length:varint  digest:32  ops_length:varint  ops
//!           literals_length:varint  literals
//! ```
//! `ops` is described in [`ops`], the limits in [`limits`]. Guarantees: a reader allocates nothing that a limit does not
//! cover, whatever a peer sends. Numbers are in their shortest form when written; readers accept any.

mod frame;
pub mod limits;
pub(crate) mod ops;
mod reader;
pub(crate) mod varint;
pub mod version;

pub(crate) use frame::write_frame;
pub use frame::{Frame, FrameError, FrameKind};
pub use ops::OpsError;
pub use reader::FrameReader;

/// First bytes of each stream, before the version.
const MAGIC: [u8; 4] = *b"PGPT";

/// What a sender writes before its first frame.
pub fn stream_header() -> [u8; 5] {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, version::CURRENT]
}
