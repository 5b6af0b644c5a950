//! The durable store: sled behind a seam small enough to be replaced.
//!
//! Guarantees: when [`Store::commit`] returns, the batch is on stable storage, whole or (after a crash before it
//! returned) not at all. sled's own `flush` ends in `sync_file_range`, which does not reach through the disk's cache, so
//! the data file is opened once more here and `fdatasync`ed after each flush.
//!
//! Does not take values above [`MAX_VALUE_BYTES`]: sled would put them into files that it never syncs. Snapshots and
//! the like belong into files of their own.
//!
//! Calls block on the disk: keep them off async threads.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Largest value, in bytes; sled keeps anything of 256 KiB and more outside its log, unsynced.
pub const MAX_VALUE_BYTES: usize = 64 * 1024;

/// Why the store did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be opened as a store.
    #[error("open the store {}: if the file is damaged, move it away and restore this node from its peers", path.display())]
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

/// Changes that take effect together.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    inner: sled::Batch,
    largest_value_bytes: usize,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.largest_value_bytes = self.largest_value_bytes.max(value.as_ref().len());
        self.inner.insert(key.as_ref(), value.as_ref());
    }

    /// Removes a key, present or not.
    pub fn remove(&mut self, key: impl AsRef<[u8]>) {
        self.inner.remove(key.as_ref());
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

/// Key and value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// An ordered map of bytes to bytes on stable storage.
#[derive(Debug)]
pub struct Store {
    db: sled::Db,
    data_file: File,
}

impl Store {
    /// Opens or creates the store in `folder`.
    ///
    /// # Errors
    /// [`StoreError::Open`] when another process holds it, and goes on to for three seconds, or it is damaged.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let db = open_unlocked(folder).map_err(|source| StoreError::Open { path: folder.to_owned(), source })?;
        let path = folder.join("db");
        let data_file = File::open(&path).map_err(|source| StoreError::DataFile { path: path.clone(), source })?;
        // The name of a fresh data file must survive a power loss too.
        let sync_folder = File::open(folder).and_then(|folder| folder.sync_all());
        sync_folder.map_err(|source| StoreError::DataFile { path, source })?;
        Ok(Self { db, data_file })
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
        pairs.collect::<Result<_, _>>().map_err(StoreError::Read)
    }

    /// Applies the batch and returns when it is on stable storage.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] (nothing changed); after any other error the outcome is unknown.
    pub fn commit(&self, batch: Batch) -> Result<(), StoreError> {
        if batch.largest_value_bytes > MAX_VALUE_BYTES {
            return Err(StoreError::TooLarge { bytes: batch.largest_value_bytes });
        }
        self.db.apply_batch(batch.inner).map_err(StoreError::Write)?;
        self.db.flush().map_err(StoreError::Write)?;
        self.data_file.sync_data().map_err(StoreError::Sync)
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
