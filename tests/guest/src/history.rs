//! The history load: writes in an order that shows on the disk, so that any moment of the disk can be told from any other, and from a mixture.
//!
//! ```text
//!   operation i:   change one block in place, sync ─▶ append record i, sync          i = 0, 1, 2, …
//!   a moment:      records 0..m are there ⇒ the blocks are as operations 0..m have left them; only operation m may have begun
//! ```
//! A change overwrites a block of 4 KiB with content that follows from the operation, or punches it out. Now and then the file system is
//! trimmed. What an operation does follows from the seed, so whoever reads the two files of a frozen disk can check all of it.
//!
//! The blocks may be spread over whole disks, too: block b lies at place b mod n, of which the file is the first and the disks are the others. Since each
//! write is synced before the next, wherever it goes, what several disks show together is of one moment only if they were frozen at one.
//!
//! Does not unlink or shrink files once it has begun: a file system that is frozen while it does owes itself a repair.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
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
    /// A place of blocks has another size.
    Size {
        /// Which; the file is 0.
        place: usize,
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
            Self::Size { place, bytes } => write!(f, "place {place} of blocks has {bytes} bytes"),
        }
    }
}

/// How much of one of so many places holds blocks, from its beginning, in bytes.
#[must_use]
pub fn place_bytes(place: usize, places: usize) -> u64 {
    (0..BLOCKS).filter(|block| Spot::of(*block, places).place == place).count() as u64 * UNIT_BYTES as u64
}

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
struct Spot {
    place: usize,
    offset: u64,
}

impl Spot {
    fn of(block: u64, places: usize) -> Self {
        let places = places.max(1) as u64;
        Self { place: usize::try_from(block % places).unwrap_or_default(), offset: block / places * UNIT_BYTES as u64 }
    }
}

