//! What is on stable storage about images that become raw: which are to, how far that is, and what follows.
//!
//! | key of the worker's store | value |
//! |---|---|
//! | `flatten/<vm>/<disk>` | the [`Step`] that flattening the disk's image is at |
//! | `adopt/<vm>` | the [`Adoption`] that follows when all of a VM's images are raw |
//!
//! ```text
//!   (none) ─▶ Converting ─ file written, synced, renamed ─▶ Recorded (the raw file is the disk) ─ qcow2 file removed ─▶ (none)
//!                └─ a hypervisor takes the disk: what was written is removed
//! ```
//! Guarantees: until the raw file is whole, on stable storage and recorded, the qcow2 file is the disk and is only read. What backs it is never
//! touched. No file that was there before is overwritten.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use pageport_common::store::Batch;
use pageport_proto::VmId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DiskLocation, ReplicaError, ReplicaStore, key, remove_if_there};
use crate::image::Format;

/// Where the flattening of an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The qcow2 file is the disk. What lies at `to`, or where it is [written](written), is ours.
    Converting {
        /// The qcow2 file.
        from: PathBuf,
        /// The raw file, once it is whole.
        to: PathBuf,
    },
    /// The raw file is the disk.
    Recorded {
        /// The qcow2 file, which is to go.
        from: PathBuf,
    },
}

/// What a VM's disks become once all are raw: the one recovery point of this lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    /// The lineage's number.
    pub lineage: u64,
    /// When the disks were as they are: milliseconds since 1970.
    pub taken_unix_ms: i64,
}

/// Where a raw file lies until it is whole.
pub fn written(to: &Path) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

impl ReplicaStore {
    /// Disks of a VM whose images are qcow2 files, or whose flattening has not ended.
    pub fn unflattened(&self, vm: VmId) -> Vec<String> {
        let qcow2 = self.locations(vm).into_iter().filter(|(_, location)| location.format == Format::Qcow2);
        let prefix = format!("flatten/{vm}/");
        let steps = self.store.scan(&prefix).unwrap_or_default().into_iter();
        let begun = steps.filter_map(|(key, _)| String::from_utf8(key).ok()?.strip_prefix(&prefix).map(str::to_owned));
        let mut names: Vec<String> = qcow2.map(|(name, _)| name).chain(begun).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Refuses to use a VM's images as replicas while one is a qcow2 file, or before what they are is known.
    ///
    /// # Errors
    /// [`ReplicaError::NotFlat`]; the worker's store failed.
    pub fn must_be_flat(&self, vm: VmId) -> Result<(), ReplicaError> {
        let flat = self.unflattened(vm).is_empty() && self.adoption(vm)?.is_none();
        if flat { Ok(()) } else { Err(ReplicaError::NotFlat { vm }) }
    }

    /// The step that a disk is at, if its flattening has begun.
    ///
    /// # Errors
    /// The worker's store failed or is damaged.
    pub fn flattening_step(&self, vm: VmId, disk: &str) -> Result<Option<Step>, ReplicaError> {
        self.read(vm, disk, &step_key(vm, disk))
    }

    /// Claims the place of the raw file beside the qcow2 file.
    ///
    /// # Errors
    /// [`ReplicaError::InTheWay`]; the worker's store failed.
    pub fn begin_flattening(&self, vm: VmId, disk: &str, image: &Path) -> Result<Step, ReplicaError> {
        let failed = |source| ReplicaError::Open { path: image.to_owned(), source };
        // Beside the file itself, if this is a link to it.
        let from = std::fs::canonicalize(image).map_err(failed)?;
        let mut to = from.clone().into_os_string();
        to.push(".raw");
        let to = PathBuf::from(to);
        for path in [to.clone(), written(&to)] {
            if path.symlink_metadata().is_ok() {
                return Err(ReplicaError::InTheWay { path });
            }
        }
        let step = Step::Converting { from, to };
        let mut batch = Batch::default();
        batch.put(step_key(vm, disk), self.text(vm, disk, &step)?);
        self.commit(vm, disk, batch)?;
        Ok(step)
    }

    /// The raw file is whole and on stable storage: it is the disk from now on.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn record_flat(&self, vm: VmId, disk: &str, from: &Path, to: &Path) -> Result<Step, ReplicaError> {
        let Some(before) = self.locate(vm, disk)? else {
            return Err(ReplicaError::Missing { vm, disk: disk.to_owned() });
        };
        let location = DiskLocation { path: to.to_owned(), format: Format::Raw, ..before };
        let step = Step::Recorded { from: from.to_owned() };
        let mut batch = Batch::default();
        batch.put(key(vm, disk), self.text(vm, disk, &location)?);
        batch.put(step_key(vm, disk), self.text(vm, disk, &step)?);
        self.commit(vm, disk, batch)?;
        Ok(step)
    }

