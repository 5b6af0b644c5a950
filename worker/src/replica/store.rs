//! Which file on this host holds a VM's disk, and the replica files themselves.
//!
//! | where | what |
//! |---|---|
//! | key `disk/<vm>/<disk>` of the worker's store | path, format and [`Origin`] of the image on this host |
//! | `replicas/<vm>/<disk>.raw` below the VM's [pool](crate::pool) | a replica that this worker made |
//! | `disks/<vm>/<disk>.raw` below it | a disk that was added, and that this worker made where no path was given |
//!
//! An image that an operator provided ([`Origin::Given`]) is never deleted. When its VM moves away it becomes the
//! replica for the way back. Replicas are raw: a qcow2 image is flattened first ([`flattening`]). An operator may have a replica made on a block
//! device ([`device`]), which counts as given.

pub mod device;
mod disk;
mod error;
pub mod flattening;
mod making;
mod room;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pageport_common::store::{Batch, Store};
use pageport_proto::{PoolName, VmId};
use serde::{Deserialize, Serialize};

pub use self::disk::ReplicaDisk;
use self::disk::SPARE_BYTES;
pub use self::error::ReplicaError;
use self::room::Expected;
use super::points;
use crate::image::{Format, Image, ImageError, begins_like_qcow2, qcow2_bytes};
use crate::pool::{self, Pools};

/// Unit of digests and of comparison, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

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
    /// Of a block device: how much of it is the disk, in bytes; [`None`]: it is a file, which has the disk's size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
}

impl DiskLocation {
    /// Size of the disk, and how much of the image's own file is not holes, in bytes.
    ///
    /// # Errors
    /// The image cannot be looked at.
    pub fn bytes(&self) -> Result<(u64, u64), ImageError> {
        let failed = |source| ImageError::Open { path: self.path.clone(), source };
        if let Some(size_bytes) = self.size_bytes {
            self.path.metadata().map_err(failed)?;
            return Ok((size_bytes, size_bytes));
        }
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
        match self.size_bytes {
            Some(size_bytes) => Ok(Image::device(&self.path, size_bytes)),
            None => Image::open(&self.path, self.format),
        }
    }
}

/// All disks and replicas of this host.
#[derive(Debug)]
pub struct ReplicaStore {
    store: Arc<Store>,
    pools: Arc<Pools>,
    /// Block devices, and folders of such, that replicas may be made on.
    devices: Vec<PathBuf>,
    expected: Mutex<Expected>,
    open: Mutex<HashMap<(VmId, String), Arc<ReplicaDisk>>>,
}

impl ReplicaStore {
    /// Keeps its records in `store` and its files below `data_dir`, where there may be as many as there is room for.
    pub fn new(store: Arc<Store>, data_dir: &Path) -> Self {
        let pools = Pools::only(store.clone(), data_dir, SPARE_BYTES);
        Self::over(store, Arc::new(pools))
    }

    /// Keeps its records in `store` and its files in these pools.
    pub fn over(store: Arc<Store>, pools: Arc<Pools>) -> Self {
        Self { store, pools, devices: vec![], expected: Mutex::default(), open: Mutex::default() }
    }

    /// Replicas may be made on these block devices, or on those in these folders.
    #[must_use]
    pub fn allow(self, devices: Vec<PathBuf>) -> Self {
        Self { devices, ..self }
    }

    /// Sees to it that the VM's replica lies in this pool, which is there.
    ///
    /// # Errors
    /// It lies in another, or the pool must not be used, with the reason and the way out.
    pub fn choose_pool(&self, vm: VmId, asked: &PoolName) -> Result<(), ReplicaError> {
        if self.names(vm)?.is_empty() {
            return Ok(self.pools.choose(vm, asked)?);
        }
        let held = self.pools.ready(vm)?.name().clone();
        if held == *asked { Ok(()) } else { Err(ReplicaError::Pooled { vm, held, asked: asked.clone() }) }
    }

    /// Refuses what is to be done with a VM's replica while its pool is not there.
    ///
    /// # Errors
    /// The pool is not there; the worker's store failed.
    pub fn must_be_there(&self, vm: VmId) -> Result<(), ReplicaError> {
        Ok(self.pools.ready(vm).map(drop)?)
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
        let format = format.unwrap_or_default();
        let size_bytes = if format == Format::Raw && device::is_device(given) {
            self.must_be_no_other_disk(vm, disk, given)?;
            let failed = |source| ReplicaError::Open { path: given.to_owned(), source };
            Some(File::open(given).and_then(|device| device::length(&device)).map_err(failed)?)
        } else {
            None
        };
        let location = DiskLocation { path: given.to_owned(), origin: Origin::Given, format, size_bytes };
        self.record(vm, disk, &location)?;
        Ok(location)
    }

