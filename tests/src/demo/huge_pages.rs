//! Huge pages for the demo's guests, set aside for as long as it runs.
//!
//! A virtual machine that hosts this demo may have given its free memory back, and then waits for its own host with each page that is touched for the first
//! time: seconds per GiB. Pages that are set aside, and touched once, stay. (The memory of QEMU's own ways is preallocated before they are timed.)
//!
//! What is set aside is noted in a file, so that a demo that was killed is made up for by the next.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::MmapOptions;

/// How many pages of the default size the kernel sets aside (Linux, `Documentation/admin-guide/mm/hugetlbpage.rst`).
const POOL: &str = "/proc/sys/vm/nr_hugepages";
const MEMINFO: &str = "/proc/meminfo";
/// Has the kernel move pages together.
const COMPACT: &str = "/proc/sys/vm/compact_memory";
const ATTEMPTS: usize = 4;

/// Huge pages that were added to the kernel's pool; given back when this is dropped.
#[derive(Debug)]
pub struct HugePageReserve {
    note: PathBuf,
}

impl HugePageReserve {
    /// Sets so much memory aside, and touches it. `note` is the file that tells of it.
    ///
    /// # Errors
    /// The kernel does not set as much aside, or this process may not ask for it; nothing is set aside then.
    pub fn take(bytes: u64, note: &Path) -> io::Result<Self> {
        give_back(note)?;
        let page_bytes = page_bytes()?;
        let (before, pages) = (pool()?, bytes.div_ceil(page_bytes));
        fs::write(note, pages.to_string())?;
        let reserve = Self { note: note.to_owned() };
        let mut added = 0;
        for _ in 0..ATTEMPTS {
            fs::write(POOL, (before + pages).to_string())?;
            added = pool()?.saturating_sub(before);
            if added >= pages {
                let mut memory = MmapOptions::new().huge(None).len((pages * page_bytes) as usize).map_anon()?;
                memory.chunks_mut(page_bytes as usize).for_each(|page| page[0] = 1);
                return Ok(reserve);
            }
            // Other pages are in the way; it may not be possible to move them.
            fs::write(COMPACT, "1").ok();
        }
        // What was not added is not taken away.
        fs::write(note, added.to_string())?;
        let message = format!("the kernel sets aside {added} huge pages of {pages}");
        Err(io::Error::new(io::ErrorKind::OutOfMemory, message))
    }
}

impl Drop for HugePageReserve {
    fn drop(&mut self) {
        // The note stays if this fails, and the next demo tries again.
        give_back(&self.note).ok();
    }
}

fn give_back(note: &Path) -> io::Result<()> {
    let text = match fs::read_to_string(note) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    let added: u64 = text.trim().parse().unwrap_or(0);
    if added > 0 {
        fs::write(POOL, pool()?.saturating_sub(added).to_string())?;
    }
    fs::remove_file(note)
}

fn pool() -> io::Result<u64> {
    fs::read_to_string(POOL)?.trim().parse().map_err(io::Error::other)
}

fn page_bytes() -> io::Result<u64> {
    let text = fs::read_to_string(MEMINFO)?;
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the kernel has no huge pages"))
}
