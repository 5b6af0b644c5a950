//! The block index of a VM's replicas.
//!
//! ```text
//! disk ─▶ part of 1024 blocks: unknown │ zero │ digests of 16 bytes, in the disk's store     by place
//! digest ─▶ hash table of u32: slab * 1024 + offset; slab ─▶ part                             by content
//! ```
//! Costs less than 24 bytes a block when all blocks differ, the store's own included; parts that are all zero or unknown cost nothing.
//! Guarantees: what [`find`](BlockLookup::find) gives holds that digest now. When content lies
//! in several places the table knows one of them; once that one is overwritten the others are found no more. Zero blocks
//! are known by place and never found by content. Does not lock: share it behind a lock of your own.

mod disks;
mod error;
#[cfg(test)]
mod tests;

use self::disks::{Disk, Disks, Part, Slab};
pub use self::error::IndexError;
use super::digests::{DigestStore, HeapDigests, PART_BLOCKS, PartKind, StoreFailed, split};
use super::table::Table;
use super::{BlockLookup, BlockRef};
use crate::page::BlockDigest;

/// Most parts that positions of 32 bits can address: 16 TiB of blocks.
const SLABS_MAX: usize = 1 << 22;
/// Most blocks of all disks together.
const BLOCKS_MAX: u64 = (SLABS_MAX * PART_BLOCKS) as u64;

/// The index over all disks of one VM at one destination.
#[derive(Debug)]
pub struct BlockIndex<S = HeapDigests> {
    disks: Disks<S>,
    free: Vec<u32>,
    table: Table,
}

impl<S> Default for BlockIndex<S> {
    fn default() -> Self {
        Self { disks: Disks { all: vec![], slabs: vec![] }, free: vec![], table: Table::default() }
    }
}

impl BlockIndex {
    /// An index without disks, in memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk of which nothing is known yet, or forgets all of a disk that there was, whatever its size.
    pub fn add_disk(&mut self, disk: u16, blocks: u64) -> Result<(), IndexError> {
        self.check_total(disk, blocks)?;
        self.add_disk_in(disk, blocks, HeapDigests::new(blocks))
    }
}

impl<S: DigestStore> BlockIndex<S> {
    /// Adds a disk with what its store knows already, in place of a disk that there was.
    pub fn add_disk_in(&mut self, disk: u16, blocks: u64, store: S) -> Result<(), IndexError> {
        let total = self.check_total(disk, blocks)?;
        self.remove_disk(disk);
        let place = usize::from(disk);
        if self.disks.all.len() <= place {
            self.disks.all.resize_with(place + 1, || None);
        }
        let part_count = blocks.div_ceil(PART_BLOCKS as u64) as u32;
        let parts = vec![Part::Unknown; part_count as usize];
        let kinds: Vec<_> = (0..part_count).map(|part| store.kind(part)).collect();
        self.disks.all[place] = Some(Disk { blocks, parts, store });
        let disks = &self.disks;
        self.table.resize(total, |known| disks.digest_at(known));
        for (part, kind) in (0..).zip(kinds) {
            match kind {
                PartKind::Unknown => {}
                PartKind::Zero => self.disks.set_part(disk, part, Part::Zero),
                PartKind::Digests => {
                    let slab = self.new_slab(disk, part)?;
                    (0..PART_BLOCKS).for_each(|offset| self.enter(position(slab, offset)));
                }
            }
        }
        Ok(())
    }

    /// Forgets a disk and gives its store back.
    pub fn remove_disk(&mut self, disk: u16) -> Option<S> {
        let parts = self.disks.disk(disk)?.parts.len() as u32;
        (0..parts).for_each(|part| self.drop_slab(disk, part));
        Some(self.disks.all.get_mut(usize::from(disk))?.take()?.store)
    }

    fn check_total(&self, disk: u16, blocks: u64) -> Result<u64, IndexError> {
        let disks = self.disks.all.iter().enumerate().filter(|(place, _)| *place != usize::from(disk));
        let others: u64 = disks.filter_map(|(_, other)| other.as_ref()).map(|other| other.blocks).sum();
        let total = others.saturating_add(blocks);
        if total > BLOCKS_MAX { Err(IndexError::TooLarge { disk, blocks }) } else { Ok(total) }
    }

