//! The durable store: sled behind a seam small enough to be replaced.
//!
//! Guarantees: when [`Store::commit`] returns, the batch is on stable storage, whole or (after a crash before it
//! returned) not at all. sled's own `flush` ends in `sync_file_range`, which does not reach through the disk's cache, so
//! the data file is opened once more here and `fdatasync`ed after each flush.
//!
//! sled takes a damaged end of its file for the rest of a write that a crash cut off, and damage further up for pages that are not
//! there, and opens without them. So every batch has a number and says what all pairs come to after it ([`Sum`]), and the newest
//! one that was on stable storage is noted in a file beside ([`mark`]). A store that opens with an older batch, or with
//! pairs that come to something else, has lost something, and is refused.
//!
//! Does not take values above [`MAX_VALUE_BYTES`]: sled would put them into files that it never syncs. Snapshots and
//! the like belong into files of their own.
//!
//! Calls block on the disk: keep them off async threads.

mod mark;

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::mark::{Mark, MarkError};

/// Why sled did not do as told.
pub use sled::Error as EngineError;

/// Largest value, in bytes; sled keeps anything of 256 KiB and more outside its log, unsynced.
pub const MAX_VALUE_BYTES: usize = 64 * 1024;

/// Why the store did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be opened as a store.
    #[error("open the store {}", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: sled::Error,
    },
    /// The data file cannot be opened for syncing.
    #[error("open the data file {}", path.display())]
    DataFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// sled gave up on what it found.
    #[error("the store {} is damaged: it cannot be read", path.display())]
    Unreadable {
        /// The folder.
        path: PathBuf,
    },
    /// Batches that were on stable storage are gone.
    #[error("the store {} is damaged: it ends with batch {found}, and batch {marked} was on stable storage", path.display())]
    Short {
        /// The folder.
        path: PathBuf,
        /// The newest batch that is there.
        found: u64,
        /// The newest one that was.
        marked: u64,
    },
    /// Pairs are gone, or others than were written.
    #[error("the store {} is damaged: what is left of it is not what was written", path.display())]
    Changed {
        /// The folder.
        path: PathBuf,
    },
    /// The note of the newest batch.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// Reading failed.
    #[error("read from the store")]
    Read(#[source] sled::Error),
    /// Writing failed; whether the batch took effect is unknown until the store is opened again.
    #[error("write to the store")]
    Write(#[source] sled::Error),
    /// `fdatasync` failed; whether the batch took effect is unknown until the store is opened again.
    #[error("sync the store")]
    Sync(#[source] std::io::Error),
    /// A value that sled would not keep durably.
    #[error("a value of {bytes} bytes is above the store's limit of {MAX_VALUE_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

impl StoreError {
    /// Is what the store holds not what was written? Anything else may pass, or be put right outside it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Read(source) => !matches!(source, sled::Error::Io(_)),
            Self::Unreadable { .. } | Self::Short { .. } | Self::Changed { .. } => true,
            Self::Mark(error) => error.is_damage(),
            Self::DataFile { .. } | Self::Write(_) | Self::Sync(_) | Self::TooLarge { .. } => false,
        }
    }
}

/// Changes that take effect together.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// The last word on each key; [`None`]: removed.
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.changes.insert(key.as_ref().to_owned(), Some(value.as_ref().to_owned()));
    }

    /// Removes a key, present or not.
    pub fn remove(&mut self, key: impl AsRef<[u8]>) {
        self.changes.insert(key.as_ref().to_owned(), None);
    }

    fn largest_value_bytes(&self) -> usize {
        self.changes.values().flatten().map(Vec::len).max().unwrap_or_default()
    }
}

/// Who holds the store may be about to let go of it: a process that is ending, or sled's own threads after a drop.
const LOCK_LIMIT: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

fn open_unlocked(folder: &Path) -> Result<sled::Db, sled::Error> {
    let give_up = Instant::now() + LOCK_LIMIT;
    loop {
        match sled::Config::new().path(folder).flush_every_ms(None).open() {
            // sled says it in words only.
            Err(sled::Error::Io(error))
                if error.to_string().contains("could not acquire lock") && Instant::now() < give_up =>
            {
                std::thread::sleep(LOOK_AGAIN);
            }
            opened => return opened,
        }
    }
}

/// Number of the newest batch and what all other pairs come to (2 x u64, big-endian); not among the pairs that callers see.
const NEWEST: &[u8] = b"\0batch";

/// What the pairs of a store come to, in whatever order: pairs that are missing or others give something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sum(u64);

impl Sum {
    fn of(key: &[u8], value: &[u8]) -> u64 {
        let mut hash = blake3::Hasher::new();
        hash.update(&(key.len() as u64).to_be_bytes()).update(key).update(value);
        hash.finalize().as_bytes().first_chunk().copied().map(u64::from_be_bytes).unwrap_or_default()
    }

    fn with(self, key: &[u8], value: &[u8]) -> Self {
        Self(self.0.wrapping_add(Self::of(key, value)))
    }

