//! Where the digests of one disk lie: by parts, so that what is all zero or unknown takes no room.
//!
//! [`DigestStore`] is all that the index knows of it; [`HeapDigests`] keeps them in memory.

use crate::page::BlockDigest;

/// Blocks whose digests are kept together.
pub const PART_BLOCKS: usize = 1024;

impl BlockDigest {
    /// Stands for a block of which nothing is known; no block has this digest.
    pub const UNKNOWN: Self = Self([0; Self::LENGTH]);
}

/// What is known of a part as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartKind {
    /// Nothing.
    Unknown,
    /// All its blocks are zeros.
    Zero,
    /// A digest of each block, or [`BlockDigest::UNKNOWN`].
    Digests,
}

/// A store that cannot keep what it was given; it has said why to whoever made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreFailed;

/// Keeps the digests of one disk. After [`StoreFailed`] what it holds is not to be used any more.
pub trait DigestStore {
    /// What is known of a part; nothing of one past the end.
    fn kind(&self, part: u32) -> PartKind;

    /// What was last written of a block in a part of digests; [`BlockDigest::UNKNOWN`] anywhere else.
    fn digest(&self, block: u64) -> BlockDigest;

    /// Makes a part one of digests, all of them `content`.
    ///
    /// # Errors
    /// [`StoreFailed`].
    fn begin_part(&mut self, part: u32, content: BlockDigest) -> Result<(), StoreFailed>;

    /// Makes parts something without digests.
    ///
    /// # Errors
    /// [`StoreFailed`].
    fn end_parts(&mut self, parts: std::ops::Range<u32>, kind: PartKind) -> Result<(), StoreFailed>;

    /// Writes the digests of blocks that follow each other within one part of digests.
    ///
    /// # Errors
    /// [`StoreFailed`].
    fn write(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), StoreFailed>;

    /// Bytes of memory that it takes.
    fn memory_bytes(&self) -> usize;
}

#[derive(Debug, Default)]
enum Part {
    #[default]
    Unknown,
    Zero,
    Digests(Box<[BlockDigest; PART_BLOCKS]>),
}

/// Digests in memory.
#[derive(Debug)]
pub struct HeapDigests {
    parts: Vec<Part>,
}

impl HeapDigests {
    /// Those of a disk of which nothing is known.
    pub fn new(blocks: u64) -> Self {
        let mut parts = Vec::new();
        parts.resize_with(blocks.div_ceil(PART_BLOCKS as u64) as usize, Part::default);
        Self { parts }
    }
}

impl DigestStore for HeapDigests {
    fn kind(&self, part: u32) -> PartKind {
        match self.parts.get(part as usize) {
            None | Some(Part::Unknown) => PartKind::Unknown,
            Some(Part::Zero) => PartKind::Zero,
            Some(Part::Digests(_)) => PartKind::Digests,
        }
    }

    fn digest(&self, block: u64) -> BlockDigest {
        let (part, offset) = split(block);
        match self.parts.get(part as usize) {
            Some(Part::Digests(digests)) => digests[offset],
            _ => BlockDigest::UNKNOWN,
        }
    }

    fn begin_part(&mut self, part: u32, content: BlockDigest) -> Result<(), StoreFailed> {
        *self.parts.get_mut(part as usize).ok_or(StoreFailed)? = Part::Digests(Box::new([content; PART_BLOCKS]));
        Ok(())
    }

    fn end_parts(&mut self, parts: std::ops::Range<u32>, kind: PartKind) -> Result<(), StoreFailed> {
        for part in self.parts.get_mut(parts.start as usize..parts.end as usize).ok_or(StoreFailed)? {
            *part = if kind == PartKind::Zero { Part::Zero } else { Part::Unknown };
        }
        Ok(())
    }

    fn write(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), StoreFailed> {
        let (part, offset) = split(first_block);
        let Some(Part::Digests(held)) = self.parts.get_mut(part as usize) else { return Err(StoreFailed) };
        held.get_mut(offset..offset + digests.len()).ok_or(StoreFailed)?.copy_from_slice(digests);
        Ok(())
    }

    fn memory_bytes(&self) -> usize {
        let boxed = self.parts.iter().filter(|part| matches!(part, Part::Digests(_))).count();
        boxed * size_of::<[BlockDigest; PART_BLOCKS]>() + self.parts.capacity() * size_of::<Part>()
    }
}

/// The part of a block, and its place there.
pub(super) fn split(block: u64) -> (u32, usize) {
    ((block / PART_BLOCKS as u64) as u32, (block % PART_BLOCKS as u64) as usize)
}
