//! A few pages of a guest's memory, told into the classes in which a move would send them.
//!
//! Taken in clusters of neighbours, one at a random place of each of as many equal parts of the memory: neighbours are alike, and what is
//! literal is compressed with its neighbours, as a move does it. How much the clusters differ says how far the sample can be trusted
//! (stratified cluster sampling; Cochran, *Sampling Techniques*, 3rd ed., 1977, chapters 5 and 9).

use std::io;

use pageport_teleport::{BlockDigest, BlockLookup, LiteralSizer, PAGE_SIZE, Page, is_zero};
use rand::Rng;

use crate::hypervisor::GuestRam;
use crate::replica::view::ReplicaView;

/// Pages of a cluster: 64 KiB.
const CLUSTER_PAGES: usize = 16;
/// Most clusters: 32 MiB are looked at.
const MAX_CLUSTERS: u64 = 512;

/// What one cluster holds, in pages; and what its literal ones would take on the wire, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cluster {
    /// All of them.
    pub pages: u32,
    /// Of zeros.
    pub zero: u32,
    /// That the replica holds.
    pub teleported: u32,
    /// Others.
    pub literal: u32,
    /// Of these, on the wire.
    pub literal_wire_bytes: u32,
}

/// Looks at some of a guest's memory. Blocks for a part of a second.
///
/// # Errors
/// The memory cannot be read: the hypervisor has ended.
pub fn take(ram: &GuestRam, view: &ReplicaView, random: &mut impl Rng) -> io::Result<Vec<Cluster>> {
    let mut sizer = LiteralSizer::new()?;
    let mut pages = vec![[0; PAGE_SIZE]; CLUSTER_PAGES];
    let places = places(ram.pages(), random);
    let clusters = places.into_iter().map(|first| {
        ram.read(first, &mut pages)?;
        classify(&pages, &view.index(), &mut sizer)
    });
    clusters.collect()
}

/// Where clusters begin: one in each part.
fn places(pages: u64, random: &mut impl Rng) -> Vec<u64> {
    let cluster = CLUSTER_PAGES as u64;
    let parts = (pages / cluster).min(MAX_CLUSTERS);
    let begin = |part: u64| pages / cluster * part / parts * cluster;
    (0..parts).map(|part| random.random_range(begin(part)..=begin(part + 1) - cluster)).collect()
}

fn classify(pages: &[Page], index: &impl BlockLookup, sizer: &mut LiteralSizer) -> io::Result<Cluster> {
    let mut cluster = Cluster { pages: pages.len() as u32, ..Cluster::default() };
    let mut literals = Vec::with_capacity(pages.len() * PAGE_SIZE);
    for (page, digest) in pages.iter().zip(BlockDigest::of_each(pages)) {
        if is_zero(page) {
            cluster.zero += 1;
        } else if index.find(&digest).is_some() {
            cluster.teleported += 1;
        } else {
            cluster.literal += 1;
            literals.extend_from_slice(page);
        }
    }
    cluster.literal_wire_bytes = sizer.wire_bytes(&literals)? as u32;
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use pageport_teleport::index::HeapDigests;
    use pageport_teleport::{BlockIndex, BlockRef};
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn each_page_is_of_the_class_in_which_a_move_would_send_it() {
        let mut index = BlockIndex::<HeapDigests>::new();
        let held = [5; PAGE_SIZE];
        index.add_disk(0, 10).unwrap();
        index.set(BlockRef { disk: 0, block: 9 }, BlockDigest::of(&held)).unwrap();
        let mut noise = [0; PAGE_SIZE];
        rand::Rng::fill(&mut StdRng::seed_from_u64(1), &mut noise[..]);
        let pages = [[0; PAGE_SIZE], held, noise, held];
        let mut sizer = LiteralSizer::new().unwrap();
        let cluster = classify(&pages, &index, &mut sizer).unwrap();
        assert_eq!((cluster.pages, cluster.zero, cluster.teleported, cluster.literal), (4, 1, 2, 1));
        assert!(cluster.literal_wire_bytes >= 4096, "{cluster:?}");
        // Alike: it costs next to nothing the second time.
        let again = classify(&pages, &index, &mut sizer).unwrap();
        assert!(again.literal_wire_bytes < 200, "{again:?}");
    }

    proptest! {
        #[test]
        fn clusters_lie_within_the_memory_and_apart(pages in 0u64..5_000_000, seed: u64) {
            let places = places(pages, &mut StdRng::seed_from_u64(seed));
            prop_assert_eq!(places.len() as u64, (pages / CLUSTER_PAGES as u64).min(MAX_CLUSTERS));
            prop_assert!(places.windows(2).all(|pair| pair[0] + CLUSTER_PAGES as u64 <= pair[1]));
            prop_assert!(places.last().is_none_or(|last| last + CLUSTER_PAGES as u64 <= pages));
        }
    }
}
