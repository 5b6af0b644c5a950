//! Which file on this host holds a VM's disk, and the replica files themselves.
//!
//! | where | what |
//! |---|---|
//! | key `disk/<vm>/<disk>` of the worker's store | path, format and [`Origin`] of the image on this host |
//! | `<data_dir>/replicas/<vm>/<disk>.raw` | a replica that this worker made |
//! | `<data_dir>/disks/<vm>/<disk>.raw` | a disk that was added, and that this worker made where no path was given |
//!
//! An image that an operator provided ([`Origin::Given`]) is never deleted. When its VM moves away it becomes the
//! replica for the way back. Replicas are raw: a qcow2 image is flattened first ([`flattening`]).

pub mod flattening;
mod making;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::unistd::{Whence, lseek64};
use pageport_common::store::{Batch, Store, StoreError};
use pageport_proto::VmId;
use serde::{Deserialize, Serialize};

use super::points;
use crate::image::{Format, Image, ImageError, begins_like_qcow2, qcow2_bytes};

/// Unit of digests and of comparison, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// Left free on the file system when a replica is made, in bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// Who provided an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The operator: never deleted.
    Given,
    /// This worker, as a replica or as a disk that was added: deleted with it.
    Made,
}

/// Where a disk lies on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLocation {
    /// The image file.
    pub path: PathBuf,
    /// Who provided it.
    pub origin: Origin,
    /// What its bytes mean.
    #[serde(default)]
    pub format: Format,
}

impl DiskLocation {
    /// Size of the disk, and how much of the image's own file is not holes, in bytes.
    ///
    /// # Errors
    /// The image cannot be looked at.
    pub fn bytes(&self) -> Result<(u64, u64), ImageError> {
        let failed = |source| ImageError::Open { path: self.path.clone(), source };
        let (length, allocated_bytes) = image_bytes(&self.path).map_err(failed)?;
        match self.format {
            Format::Raw => Ok((length, allocated_bytes)),
            Format::Qcow2 => Ok((qcow2_bytes(&self.path)?, allocated_bytes)),
        }
    }

    /// The image with everything that it is backed by.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn image(&self) -> Result<Image, ImageError> {
        Image::open(&self.path, self.format)
    }
}

/// Why a disk or replica cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The worker's store failed.
    #[error("look up disk {disk:?} of vm {vm}")]
    Store {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The record in the worker's store is damaged.
    #[error("the record of disk {disk:?} of vm {vm} is damaged")]
    Record {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The image cannot be opened or made.
    #[error("open the image {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not enough room.
    #[error(
        "no space for the replica {}: it needs {needed_bytes} bytes and {free_bytes} are free; \
         free some space or move the worker's data_dir", path.display()
    )]
    NoSpace {
        /// The image.
        path: PathBuf,
        /// What the source's image occupies, less what the replica occupies already.
        needed_bytes: u64,
        /// What the file system has.
        free_bytes: u64,
    },
    /// A replica cannot be brought to stable storage.
    #[error("bring the replica {} to stable storage", path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk that has become smaller.
    #[error(
        "the disk has {size_bytes} bytes and its replica {} has {held_bytes}: a replica is never cut; delete it and begin anew",
        path.display()
    )]
    Shrinks {
        /// The image.
        path: PathBuf,
        /// Its size.
        held_bytes: u64,
        /// What was asked for.
        size_bytes: u64,
    },
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nobody said what the image is, and it looks like something else than raw.
    #[error(
        "the image {} begins like a qcow2 file and the vm's definition does not say which format it has; that is not guessed, since a guest can \
         write such a beginning into a raw disk: define the vm with \"format: qcow2\" for this disk, or with \"format: raw\"", path.display()
    )]
    FormatUnsaid {
        /// The image.
        path: PathBuf,
    },
    /// A file of that name is there, and the disk is new.
    #[error("disk {disk:?} is to be made at {}, and there is something already: move it away", path.display())]
    DiskInTheWay {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
    },
    /// A disk could not be made.
    #[error("make disk {disk:?} at {}", path.display())]
    Make {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of that name is there, and it is not ours.
    #[error("the image is to be flattened to {}, and such a file is there already: move it away", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// A replica is raw, and this is not yet.
    #[error(
        "the disks of vm {vm} are being flattened from qcow2 to raw here before they are replicas: wait until that is done \
         (\"pageportctl replica list\" shows how far it is)"
    )]
    NotFlat {
        /// The VM.
        vm: VmId,
    },
    /// There is no replica of this disk here.
    #[error("this site holds no replica of disk {disk:?} of vm {vm}: seed it first")]
    Missing {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
    },
}