    /// The size of a disk, if it was added.
    pub fn blocks(&self, disk: u16) -> Option<u64> {
        self.disks.disk(disk).map(|disk| disk.blocks)
    }

    /// Where a disk's digests lie: for what the store has besides. Digests are changed only through the index.
    pub fn store_mut(&mut self, disk: u16) -> Option<&mut S> {
        self.disks.disk_mut(disk).map(|disk| &mut disk.store)
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
        let disks = self.disks.all.iter().flatten();
        let parts: usize =
            disks.map(|disk| disk.parts.capacity() * size_of::<Part>() + disk.store.memory_bytes()).sum();
        parts + self.disks.slabs.capacity() * size_of::<Option<Slab>>() + self.table.memory_bytes()
    }

    /// What is known of a block: nothing, or its digest, which is [`BlockDigest::ZERO`] for zeros.
    pub fn get(&self, at: BlockRef) -> Option<BlockDigest> {
        let (part, _) = split(at.block);
        let disk = self.disks.disk(at.disk).filter(|disk| at.block < disk.blocks)?;
        match disk.parts.get(part as usize)? {
            Part::Unknown => None,
            Part::Zero => Some(BlockDigest::ZERO),
            Part::Slab(_) => Some(disk.store.digest(at.block)).filter(|digest| *digest != BlockDigest::UNKNOWN),
        }
    }

    /// The block now has this content.
    pub fn set(&mut self, at: BlockRef, digest: BlockDigest) -> Result<(), IndexError> {
        self.set_run(at, &[digest])
    }

