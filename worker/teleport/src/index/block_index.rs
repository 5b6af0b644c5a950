//! The block index of a VM's replicas, in memory.
//!
//! ```text
//! disk ─▶ part of 1024 blocks: unknown │ zero │ slab ─▶ 1024 digests of 16 bytes     by place
//! digest ─▶ hash table of u32: slab * 1024 + offset                                  by content
//! ```
//! Costs less than 24 bytes a block when all blocks differ; parts that are all zero or unknown cost nothing. Guarantees: what [`find`](BlockLookup::find) gives holds that digest now. When content lies
//! in several places the table knows one of them; once that one is overwritten the others are found no more. Zero blocks
//! are known by place and never found by content. Does not lock: share it behind a lock of your own.

use super::table::Table;
use super::{BlockLookup, BlockRef};
use crate::page::BlockDigest;

/// Blocks whose digests are kept together.
const PART_BLOCKS: usize = 1024;
/// What stands for a block of which nothing is known.
const UNKNOWN: BlockDigest = BlockDigest([0; BlockDigest::LENGTH]);
/// Most parts that positions of 32 bits can address: 16 TiB of blocks.
const SLABS_MAX: usize = 1 << 22;
/// Most blocks of all disks together.
const BLOCKS_MAX: u64 = (SLABS_MAX * PART_BLOCKS) as u64;

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
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Unknown,
    Zero,
    Slab(u32),
}

#[derive(Debug)]
struct Disk {
    blocks: u64,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Slab {
    disk: u16,
    part: u32,
    digests: Box<[BlockDigest; PART_BLOCKS]>,
}

/// The index over all disks of one VM at one destination.
#[derive(Debug, Default)]
pub struct BlockIndex {
    /// By number of the disk.
    disks: Vec<Option<Disk>>,
    slabs: Vec<Option<Slab>>,
    free: Vec<u32>,
    table: Table,
}

impl BlockIndex {
    /// An index without disks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk of which nothing is known yet, or forgets all of a disk that there was, whatever its size.
    pub fn add_disk(&mut self, disk: u16, blocks: u64) -> Result<(), IndexError> {
        let others: u64 = self
            .disks
            .iter()
            .enumerate()
            .filter(|(place, _)| *place != usize::from(disk))
            .filter_map(|(_, other)| other.as_ref())
            .map(|other| other.blocks)
            .sum();
        let total = others.saturating_add(blocks);
        if total > BLOCKS_MAX {
            return Err(IndexError::TooLarge { disk, blocks });
        }
        if let Some(old) = self.blocks(disk) {
            self.clear(BlockRef { disk, block: 0 }, old)?;
        }
        let place = usize::from(disk);
        if self.disks.len() <= place {
            self.disks.resize_with(place + 1, || None);
        }
        let parts = vec![Part::Unknown; blocks.div_ceil(PART_BLOCKS as u64) as usize];
        self.disks[place] = Some(Disk { blocks, parts });
        let slabs = &self.slabs;
        self.table.resize(total, |known| digest_in(slabs, known));
        Ok(())
    }

    /// The size of a disk, if it was added.
    pub fn blocks(&self, disk: u16) -> Option<u64> {
        self.disks.get(usize::from(disk))?.as_ref().map(|disk| disk.blocks)
    }

    /// Different contents that can be found.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the index takes.
    pub fn memory_bytes(&self) -> usize {
        let slabs = self.slabs.iter().flatten().count() * size_of::<[BlockDigest; PART_BLOCKS]>();
        let parts: usize = self.disks.iter().flatten().map(|disk| disk.parts.capacity() * size_of::<Part>()).sum();
        slabs + parts + self.slabs.capacity() * size_of::<Option<Slab>>() + self.table.memory_bytes()
    }

    /// What is known of a block: nothing, or its digest, which is [`BlockDigest::ZERO`] for zeros.
    pub fn get(&self, at: BlockRef) -> Option<BlockDigest> {
        let (part, offset) = split(at.block);
        let disk = self.disks.get(usize::from(at.disk))?.as_ref()?;
        match disk.parts.get(part)? {
            Part::Unknown => None,
            Part::Zero => (at.block < disk.blocks).then_some(BlockDigest::ZERO),
            Part::Slab(slab) => {
                let slab = self.slabs.get(*slab as usize)?.as_ref()?;
                Some(slab.digests[offset]).filter(|digest| *digest != UNKNOWN)
            }
        }
    }

