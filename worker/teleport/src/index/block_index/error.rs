//! Why the index cannot do as asked.

use super::BLOCKS_MAX;

/// Why the index cannot do as asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IndexError {
    /// The disk was never added.
    #[error("index: no disk {disk}")]
    NoDisk {
        /// Its number.
        disk: u16,
    },
    /// A block beyond the disk's end.
    #[error("index: block {block} is beyond the {blocks} blocks of disk {disk}")]
    BeyondEnd {
        /// The disk.
        disk: u16,
        /// The block.
        block: u64,
        /// The disk's size.
        blocks: u64,
    },
    /// All disks together would be larger than can be addressed.
    #[error("index: disk {disk} of {blocks} blocks makes all disks more than {BLOCKS_MAX} blocks")]
    TooLarge {
        /// The disk.
        disk: u16,
        /// Its size.
        blocks: u64,
    },
    /// All disks together hold more than positions can address.
    #[error("index: more than {BLOCKS_MAX} blocks are held")]
    Full,
    /// The store of a disk's digests has failed: the disk is to be added again.
    #[error("index: the digests of disk {disk} cannot be kept")]
    Store {
        /// The disk.
        disk: u16,
    },
}
