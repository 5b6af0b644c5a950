//! What is compared at a time, and which blocks of it differ: pure.

use std::ops::Range;

use pageport_teleport::{BlockDigest, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::replica::store::BLOCK_BYTES;

/// Bytes of a disk that are compared at a time: read whole into memory at the source.
pub const PIECE_BYTES: u64 = 32 << 20;

/// Where a scrub is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The disk; empty: the first.
    pub disk: String,
    /// What lies in front of it is compared, in bytes.
    pub offset: u64,
}

/// The disks of a VM at one moment: name and size in bytes, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disks(pub Vec<(String, u64)>);

/// A part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The disk's number.
    pub number: u16,
    /// Its name.
    pub disk: String,
    /// Where it begins, in bytes; at a block.
    pub offset: u64,
    /// Bytes; ends at a block, or with the disk.
    pub length: u64,
}

impl Disks {
    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    /// In all.
    pub fn total_bytes(&self) -> u64 {
        self.0.iter().map(|(_, size)| size).sum()
    }

    /// What is compared next; [`None`]: nothing is left. A disk that is not here any more is begun anew from the first.
    pub fn piece_at(&self, place: &Place) -> Option<Piece> {
        let at = self.0.iter().position(|(name, _)| *name == place.disk);
        let (first, offset) = at.map_or((0, 0), |at| (at, place.offset));
        let mut rest = (0u16..).zip(&self.0).skip(first).zip(std::iter::once(offset).chain(std::iter::repeat(0)));
        let ((number, (disk, size)), offset) = rest.find(|((_, (_, size)), offset)| offset < size)?;
        // A disk that ended inside a block may have grown since.
        let offset = offset - offset % BLOCK_BYTES;
        Some(Piece { number, disk: disk.clone(), offset, length: (size - offset).min(PIECE_BYTES) })
    }

    /// Where the next piece is looked for; [`None`]: that was the last.
    pub fn after(&self, piece: &Piece) -> Option<Place> {
        let place = Place { disk: piece.disk.clone(), offset: piece.offset + piece.length };
        self.piece_at(&place).map(|_| place)
    }
}

impl Piece {
    /// Its first block.
    pub fn first_block(&self) -> u64 {
        self.offset / BLOCK_BYTES
    }
}

/// What of a piece was written since the newest point: blocks, in runs that follow each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written(Vec<Range<u64>>);

impl Written {
    /// The blocks that a range of bytes touches; later ranges are noted later.
    pub fn note(&mut self, start: u64, end: u64) {
        let (start, end) = (start / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        match self.0.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => self.0.push(start..end),
        }
    }

    fn has(&self, block: u64) -> bool {
        let after = self.0.partition_point(|run| run.end <= block);
        self.0.get(after).is_some_and(|run| run.contains(&block))
    }

    /// How much of the piece that is, in bytes.
    pub fn bytes(&self, piece: &Piece) -> u64 {
        let end = piece.offset + piece.length;
        self.0.iter().map(|run| (run.end * BLOCK_BYTES).min(end) - run.start * BLOCK_BYTES).sum()
    }
}

/// Digest of each block; a last one that is cut counts as if zeros followed.
pub fn digests(content: &[u8]) -> Vec<BlockDigest> {
    let (blocks, cut) = content.as_chunks::<PAGE_SIZE>();
    let mut digests = BlockDigest::of_each(blocks);
    if !cut.is_empty() {
        let mut padded = [0; PAGE_SIZE];
        padded[..cut.len()].copy_from_slice(cut);
        digests.push(BlockDigest::of(&padded));
    }
    digests
}

/// One digest of many.
pub fn digest_of(digests: &[BlockDigest]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for digest in digests {
        hasher.update(&digest.0);
    }
    *hasher.finalize().as_bytes()
}

