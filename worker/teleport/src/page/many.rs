//! Several pages hashed side by side.
//!
//! BLAKE3 works on as many chunks of 1 KiB at a time as the CPU has lanes, up to 16; a page has four. So the first chunks of all pages are
//! compressed together, then the second ones, and so on, then the nodes of their trees (BLAKE3's paper, sections 2.1 to 2.4 and 5.3):
//!
//! ```text
//!        root          flags PARENT | ROOT
//!      ┌───┴───┐
//!     node    node     flags PARENT
//!    ┌─┴─┐   ┌─┴─┐
//!    0   1   2   3     counter 0 to 3, CHUNK_START on the first of 16 blocks, CHUNK_END on the last
//! ```
//! The crate's own building block serves, which is public for its benchmarks only; so its version is pinned, and tests compare with its front door.

use arrayvec::ArrayVec;
use blake3::IncrementCounter;
use blake3::platform::Platform;

use super::{PAGE_SIZE, Page, PageHash};

/// Pages at a time.
pub(super) const LANES: usize = 16;

const HASH: usize = 32;
const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE_SIZE / CHUNK;
const NODE: usize = 2 * HASH;
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// The pages' hashes, in their order.
pub(super) fn hash(pages: &ArrayVec<&Page, LANES>) -> ArrayVec<PageHash, LANES> {
    let platform = Platform::detect();
    let count = pages.len();
    // Per page its four chunks' hashes, one behind the other: the contents of its two lower nodes.
    let mut leaves = [[0; CHUNKS * HASH]; LANES];
    let mut hashes = [[0; HASH]; LANES];
    for chunk in 0..CHUNKS {
        let inputs: ArrayVec<&[u8; CHUNK], LANES> = pages.iter().map(|page| &page.as_chunks().0[chunk]).collect();
        let out = hashes[..count].as_flattened_mut();
        platform.hash_many(&inputs, &IV, chunk as u64, IncrementCounter::No, 0, CHUNK_START, CHUNK_END, out);
        for (leaves, hash) in leaves.iter_mut().zip(&hashes) {
            leaves[chunk * HASH..][..HASH].copy_from_slice(hash);
        }
    }
    let mut nodes = [[0; NODE]; LANES];
    let inputs: ArrayVec<&[u8; NODE], { 2 * LANES }> = leaves[..count].as_flattened().as_chunks().0.iter().collect();
    let out = nodes[..count].as_flattened_mut();
    platform.hash_many(&inputs, &IV, 0, IncrementCounter::No, PARENT, 0, 0, out);
    let inputs: ArrayVec<&[u8; NODE], LANES> = nodes[..count].iter().collect();
    let out = hashes[..count].as_flattened_mut();
    platform.hash_many(&inputs, &IV, 0, IncrementCounter::No, PARENT | ROOT, 0, 0, out);
    hashes[..count].iter().map(|hash| PageHash(*hash)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hashed_together_have_the_hashes_that_each_has_alone() {
        let mut pages = vec![[0; PAGE_SIZE]; LANES];
        let mut word = 1u64;
        for byte in pages.as_flattened_mut() {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (word >> 56) as u8;
        }
        pages[2] = [0; PAGE_SIZE];
        let alone: Vec<_> = pages.iter().map(PageHash::of).collect();
        for count in 0..=LANES {
            let together = hash(&pages.iter().take(count).collect());
            assert_eq!(together[..], alone[..count], "{count} pages");
        }
    }
}
