//! A replica that is open: its bytes, its size, and who may still change them. It lies in a file, or on a block device ([`super::device`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::unistd::{Whence, lseek64};
use pageport_proto::PoolName;

use super::device::{self, Device};
use super::{ReplicaError, free_bytes, image_bytes};

/// Left free on the file system when a replica is made, in bytes.
pub(super) const SPARE_BYTES: u64 = 64 << 20;

/// An open replica.
#[derive(Debug)]
pub struct ReplicaDisk {
    file: File,
    /// Not a file, but a block device.
    device: Option<Device>,
    path: PathBuf,
    size_bytes: AtomicU64,
    instance: u64,
    version: AtomicU64,
    session: tokio::sync::Mutex<()>,
    /// Locked for reading by whoever writes, and for writing by whoever changes the size.
    closed: RwLock<bool>,
}

impl ReplicaDisk {
    /// One whose disk has so many bytes.
    pub(super) fn new(path: &Path, file: File, size_bytes: u64, device: Option<Device>) -> Self {
        Self {
            file,
            device,
            path: path.to_owned(),
            size_bytes: AtomicU64::new(size_bytes),
            instance: rand::random::<u64>() | 1,
            version: AtomicU64::new(0),
            session: tokio::sync::Mutex::default(),
            closed: RwLock::new(false),
        }
    }

    /// In a file of a pool, which is made if it is not there. [`ReplicaError::NoSpace`]: `allocated_bytes` do not fit.
    pub(super) fn in_file(path: &Path, allocated_bytes: u64, pool: &PoolName) -> Result<Self, ReplicaError> {
        let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
            let held = image_bytes(path).map(|(_, allocated)| allocated).unwrap_or_default();
            let needed_bytes = allocated_bytes.saturating_sub(held);
            let free_bytes = free_bytes(folder).map_err(failed)?;
            if needed_bytes.saturating_add(SPARE_BYTES) > free_bytes {
                let (path, pool) = (path.to_owned(), pool.clone());
                return Err(ReplicaError::NoSpace { path, needed_bytes, free_bytes, pool });
            }
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        file.sync_all().map_err(failed)?;
        Ok(Self::new(path, file, size_bytes, None))
    }

    /// Waits for the one session that may write at a time; the turn ends with the guard.
    pub async fn session_turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.session.lock().await
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the disk, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Makes the disk at least `size_bytes` large; what is new reads as zeros. Never shrinks.
    ///
    /// # Errors
    /// The system's, that a block device is smaller, or `PermissionDenied` once it is closed.
    pub fn grow(&self, size_bytes: u64) -> io::Result<()> {
        let _alone = self.open_alone()?;
        let held_bytes = self.size_bytes();
        if size_bytes > held_bytes {
            match &self.device {
                None => self.file.set_len(size_bytes)?,
                Some(device) => device.grow(&self.file, held_bytes, size_bytes)?,
            }
            self.size_bytes.store(size_bytes, Ordering::Release);
        }
        Ok(())
    }