    fn without(self, key: &[u8], value: &[u8]) -> Self {
        Self(self.0.wrapping_sub(Self::of(key, value)))
    }
}

/// The newest batch, and what the pairs come to after it.
#[derive(Debug, Clone, Copy, Default)]
struct Newest {
    number: u64,
    sum: Sum,
}

impl Newest {
    fn encode(self) -> Vec<u8> {
        [self.number.to_be_bytes(), self.sum.0.to_be_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (number, rest) = bytes.split_first_chunk::<8>()?;
        let sum = <[u8; 8]>::try_from(rest).ok()?;
        Some(Self { number: u64::from_be_bytes(*number), sum: Sum(u64::from_be_bytes(sum)) })
    }
}

/// Key and value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// An ordered map of bytes to bytes on stable storage.
#[derive(Debug)]
pub struct Store {
    db: sled::Db,
    data_file: File,
    /// As it was applied.
    newest: Mutex<Newest>,
    mark: Mutex<Mark>,
}

impl Store {
    /// Opens or creates the store in `folder`.
    ///
    /// # Errors
    /// [`StoreError::Open`] when another process holds it, and goes on to for three seconds; an error of which
    /// [`StoreError::is_damage`] says so when what was committed is not there any more.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = || folder.to_owned();
        // sled asserts much of what it reads: that it panics says that it was not what it wrote.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let db = open_unlocked(folder).map_err(|source| StoreError::Open { path: path(), source })?;
            let newest = look(&db, folder)?;
            Ok::<_, StoreError>((db, newest))
        }));
        let (db, newest) = opened.map_err(|_| StoreError::Unreadable { path: path() })??;
        let data = folder.join("db");
        let data_file = File::open(&data).map_err(|source| StoreError::DataFile { path: data.clone(), source })?;
        let mark = Mark::open(folder, newest.number)?;
        if mark.newest() > newest.number {
            return Err(StoreError::Short { path: path(), found: newest.number, marked: mark.newest() });
        }
        // The names of fresh files must survive a power loss too.
        let sync_folder = File::open(folder).and_then(|folder| folder.sync_all());
        sync_folder.map_err(|source| StoreError::DataFile { path: data, source })?;
        Ok(Self { db, data_file, newest: Mutex::new(newest), mark: Mutex::new(mark) })
    }

    /// The value of a key.
    ///
    /// # Errors
    /// [`StoreError::Read`].
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get(key).map(|found| found.map(|value| value.to_vec())).map_err(StoreError::Read)
    }

    /// All pairs whose key starts with `prefix`, in key order.
    ///
    /// # Errors
    /// [`StoreError::Read`].
    pub fn scan(&self, prefix: impl AsRef<[u8]>) -> Result<Vec<Pair>, StoreError> {
        let pairs = self.db.scan_prefix(prefix).map(|pair| pair.map(|(key, value)| (key.to_vec(), value.to_vec())));
        let pairs = pairs.filter(|pair| pair.as_ref().map_or(true, |(key, _)| key != NEWEST));
        pairs.collect::<Result<_, _>>().map_err(StoreError::Read)
    }

    /// Applies the batch and returns when it is on stable storage.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] (nothing changed); after any other error the outcome is unknown.
    pub fn commit(&self, batch: Batch) -> Result<(), StoreError> {
        let bytes = batch.largest_value_bytes();
        if bytes > MAX_VALUE_BYTES {
            return Err(StoreError::TooLarge { bytes });
        }
        let number = self.apply(batch)?;
        self.db.flush().map_err(StoreError::Write)?;
        self.data_file.sync_data().map_err(StoreError::Sync)?;
        let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(mark.reached(number)?)
    }

    /// Gives the batch its number.
    fn apply(&self, batch: Batch) -> Result<u64, StoreError> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Newest { number: newest.number + 1, sum: newest.sum };
        let mut out = sled::Batch::default();
        for (key, value) in batch.changes {
            if let Some(before) = self.db.get(&key).map_err(StoreError::Read)? {
                next.sum = next.sum.without(&key, &before);
            }
            match value {
                Some(value) => {
                    next.sum = next.sum.with(&key, &value);
                    out.insert(key, value);
                }
                None => out.remove(key),
            }
        }
        out.insert(NEWEST, next.encode());
        self.db.apply_batch(out).map_err(StoreError::Write)?;
        *newest = next;
        Ok(next.number)
    }
}

