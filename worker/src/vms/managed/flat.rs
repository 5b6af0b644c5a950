//! The images of a VM that this worker does not own, as they become raw: what must not happen while a hypervisor has them.

use std::path::Path;
use std::sync::Arc;

use pageport_ownership::Guest;

use super::{ManagedVm, State, VmError};
use crate::replica::flatten::Flattenings;
use crate::replica::store::ReplicaStore;
use crate::replica::store::flattening::Step;

impl ManagedVm {
    /// The disks and replicas of this host.
    pub fn replicas(&self) -> &ReplicaStore {
        &self.shared.replicas
    }

    /// What makes raw files of qcow2 images.
    pub fn flattenings(&self) -> &Arc<Flattenings> {
        &self.shared.flattenings
    }

    /// Has qcow2 images made raw, if the VM is not this worker's any more.
    pub fn flatten_what_was_left(self: &Arc<Self>) {
        let status = self.status();
        if status.record.owned().is_none() && status.volatile.guest == Guest::Absent {
            self.shared.flattenings.follow(self);
        }
    }

    /// Makes a raw file a disk, unless a hypervisor has taken the image meanwhile.
    ///
    /// # Errors
    /// It has, or the worker's store failed.
    pub async fn record_flat_disk(&self, disk: &str, from: &Path, to: &Path) -> Result<Step, VmError> {
        let state = self.state.lock().await;
        self.must_be_left(&state)?;
        let replicas = &self.shared.replicas;
        tokio::task::block_in_place(|| match replicas.flattening_step(self.id, disk)? {
            Some(Step::Converting { .. }) => Ok(replicas.record_flat(self.id, disk, from, to)?),
            // Forgotten since: the disks were removed.
            _ => Err(VmError::DisksTaken { vm: self.id }),
        })
    }

    /// Makes the disks, which are raw now, the recovery point that they are to be.
    ///
    /// # Errors
    /// A hypervisor has taken them meanwhile, the worker's store failed, or the disks.
    pub async fn adopt_flat_disks(&self) -> Result<(), VmError> {
        let state = self.state.lock().await;
        self.must_be_left(&state)?;
        let (replicas, groups) = (&self.shared.replicas, &self.shared.groups);
        tokio::task::block_in_place(|| {
            let Some(adoption) = replicas.adoption(self.id)? else { return Ok(()) };
            let names = replicas.names(self.id)?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            groups.adopt(replicas, self.id, &names, adoption.lineage, adoption.taken_unix_ms)?;
            Ok(replicas.adopted(self.id)?)
        })
    }

    fn must_be_left(&self, state: &State) -> Result<(), VmError> {
        let left = state.qemu.is_none() && state.durable.record().owned().is_none();
        if left { Ok(()) } else { Err(VmError::DisksTaken { vm: self.id }) }
    }
}