/// Runs of blocks that differ, though they were not written.
pub fn differing(first_block: u64, ours: &[BlockDigest], theirs: &[BlockDigest], written: &Written) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = vec![];
    let pairs = (first_block..).zip(ours.iter().zip(theirs));
    for (block, _) in pairs.filter(|(block, (ours, theirs))| ours != theirs && !written.has(*block)) {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(sizes: &[(&str, u64)]) -> Disks {
        Disks(sizes.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect())
    }

    fn walk(disks: &Disks) -> Vec<(String, u64, u64)> {
        let (mut pieces, mut place) = (vec![], Some(Place::default()));
        while let Some(piece) = place.as_ref().and_then(|place| disks.piece_at(place)) {
            place = disks.after(&piece);
            pieces.push((piece.disk, piece.offset, piece.length));
        }
        pieces
    }

    #[test]
    fn pieces_cover_every_disk_once() {
        let some = disks(&[("data", 5000), ("empty", 0), ("root", 2 * PIECE_BYTES + 512), ("swap", PIECE_BYTES)]);
        let piece = |disk: &str, offset, length| (disk.to_owned(), offset, length);
        assert_eq!(
            walk(&some),
            [
                piece("data", 0, 5000),
                piece("root", 0, PIECE_BYTES),
                piece("root", PIECE_BYTES, PIECE_BYTES),
                piece("root", 2 * PIECE_BYTES, 512),
                piece("swap", 0, PIECE_BYTES),
            ]
        );
        assert_eq!(some.total_bytes(), walk(&some).iter().map(|(_, _, length)| length).sum::<u64>());
        assert!(walk(&disks(&[])).is_empty());
    }

    #[test]
    fn a_scrub_goes_on_where_it_was_when_disks_have_grown_and_begins_anew_when_its_disk_is_gone() {
        let grown = disks(&[("data", 2 * PIECE_BYTES), ("root", 4096)]);
        let place = |disk: &str, offset| Place { disk: disk.to_owned(), offset };
        let piece = grown.piece_at(&place("data", 5000)).unwrap();
        assert_eq!((piece.disk.as_str(), piece.offset), ("data", 4096));
        assert_eq!(grown.piece_at(&place("data", 2 * PIECE_BYTES)).unwrap().disk, "root");
        assert_eq!(grown.piece_at(&place("root", 4096)), None);
        assert_eq!(grown.piece_at(&place("gone", 4096)).unwrap().disk, "data");
    }

    #[test]
    fn blocks_that_differ_are_found_in_runs_and_a_cut_block_is_compared_as_if_zeros_followed() {
        let mut content = vec![7; 5 * PAGE_SIZE + 100];
        content[2 * PAGE_SIZE..3 * PAGE_SIZE].fill(0);
        let ours = digests(&content);
        assert_eq!((ours.len(), ours[2]), (6, BlockDigest::ZERO));
        let mut padded = content.clone();
        padded.resize(6 * PAGE_SIZE, 0);
        assert_eq!(digests(&padded), ours);
        let differing = |theirs: &[_], written: &Written| differing(100, &ours, theirs, written);
        assert_eq!(differing(&ours, &Written::default()), []);
        for at in [PAGE_SIZE + 1, 2 * PAGE_SIZE, 5 * PAGE_SIZE + 99] {
            content[at] ^= 1;
        }
        let theirs = digests(&content);
        assert_eq!(differing(&theirs, &Written::default()), [101..103, 105..106]);
        assert_ne!(digest_of(&ours), digest_of(&theirs));
        let mut written = Written::default();
        written.note(101 * BLOCK_BYTES + 1, 102 * BLOCK_BYTES - 1);
        written.note(104 * BLOCK_BYTES, 105 * BLOCK_BYTES);
        written.note(105 * BLOCK_BYTES, 105 * BLOCK_BYTES + 100);
        assert_eq!(differing(&theirs, &written).first(), Some(&(102..103)));
        assert_eq!(differing(&theirs, &written).len(), 1);
        let (number, disk, offset) = (0, "root".to_owned(), 100 * BLOCK_BYTES);
        let piece = Piece { number, disk, offset, length: content.len() as u64 };
        assert_eq!(written.bytes(&piece), 2 * BLOCK_BYTES + 100);
    }
}