    /// The block now has this content.
    pub fn set(&mut self, at: BlockRef, digest: BlockDigest) -> Result<(), IndexError> {
        self.check(at, 1)?;
        self.put(at, digest)
    }

    /// Nothing is known of these blocks any more.
    pub fn clear(&mut self, from: BlockRef, count: u64) -> Result<(), IndexError> {
        self.fill(from, count, UNKNOWN, Part::Unknown)
    }

    /// These blocks are zeros now.
    pub fn zero(&mut self, from: BlockRef, count: u64) -> Result<(), IndexError> {
        self.fill(from, count, BlockDigest::ZERO, Part::Zero)
    }

    fn fill(&mut self, from: BlockRef, count: u64, digest: BlockDigest, whole: Part) -> Result<(), IndexError> {
        let blocks = self.check(from, count)?;
        let end = from.block + count;
        let mut block = from.block;
        while block < end {
            let (part, offset) = split(block);
            let part_end = ((part as u64 + 1) * PART_BLOCKS as u64).min(blocks);
            if offset == 0 && end >= part_end {
                self.replace_part(from.disk, part, whole);
                block = part_end;
            } else {
                let stop = end.min(part_end);
                if self.part(from.disk, part) != Some(whole) {
                    for block in block..stop {
                        self.put(BlockRef { block, ..from }, digest)?;
                    }
                }
                block = stop;
            }
        }
        Ok(())
    }

    fn check(&self, from: BlockRef, count: u64) -> Result<u64, IndexError> {
        let BlockRef { disk, block } = from;
        let blocks = self.blocks(disk).ok_or(IndexError::NoDisk { disk })?;
        match block.checked_add(count) {
            Some(end) if end <= blocks => Ok(blocks),
            _ => Err(IndexError::BeyondEnd { disk, block: block.saturating_add(count.saturating_sub(1)), blocks }),
        }
    }

    fn part(&self, disk: u16, part: usize) -> Option<Part> {
        self.disks.get(usize::from(disk))?.as_ref()?.parts.get(part).copied()
    }

    fn set_part(&mut self, disk: u16, part: usize, to: Part) {
        if let Some(place) =
            self.disks.get_mut(usize::from(disk)).and_then(Option::as_mut).and_then(|disk| disk.parts.get_mut(part))
        {
            *place = to;
        }
    }

    /// Drops what is known of a whole part.
    fn replace_part(&mut self, disk: u16, part: usize, to: Part) {
        if let Some(Part::Slab(slab)) = self.part(disk, part) {
            for offset in 0..PART_BLOCKS {
                self.forget(position(slab, offset));
            }
            self.slabs[slab as usize] = None;
            self.free.push(slab);
        }
        self.set_part(disk, part, to);
    }

    /// Writes the digest of a block that is on the disk.
    fn put(&mut self, at: BlockRef, digest: BlockDigest) -> Result<(), IndexError> {
        let (part, offset) = split(at.block);
        let slab = self.slab_of(at.disk, part)?;
        let position = position(slab, offset);
        if self.digest_at(position) == digest {
            return Ok(());
        }
        self.forget(position);
        if let Some(slab) = &mut self.slabs[slab as usize] {
            slab.digests[offset] = digest;
        }
        if digest != UNKNOWN && digest != BlockDigest::ZERO {
            let slabs = &self.slabs;
            self.table.insert(&digest, position, |known| digest_in(slabs, known));
        }
        Ok(())
    }

