//! Replicas on block devices: which may be used, and how a device is written where it is not like a file.
//!
//! ```text
//!   place named ─▶ allowed? ─▶ a block device? ─▶ in nobody's use? ─▶ large enough? ─▶ no other disk's? ─▶ empty? ─▶ recorded as the disk
//! ```
//! | | file | block device |
//! |---|---|---|
//! | size of the disk | the file's | in the record of the disk; the device may be larger |
//! | what is new as the disk grows | zeros, as a hole | made zeros, on stable storage, before the size is recorded |
//! | zeros | a hole | the device's own way, else written |
//! | what is data | what is no hole | all of it |
//!
//! Guarantees: nothing that is not zeros at both ends is taken for a replica's place, but what this worker has recorded as the disk itself. Nobody
//! can mount a device while it is open as a replica. Nothing is deleted from a device when its replica is forgotten.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use pageport_common::store::{Batch, Store};
use pageport_proto::VmId;

use super::{DiskLocation, Origin, ReplicaError, ReplicaStore, key};
use crate::image::Format;

/// Looked at on both ends of a device before it is used: where tables of partitions, labels and file systems say what they are.
const LOOK_BYTES: u64 = 1 << 20;
/// Zeros are made in ranges of whole blocks of this size, which every device takes.
const ALIGN_BYTES: u64 = 4096;
/// Sizes of disks on devices are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// What a replica on a block device has besides the open device.
#[derive(Debug)]
pub(super) struct Device {
    store: Arc<Store>,
    vm: VmId,
    disk: String,
    location: DiskLocation,
    /// Keeps others from mounting it. Ranges are zeroed through it: the kernel refuses that to others while somebody has the device exclusively and it
    /// still holds back writes to the range.
    claim: Mutex<Option<Arc<File>>>,
}

impl Device {
    /// Makes the disk larger: what is new reads as zeros, and the size is recorded.
    pub(super) fn grow(&self, file: &File, held_bytes: u64, size_bytes: u64) -> io::Result<()> {
        self.check(file, size_bytes)?;
        self.zero(held_bytes, size_bytes - held_bytes)?;
        file.sync_data()?;
        self.record(size_bytes)
    }

    /// Makes the disk so large, whatever what is new holds.
    pub(super) fn resize(&self, file: &File, size_bytes: u64) -> io::Result<()> {
        self.check(file, size_bytes)?;
        self.record(size_bytes)
    }

