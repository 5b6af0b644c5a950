//! A set of blocks of one disk, one bit each.

use std::io;
use std::ops::Range;

use super::store::BLOCK_BYTES;

/// Blocks of one disk.
#[derive(Debug)]
pub(super) struct Blocks {
    size_bytes: u64,
    words: Vec<u64>,
}

impl Blocks {
    /// None yet, of a disk of this size in bytes.
    pub(super) fn new(size_bytes: u64) -> Self {
        Self { size_bytes, words: vec![0; size_bytes.div_ceil(BLOCK_BYTES).div_ceil(64) as usize] }
    }

    /// Notes the blocks of a range of bytes, the last of which may be cut by the end of the disk.
    ///
    /// # Errors
    /// The range begins or ends inside a block.
    pub(super) fn note(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        let whole = offset.is_multiple_of(BLOCK_BYTES) && (end.is_multiple_of(BLOCK_BYTES) || end == self.size_bytes);
        if !whole {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a part of a block, where whole ones are expected",
            ));
        }
        self.note_blocks(offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES));
        Ok(())
    }

    /// Notes blocks by their numbers; those beyond the end of the disk are left out.
    pub(super) fn note_blocks(&mut self, blocks: Range<u64>) {
        for block in blocks {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// Whether a block is noted.
    pub(super) fn noted(&self, block: u64) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// The parts of a range of bytes whose blocks are not noted: where each begins, and its length.
    pub(super) fn not_noted(&self, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let end = offset + length;
        let mut parts: Vec<(u64, u64)> = vec![];
        let mut at = offset;
        while at < end {
            let next = (at - at % BLOCK_BYTES + BLOCK_BYTES).min(end);
            if !self.noted(at / BLOCK_BYTES) {
                match parts.last_mut() {
                    Some((start, length)) if *start + *length == at => *length += next - at,
                    _ => parts.push((at, next - at)),
                }
            }
            at = next;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_are_noted_and_what_is_left_of_a_range_is_found() {
        let mut blocks = Blocks::new(99 * BLOCK_BYTES + 512);
        blocks.note(3 * BLOCK_BYTES, 2 * BLOCK_BYTES).unwrap();
        blocks.note(98 * BLOCK_BYTES, BLOCK_BYTES + 512).unwrap();
        for (offset, length) in [(1, BLOCK_BYTES), (0, 512), (98 * BLOCK_BYTES + 512, BLOCK_BYTES)] {
            assert_eq!(blocks.note(offset, length).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let noted: Vec<u64> = (0..100).filter(|block| blocks.noted(*block)).collect();
        assert_eq!(noted, [3, 4, 98, 99]);
        assert_eq!(
            blocks.not_noted(2 * BLOCK_BYTES + 100, 4 * BLOCK_BYTES),
            [(2 * BLOCK_BYTES + 100, BLOCK_BYTES - 100), (5 * BLOCK_BYTES, BLOCK_BYTES + 100)]
        );
        assert_eq!(blocks.not_noted(3 * BLOCK_BYTES, 2 * BLOCK_BYTES), []);
        assert_eq!(blocks.not_noted(80 * BLOCK_BYTES, 18 * BLOCK_BYTES), [(80 * BLOCK_BYTES, 18 * BLOCK_BYTES)]);
    }
}