/// An open replica.
#[derive(Debug)]
pub struct ReplicaDisk {
    file: File,
    path: PathBuf,
    size_bytes: AtomicU64,
    instance: u64,
    version: AtomicU64,
    session: tokio::sync::Mutex<()>,
    /// Locked for reading by whoever writes, and for writing by whoever changes the size.
    closed: RwLock<bool>,
}

impl ReplicaDisk {
    /// Waits for the one session that may write at a time; the turn ends with the guard.
    pub async fn session_turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.session.lock().await
    }

    /// Size of the disk, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Makes the disk at least `size_bytes` large; what is new reads as zeros. Never shrinks.
    ///
    /// # Errors
    /// The system's, or `PermissionDenied` once it is closed.
    pub fn grow(&self, size_bytes: u64) -> io::Result<()> {
        let _alone = self.open_alone()?;
        if size_bytes > self.size_bytes() {
            self.file.set_len(size_bytes)?;
            self.size_bytes.store(size_bytes, Ordering::Release);
        }
        Ok(())
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
            self.file.set_len(size_bytes)?;
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

    /// Makes a range read as zeros, leaving a hole.
    ///
    /// # Errors
    /// The system's, `InvalidInput` past the end, or `PermissionDenied` once it is closed.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<u64> {
        let _open = self.open()?;
        self.check_range(offset, length)?;
        if length > 0 {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(self.file.as_fd(), hole, offset as i64, length as i64)?;
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

    /// The next range at or after `from` that is not a hole; `None`: only holes follow.
    ///
    /// # Errors
    /// The system's.
    pub fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        let start = match lseek64(self.file.as_fd(), from as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(nix::errno::Errno::ENXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = lseek64(self.file.as_fd(), start as i64, Whence::SeekHole)? as u64;
        Ok(Some((start, end.min(self.size_bytes()))))
    }

    /// Waits for writes under way, and refuses every later one: the file is somebody else's. It can still be read.
    fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
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

/// All disks and replicas of this host.
#[derive(Debug)]
pub struct ReplicaStore {
    store: Arc<Store>,
    folder: PathBuf,
    /// Of the disks that were added.
    disks_folder: PathBuf,
    open: Mutex<HashMap<(VmId, String), Arc<ReplicaDisk>>>,
}

impl ReplicaStore {
    /// Keeps its records in `store` and its files below `data_dir`.
    pub fn new(store: Arc<Store>, data_dir: &Path) -> Self {
        let (folder, disks_folder) = (data_dir.join("replicas"), data_dir.join("disks"));
        Self { store, folder, disks_folder, open: Mutex::default() }
    }

    /// Where a disk lies on this host, if it does.
    ///
    /// # Errors
    /// The worker's store failed or is damaged.
    pub fn locate(&self, vm: VmId, disk: &str) -> Result<Option<DiskLocation>, ReplicaError> {
        let failed = |source| ReplicaError::Store { vm, disk: disk.to_owned(), source };
        let Some(text) = self.store.get(key(vm, disk)).map_err(failed)? else { return Ok(None) };
        let location = serde_json::from_slice(&text);
        location.map(Some).map_err(|source| ReplicaError::Record { vm, disk: disk.to_owned(), source })
    }

    /// Where the owner's disk lies: as recorded, or (the first time) where and as the VM's definition says; [`None`]: it does not say the format.
    ///
    /// # Errors
    /// The worker's store failed, or the format would have to be guessed.
    pub fn locate_or_adopt(
        &self,
        vm: VmId,
        disk: &str,
        given: &Path,
        format: Option<Format>,
    ) -> Result<DiskLocation, ReplicaError> {
        if let Some(location) = self.locate(vm, disk)? {
            return Ok(location);
        }
        // One that cannot be read is for the hypervisor to complain of.
        if format.is_none() && begins_like_qcow2(given).unwrap_or(false) {
            return Err(ReplicaError::FormatUnsaid { path: given.to_owned() });
        }
        let location =
            DiskLocation { path: given.to_owned(), origin: Origin::Given, format: format.unwrap_or_default() };
        self.record(vm, disk, &location)?;
        Ok(location)
    }

    /// Opens a replica for writing, with this size, making it if there is none.
    ///
    /// # Errors
    /// As [`Self::open_as_it_is`]; [`ReplicaError::Shrinks`].
    pub fn open_for_writing(
        &self,
        vm: VmId,
        disk: &str,
        size_bytes: u64,
        allocated_bytes: u64,
    ) -> Result<Arc<ReplicaDisk>, ReplicaError> {
        let replica = self.open_as_it_is(vm, disk, allocated_bytes)?;
        replica.must_not_shrink(size_bytes)?;
        let failed = |source| ReplicaError::Open { path: replica.path.clone(), source };
        replica.grow(size_bytes).map_err(failed)?;
        Ok(replica)
    }

    /// Opens a replica for writing, with the size that it has; makes an empty one if there is none.
    ///
    /// # Errors
    /// [`ReplicaError::NoSpace`] when the source's `allocated_bytes` do not fit; [`ReplicaError::NotFlat`]; the system's.
    pub fn open_as_it_is(&self, vm: VmId, disk: &str, allocated_bytes: u64) -> Result<Arc<ReplicaDisk>, ReplicaError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = open.get(&(vm, disk.to_owned())) {
            return Ok(found.clone());
        }
        let location = match self.locate(vm, disk)? {
            Some(DiskLocation { format: Format::Qcow2, .. }) => {
                return Err(ReplicaError::NotFlat { vm });
            }
            Some(location) => location,
            None => {
                let path = self.folder.join(vm.to_string()).join(format!("{disk}.raw"));
                DiskLocation { path, origin: Origin::Made, format: Format::Raw }
            }
        };
        let replica = open_file(&location.path, allocated_bytes)?;
        self.record(vm, disk, &location)?;
        let replica = Arc::new(replica);
        open.insert((vm, disk.to_owned()), replica.clone());
        Ok(replica)
    }

    /// Opens a replica that is there: what a migration restores pages from.
    ///
    /// # Errors
    /// [`ReplicaError::Missing`]; the system's.
    pub fn open_existing(&self, vm: VmId, disk: &str) -> Result<Arc<ReplicaDisk>, ReplicaError> {
        let missing = || ReplicaError::Missing { vm, disk: disk.to_owned() };
        let location = self.locate(vm, disk)?.ok_or_else(missing)?;
        // It is not to be made.
        location.bytes()?;
        self.open_as_it_is(vm, disk, 0)
    }

    /// The images of a VM on this host, with the names of their disks.
    pub fn locations(&self, vm: VmId) -> Vec<(String, DiskLocation)> {
        let prefix = format!("disk/{vm}/");
        let pairs = self.store.scan(&prefix).unwrap_or_default();
        let location = |(key, text): (Vec<u8>, Vec<u8>)| {
            let name = String::from_utf8(key).ok()?.strip_prefix(&prefix)?.to_owned();
            Some((name, serde_json::from_slice::<DiskLocation>(&text).ok()?))
        };
        pairs.into_iter().filter_map(location).collect()
    }

    /// Names of the disks of a VM on this host.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn names(&self, vm: VmId) -> Result<Vec<String>, ReplicaError> {
        let prefix = format!("disk/{vm}/");
        let failed = |source| ReplicaError::Store { vm, disk: String::new(), source };
        let name = |(key, _): (Vec<u8>, Vec<u8>)| String::from_utf8(key).ok()?.strip_prefix(&prefix).map(str::to_owned);
        Ok(self.store.scan(&prefix).map_err(failed)?.into_iter().filter_map(name).collect())
    }

    /// Lets go of a VM's replicas: from now on the hypervisor changes these files, or they are deleted. Whoever still has them open
    /// writes them no more.
    pub fn close(&self, vm: VmId) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.extract_if(|(of, _), _| *of == vm).for_each(|(_, disk)| disk.close());
    }

    /// Forgets a VM's disks, and deletes those that this worker made.
    ///
    /// # Errors
    /// The worker's store failed, or a file cannot be deleted.
    pub fn remove(&self, vm: VmId) -> Result<(), ReplicaError> {
        self.close(vm);
        self.forget_flattening(vm)?;
        let prefix = format!("disk/{vm}/");
        let failed = |source| ReplicaError::Store { vm, disk: String::new(), source };
        let mut batch = Batch::default();
        for (name, text) in self.store.scan(&prefix).map_err(failed)? {
            let location: Option<DiskLocation> = serde_json::from_slice(&text).ok();
            if let Some(made) = location.filter(|location| location.origin == Origin::Made) {
                remove_if_there(&made.path)?;
            }
            batch.remove(name);
        }
        batch.remove(points::record_key(vm));
        let folder = self.folder.join(vm.to_string());
        let points = folder.join(points::FOLDER);
        if points.exists() {
            std::fs::remove_dir_all(&points).map_err(|source| ReplicaError::Open { path: points, source })?;
        }
        if folder.exists() {
            std::fs::remove_dir(&folder).map_err(|source| ReplicaError::Open { path: folder, source })?;
        }
        let disks = self.disks_folder.join(vm.to_string());
        if disks.exists() {
            std::fs::remove_dir_all(&disks).map_err(|source| ReplicaError::Open { path: disks, source })?;
        }
        self.store.commit(batch).map_err(failed)
    }

    fn record(&self, vm: VmId, disk: &str, location: &DiskLocation) -> Result<(), ReplicaError> {
        let mut batch = Batch::default();
        batch.put(key(vm, disk), self.text(vm, disk, location)?);
        self.commit(vm, disk, batch)
    }

    fn text(&self, vm: VmId, disk: &str, value: &impl Serialize) -> Result<Vec<u8>, ReplicaError> {
        let failed = |source| ReplicaError::Record { vm, disk: disk.to_owned(), source };
        serde_json::to_vec(value).map_err(failed)
    }

    fn commit(&self, vm: VmId, disk: &str, batch: Batch) -> Result<(), ReplicaError> {
        self.store.commit(batch).map_err(|source| ReplicaError::Store { vm, disk: disk.to_owned(), source })
    }
}