    /// Opens a replica for writing, with this size, making it if there is none. All of it is to be compared.
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
        replica.must_have_room(size_bytes)?;
        let failed = |source| ReplicaError::Open { path: replica.path().to_owned(), source };
        replica.grow_to_compare(size_bytes).map_err(failed)?;
        Ok(replica)
    }

    /// Sees to it that the replica of a disk of `size_bytes` lies on this block device. What it is to be made on is checked and recorded.
    ///
    /// # Errors
    /// It lies elsewhere, or the device must not be used, with the reason and the way out.
    pub fn place(&self, vm: VmId, disk: &str, device: &Path, size_bytes: u64) -> Result<(), ReplicaError> {
        match self.locate(vm, disk)? {
            Some(location) if location.path == device => Ok(()),
            Some(DiskLocation { path: held, .. }) => {
                Err(ReplicaError::Placed { disk: disk.to_owned(), held, asked: device.to_owned() })
            }
            None => self.claim_device(vm, disk, device, size_bytes).map(drop),
        }
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
                let path = self.pools.of(vm)?.replica(vm).join(format!("{disk}.raw"));
                DiskLocation { path, origin: Origin::Made, format: Format::Raw, size_bytes: None }
            }
        };
        let replica = match location.size_bytes {
            Some(size_bytes) => {
                let (file, device) = self.open_device(vm, disk, &location, size_bytes)?;
                ReplicaDisk::new(&location.path, file, size_bytes, Some(device))
            }
            None => {
                let pool = self.pools.ready(vm)?;
                let replica = ReplicaDisk::in_file(&location.path, allocated_bytes, pool.name())?;
                self.record(vm, disk, &location)?;
                replica
            }
        };
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
        if let Err(error) = location.bytes() {
            self.must_be_there(vm)?;
            return Err(error.into());
        }
        self.open_as_it_is(vm, disk, 0)
    }

    /// The image of a disk of a VM on this host.
    ///
    /// # Errors
    /// [`ImageError`], or that the pool that it lies in is not there.
    pub fn image(&self, vm: VmId, location: &DiskLocation) -> Result<Image, ReplicaError> {
        if location.bytes().is_err() {
            self.must_be_there(vm)?;
        }
        Ok(location.image()?)
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

    /// The disks of all VMs on this host. What cannot be read is left out.
    fn all_locations(&self) -> Result<Vec<(VmId, String, DiskLocation)>, ReplicaError> {
        let failed = |source| ReplicaError::Scan { source };
        let location = |(key, text): (Vec<u8>, Vec<u8>)| {
            let key = String::from_utf8(key).ok()?;
            let (vm, disk) = key.strip_prefix("disk/")?.split_once('/')?;
            Some((vm.parse().ok()?, disk.to_owned(), serde_json::from_slice(&text).ok()?))
        };
        Ok(self.store.scan("disk/").map_err(failed)?.into_iter().filter_map(location).collect())
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
    /// The worker's store failed, or a file cannot be deleted, or is in a pool that is not there.
    pub fn remove(&self, vm: VmId) -> Result<(), ReplicaError> {
        self.close(vm);
        let pool = self.pools.leaving(vm)?;
        self.expect_nothing(vm);
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
        batch.remove(pool::record_key(vm));
        if let Some(pool) = pool {
            let folder = pool.replica(vm);
            remove_folder(folder.join(points::FOLDER), |points| std::fs::remove_dir_all(points))?;
            remove_folder(folder, |folder| std::fs::remove_dir(folder))?;
            remove_folder(pool.disks(vm), |disks| std::fs::remove_dir_all(disks))?;
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

/// Size of an image that is a file, and how much of it is not holes, in bytes.
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

/// What the file system of a folder has left, in bytes.
pub(crate) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Removes a folder, there or not.
fn remove_folder(path: PathBuf, remove: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), ReplicaError> {
    match remove(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ReplicaError::Open { path, source }),
        _ => Ok(()),
    }
}

fn remove_if_there(path: &Path) -> Result<(), ReplicaError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ReplicaError::Open { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
