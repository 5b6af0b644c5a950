//! [`Disk`]: what a node needs of stable storage, small enough to be simulated.
//!
//! Guarantees asked of an implementation: what [`Disk::commit`] and [`Disk::replace_snapshot`] were given is on stable storage
//! when they return, whole; after an error or a crash inside them it is there whole or not at all. The two are not atomic
//! together: [`super::storage`] copes with a crash in between.

use std::path::{Path, PathBuf};

use pageport_common::store::{Batch, Pair, Store, StoreError};

use super::snapshot::{self, SnapshotError};

/// Why a disk did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The snapshot file said no.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The store is gone and the snapshot is not: terms and votes would be forgotten.
    #[error(
        "{} is missing, and {} is there: terms and votes are lost",
        store.display(),
        snapshot.display()
    )]
    StoreMissing {
        /// What should be there.
        store: PathBuf,
        /// What is.
        snapshot: PathBuf,
    },
    /// The machine went down.
    #[error("the machine went down")]
    Down,
}

impl DiskError {
    /// Is what is on the disk not what was written?
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Store(error) => error.is_damage(),
            Self::Snapshot(error) => error.is_damage(),
            Self::StoreMissing { .. } => true,
            Self::Down => false,
        }
    }
}

/// One change of many that take effect together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sets a key.
    Put {
        /// The key.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// Removes a key, present or not.
    Remove(Vec<u8>),
}

impl Change {
    /// Sets a key.
    pub fn put(key: impl Into<Vec<u8>>, value: Vec<u8>) -> Self {
        Self::Put { key: key.into(), value }
    }
}

/// A small ordered map, and one file.
pub trait Disk {
    /// The value of a key.
    ///
    /// # Errors
    /// [`DiskError`].
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError>;

    /// All pairs whose key starts with `prefix`, in key order.
    ///
    /// # Errors
    /// [`DiskError`].
    fn scan(&self, prefix: &str) -> Result<Vec<Pair>, DiskError>;

    /// Makes the changes, all or none.
    ///
    /// # Errors
    /// [`DiskError`]: whether they took effect is unknown until the disk is looked at again.
    fn commit(&mut self, changes: Vec<Change>) -> Result<(), DiskError>;

    /// The snapshot, if there is one.
    ///
    /// # Errors
    /// [`DiskError`].
    fn snapshot(&self) -> Result<Option<Vec<u8>>, DiskError>;

    /// Replaces the snapshot.
    ///
    /// # Errors
    /// [`DiskError`]: the old or the new one is there.
    fn replace_snapshot(&mut self, bytes: &[u8]) -> Result<(), DiskError>;
}

/// The durable store, and a file beside it.
#[derive(Debug)]
pub struct FileDisk {
    store: Store,
    folder: PathBuf,
}

impl FileDisk {
    /// Opens or creates both in `folder`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(folder: &Path) -> Result<Self, DiskError> {
        // The store is always made before the first snapshot.
        let (store, snapshot) = (folder.join("log/db"), snapshot::path(folder));
        if snapshot.exists() && !store.exists() {
            return Err(DiskError::StoreMissing { store, snapshot });
        }
        snapshot::clean_up(folder)?;
        Ok(Self { store: Store::open(&folder.join("log"))?, folder: folder.to_owned() })
    }
}

impl Disk for FileDisk {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.store.get(key)?)
    }

    fn scan(&self, prefix: &str) -> Result<Vec<Pair>, DiskError> {
        Ok(self.store.scan(prefix)?)
    }

    fn commit(&mut self, changes: Vec<Change>) -> Result<(), DiskError> {
        let mut batch = Batch::default();
        for change in changes {
            match change {
                Change::Put { key, value } => batch.put(key, value),
                Change::Remove(key) => batch.remove(key),
            }
        }
        Ok(self.store.commit(batch)?)
    }

    fn snapshot(&self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(snapshot::read(&self.folder)?)
    }

    fn replace_snapshot(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        Ok(snapshot::replace(&self.folder, bytes)?)
    }
}