/// Finds the moment of a history that its file of records and its places of blocks show: how many operations are complete.
///
/// # Errors
/// [`Mixture`]: they are of no single moment.
pub fn moment(seed: u64, records: &[u8], places: &[Vec<u8>]) -> Result<u64, Mixture> {
    let operations = records.chunks(UNIT_BYTES).zip(0..).try_fold(0, |_, (found, number)| {
        if found == record(seed, number) { Ok(number + 1) } else { Err(Mixture::Record { number }) }
    })?;
    for (place, blocks) in places.iter().enumerate() {
        let bytes = blocks.len() as u64;
        if bytes != place_bytes(place, places.len()) {
            return Err(Mixture::Size { place, bytes });
        }
    }
    let held = |block| {
        let Spot { place, offset } = Spot::of(block, places.len());
        let held = places.get(place).and_then(|blocks| blocks.get(usize::try_from(offset).ok()?..)?.get(..UNIT_BYTES));
        held.unwrap_or_default()
    };
    let mut newest = vec![None; usize::try_from(BLOCKS).unwrap_or_default()];
    for operation in 0..operations {
        let change = Change::of(seed, operation);
        newest[usize::try_from(change.block()).unwrap_or_default()] = Some((change, operation));
    }
    let under_way = Change::of(seed, operations);
    for (newest, block) in newest.into_iter().zip(0..) {
        let found = held(block);
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
#[derive(Clone, Debug)]
pub struct Plan {
    /// Operations per second, at most.
    pub operations_per_second: u64,
    /// What they do.
    pub seed: u64,
    /// The file system is trimmed after so many; 0: never.
    pub trim_every: u64,
    /// Disks, whole, that hold a part of the blocks. What is on them is lost.
    pub disks: Vec<PathBuf>,
}

impl History {
    /// Makes the two files and the blocks of the disks, syncs them, and begins.
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
        let records = open(RECORDS_FILE)?;
        let disks = plan.disks.iter().map(|disk| OpenOptions::new().write(true).open(disk));
        let places = std::iter::once(open(BLOCKS_FILE)).chain(disks).collect::<io::Result<Vec<_>>>()?;
        for block in 0..BLOCKS {
            let Spot { place, offset } = Spot::of(block, places.len());
            places[place].write_all_at(&initial(plan.seed, block), offset)?;
        }
        places.iter().try_for_each(File::sync_all)?;
        records.sync_all()?;
        File::open(data.join("load"))?.sync_all()?;
        let told = Arc::new(Told::default());
        let mut writer = Writer { told: Arc::clone(&told), plan, data: data.to_owned(), records, places };
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
    data: PathBuf,
    records: File,
    places: Vec<File>,
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
        let Spot { place, offset } = Spot::of(change.block(), self.places.len());
        let content = change.content(self.plan.seed, operation);
        self.timed(|writer| match change {
            Change::Overwrite { .. } => {
                writer.places[place].write_all_at(&content, offset)?;
                writer.places[place].sync_data()
            }
            Change::Punch { .. } => {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&writer.places[place], hole, offset.cast_signed(), (UNIT_BYTES as u64).cast_signed())?;
                writer.places[place].sync_all()
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

    /// The records and the places after so many operations, and perhaps the change of the next.
    fn files(operations: u64, begun: bool, places: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
        let records = (0..operations).flat_map(|number| record(SEED, number)).collect();
        let empty = |place| vec![0; usize::try_from(place_bytes(place, places)).unwrap()];
        let mut held: Vec<Vec<u8>> = (0..places).map(empty).collect();
        let mut put = |block, content: Vec<u8>| {
            let Spot { place, offset } = Spot::of(block, places);
            let at = usize::try_from(offset).unwrap();
            held[place][at..at + UNIT_BYTES].copy_from_slice(&content);
        };
        for block in 0..BLOCKS {
            put(block, initial(SEED, block));
        }
        for operation in 0..operations + u64::from(begun) {
            let change = Change::of(SEED, operation);
            put(change.block(), change.content(SEED, operation));
        }
        (records, held)
    }

    #[test]
    fn every_moment_is_told() {
        for operations in [0, 1, 2, 500, 2000] {
            for begun in [false, true] {
                for places in 1..=3 {
                    let (records, blocks) = files(operations, begun, places);
                    assert_eq!(moment(SEED, &records, &blocks), Ok(operations));
                }
            }
        }
    }

    #[test]
    fn what_is_of_no_single_moment_is_found() {
        let (records, blocks) = files(600, false, 1);
        // One change alone may be no change: a hole punched where there is one.
        let (_, later) = files(610, false, 1);
        let (_, earlier) = files(590, false, 1);
        for mixed in [&later, &earlier] {
            assert!(matches!(moment(SEED, &records, mixed), Err(Mixture::Block { operations: 600, .. })));
        }
        let mut damaged = records.clone();
        damaged[3 * UNIT_BYTES + 5] ^= 1;
        assert_eq!(moment(SEED, &damaged, &blocks), Err(Mixture::Record { number: 3 }));
        let torn = &records[..600 * UNIT_BYTES - 1];
        assert_eq!(moment(SEED, torn, &blocks), Err(Mixture::Record { number: 599 }));
        let short = [blocks[0][..UNIT_BYTES].to_vec()];
        assert!(matches!(moment(SEED, &records, &short), Err(Mixture::Size { place: 0, bytes: 4096 })));
    }

    #[test]
    fn one_disk_of_another_moment_is_found() {
        let (records, blocks) = files(600, false, 3);
        for place in 0..3 {
            for operations in [580, 620] {
                let mut mixed = blocks.clone();
                mixed[place] = files(operations, false, 3).1.swap_remove(place);
                assert!(matches!(moment(SEED, &records, &mixed), Err(Mixture::Block { operations: 600, .. })));
            }
        }
    }

    #[test]
    fn what_the_load_leaves_is_the_moment_at_which_it_was_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        File::create(&disk).unwrap().set_len(4 << 20).unwrap();
        let plan = Plan { operations_per_second: 10_000, seed: SEED, trim_every: 0, disks: vec![disk.clone()] };
        let load = History::start(folder.path(), plan).unwrap();
        while load.fares().done < 40 {
            assert_eq!(load.fares().failure, None);
            std::thread::yield_now();
        }
        let fares = load.stop().unwrap();
        let read = |name| fs::read(folder.path().join(name)).unwrap();
        let mut on_disk = fs::read(disk).unwrap();
        on_disk.truncate(usize::try_from(place_bytes(1, 2)).unwrap());
        assert_eq!(moment(SEED, &read(RECORDS_FILE), &[read(BLOCKS_FILE), on_disk]), Ok(fares.done));
    }
}
