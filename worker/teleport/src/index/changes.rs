//! Changes that may yet be dropped as a whole, beside an index that they leave as it is.
//!
//! ```text
//! get:  changed? ─yes─▶ what it is now        find: by content among the changes, then in the index, unless changed since
//!           └─no──▶ the index
//! ```
//! Costs about 50 bytes a changed block, and next to nothing for parts that became zero or unknown as a whole. Guarantees: what
//! [`Changed::find`](BlockLookup::find) gives holds that digest, as far as the index and the changes say; an index is changed only by
//! [`Changes::apply`].

use std::collections::BTreeMap;
use std::ops::Bound;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::block_index::{BlockIndex, IndexError};
use super::digests::{DigestStore, PART_BLOCKS, split};
use super::{BlockLookup, BlockRef};
use crate::page::BlockDigest;

/// The disk's number lies above the block's in a packed place.
const BLOCK_BITS: u32 = 48;

/// What has changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// By disk and part.
    parts: BTreeMap<(u16, u32), Part>,
    /// Packed places of changed blocks, by their content.
    table: HashTable<u64>,
}

#[derive(Debug, Default)]
struct Part {
    /// All blocks became this, before those of `blocks` changed once more.
    whole: Option<BlockDigest>,
    blocks: BTreeMap<u16, BlockDigest>,
}

impl Part {
    fn get(&self, offset: usize) -> Option<BlockDigest> {
        self.blocks.get(&(offset as u16)).copied().or(self.whole)
    }
}

impl Changes {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether a disk has changed.
    pub fn touch(&self, disk: u16) -> bool {
        self.parts.range((disk, 0)..=(disk, u32::MAX)).next().is_some()
    }

    /// What a block has become, or [`None`] if it has not changed; [`BlockDigest::UNKNOWN`]: nothing is known of it any more.
    pub fn get(&self, at: BlockRef) -> Option<BlockDigest> {
        let (part, offset) = split(at.block);
        self.parts.get(&(at.disk, part))?.get(offset)
    }

    /// Blocks that follow each other now have this content. They must be on the disk.
    pub fn set_run(&mut self, from: BlockRef, digests: &[BlockDigest]) {
        for (block, digest) in (from.block..).zip(digests) {
            self.set(BlockRef { block, ..from }, *digest);
        }
    }

    /// Blocks that follow each other all became this: zeros, or unknown. They must be on the disk.
    pub fn fill(&mut self, from: BlockRef, count: u64, digest: BlockDigest) {
        let (mut block, end) = (from.block, from.block.saturating_add(count));
        while block < end {
            let (part, offset) = split(block);
            let run = (end - block).min((PART_BLOCKS - offset) as u64);
            if run == PART_BLOCKS as u64 {
                self.fill_part((from.disk, part), digest);
            } else {
                (block..block + run).for_each(|block| self.set(BlockRef { block, ..from }, digest));
            }
            block += run;
        }
    }

    fn fill_part(&mut self, key: (u16, u32), digest: BlockDigest) {
        let part = Part { whole: Some(digest), blocks: BTreeMap::new() };
        let Some(before) = self.parts.insert(key, part) else { return };
        for (offset, digest) in before.blocks {
            let block = u64::from(key.1) * PART_BLOCKS as u64 + u64::from(offset);
            self.forget(pack(BlockRef { disk: key.0, block }), &digest);
        }
    }

    fn set(&mut self, at: BlockRef, digest: BlockDigest) {
        let (part, offset) = split(at.block);
        let before = self.parts.entry((at.disk, part)).or_default().blocks.insert(offset as u16, digest);
        let place = pack(at);
        if let Some(before) = before {
            if before == digest {
                return;
            }
            self.forget(place, &before);
        }
        if can_be_found(&digest) {
            let parts = &self.parts;
            let digest_of = |place: &u64| digest_in(parts, *place);
            let same = |place: &u64| digest_of(place) == digest;
            if let Entry::Vacant(slot) = self.table.entry(hash(&digest), same, |place| hash(&digest_of(place))) {
                slot.insert(place);
            }
        }
    }

    /// Takes a place out of the table, if it is the one that the table knows for this content.
    fn forget(&mut self, place: u64, digest: &BlockDigest) {
        if can_be_found(digest)
            && let Ok(entry) = self.table.find_entry(hash(digest), |known| *known == place)
        {
            entry.remove();
        }
    }

