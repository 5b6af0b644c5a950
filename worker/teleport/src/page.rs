//! Pages and their digests.
//!
//! One hash serves everything: the BLAKE3 of a 4 KiB page. Its first 16 bytes are the key of the block index, all 32 of
//! them enter the digest of the batch; each side hashes each page once. It is cryptographic because the same index lets
//! identical disk writes be dropped unsent, where nothing verifies later.

mod many;

use std::fmt;

use arrayvec::ArrayVec;

/// Bytes of a page of the guest and of a block of the disk.
pub const PAGE_SIZE: usize = 4096;

/// A page of the guest, or a block of a disk.
pub type Page = [u8; PAGE_SIZE];

/// A page of zeros.
pub const ZERO_PAGE: Page = [0; PAGE_SIZE];

/// The BLAKE3 of [`ZERO_PAGE`].
pub const ZERO_PAGE_HASH: PageHash = PageHash([
    0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82, 0xad, 0xcf, 0xc8, 0x98,
    0x54, 0xd0, 0x1b, 0xfe, 0x39, 0x72, 0xfd, 0xc4, 0x78, 0x5b, 0x41, 0xb2, 0xc7,
]);

/// The whole BLAKE3 of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHash(pub [u8; 32]);

impl PageHash {
    /// Hashes a page.
    pub fn of(page: &Page) -> Self {
        Self(*blake3::hash(page).as_bytes())
    }

    /// How many pages [`PageHash::of_each`] takes.
    pub const AT_ONCE: usize = many::LANES;

    /// Hashes the first [`PageHash::AT_ONCE`] pages, in less than half the time that it takes one by one.
    pub fn of_each(pages: &[Page]) -> ArrayVec<Self, { Self::AT_ONCE }> {
        many::hash(&pages.iter().take(Self::AT_ONCE).collect())
    }

    /// The part of it that the block index uses.
    pub fn digest(&self) -> BlockDigest {
        let mut short = [0; BlockDigest::LENGTH];
        short.copy_from_slice(&self.0[..BlockDigest::LENGTH]);
        BlockDigest(short)
    }
}

/// The first 16 bytes of the BLAKE3 of a 4 KiB block: what the block index keeps, and what workers compare.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockDigest(pub [u8; BlockDigest::LENGTH]);

impl BlockDigest {
    /// Bytes of a digest.
    pub const LENGTH: usize = 16;

    /// The digest of a block of zeros.
    pub const ZERO: Self =
        Self([0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82, 0xad]);

    /// Hashes a block.
    pub fn of(block: &Page) -> Self {
        PageHash::of(block).digest()
    }

    /// Hashes each block; fast where there are many, and where they are zeros.
    pub fn of_each(blocks: &[Page]) -> Vec<Self> {
        let mut digests = vec![Self::ZERO; blocks.len()];
        let mut others = digests.iter_mut().zip(blocks).filter(|(_, block)| !is_zero(block));
        loop {
            let (places, group): (ArrayVec<_, { many::LANES }>, ArrayVec<_, { many::LANES }>) =
                others.by_ref().take(many::LANES).unzip();
            for (place, hash) in places.into_iter().zip(many::hash(&group)) {
                *place = hash.digest();
            }
            if group.len() < many::LANES {
                break;
            }
        }
        drop(others);
        digests
    }
}

impl fmt::Debug for BlockDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whether a page is all zeros; gives up at the first part that is not.
pub fn is_zero(page: &Page) -> bool {
    const PART: usize = 128;
    let (parts, _) = page.as_chunks::<PART>();
    parts.iter().all(|part| part.iter().fold(0, |sum, byte| sum | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_the_hashes_they_claim_to_be() {
        assert_eq!(PageHash::of(&ZERO_PAGE), ZERO_PAGE_HASH);
        assert_eq!(BlockDigest::of(&ZERO_PAGE), BlockDigest::ZERO);
    }

    #[test]
    fn blocks_among_zeros_are_hashed_each_for_itself() {
        let mut blocks = vec![ZERO_PAGE; 50];
        for (at, block) in blocks.iter_mut().enumerate().filter(|(at, _)| at % 3 != 1) {
            block[at] = at as u8 + 1;
        }
        let alone: Vec<_> = blocks.iter().map(BlockDigest::of).collect();
        for count in [0, 1, 2, 24, 25, 50] {
            assert_eq!(BlockDigest::of_each(&blocks[..count]), alone[..count]);
        }
    }

    #[test]
    fn a_single_set_bit_anywhere_makes_a_page_not_zero() {
        assert!(is_zero(&ZERO_PAGE));
        for at in [0, 1, 127, 128, 2048, 4094, 4095] {
            let mut page = ZERO_PAGE;
            page[at] = 0x40;
            assert!(!is_zero(&page), "byte {at}");
        }
    }
}