    /// Blocks that follow each other now have this content.
    pub fn set_run(&mut self, from: BlockRef, digests: &[BlockDigest]) -> Result<(), IndexError> {
        self.check(from, digests.len() as u64)?;
        let (mut at, mut rest) = (from, digests);
        while !rest.is_empty() {
            let (_, offset) = split(at.block);
            let (run, after) = rest.split_at(rest.len().min(PART_BLOCKS - offset));
            self.put(at, run)?;
            at.block += run.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Nothing is known of these blocks any more.
    pub fn clear(&mut self, from: BlockRef, count: u64) -> Result<(), IndexError> {
        self.fill(from, count, BlockDigest::UNKNOWN, PartKind::Unknown)
    }

    /// These blocks are zeros now.
    pub fn zero(&mut self, from: BlockRef, count: u64) -> Result<(), IndexError> {
        self.fill(from, count, BlockDigest::ZERO, PartKind::Zero)
    }

    /// Parts as a whole in the middle, and digests at the edges.
    fn fill(&mut self, from: BlockRef, count: u64, digest: BlockDigest, whole: PartKind) -> Result<(), IndexError> {
        let blocks = self.check(from, count)?;
        let end = from.block + count;
        let part_blocks = PART_BLOCKS as u64;
        let first_part = from.block.div_ceil(part_blocks);
        let end_part = if end == blocks { end.div_ceil(part_blocks) } else { end / part_blocks };
        if first_part >= end_part {
            return self.fill_edge(from, count, digest, whole);
        }
        self.fill_edge(from, first_part * part_blocks - from.block, digest, whole)?;
        self.fill_parts(from.disk, first_part as u32..end_part as u32, whole)?;
        let tail = end_part * part_blocks;
        self.fill_edge(BlockRef { block: tail, ..from }, end.saturating_sub(tail), digest, whole)
    }

    fn fill_parts(&mut self, disk: u16, parts: std::ops::Range<u32>, whole: PartKind) -> Result<(), IndexError> {
        let to = if whole == PartKind::Zero { Part::Zero } else { Part::Unknown };
        for part in parts.clone() {
            self.drop_slab(disk, part);
            self.disks.set_part(disk, part, to);
        }
        let store = self.store_mut(disk).ok_or(IndexError::NoDisk { disk })?;
        store.end_parts(parts, whole).map_err(|StoreFailed| IndexError::Store { disk })
    }

    fn fill_edge(
        &mut self,
        from: BlockRef,
        count: u64,
        digest: BlockDigest,
        whole: PartKind,
    ) -> Result<(), IndexError> {
        let (mut at, end) = (from, from.block + count);
        while at.block < end {
            let (part, offset) = split(at.block);
            let run = (end - at.block).min((PART_BLOCKS - offset) as u64);
            let same = match self.disks.part(at.disk, part) {
                Some(Part::Unknown) => whole == PartKind::Unknown,
                Some(Part::Zero) => whole == PartKind::Zero,
                _ => false,
            };
            if !same {
                self.put(at, &[digest; PART_BLOCKS][..run as usize])?;
            }
            at.block += run;
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

    /// Makes the table forget a part, if it has digests.
    fn drop_slab(&mut self, disk: u16, part: u32) {
        if let Some(Part::Slab(slab)) = self.disks.part(disk, part) {
            (0..PART_BLOCKS).for_each(|offset| self.forget(position(slab, offset)));
            self.disks.set_part(disk, part, Part::Unknown);
            self.disks.slabs[slab as usize] = None;
            self.free.push(slab);
        }
    }

    /// Writes the digests of blocks that are on the disk and in one part.
    fn put(&mut self, at: BlockRef, digests: &[BlockDigest]) -> Result<(), IndexError> {
        let (part, offset) = split(at.block);
        let slab = self.slab_of(at.disk, part)?;
        let places = offset..offset + digests.len();
        let changed: Vec<u32> = (places.map(|place| position(slab, place)).zip(digests))
            .filter(|(position, digest)| self.disks.digest_at(*position) != **digest)
            .map(|(position, _)| position)
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        changed.iter().for_each(|position| self.forget(*position));
        let store = self.store_mut(at.disk).ok_or(IndexError::NoDisk { disk: at.disk })?;
        store.write(at.block, digests).map_err(|StoreFailed| IndexError::Store { disk: at.disk })?;
        changed.iter().for_each(|position| self.enter(*position));
        Ok(())
    }

    /// The slab of a part, made if there is none.
    fn slab_of(&mut self, disk: u16, part: u32) -> Result<u32, IndexError> {
        let content = match self.disks.part(disk, part) {
            Some(Part::Slab(slab)) => return Ok(slab),
            Some(Part::Zero) => BlockDigest::ZERO,
            Some(Part::Unknown) => BlockDigest::UNKNOWN,
            None => return Err(IndexError::NoDisk { disk }),
        };
        let store = self.store_mut(disk).ok_or(IndexError::NoDisk { disk })?;
        store.begin_part(part, content).map_err(|StoreFailed| IndexError::Store { disk })?;
        self.new_slab(disk, part)
    }

    fn new_slab(&mut self, disk: u16, part: u32) -> Result<u32, IndexError> {
        let slabs = &mut self.disks.slabs;
        let number = match self.free.pop() {
            Some(number) => number,
            None if slabs.len() == SLABS_MAX => return Err(IndexError::Full),
            None => {
                slabs.push(None);
                slabs.len() as u32 - 1
            }
        };
        slabs[number as usize] = Some(Slab { disk, part });
        self.disks.set_part(disk, part, Part::Slab(number));
        Ok(number)
    }

    /// Enters a place into the table, unless another is known for its content.
    fn enter(&mut self, position: u32) {
        let (disks, digest) = (&self.disks, self.disks.digest_at(position));
        if digest != BlockDigest::UNKNOWN && digest != BlockDigest::ZERO {
            self.table.insert(&digest, position, |known| disks.digest_at(known));
        }
    }

    /// Takes a place out of the table, if it is the one that the table knows for its content.
    fn forget(&mut self, position: u32) {
        let digest = self.disks.digest_at(position);
        if digest != BlockDigest::UNKNOWN && digest != BlockDigest::ZERO {
            self.table.remove(&digest, position);
        }
    }
}

impl<S: DigestStore> BlockLookup for BlockIndex<S> {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        let position = self.table.find(digest, |known| self.disks.digest_at(known))?;
        self.disks.place(position)
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        self.get(at).is_some_and(|known| known == *digest)
    }
}

fn position(slab: u32, offset: usize) -> u32 {
    slab * PART_BLOCKS as u32 + offset as u32
}