/// Reads everything, and compares it with what the newest batch says.
fn look(db: &sled::Db, folder: &Path) -> Result<Newest, StoreError> {
    let changed = || StoreError::Changed { path: folder.to_owned() };
    let (mut sum, mut newest) = (Sum::default(), None);
    for pair in db.iter() {
        let (key, value) = pair.map_err(StoreError::Read)?;
        match &*key {
            NEWEST => newest = Some(Newest::decode(&value).ok_or_else(changed)?),
            key => sum = sum.with(key, &value),
        }
    }
    match newest {
        // Of a version that did not number its batches.
        None => Ok(Newest { number: 0, sum }),
        Some(newest) if newest.sum == sum => Ok(newest),
        Some(_) => Err(changed()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_committed_batch_is_found_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        {
            let store = Store::open(folder.path()).unwrap();
            let mut batch = Batch::default();
            batch.put("vm/1", "own");
            batch.put("vm/2", "replica");
            batch.put("log/1", "x");
            store.commit(batch).unwrap();
            let mut second = Batch::default();
            second.remove("vm/2");
            store.commit(second).unwrap();
        }
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.get("vm/1").unwrap().as_deref(), Some(&b"own"[..]));
        assert_eq!(store.scan("vm/").unwrap().len(), 1);
    }

    #[test]
    fn a_store_that_is_about_to_be_let_go_of_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let held = Store::open(folder.path()).unwrap();
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(held);
        });
        Store::open(folder.path()).unwrap();
        holder.join().unwrap();
    }

    /// A store of so many batches, and its files' names.
    fn used(folder: &Path) {
        let store = Store::open(folder).unwrap();
        for number in 0..BATCHES {
            let mut batch = Batch::default();
            batch.put(format!("log/{number:04}"), [number as u8; 700]);
            batch.put("hard", number.to_be_bytes());
            store.commit(batch).unwrap();
        }
    }

    const BATCHES: u64 = 600;

    /// Refused as damaged, or found whole.
    fn is_refused(folder: &Path, what: &str) -> bool {
        let store = match Store::open(folder) {
            Ok(store) => store,
            Err(error) => {
                assert!(error.is_damage(), "{what}: {error:?}");
                return true;
            }
        };
        let hard = store.get("hard").unwrap().unwrap();
        assert_eq!(hard, (BATCHES - 1).to_be_bytes(), "{what}: opened without its end");
        let pairs = store.scan("log/").unwrap();
        assert_eq!(pairs.len() as u64, BATCHES, "{what}: opened without a part");
        for (number, (_, value)) in pairs.iter().enumerate() {
            assert_eq!(value, &[number as u8; 700], "{what}: opened with another value");
        }
        false
    }

    fn copy(from: &Path) -> tempfile::TempDir {
        let to = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            if file.file_type().unwrap().is_file() {
                std::fs::copy(file.path(), to.path().join(file.file_name())).unwrap();
            }
        }
        to
    }

    #[test]
    fn whatever_is_damaged_in_a_file_is_a_refusal_and_never_an_older_store() {
        let folder = tempfile::tempdir().unwrap();
        used(folder.path());
        assert!(!is_refused(copy(folder.path()).path(), "nothing"));
        let mut refused = 0;
        for name in ["db", "newest-batch", "conf"] {
            let good = std::fs::read(folder.path().join(name)).unwrap();
            let step = (good.len() / 199).max(1);
            for at in (0..good.len()).step_by(step) {
                let damaged = copy(folder.path());
                let mut bad = good.clone();
                let end = (at + 512).min(bad.len());
                match at / step % 3 {
                    0 => bad[at] ^= 0x10,
                    1 => bad[at..end].fill(0),
                    _ => bad.truncate(at),
                }
                std::fs::write(damaged.path().join(name), &bad).unwrap();
                refused += u32::from(is_refused(damaged.path(), &format!("{name} at {at}")));
            }
        }
        assert!(refused > 30, "only {refused}: this damages what is not used");
    }

    #[test]
    fn a_file_that_is_gone_is_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        used(folder.path());
        for name in ["db", "newest-batch"] {
            let damaged = copy(folder.path());
            std::fs::remove_file(damaged.path().join(name)).unwrap();
            assert!(is_refused(damaged.path(), name), "{name}");
        }
    }

    #[test]
    fn a_store_of_a_version_that_did_not_number_its_batches_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        {
            let db = sled::open(folder.path()).unwrap();
            db.insert("vm/1", "own").unwrap();
            db.flush().unwrap();
        }
        {
            let store = Store::open(folder.path()).unwrap();
            assert_eq!(store.get("vm/1").unwrap().as_deref(), Some(&b"own"[..]));
            store.commit(Batch::default()).unwrap();
            assert_eq!(store.scan("").unwrap().len(), 1, "the number is not among the pairs");
        }
        std::fs::remove_file(folder.path().join("newest-batch")).unwrap();
        assert!(matches!(Store::open(folder.path()), Err(StoreError::Mark(MarkError::Missing { .. }))));
    }

    #[test]
    fn a_value_that_sled_would_not_sync_is_refused_whole() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut batch = Batch::default();
        batch.put("small", "x");
        batch.put("large", vec![0; MAX_VALUE_BYTES + 1]);
        assert!(matches!(store.commit(batch), Err(StoreError::TooLarge { .. })));
        assert_eq!(store.get("small").unwrap(), None);
    }
}
