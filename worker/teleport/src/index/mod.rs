//! What the destination's replica holds: from the digest of a block to a place where it lies.
//!
//! [`BlockLookup`] is all that the encoder knows of it; [`BlockIndex`] is the index itself, [`DigestStore`] where its digests lie, and
//! [`Changes`] what an attempt has changed that may yet be dropped.

mod block_index;
mod changes;
mod digests;
mod table;

pub use block_index::{BlockIndex, IndexError};
pub use changes::{Changed, Changes};
pub use digests::{DigestStore, HeapDigests, PART_BLOCKS, PartKind, StoreFailed};

use crate::page::BlockDigest;

/// Number of the "disk" whose blocks are pages of the guest's memory that the destination has kept: no disk of a VM has it.
pub const KEPT_MEMORY: u16 = u16::MAX;

/// A block of a disk of the VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockRef {
    /// Number of the disk, as both workers know it.
    pub disk: u16,
    /// Number of the 4 KiB block on it.
    pub block: u64,
}

impl BlockRef {
    /// The block behind this one.
    pub fn next(self) -> Self {
        Self { block: self.block + 1, ..self }
    }
}

/// Asked by the encoder for each page that is not zero.
pub trait BlockLookup {
    /// A place where a block with this digest lies.
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef>;

    /// Whether the block at this place has this digest: cheaper than [`BlockLookup::find`], and keeps extents long.
    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool;
}

/// A replica that holds nothing: everything is sent as bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyReplica;

impl BlockLookup for EmptyReplica {
    fn find(&self, _: &BlockDigest) -> Option<BlockRef> {
        None
    }

    fn holds(&self, _: BlockRef, _: &BlockDigest) -> bool {
        false
    }
}