    /// The slab of a part, made if there is none.
    fn slab_of(&mut self, disk: u16, part: usize) -> Result<u32, IndexError> {
        let content = match self.part(disk, part) {
            Some(Part::Slab(slab)) => return Ok(slab),
            Some(Part::Zero) => BlockDigest::ZERO,
            Some(Part::Unknown) => UNKNOWN,
            None => return Err(IndexError::NoDisk { disk }),
        };
        let slab = Slab { disk, part: part as u32, digests: Box::new([content; PART_BLOCKS]) };
        let number = match self.free.pop() {
            Some(number) => {
                self.slabs[number as usize] = Some(slab);
                number
            }
            None if self.slabs.len() == SLABS_MAX => return Err(IndexError::Full),
            None => {
                self.slabs.push(Some(slab));
                self.slabs.len() as u32 - 1
            }
        };
        self.set_part(disk, part, Part::Slab(number));
        Ok(number)
    }

    /// Takes a place out of the table, if it is the one that the table knows for its content.
    fn forget(&mut self, position: u32) {
        let digest = self.digest_at(position);
        if digest == UNKNOWN || digest == BlockDigest::ZERO {
            return;
        }
        self.table.remove(&digest, position);
    }

    fn digest_at(&self, position: u32) -> BlockDigest {
        digest_in(&self.slabs, position)
    }
}

impl BlockLookup for BlockIndex {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        let position = self.table.find(digest, |known| self.digest_at(known))?;
        let slab = self.slabs.get(position as usize / PART_BLOCKS)?.as_ref()?;
        let offset = position as usize % PART_BLOCKS;
        Some(BlockRef { disk: slab.disk, block: u64::from(slab.part) * PART_BLOCKS as u64 + offset as u64 })
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        self.get(at).is_some_and(|known| known == *digest)
    }
}

fn split(block: u64) -> (usize, usize) {
    ((block / PART_BLOCKS as u64) as usize, (block % PART_BLOCKS as u64) as usize)
}

fn position(slab: u32, offset: usize) -> u32 {
    slab * PART_BLOCKS as u32 + offset as u32
}

