//! The history load: writes in an order that shows on the disk, so that any moment of the disk can be told from any other, and from a mixture.
//!
//! ```text
//!   operation i:   change one block in place, sync ─▶ append record i, sync          i = 0, 1, 2, …
//!   a moment:      records 0..m are there ⇒ the blocks are as operations 0..m have left them; only operation m may have begun
//! ```
//! A change overwrites a block of 4 KiB with content that follows from the operation, or punches it out. Now and then the file system is
//! trimmed. What an operation does follows from the seed, so whoever reads the two files of a frozen disk can check all of it.
//!
//! Does not unlink or shrink files once it has begun: a file system that is frozen while it does owes itself a repair.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::memory::{PAGE_WORDS, SplitMix, fill_page};

/// The file of appended records, below the folder that is served.
pub const RECORDS_FILE: &str = "load/history-records";
/// The file of blocks that are changed in place.
pub const BLOCKS_FILE: &str = "load/history-blocks";
/// Size of a record, and of a block.
pub const UNIT_BYTES: usize = PAGE_WORDS * 8;
/// Blocks that are changed in place.
pub const BLOCKS: u64 = 512;

/// What one operation does to its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Overwrite { block: u64 },
    Punch { block: u64 },
}

impl Change {
    fn of(seed: u64, operation: u64) -> Self {
        let mut random = SplitMix(seed ^ operation.rotate_left(23));
        let block = random.next_word() % BLOCKS;
        if random.next_word().is_multiple_of(8) { Self::Punch { block } } else { Self::Overwrite { block } }
    }

    fn block(self) -> u64 {
        match self {
            Self::Overwrite { block } | Self::Punch { block } => block,
        }
    }

    /// The block's content after it.
    fn content(self, seed: u64, operation: u64) -> Vec<u8> {
        match self {
            Self::Overwrite { block } => unit(seed, block, operation + 1),
            Self::Punch { .. } => vec![0; UNIT_BYTES],
        }
    }
}

fn unit(seed: u64, number: u64, version: u64) -> Vec<u8> {
    let mut words = [0; PAGE_WORDS];
    fill_page(&mut words, seed, number, version);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Records are told from blocks by a number that no block has.
fn record(seed: u64, operation: u64) -> Vec<u8> {
    unit(seed, BLOCKS, operation)
}

fn initial(seed: u64, block: u64) -> Vec<u8> {
    unit(seed, block, 0)
}

/// Why two files are of no moment of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mixture {
    /// A record is not what it must be, though the file is longer.
    Record {
        /// Its number.
        number: u64,
    },
    /// A block is not as the operations that are recorded have left it.
    Block {
        /// Which.
        block: u64,
        /// How many operations are recorded.
        operations: u64,
    },
    /// The file of blocks has another size.
    Size {
        /// In bytes.
        bytes: u64,
    },
}

impl std::fmt::Display for Mixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Record { number } => write!(f, "record {number} is damaged"),
            Self::Block { block, operations } => {
                write!(f, "block {block} is not as {operations} operations have left it")
            }
            Self::Size { bytes } => write!(f, "the file of blocks has {bytes} bytes"),
        }
    }
}

/// Finds the moment of a history that its two files show: how many operations are complete.
///
/// # Errors
/// [`Mixture`]: they are of no single moment.
pub fn moment(seed: u64, records: &[u8], blocks: &[u8]) -> Result<u64, Mixture> {
    let operations = records.chunks(UNIT_BYTES).zip(0..).try_fold(0, |_, (found, number)| {
        if found == record(seed, number) { Ok(number + 1) } else { Err(Mixture::Record { number }) }
    })?;
    if blocks.len() as u64 != BLOCKS * UNIT_BYTES as u64 {
        return Err(Mixture::Size { bytes: blocks.len() as u64 });
    }
    let mut newest = vec![None; usize::try_from(BLOCKS).unwrap_or_default()];
    for operation in 0..operations {
        let change = Change::of(seed, operation);
        newest[usize::try_from(change.block()).unwrap_or_default()] = Some((change, operation));
    }
    let under_way = Change::of(seed, operations);
    for ((found, newest), block) in blocks.chunks(UNIT_BYTES).zip(newest).zip(0..) {
        let expected = match newest {
            Some((change, operation)) => change.content(seed, operation),
            None => initial(seed, block),
        };
        let has_begun = under_way.block() == block && found == under_way.content(seed, operations);
        if found != expected && !has_begun {
            return Err(Mixture::Block { block, operations });
        }
    }
    Ok(operations)
}

/// How a history fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fares {
    /// Operations that are on the disk.
    pub done: u64,
    /// The slowest write with its sync, in milliseconds.
    pub slowest_write_ms: u64,
    /// Why it has ended early.
    pub failure: Option<String>,
}

#[derive(Debug, Default)]
struct Told {
    stop: AtomicBool,
    done: AtomicU64,
    slowest_write_ms: AtomicU64,
    failure: Mutex<Option<String>>,
}

/// A running load.
#[derive(Debug)]
pub struct History {
    told: Arc<Told>,
    thread: JoinHandle<()>,
}

/// What a history is to be.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Operations per second, at most.
    pub operations_per_second: u64,
    /// What they do.
    pub seed: u64,
    /// The file system is trimmed after so many; 0: never.
    pub trim_every: u64,
}