    /// As [`Self::grow`], of a disk all of which is to be compared: what is new of a block device holds anything, since to make that zeros may take as
    /// long as to write it.
    ///
    /// # Errors
    /// As [`Self::grow`].
    pub fn grow_to_compare(&self, size_bytes: u64) -> io::Result<()> {
        let Some(device) = &self.device else { return self.grow(size_bytes) };
        let _alone = self.open_alone()?;
        if size_bytes > self.size_bytes() {
            device.resize(&self.file, size_bytes)?;
            self.size_bytes.store(size_bytes, Ordering::Release);
            // Nobody knows this content.
            self.version.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Refuses a disk that a block device does not hold.
    ///
    /// # Errors
    /// [`ReplicaError::DeviceSmall`]; the system's.
    pub fn must_have_room(&self, size_bytes: u64) -> Result<(), ReplicaError> {
        if self.device.is_none() {
            return Ok(());
        }
        let failed = |source| ReplicaError::Open { path: self.path.clone(), source };
        device::must_hold(&self.path, device::length(&self.file).map_err(failed)?, size_bytes)
    }

    /// Refuses to make the disk smaller than it is.
    ///
    /// # Errors
    /// [`ReplicaError::Shrinks`].
    pub fn must_not_shrink(&self, size_bytes: u64) -> Result<(), ReplicaError> {
        let held_bytes = self.size_bytes();
        if size_bytes >= held_bytes {
            return Ok(());
        }
        Err(ReplicaError::Shrinks { path: self.path.clone(), held_bytes, size_bytes })
    }

    /// Makes the disk at most `size_bytes` large. Only for taking back what has made it larger.
    ///
    /// # Errors
    /// The system's, or `PermissionDenied` once it is closed.
    pub fn cut(&self, size_bytes: u64) -> io::Result<()> {
        let _alone = self.open_alone()?;
        if size_bytes < self.size_bytes() {
            match &self.device {
                None => self.file.set_len(size_bytes)?,
                Some(device) => device.resize(&self.file, size_bytes)?,
            }
            self.size_bytes.store(size_bytes, Ordering::Release);
            self.version.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Together with [`Self::version`]: names the content. Differs after each opening by a worker.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// Counts the changes since the replica was opened.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Reads exactly `into.len()` bytes.
    ///
    /// # Errors
    /// The system's, or `UnexpectedEof` past the end.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Reads what the device holds, not what the system remembers of it, as far as the system goes along.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_anew(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(self.file.as_fd(), offset as i64, into.len() as i64, advice)?;
        self.read(offset, into)
    }

    /// Writes; all of it must lie inside the disk.
    ///
    /// # Errors
    /// The system's, `InvalidInput` past the end, or `PermissionDenied` once it is closed.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<u64> {
        let _open = self.open()?;
        self.check_range(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)?;
        Ok(self.version.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Makes a range read as zeros, leaving a hole in a file.
    ///
    /// # Errors
    /// The system's, `InvalidInput` past the end, or `PermissionDenied` once it is closed.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<u64> {
        let _open = self.open()?;
        self.check_range(offset, length)?;
        match &self.device {
            _ if length == 0 => {}
            None => {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(self.file.as_fd(), hole, offset as i64, length as i64)?;
            }
            Some(device) => device.zero(offset, length)?,
        }
        Ok(self.version.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> io::Result<u64> {
        self.file.sync_data()?;
        Ok(self.version())
    }

    /// The next range at or after `from` that is not a hole; `None`: only holes follow. A block device has none.
    ///
    /// # Errors
    /// The system's.
    pub fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        if self.device.is_some() {
            let end = self.size_bytes();
            return Ok((from < end).then_some((from, end)));
        }
        let start = match lseek64(self.file.as_fd(), from as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(nix::errno::Errno::ENXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = lseek64(self.file.as_fd(), start as i64, Whence::SeekHole)? as u64;
        Ok(Some((start, end.min(self.size_bytes()))))
    }

    /// Waits for writes under way, and refuses every later one: the file is somebody else's. It can still be read.
    pub(super) fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
        if let Some(device) = &self.device {
            device.let_go();
        }
    }

    /// Holds off [`Self::close`].
    fn open(&self) -> io::Result<RwLockReadGuard<'_, bool>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err(is_closed()) } else { Ok(closed) }
    }

    /// Holds off [`Self::close`], and all other changes.
    fn open_alone(&self) -> io::Result<RwLockWriteGuard<'_, bool>> {
        let closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err(is_closed()) } else { Ok(closed) }
    }

    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "past the end of the disk")),
        }
    }
}

fn is_closed() -> io::Error {
    let why = "the replica is closed: a hypervisor has its disk, or it was removed";
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

impl std::fmt::Display for ReplicaDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())
    }
}