fn digest_in(slabs: &[Option<Slab>], position: u32) -> BlockDigest {
    match slabs.get(position as usize / PART_BLOCKS) {
        Some(Some(slab)) => slab.digests[position as usize % PART_BLOCKS],
        _ => UNKNOWN,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 2500;

    fn at(disk: u16, block: u64) -> BlockRef {
        BlockRef { disk, block }
    }

    fn digest(seed: u8) -> BlockDigest {
        BlockDigest([seed + 1; 16])
    }

    fn index() -> BlockIndex {
        let mut index = BlockIndex::new();
        index.add_disk(0, BLOCKS).unwrap();
        index.add_disk(7, 100).unwrap();
        index
    }

    #[test]
    fn content_in_two_places_is_never_found_where_it_no_longer_is() {
        let mut index = index();
        index.set(at(0, 5), digest(1)).unwrap();
        index.set(at(7, 9), digest(1)).unwrap();
        assert_eq!(index.find(&digest(1)), Some(at(0, 5)));
        index.set(at(0, 5), digest(2)).unwrap();
        assert_eq!(index.find(&digest(1)), None);
        assert!(index.holds(at(7, 9), &digest(1)));
        index.set(at(7, 9), digest(1)).unwrap();
        index.set(at(7, 10), digest(1)).unwrap();
        assert_eq!(index.find(&digest(1)), Some(at(7, 10)));
    }

    #[test]
    fn zeros_are_known_by_place_only_and_cost_nothing_by_the_part() {
        let mut index = BlockIndex::new();
        index.add_disk(0, 1 << 20).unwrap();
        let empty = index.memory_bytes();
        index.zero(at(0, 0), 1 << 20).unwrap();
        assert_eq!(index.memory_bytes(), empty);
        assert_eq!(index.get(at(0, 12_345)), Some(BlockDigest::ZERO));
        assert_eq!(index.find(&BlockDigest::ZERO), None);
        index.set(at(0, 12_345), digest(0)).unwrap();
        assert_eq!(index.get(at(0, 12_344)), Some(BlockDigest::ZERO));
        index.clear(at(0, 12_300), 100).unwrap();
        assert_eq!((index.get(at(0, 12_345)), index.find(&digest(0))), (None, None));
        assert_eq!(index.get(at(0, 12_400)), Some(BlockDigest::ZERO));
    }

    #[test]
    fn places_that_do_not_exist_are_refused() {
        let mut index = index();
        let beyond = |disk, block, blocks| Err(IndexError::BeyondEnd { disk, block, blocks });
        assert_eq!(index.set(at(3, 0), digest(1)), Err(IndexError::NoDisk { disk: 3 }));
        assert_eq!(index.set(at(7, 100), digest(1)), beyond(7, 100, 100));
        assert_eq!(index.zero(at(7, 99), 2), beyond(7, 100, 100));
        assert_eq!(index.clear(at(0, u64::MAX), 2), beyond(0, u64::MAX, BLOCKS));
        assert_eq!(index.add_disk(1, u64::MAX), Err(IndexError::TooLarge { disk: 1, blocks: u64::MAX }));
        assert_eq!((index.get(at(7, 100)), index.get(at(9, 0)), index.get(at(0, u64::MAX))), (None, None, None));
    }

    #[test]
    fn a_disk_added_again_is_forgotten_and_its_memory_used_again() {
        let mut index = index();
        (0..BLOCKS).for_each(|block| index.set(at(0, block), digest((block % 200) as u8)).unwrap());
        let full = index.memory_bytes();
        for _ in 0..3 {
            index.add_disk(0, BLOCKS).unwrap();
            assert!(index.is_empty());
            (0..BLOCKS).for_each(|block| index.set(at(0, block), digest((block % 200) as u8)).unwrap());
            assert_eq!(index.memory_bytes(), full);
        }
    }

    #[test]
    fn a_block_costs_less_than_24_bytes_when_all_differ() {
        let mut index = BlockIndex::new();
        const MANY: u64 = 1 << 17;
        index.add_disk(0, MANY).unwrap();
        for block in 0..MANY {
            let hash = blake3::hash(&block.to_le_bytes());
            index.set(at(0, block), BlockDigest(*hash.as_bytes().first_chunk().unwrap())).unwrap();
        }
        assert_eq!(index.len(), MANY as usize);
        assert!(index.memory_bytes() < MANY as usize * 24, "{} bytes", index.memory_bytes());
    }

    #[test]
    fn a_disk_added_later_leaves_the_others_to_be_found() {
        let mut index = index();
        (0..200).for_each(|seed| index.set(at(0, u64::from(seed)), digest(seed)).unwrap());
        index.add_disk(1, 100_000).unwrap();
        assert!((0..200).all(|seed| index.find(&digest(seed)) == Some(at(0, u64::from(seed)))));
    }

    #[derive(Clone, Debug)]
    enum Change {
        Set(u64, u8),
        Clear(u64, u64),
        Zero(u64, u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            6 => (0..BLOCKS, 0..40_u8).prop_map(|(block, seed)| Change::Set(block, seed)),
            1 => (0..BLOCKS, 0..BLOCKS).prop_map(|(from, count)| Change::Clear(from, count.min(BLOCKS - from))),
            1 => (0..BLOCKS, 0..BLOCKS).prop_map(|(from, count)| Change::Zero(from, count.min(BLOCKS - from))),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_map_after_any_changes(changes in vec(change(), 0..200)) {
            let mut index = index();
            let mut model: HashMap<u64, BlockDigest> = HashMap::new();
            for change in changes {
                match change {
                    Change::Set(block, seed) => {
                        index.set(at(0, block), digest(seed)).unwrap();
                        model.insert(block, digest(seed));
                    }
                    Change::Clear(from, count) => {
                        index.clear(at(0, from), count).unwrap();
                        model.retain(|block, _| !(from..from + count).contains(block));
                    }
                    Change::Zero(from, count) => {
                        index.zero(at(0, from), count).unwrap();
                        model.extend((from..from + count).map(|block| (block, BlockDigest::ZERO)));
                    }
                }
            }
            for block in 0..BLOCKS {
                prop_assert_eq!(index.get(at(0, block)), model.get(&block).copied());
            }
            for seed in 0..40 {
                if let Some(found) = index.find(&digest(seed)) {
                    prop_assert_eq!(model.get(&found.block).copied(), Some(digest(seed)));
                }
            }
        }
    }
}