    /// Makes a range zeros. A device that knows how is told to, and may give back what it holds; others are written.
    pub(super) fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match claim {
            Some(file) => zero(&file, offset, length),
            None => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Lets others have it.
    pub(super) fn let_go(&self) {
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn check(&self, file: &File, size_bytes: u64) -> io::Result<()> {
        if !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let why = format!(
                "a disk of {size_bytes} bytes cannot lie on a block device: that is no multiple of {SECTOR_BYTES}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        must_hold(&self.location.path, length(file)?, size_bytes).map_err(io::Error::other)
    }

    fn record(&self, size_bytes: u64) -> io::Result<()> {
        let location = DiskLocation { size_bytes: Some(size_bytes), ..self.location.clone() };
        let mut batch = Batch::default();
        batch.put(key(self.vm, &self.disk), serde_json::to_vec(&location)?);
        self.store.commit(batch).map_err(io::Error::other)
    }
}

impl ReplicaStore {
    /// Opens the device that a disk lies on, for this worker alone. It is never made.
    pub(super) fn open_device(
        &self,
        vm: VmId,
        disk: &str,
        location: &DiskLocation,
        size_bytes: u64,
    ) -> Result<(File, Device), ReplicaError> {
        let path = &location.path;
        let failed = |source| ReplicaError::Open { path: path.clone(), source };
        let claim = claim(path)?;
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        must_hold(path, length(&file).map_err(failed)?, size_bytes)?;
        let (store, disk, location) = (self.store.clone(), disk.to_owned(), location.clone());
        Ok((file, Device { store, vm, disk, location, claim: Mutex::new(Some(Arc::new(claim))) }))
    }

    /// Records a device as the place of a replica that is not there yet.
    ///
    /// # Errors
    /// It must not be used, with the reason and the way out; the worker's store failed.
    pub(super) fn claim_device(
        &self,
        vm: VmId,
        disk: &str,
        path: &Path,
        size_bytes: u64,
    ) -> Result<DiskLocation, ReplicaError> {
        if !is_allowed(&self.devices, path) {
            return Err(ReplicaError::DeviceNotAllowed { path: path.to_owned() });
        }
        let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
        self.must_be_no_other_disk(vm, disk, path)?;
        // Until it is recorded nobody else begins to use it.
        let device = claim(path)?;
        let device_bytes = length(&device).map_err(failed)?;
        must_hold(path, device_bytes, size_bytes)?;
        for offset in [0, device_bytes.saturating_sub(LOOK_BYTES)] {
            let mut content = vec![0; LOOK_BYTES.min(device_bytes) as usize];
            device.read_exact_at(&mut content, offset).map_err(failed)?;
            if content.iter().any(|byte| *byte != 0) {
                return Err(ReplicaError::DeviceNotEmpty { path: path.to_owned() });
            }
        }
        let location =
            DiskLocation { path: path.to_owned(), origin: Origin::Given, format: Format::Raw, size_bytes: Some(0) };
        self.record(vm, disk, &location)?;
        tracing::info!(vm_id = %vm, disk, path = %path.display(), device_bytes, "block device taken for a replica");
        Ok(location)
    }

    /// Makes a disk of a VM that is not open as a replica at least so large, if it lies on a block device. A hypervisor that has it may not write behind the
    /// size that it had.
    ///
    /// # Errors
    /// [`ReplicaError::DeviceSmall`]; the system's.
    pub fn grow_on_device(&self, vm: VmId, disk: &str, size_bytes: u64) -> Result<(), ReplicaError> {
        let Some(location) = self.locate(vm, disk)? else { return Ok(()) };
        let Some(held_bytes) = location.size_bytes.filter(|held_bytes| *held_bytes < size_bytes) else { return Ok(()) };
        let (file, device) = self.open_device(vm, disk, &location, size_bytes)?;
        let failed = |source| ReplicaError::Open { path: location.path.clone(), source };
        device.grow(&file, held_bytes, size_bytes).map_err(failed)
    }

    /// Whichever names they have, two disks never share a device.
    pub(super) fn must_be_no_other_disk(&self, vm: VmId, disk: &str, path: &Path) -> Result<(), ReplicaError> {
        let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
        let number = device_number(path).map_err(failed)?;
        for (of, name, location) in self.all_locations()? {
            let is_itself = of == vm && name == disk;
            if !is_itself && location.size_bytes.is_some() && device_number(&location.path).is_ok_and(|it| it == number)
            {
                return Err(ReplicaError::DeviceTaken { path: path.to_owned(), vm: of, disk: name });
            }
        }
        Ok(())
    }
}

/// Is there a block device of this name, or does a link lead to one?
pub fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Size of an open file or block device, in bytes.
///
/// # Errors
/// The system's.
pub fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Is the place one of these, or below one? What climbs back is not.
fn is_allowed(allowed: &[PathBuf], path: &Path) -> bool {
    let plain = path.is_absolute() && path.components().all(|part| part != Component::ParentDir);
    plain && allowed.iter().any(|place| path.starts_with(place))
}

fn device_number(path: &Path) -> io::Result<u64> {
    Ok(path.metadata()?.rdev())
}

/// Opens a block device so that nobody else can mount it or use it exclusively, nor does now.
fn claim(path: &Path) -> Result<File, ReplicaError> {
    let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
    if !path.metadata().map_err(failed)?.file_type().is_block_device() {
        return Err(ReplicaError::NotADevice { path: path.to_owned() });
    }
    let exclusive = OFlag::O_EXCL.bits();
    match OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path) {
        Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
            Err(ReplicaError::DeviceInUse { path: path.to_owned() })
        }
        opened => opened.map_err(failed),
    }
}

/// Size of a device that holds a disk of this size, in bytes.
///
/// # Errors
/// [`ReplicaError::DeviceSmall`]; the system's.
pub fn must_fit(path: &Path, size_bytes: u64) -> Result<u64, ReplicaError> {
    let opened = File::open(path).and_then(|device| length(&device));
    let device_bytes = opened.map_err(|source| ReplicaError::Open { path: path.to_owned(), source })?;
    must_hold(path, device_bytes, size_bytes).map(|()| device_bytes)
}

pub(super) fn must_hold(path: &Path, device_bytes: u64, size_bytes: u64) -> Result<(), ReplicaError> {
    if size_bytes <= device_bytes {
        return Ok(());
    }
    Err(ReplicaError::DeviceSmall { path: path.to_owned(), device_bytes, size_bytes })
}

fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let end = offset + length;
    let (first, last) = (offset.next_multiple_of(ALIGN_BYTES).min(end), end / ALIGN_BYTES * ALIGN_BYTES);
    if first >= last {
        return write_zeros(file, offset, end);
    }
    write_zeros(file, offset, first)?;
    write_zeros(file, last, end)?;
    let range = |flags| {
        fallocate(file.as_fd(), flags | FallocateFlags::FALLOC_FL_KEEP_SIZE, first as i64, (last - first) as i64)
    };
    match range(FallocateFlags::FALLOC_FL_PUNCH_HOLE) {
        Err(Errno::EOPNOTSUPP) => Ok(range(FallocateFlags::FALLOC_FL_ZERO_RANGE)?),
        punched => Ok(punched?),
    }
}

fn write_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    file.write_all_at(&vec![0; (to - from) as usize], from)
}

#[cfg(test)]
mod tests;