    /// Writes all of a disk's changes into the index.
    ///
    /// # Errors
    /// As [`BlockIndex::set_run`]; some may be in the index then.
    pub fn apply<S: DigestStore>(&self, disk: u16, index: &mut BlockIndex<S>) -> Result<(), IndexError> {
        let of_disk = (Bound::Included((disk, 0)), Bound::Included((disk, u32::MAX)));
        let end = index.blocks(disk).ok_or(IndexError::NoDisk { disk })?;
        for ((_, number), part) in self.parts.range(of_disk) {
            let first = BlockRef { disk, block: u64::from(*number) * PART_BLOCKS as u64 };
            if let Some(digest) = part.whole {
                let count = end.saturating_sub(first.block).min(PART_BLOCKS as u64);
                fill_whole(index, first, digest, count)?;
            }
            for (offset, digests) in runs(&part.blocks) {
                let at = BlockRef { block: first.block + u64::from(offset), ..first };
                index.set_run(at, &digests)?;
            }
        }
        Ok(())
    }
}

fn fill_whole<S: DigestStore>(
    index: &mut BlockIndex<S>,
    from: BlockRef,
    digest: BlockDigest,
    count: u64,
) -> Result<(), IndexError> {
    if digest == BlockDigest::ZERO { index.zero(from, count) } else { index.clear(from, count) }
}

/// Neighbours together.
fn runs(blocks: &BTreeMap<u16, BlockDigest>) -> Vec<(u16, Vec<BlockDigest>)> {
    let mut runs: Vec<(u16, Vec<BlockDigest>)> = vec![];
    for (offset, digest) in blocks {
        match runs.last_mut() {
            Some((first, run)) if usize::from(*first) + run.len() == usize::from(*offset) => run.push(*digest),
            _ => runs.push((*offset, vec![*digest])),
        }
    }
    runs
}

/// An index with changes, or without.
#[derive(Debug)]
pub struct Changed<'a, S> {
    /// What there was before.
    pub index: &'a BlockIndex<S>,
    /// What has changed since.
    pub changes: Option<&'a Changes>,
}

impl<S: DigestStore> Changed<'_, S> {
    /// As [`BlockIndex::get`].
    pub fn get(&self, at: BlockRef) -> Option<BlockDigest> {
        match self.changes.and_then(|changes| changes.get(at)) {
            Some(digest) => Some(digest).filter(|digest| *digest != BlockDigest::UNKNOWN),
            None => self.index.get(at),
        }
    }
}

impl<S: DigestStore> BlockLookup for Changed<'_, S> {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        let Some(changes) = self.changes else { return self.index.find(digest) };
        let newer = changes.table.find(hash(digest), |place| digest_in(&changes.parts, *place) == *digest);
        match newer {
            Some(place) => Some(unpack(*place)),
            None => self.index.find(digest).filter(|at| changes.get(*at).is_none()),
        }
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        self.get(at).is_some_and(|known| known == *digest)
    }
}

fn can_be_found(digest: &BlockDigest) -> bool {
    *digest != BlockDigest::UNKNOWN && *digest != BlockDigest::ZERO
}

fn digest_in(parts: &BTreeMap<(u16, u32), Part>, place: u64) -> BlockDigest {
    let at = unpack(place);
    let (part, offset) = split(at.block);
    parts.get(&(at.disk, part)).and_then(|part| part.get(offset)).unwrap_or(BlockDigest::UNKNOWN)
}

fn pack(at: BlockRef) -> u64 {
    u64::from(at.disk) << BLOCK_BITS | at.block
}

fn unpack(place: u64) -> BlockRef {
    BlockRef { disk: (place >> BLOCK_BITS) as u16, block: place & ((1 << BLOCK_BITS) - 1) }
}

