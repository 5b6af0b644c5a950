//! Memory with known content: a region that never changes and a region that keeps changing.
//!
//! A changing page holds its own version number and what follows from it, so every page can be checked at any time: a page
//! that a move lost, duplicated or left at an older version does not match. Half of each page's words are random, so pages
//! compress about as well as real anonymous memory does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Words of a 4 KiB page.
pub const PAGE_WORDS: usize = 512;
/// How often the load catches up with its rate.
const PACE: Duration = Duration::from_millis(10);

/// A small, fast, well-mixed random sequence.
#[derive(Clone, Debug)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    pub fn next_word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Writes the content of page `page` at `version`.
pub fn fill_page(words: &mut [u64], seed: u64, page: u64, version: u64) {
    let mut random = SplitMix(seed ^ page.rotate_left(40) ^ version.rotate_left(17));
    for (n, word) in words.iter_mut().enumerate() {
        *word = if n % 2 == 0 { random.next_word() } else { version };
    }
}

/// A region that stays as it was filled.
#[derive(Debug)]
pub struct Static(Vec<u64>);

impl Static {
    /// Fills `bytes` (rounded down to pages).
    #[must_use]
    pub fn new(bytes: u64, seed: u64) -> Self {
        let pages = usize::try_from(bytes / 4096).unwrap_or(0);
        let mut words = vec![0; pages * PAGE_WORDS];
        for (page, words) in (0..).zip(words.chunks_exact_mut(PAGE_WORDS)) {
            fill_page(words, seed, page, 0);
        }
        Self(words)
    }

    /// Digest and size in bytes.
    #[must_use]
    pub fn checksum(&self) -> (String, u64) {
        let mut hasher = blake3::Hasher::new();
        for word in &self.0 {
            hasher.update(&word.to_le_bytes());
        }
        (hasher.finalize().to_hex().to_string(), self.0.len() as u64 * 8)
    }
}

struct Region {
    words: Vec<u64>,
    versions: Vec<u64>,
    seed: u64,
}

impl Region {
    fn new(bytes: u64, seed: u64) -> Self {
        let pages = usize::try_from(bytes / 4096).unwrap_or(0).max(1);
        let mut region = Self { words: vec![0; pages * PAGE_WORDS], versions: vec![0; pages], seed };
        for page in 0..pages {
            region.fill(page);
        }
        region
    }

    fn fill(&mut self, page: usize) {
        let words = &mut self.words[page * PAGE_WORDS..(page + 1) * PAGE_WORDS];
        fill_page(words, self.seed, page as u64, self.versions[page]);
    }

    fn change(&mut self, page: usize) {
        self.versions[page] += 1;
        self.fill(page);
    }

    fn corrupt_pages(&self) -> u64 {
        let mut expected = [0; PAGE_WORDS];
        let mut corrupt = 0;
        for (page, words) in self.words.chunks_exact(PAGE_WORDS).enumerate() {
            fill_page(&mut expected, self.seed, page as u64, self.versions[page]);
            corrupt += u64::from(words != expected);
        }
        corrupt
    }
}

/// A running load.
#[derive(Debug)]
pub struct Dirty {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<u64>>>,
}

impl Dirty {
    /// Fills the region and starts to change it.
    #[must_use]
    pub fn start(bytes: u64, pages_per_second: u64, seed: u64) -> Self {
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut region = Region::new(bytes, seed);
        let thread = std::thread::spawn({
            let (stop, writes) = (Arc::clone(&stop), Arc::clone(&writes));
            move || {
                let (begin, mut random) = (Instant::now(), SplitMix(seed));
                let pages = region.versions.len() as u64;
                while !stop.load(Ordering::Relaxed) {
                    let due = begin.elapsed().as_millis() * u128::from(pages_per_second) / 1000;
                    // After a pause the load goes on; it does not make up for lost time all at once.
                    for _ in 0..due.saturating_sub(u128::from(writes.load(Ordering::Relaxed))).min(u128::from(pages)) {
                        let page = usize::try_from(random.next_word() % pages).unwrap_or(0);
                        region.change(page);
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(PACE);
                }
                region.corrupt_pages()
            }
        });
        Self { stop, writes, thread: Mutex::new(Some(thread)) }
    }

    /// Changes so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Stops and tells how many pages were not what they must be; none when it was stopped before.
    pub fn stop(&self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.lock().ok()?.take()?.join().ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn static_regions_follow_from_their_seed() {
        assert_eq!(Static::new(1 << 20, 5).checksum(), Static::new(1 << 20, 5).checksum());
        assert_ne!(Static::new(1 << 20, 5).checksum(), Static::new(1 << 20, 6).checksum());
        assert_eq!(Static::new(1 << 20, 5).checksum().1, 1 << 20);
    }

    #[test]
    fn a_lost_a_stale_and_a_swapped_page_are_found() {
        let mut region = Region::new(64 * 4096, 1);
        (0..64).for_each(|page| region.change(page));
        assert_eq!(region.corrupt_pages(), 0);
        region.words[..PAGE_WORDS].fill(0);
        let stale: Vec<u64> = region.words[PAGE_WORDS..2 * PAGE_WORDS].to_vec();
        region.change(1);
        region.words[PAGE_WORDS..2 * PAGE_WORDS].copy_from_slice(&stale);
        let other: Vec<u64> = region.words[3 * PAGE_WORDS..4 * PAGE_WORDS].to_vec();
        region.words[2 * PAGE_WORDS..3 * PAGE_WORDS].copy_from_slice(&other);
        assert_eq!(region.corrupt_pages(), 3);
    }

    #[test]
    fn the_load_runs_until_it_is_stopped_once() {
        let load = Dirty::start(1 << 20, 100_000, 3);
        let deadline = Instant::now() + Duration::from_secs(10);
        while load.writes() < 1000 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert_eq!(load.stop(), Some(0));
        assert_eq!(load.stop(), None);
    }
}