impl History {
    /// Makes the two files, syncs them, and begins.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn start(data: &Path, plan: Plan) -> io::Result<Self> {
        let open = |name| {
            let path = data.join(name);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            OpenOptions::new().create(true).write(true).truncate(true).open(path)
        };
        let (records, mut blocks) = (open(RECORDS_FILE)?, open(BLOCKS_FILE)?);
        for block in 0..BLOCKS {
            blocks.write_all(&initial(plan.seed, block))?;
        }
        blocks.sync_all()?;
        records.sync_all()?;
        File::open(data.join("load"))?.sync_all()?;
        let told = Arc::new(Told::default());
        let mut writer = Writer { told: Arc::clone(&told), plan, data: data.to_owned(), records, blocks };
        let thread = std::thread::spawn(move || {
            if let Err(error) = writer.run() {
                *writer.told.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            }
        });
        Ok(Self { told, thread })
    }

    /// How it fares.
    #[must_use]
    pub fn fares(&self) -> Fares {
        Fares {
            done: self.told.done.load(Ordering::Acquire),
            slowest_write_ms: self.told.slowest_write_ms.load(Ordering::Acquire),
            failure: self.told.failure.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Stops after the operation that is under way.
    ///
    /// # Errors
    /// When it panicked.
    pub fn stop(self) -> io::Result<Fares> {
        self.told.stop.store(true, Ordering::Release);
        let told = Arc::clone(&self.told);
        let Self { thread, .. } = self;
        thread.join().map_err(|_| io::Error::other("the history's thread panicked"))?;
        let failure = told.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Fares {
            done: told.done.load(Ordering::Acquire),
            slowest_write_ms: told.slowest_write_ms.load(Ordering::Acquire),
            failure,
        })
    }
}

struct Writer {
    told: Arc<Told>,
    plan: Plan,
    data: std::path::PathBuf,
    records: File,
    blocks: File,
}

impl Writer {
    fn run(&mut self) -> io::Result<()> {
        let per_second = u32::try_from(self.plan.operations_per_second.max(1)).unwrap_or(u32::MAX);
        let pause = Duration::from_secs(1) / per_second;
        for operation in 0.. {
            if self.told.stop.load(Ordering::Acquire) {
                break;
            }
            self.change(operation)?;
            let appended = record(self.plan.seed, operation);
            self.timed(|writer| {
                writer.records.write_all(&appended)?;
                writer.records.sync_data()
            })?;
            self.told.done.store(operation + 1, Ordering::Release);
            if self.plan.trim_every > 0 && (operation + 1).is_multiple_of(self.plan.trim_every) {
                let trimmed = Command::new("fstrim").arg(&self.data).output()?;
                if !trimmed.status.success() {
                    return Err(io::Error::other(format!("fstrim: {}", String::from_utf8_lossy(&trimmed.stderr))));
                }
            }
            std::thread::sleep(pause);
        }
        Ok(())
    }

    fn change(&mut self, operation: u64) -> io::Result<()> {
        let change = Change::of(self.plan.seed, operation);
        let offset = change.block() * UNIT_BYTES as u64;
        let content = change.content(self.plan.seed, operation);
        self.timed(|writer| match change {
            Change::Overwrite { .. } => {
                writer.blocks.write_all_at(&content, offset)?;
                writer.blocks.sync_data()
            }
            Change::Punch { .. } => {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&writer.blocks, hole, offset.cast_signed(), (UNIT_BYTES as u64).cast_signed())?;
                writer.blocks.sync_all()
            }
        })
    }

    fn timed(&mut self, write: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        let begin = Instant::now();
        write(self)?;
        let took = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.told.slowest_write_ms.fetch_max(took, Ordering::AcqRel);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SEED: u64 = 7;

    /// The files after so many operations, and perhaps the change of the next.
    fn files(operations: u64, begun: bool) -> (Vec<u8>, Vec<u8>) {
        let records = (0..operations).flat_map(|number| record(SEED, number)).collect();
        let mut blocks: Vec<u8> = (0..BLOCKS).flat_map(|block| initial(SEED, block)).collect();
        for operation in 0..operations + u64::from(begun) {
            let change = Change::of(SEED, operation);
            let at = usize::try_from(change.block()).unwrap() * UNIT_BYTES;
            blocks[at..at + UNIT_BYTES].copy_from_slice(&change.content(SEED, operation));
        }
        (records, blocks)
    }

    #[test]
    fn every_moment_is_told() {
        for operations in [0, 1, 2, 500, 2000] {
            for begun in [false, true] {
                let (records, blocks) = files(operations, begun);
                assert_eq!(moment(SEED, &records, &blocks), Ok(operations));
            }
        }
    }

    #[test]
    fn what_is_of_no_single_moment_is_found() {
        let (records, blocks) = files(600, false);
        // One change alone may be no change: a hole punched where there is one.
        let (_, later) = files(610, false);
        let (_, earlier) = files(590, false);
        for mixed in [&later, &earlier] {
            assert!(matches!(moment(SEED, &records, mixed), Err(Mixture::Block { operations: 600, .. })));
        }
        let mut damaged = records.clone();
        damaged[3 * UNIT_BYTES + 5] ^= 1;
        assert_eq!(moment(SEED, &damaged, &blocks), Err(Mixture::Record { number: 3 }));
        let torn = &records[..600 * UNIT_BYTES - 1];
        assert_eq!(moment(SEED, torn, &blocks), Err(Mixture::Record { number: 599 }));
        assert!(matches!(moment(SEED, &records, &blocks[..UNIT_BYTES]), Err(Mixture::Size { .. })));
    }

    #[test]
    fn what_the_load_leaves_is_the_moment_at_which_it_was_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { operations_per_second: 10_000, seed: SEED, trim_every: 0 };
        let load = History::start(folder.path(), plan).unwrap();
        while load.fares().done < 40 {
            assert_eq!(load.fares().failure, None);
            std::thread::yield_now();
        }
        let fares = load.stop().unwrap();
        let read = |name| fs::read(folder.path().join(name)).unwrap();
        assert_eq!(moment(SEED, &read(RECORDS_FILE), &read(BLOCKS_FILE)), Ok(fares.done));
    }
}