/// The first half of a digest, which is evenly spread.
fn hash(digest: &BlockDigest) -> u64 {
    digest.0.first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 2500;

    #[derive(Clone, Debug)]
    enum Change {
        Set(u16, u64, Vec<u8>),
        Fill(u16, u64, u64, bool),
    }

    fn change() -> impl Strategy<Value = Change> {
        let disk = 0..2_u16;
        prop_oneof![
            4 => (disk.clone(), 0..BLOCKS - 8, vec(0..20_u8, 1..8)).prop_map(|(disk, at, run)| Change::Set(disk, at, run)),
            1 => (disk, 0..BLOCKS, 0..BLOCKS, any::<bool>())
                .prop_map(|(disk, from, count, zero)| Change::Fill(disk, from, count.min(BLOCKS - from), zero)),
        ]
    }

    fn digest(seed: u8) -> BlockDigest {
        if seed == 0 { BlockDigest::UNKNOWN } else { BlockDigest([seed; 16]) }
    }

    fn digests(run: &[u8]) -> Vec<BlockDigest> {
        run.iter().map(|seed| digest(*seed)).collect()
    }

    fn to_index(index: &mut BlockIndex, change: &Change) {
        match change {
            Change::Set(disk, block, run) => {
                index.set_run(BlockRef { disk: *disk, block: *block }, &digests(run)).unwrap();
            }
            Change::Fill(disk, block, count, true) => {
                index.zero(BlockRef { disk: *disk, block: *block }, *count).unwrap();
            }
            Change::Fill(disk, block, count, false) => {
                index.clear(BlockRef { disk: *disk, block: *block }, *count).unwrap();
            }
        }
    }

    fn to_changes(changes: &mut Changes, change: &Change) {
        match change {
            Change::Set(disk, block, run) => {
                changes.set_run(BlockRef { disk: *disk, block: *block }, &digests(run));
            }
            Change::Fill(disk, block, count, zero) => {
                let digest = if *zero { BlockDigest::ZERO } else { BlockDigest::UNKNOWN };
                changes.fill(BlockRef { disk: *disk, block: *block }, *count, digest);
            }
        }
    }

    fn index() -> BlockIndex {
        let mut index = BlockIndex::new();
        (0..2).for_each(|disk| index.add_disk(disk, BLOCKS).unwrap());
        index
    }

    fn all() -> impl Iterator<Item = BlockRef> {
        (0..2).flat_map(|disk| (0..BLOCKS).map(move |block| BlockRef { disk, block }))
    }

    proptest! {
        #[test]
        fn changes_beside_an_index_look_like_changes_of_it_and_come_to_the_same_once_applied(
            before in vec(change(), 0..20), after in vec(change(), 0..40),
        ) {
            let (mut base, mut model) = (index(), index());
            before.iter().for_each(|change| to_index(&mut base, change));
            before.iter().chain(&after).for_each(|change| to_index(&mut model, change));
            let held: Vec<_> = all().map(|at| base.get(at)).collect();
            let mut changes = Changes::default();
            after.iter().for_each(|change| to_changes(&mut changes, change));

            let seen = Changed { index: &base, changes: Some(&changes) };
            for at in all() {
                prop_assert_eq!(seen.get(at), model.get(at));
            }
            for seed in 1..20 {
                if let Some(found) = seen.find(&digest(seed)) {
                    prop_assert_eq!(model.get(found), Some(digest(seed)));
                }
            }
            prop_assert!(all().map(|at| base.get(at)).eq(held), "the index is left as it was");
            for disk in 0..2 {
                changes.apply(disk, &mut base).unwrap();
            }
            prop_assert!(all().all(|at| base.get(at) == model.get(at)));
        }
    }

    #[test]
    fn what_was_changed_is_found_where_it_is_and_no_more_where_it_was() {
        let mut base = index();
        base.set(BlockRef { disk: 0, block: 5 }, digest(1)).unwrap();
        let mut changes = Changes::default();
        changes.set_run(BlockRef { disk: 1, block: 2000 }, &[digest(2)]);
        changes.fill(BlockRef { disk: 0, block: 5 }, 1, BlockDigest::UNKNOWN);
        let seen = Changed { index: &base, changes: Some(&changes) };
        assert_eq!(seen.find(&digest(1)), None);
        assert_eq!(seen.find(&digest(2)), Some(BlockRef { disk: 1, block: 2000 }));
        assert!(changes.touch(0) && changes.touch(1) && !changes.touch(2));
    }

    #[test]
    fn zeros_over_a_large_disk_cost_little() {
        let mut changes = Changes::default();
        changes.fill(BlockRef { disk: 0, block: 0 }, 1 << 28, BlockDigest::ZERO);
        assert_eq!(changes.parts.len(), 1 << 18);
        assert_eq!(changes.get(BlockRef { disk: 0, block: 12_345_678 }), Some(BlockDigest::ZERO));
    }
}
