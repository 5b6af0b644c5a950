//! What a disk session has sent, as the digest of a recovery point sees it: both sides take it, and a point is committed only if they
//! agree.
//!
//! The bytes are hashed where they are at hand, before compression; the order is decided where they are sent.

use super::points::ChangeDigest;

/// One change of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    offset: u64,
    length: u64,
    /// Digest of the bytes; [`None`]: zeros.
    content: Option<blake3::Hash>,
}

impl Change {
    /// Bytes at `offset`.
    pub fn data(offset: u64, data: &[u8]) -> Self {
        Self { offset, length: data.len() as u64, content: Some(blake3::hash(data)) }
    }

    /// So many zero bytes at `offset`.
    pub fn zeros(offset: u64, length: u64) -> Self {
        Self { offset, length, content: None }
    }
}

/// All changes of one disk so far, in their order.
#[derive(Debug)]
pub struct Changes {
    disk: String,
    digest: ChangeDigest,
    bytes: u64,
}

impl Changes {
    /// None yet, of a disk of this size.
    pub fn new(disk: &str, size_bytes: u64) -> Self {
        let mut digest = ChangeDigest::default();
        digest.resize(disk, size_bytes);
        Self { disk: disk.to_owned(), digest, bytes: 0 }
    }

    /// One more.
    pub fn add(&mut self, change: &Change) {
        match &change.content {
            Some(content) => self.digest.content(&self.disk, change.offset, change.length, content),
            None => self.digest.zero(&self.disk, change.offset, change.length),
        }
        self.bytes += change.length;
    }

    /// Digest of the disk's changes.
    pub fn digest(&self) -> ChangeDigest {
        self.digest.clone()
    }

    /// Length of all changes, in bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
