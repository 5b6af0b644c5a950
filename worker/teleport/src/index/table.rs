//! The index by content: a hash table of places that stays well filled.
//!
//! ```text
//! digest ─ second half ─▶ shard ─ first half ─▶ slot: place (u32), 1 byte of tag
//! ```
//! A hash table doubles, so just after doubling it is half empty. Here as many small ones stand side by side as make each
//! of them 80 % full once all blocks of all disks differ: 6.2 bytes a block then, whatever the size of the disks.
//! Guarantees to hold at most one place for a digest. Does not know digests: the caller says which a place has.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::page::BlockDigest;

/// Places that a shard holds when all blocks differ: four fifths of 4096 slots, of which 3584 can be filled.
const SHARD_PLACES: u64 = 3300;

/// Places by digest.
#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<HashTable<u32>>,
}

impl Default for Table {
    fn default() -> Self {
        Self { shards: vec![HashTable::new()] }
    }
}

impl Table {
    /// Divides the table anew for disks of `blocks` in all.
    pub(super) fn resize(&mut self, blocks: u64, digest_of: impl Fn(u32) -> BlockDigest) {
        let count = blocks.div_ceil(SHARD_PLACES).max(1) as usize;
        if count == self.shards.len() {
            return;
        }
        let shards = std::iter::repeat_with(HashTable::new).take(count).collect();
        let old = std::mem::replace(&mut self.shards, shards);
        for place in old.into_iter().flatten() {
            self.insert(&digest_of(place), place, &digest_of);
        }
    }

    /// The place that is known for a digest.
    pub(super) fn find(&self, digest: &BlockDigest, digest_of: impl Fn(u32) -> BlockDigest) -> Option<u32> {
        self.shards[self.shard(digest)].find(hash(digest), |known| digest_of(*known) == *digest).copied()
    }

    /// Enters a place unless another is known for its digest.
    pub(super) fn insert(&mut self, digest: &BlockDigest, place: u32, digest_of: impl Fn(u32) -> BlockDigest) {
        let shard = self.shard(digest);
        let entry = self.shards[shard].entry(
            hash(digest),
            |known| digest_of(*known) == *digest,
            |known| hash(&digest_of(*known)),
        );
        if let Entry::Vacant(slot) = entry {
            slot.insert(place);
        }
    }

    /// Takes a place out, if it is the one that is known for its digest.
    pub(super) fn remove(&mut self, digest: &BlockDigest, place: u32) {
        let shard = self.shard(digest);
        if let Ok(entry) = self.shards[shard].find_entry(hash(digest), |known| *known == place) {
            entry.remove();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(HashTable::len).sum()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let slots: usize = self.shards.iter().map(HashTable::allocation_size).sum();
        slots + self.shards.capacity() * size_of::<HashTable<u32>>()
    }

    /// The second half of a digest, as a fraction of all shards.
    fn shard(&self, digest: &BlockDigest) -> usize {
        let fraction = digest.0.last_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        ((u128::from(fraction) * self.shards.len() as u128) >> 64) as usize
    }
}

/// The first half of a digest, which is evenly spread.
fn hash(digest: &BlockDigest) -> u64 {
    digest.0.first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}
