//! What a VM's old place keeps of its memory, so that moving back costs the difference.
//!
//! ```text
//!   a ── pages that lie on no disk ══ memory stream ══▶ b
//!   └▶ kept/<vm>/<migration>: the pages, in order       └▶ their digests, in the same order: `Arrived`
//!
//!   back:  b finds a page's digest in `Arrived` ── reference ══▶ a reads the page from the file
//! ```
//! A page has a number: how many of its kind the stream had before it. Both sides count, so nothing is sent to agree on them. Pages that were
//! themselves references to kept memory count, too, and are kept anew.
//!
//! Guarantees: nothing here can put a wrong byte into a guest, since every batch is verified; a file that is gone, cut or of another
//! migration costs bytes on the link. A migration never waits for the file: what cannot keep up is given up. Files are for the worker's user alone, are not
//! kept beyond the VM's next move or its end, and never take the last of a file system.
//!
//! - [`keeping`]: the old place, while it sends.
//! - [`arrived`]: the new place, while it receives and until it sends back.

pub mod arrived;
pub mod keeping;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pageport_proto::{MigrationId, VmId};
use pageport_teleport::PAGE_SIZE;

use self::arrived::Arrived;
use self::keeping::Keeping;
use crate::replica::store::free_bytes;

/// Whether memory is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepConfig {
    /// Off: nothing is written, and nothing of what others keep is used.
    pub keep: bool,
    /// Left free on the file system, in bytes.
    pub reserve_bytes: u64,
}

/// The memory that this worker keeps, and what it knows of what others keep.
#[derive(Debug)]
pub struct KeptMemory {
    folder: PathBuf,
    config: KeepConfig,
    arrived: Mutex<HashMap<VmId, Arc<Arrived>>>,
}

impl KeptMemory {
    /// Keeps its files below `data_dir`.
    pub fn new(data_dir: &Path, config: KeepConfig) -> Self {
        Self { folder: data_dir.join("kept"), config, arrived: Mutex::default() }
    }

    /// Begins to keep what a migration sends; [`None`]: it is not wanted, or there is no room for all of the guest's memory.
    pub fn begin(&self, vm: VmId, migration: MigrationId, memory_bytes: u64) -> Option<Keeping> {
        if !self.config.keep {
            return None;
        }
        let begun = self.path(vm, migration).and_then(|path| {
            let folder = path.parent().unwrap_or(&self.folder);
            if free_bytes(folder)? < memory_bytes.saturating_add(self.config.reserve_bytes) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Keeping::begin(path, memory_bytes)
        });
        begun.inspect_err(|error| tracing::info!(vm_id = %vm, %error, "the guest's memory is not kept")).ok()
    }

    /// The pages that this worker kept when that migration took the VM away; [`None`]: none.
    pub fn open(&self, vm: VmId, migration: MigrationId) -> Option<KeptPages> {
        let path = self.config.keep.then(|| self.folder.join(vm.to_string()).join(migration.to_string()))?;
        let file = File::open(path).ok()?;
        let pages = file.metadata().ok()?.len() / PAGE_SIZE as u64;
        (pages > 0).then_some(KeptPages { file, pages })
    }

    /// The VM has come here.
    pub fn came(&self, vm: VmId, arrived: Arrived) {
        self.lock().insert(vm, Arc::new(arrived));
    }

    /// What `worker` has kept of the VM, which came from there.
    pub fn kept_by(&self, vm: VmId, worker: &str) -> Option<Arc<Arrived>> {
        let arrived = self.lock().get(&vm).cloned()?;
        (self.config.keep && arrived.source() == worker && !arrived.is_empty()).then_some(arrived)
    }

    /// What is known of the VM's memory elsewhere is of no more use.
    pub fn forget_arrived(&self, vm: VmId) {
        self.lock().remove(&vm);
    }

    /// Deletes what was kept of a VM.
    pub fn delete(&self, vm: VmId) {
        delete(&self.folder.join(vm.to_string()));
    }

    /// Deletes what was kept of other VMs than these, and what an earlier worker did not complete.
    pub fn retain(&self, keep: impl Fn(VmId) -> bool) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let vm: Option<VmId> = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if !vm.is_some_and(&keep) {
                delete(&entry.path());
                continue;
            }
            let files = std::fs::read_dir(entry.path()).into_iter().flatten().flatten().map(|file| file.path());
            files.filter(|path| path.extension().is_some()).for_each(|path| drop(std::fs::remove_file(path)));
        }
    }

    /// Where a migration's pages go; those of earlier ones are deleted.
    fn path(&self, vm: VmId, migration: MigrationId) -> io::Result<PathBuf> {
        let folder = self.folder.join(vm.to_string());
        delete(&folder);
        std::fs::create_dir_all(&folder)?;
        Ok(folder.join(migration.to_string()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Arc<Arrived>>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn delete(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "kept memory is not deleted");
        }
        _ => {}
    }
}

/// Pages that were kept.
#[derive(Debug)]
pub struct KeptPages {
    file: File,
    pages: u64,
}

impl KeptPages {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.pages
    }

    /// Reads whole pages, from number `first` on.
    ///
    /// # Errors
    /// There are not so many, or the system's.
    pub fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        let offset = first.checked_mul(PAGE_SIZE as u64).ok_or(io::ErrorKind::InvalidInput)?;
        self.file.read_exact_at(into, offset)
    }
}

#[cfg(test)]
mod tests;