    /// Removes the qcow2 file of a disk whose raw file is recorded: its flattening has ended.
    ///
    /// # Errors
    /// The file cannot be removed, or the worker's store failed.
    pub fn end_flattening(&self, vm: VmId, disk: &str, from: &Path) -> Result<(), ReplicaError> {
        remove_durably(from)?;
        let mut batch = Batch::default();
        batch.remove(step_key(vm, disk));
        self.commit(vm, disk, batch)
    }

    /// A VM's images are to be what they are: what has been written of raw files is removed, and nothing is adopted. What is recorded stays.
    ///
    /// # Errors
    /// A file cannot be removed, or the worker's store failed.
    pub fn forget_flattening(&self, vm: VmId) -> Result<(), ReplicaError> {
        for disk in self.unflattened(vm) {
            match self.flattening_step(vm, &disk)? {
                None => continue,
                Some(Step::Converting { to, .. }) => {
                    remove_durably(&written(&to))?;
                    remove_durably(&to)?;
                }
                Some(Step::Recorded { from }) => remove_durably(&from)?,
            }
            let mut batch = Batch::default();
            batch.remove(step_key(vm, &disk));
            self.commit(vm, &disk, batch)?;
        }
        self.adopted(vm)
    }

    /// Once all of a VM's images are raw, they are to become a recovery point.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn adopt_when_flat(&self, vm: VmId, adoption: Adoption) -> Result<(), ReplicaError> {
        let mut batch = Batch::default();
        batch.put(adoption_key(vm), self.text(vm, "", &adoption)?);
        self.commit(vm, "", batch)
    }

    /// What a VM's images are to become once all are raw.
    ///
    /// # Errors
    /// The worker's store failed or is damaged.
    pub fn adoption(&self, vm: VmId) -> Result<Option<Adoption>, ReplicaError> {
        self.read(vm, "", &adoption_key(vm))
    }

    /// They have become it, or never will.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn adopted(&self, vm: VmId) -> Result<(), ReplicaError> {
        if self.adoption(vm)?.is_none() {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.remove(adoption_key(vm));
        self.commit(vm, "", batch)
    }

    fn read<T: DeserializeOwned>(&self, vm: VmId, disk: &str, key: &str) -> Result<Option<T>, ReplicaError> {
        let failed = |source| ReplicaError::Store { vm, disk: disk.to_owned(), source };
        let Some(text) = self.store.get(key).map_err(failed)? else { return Ok(None) };
        let value = serde_json::from_slice(&text);
        value.map(Some).map_err(|source| ReplicaError::Record { vm, disk: disk.to_owned(), source })
    }
}

fn step_key(vm: VmId, disk: &str) -> String {
    format!("flatten/{vm}/{disk}")
}

fn adoption_key(vm: VmId) -> String {
    format!("adopt/{vm}")
}

/// Removes a file, there or not, for good.
fn remove_durably(path: &Path) -> Result<(), ReplicaError> {
    remove_if_there(path)?;
    sync_folder_of(path).map_err(|source| ReplicaError::Open { path: path.to_owned(), source })
}

/// Makes what was done to a file's name durable.
///
/// # Errors
/// The system's.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent().map(File::open) {
        Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Some(folder) => folder?.sync_all(),
        None => Ok(()),
    }
}