/// Size of an image and how much of it is not holes, in bytes.
///
/// # Errors
/// The system's.
pub fn image_bytes(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::metadata(path)?;
    Ok((meta.len(), meta.blocks() * 512))
}

fn key(vm: VmId, disk: &str) -> String {
    format!("disk/{vm}/{disk}")
}

fn open_file(path: &Path, allocated_bytes: u64) -> Result<ReplicaDisk, ReplicaError> {
    let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
        let held = image_bytes(path).map(|(_, allocated)| allocated).unwrap_or_default();
        let needed_bytes = allocated_bytes.saturating_sub(held);
        let free_bytes = free_bytes(folder).map_err(failed)?;
        if needed_bytes.saturating_add(SPARE_BYTES) > free_bytes {
            return Err(ReplicaError::NoSpace { path: path.to_owned(), needed_bytes, free_bytes });
        }
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
    let size_bytes = file.metadata().map_err(failed)?.len();
    file.sync_all().map_err(failed)?;
    let instance = rand::random::<u64>() | 1;
    Ok(ReplicaDisk {
        file,
        path: path.to_owned(),
        size_bytes: AtomicU64::new(size_bytes),
        instance,
        version: AtomicU64::new(0),
        session: tokio::sync::Mutex::default(),
        closed: RwLock::new(false),
    })
}

