//! What a group of points touches outside itself: files, disks and its durable record; and the host's own of each.
//!
//! The seam is here so that tests can end the power after every single step, and lose what was not synced.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageport_common::store::{Batch, Store, StoreError};

use crate::replica::store::{ReplicaDisk, free_bytes};

/// A journal or undo file.
pub(super) trait PointFile: Debug + Send + Sync {
    fn len(&self) -> io::Result<u64>;
    /// Reads exactly `into.len()` bytes.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    fn truncate(&self, length: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

/// The folder of the journals and undo files of one VM.
pub(super) trait Folder: Debug + Send + Sync {
    /// Names and lengths of the files.
    fn list(&self) -> io::Result<Vec<(String, u64)>>;
    /// Makes a file anew. Its name is durable after [`Self::sync`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn PointFile>>;
    fn open(&self, name: &str) -> io::Result<Arc<dyn PointFile>>;
    /// Deletes a file, there or not.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations and deletions durable.
    fn sync(&self) -> io::Result<()>;
    /// What the file system has left.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// The one durable record of a group.
pub(super) trait Cell: Debug + Send + Sync {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Durable and whole when it returns; after an error the outcome is unknown. `None` removes.
    fn save(&self, value: Option<&[u8]>) -> Result<(), StoreError>;
}

/// A replica.
pub(super) trait Disk: Debug + Send + Sync {
    fn size_bytes(&self) -> u64;
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a hole.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;
    fn grow(&self, size_bytes: u64) -> io::Result<()>;
    /// Makes it at most so large; what lay behind that is gone.
    fn cut(&self, size_bytes: u64) -> io::Result<()>;
    fn flush(&self) -> io::Result<()>;
    /// The next range at or after `from` that is not a hole.
    fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>>;
}

impl Disk for ReplicaDisk {
    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Self::read(self, offset, into)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Self::write(self, offset, data).map(drop)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        Self::zero(self, offset, length).map(drop)
    }

    fn grow(&self, size_bytes: u64) -> io::Result<()> {
        Self::grow(self, size_bytes)
    }

    fn cut(&self, size_bytes: u64) -> io::Result<()> {
        Self::cut(self, size_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        Self::flush(self).map(drop)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        Self::next_data(self, from)
    }
}

impl PointFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A folder of the host; made when it is first needed.
#[derive(Debug)]
pub(super) struct HostFolder(pub(super) PathBuf);

impl HostFolder {
    fn make(&self) -> io::Result<()> {
        if self.0.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.0)?;
        // The names of the folders down to this one must survive a power loss too.
        self.0.ancestors().skip(1).take(3).try_for_each(sync_folder)
    }
}

impl Folder for HostFolder {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        entries
            .map(|entry| {
                let entry = entry?;
                Ok((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()))
            })
            .collect()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn PointFile>> {
        self.make()?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(self.0.join(name))?;
        Ok(Arc::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn PointFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.0.join(name))?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match sync_folder(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.make()?;
        free_bytes(&self.0)
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A key of the worker's store.
#[derive(Debug)]
pub(super) struct StoreCell {
    pub(super) store: Arc<Store>,
    pub(super) key: String,
}

impl Cell for StoreCell {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.get(&self.key)
    }

    fn save(&self, value: Option<&[u8]>) -> Result<(), StoreError> {
        let mut batch = Batch::default();
        match value {
            Some(value) => batch.put(&self.key, value),
            None => batch.remove(&self.key),
        }
        self.store.commit(batch)
    }
}