/// What the file system of a folder has left, in bytes.
pub(crate) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

fn remove_if_there(path: &Path) -> Result<(), ReplicaError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ReplicaError::Open { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

impl std::fmt::Display for ReplicaDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> (tempfile::TempDir, ReplicaStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let replicas = ReplicaStore::new(store, folder.path());
        (folder, replicas)
    }

    #[test]
    fn holes_stay_holes_and_writes_past_the_end_are_refused() {
        let (_folder, replicas) = setup();
        let vm = VmId::generate();
        let disk = replicas.open_for_writing(vm, "root", 1 << 20, 0).unwrap();
        disk.write(65536, &[7; 4096]).unwrap();
        assert_eq!(disk.next_data(0).unwrap(), Some((65536, 65536 + 4096)));
        disk.zero(65536, 4096).unwrap();
        assert_eq!(disk.next_data(0).unwrap(), None);
        assert_eq!(disk.write((1 << 20) - 1, &[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(disk.zero(u64::MAX, 2).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(disk.version(), 2);
    }

    #[test]
    fn a_replica_grows_with_its_disk_and_is_never_cut() {
        let (_folder, replicas) = setup();
        let vm = VmId::generate();
        let disk = replicas.open_for_writing(vm, "root", 8192, 0).unwrap();
        disk.write(4096, &[7; 4096]).unwrap();
        let grown = replicas.open_for_writing(vm, "root", 16384, 0).unwrap();
        assert!(Arc::ptr_eq(&disk, &grown));
        assert_eq!(disk.size_bytes(), 16384);
        for _ in ["open", "closed"] {
            let cut = replicas.open_for_writing(vm, "root", 4096, 0);
            assert!(matches!(cut, Err(ReplicaError::Shrinks { held_bytes: 16384, .. })), "{cut:?}");
            replicas.close(vm);
        }
    }

    #[test]
    fn whoever_still_holds_a_closed_replica_reads_it_and_writes_it_no_more() {
        let (_folder, replicas) = setup();
        let (vm, other) = (VmId::generate(), VmId::generate());
        let stale = replicas.open_for_writing(vm, "root", 8192, 0).unwrap();
        let kept = replicas.open_for_writing(other, "root", 8192, 0).unwrap();
        stale.write(0, b"a").unwrap();
        replicas.close(vm);
        for refused in [stale.write(0, b"b").map(drop), stale.zero(0, 1).map(drop), stale.grow(16384)] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        let mut found = [0];
        stale.read(0, &mut found).unwrap();
        assert_eq!((&found, stale.size_bytes()), (b"a", 8192));
        kept.write(0, b"c").unwrap();
        replicas.open_existing(vm, "root").unwrap().write(0, b"d").unwrap();
    }

    #[test]
    fn the_format_of_an_image_is_said_once_and_never_guessed() {
        let (folder, replicas) = setup();
        let given = folder.path().join("given");
        std::fs::write(&given, b"QFI\xfb and so on").unwrap();
        let adopt = |vm, format| replicas.locate_or_adopt(vm, "root", &given, format);
        let (unsaid, raw, qcow2) = (VmId::generate(), VmId::generate(), VmId::generate());
        let refused = adopt(unsaid, None).unwrap_err().to_string();
        assert!(refused.contains("format: qcow2") && refused.contains("format: raw"), "{refused}");
        assert_eq!(replicas.locate(unsaid, "root").unwrap(), None);
        assert_eq!(adopt(raw, Some(Format::Raw)).unwrap().format, Format::Raw);
        assert_eq!(adopt(qcow2, Some(Format::Qcow2)).unwrap().format, Format::Qcow2);
        // What is recorded counts from then on.
        assert_eq!(adopt(raw, None).unwrap().format, Format::Raw);
        assert_eq!(adopt(qcow2, None).unwrap().format, Format::Qcow2);
        std::fs::write(&given, [0; 4096]).unwrap();
        assert_eq!(adopt(unsaid, None).unwrap().format, Format::Raw);
    }

    #[test]
    fn a_qcow2_image_is_no_replica() {
        let (folder, replicas) = setup();
        let (vm, given) = (VmId::generate(), folder.path().join("given"));
        replicas.locate_or_adopt(vm, "root", &given, Some(Format::Qcow2)).unwrap();
        let refused = replicas.open_for_writing(vm, "root", 4096, 0);
        assert!(matches!(refused, Err(ReplicaError::NotFlat { .. })), "{refused:?}");
        assert!(!given.exists());
    }

    #[test]
    fn a_replica_that_cannot_fit_is_refused_before_it_is_made() {
        let (folder, replicas) = setup();
        let vm = VmId::generate();
        let refused = replicas.open_for_writing(vm, "root", 1 << 50, 1 << 50);
        assert!(matches!(refused, Err(ReplicaError::NoSpace { .. })), "{refused:?}");
        assert!(!folder.path().join("replicas").join(vm.to_string()).join("root.raw").exists());
    }

    #[test]
    fn removal_deletes_what_the_worker_made_and_spares_what_was_given() {
        let (folder, replicas) = setup();
        let given = folder.path().join("given.raw");
        std::fs::write(&given, [0; 4096]).unwrap();
        let (owner, copied) = (VmId::generate(), VmId::generate());
        assert_eq!(replicas.locate_or_adopt(owner, "root", &given, None).unwrap().path, given);
        let made = replicas.open_for_writing(copied, "root", 4096, 0).unwrap().path.clone();
        replicas.remove(owner).unwrap();
        replicas.remove(copied).unwrap();
        assert!(given.exists() && !made.exists());
        assert_eq!(replicas.locate(owner, "root").unwrap(), None);
    }
}
