//! The VMs of this host: their ownership records, their hypervisors, and what brings both in line with the order.
//!
//! - [`records`]: the durable ownership records.
//! - [`managed`]: one VM: every change of its record goes through [`ManagedVm::step`], which persists, then acts.
//! - [`fence`]: what a VM's policy and the worker's lease permit.
//! - [`plan`]: what the controllers' assignment asks of a VM: pure.
//! - [`converge`]: does it, step by step. [`disks`]: the same for the disks of one that runs.
//!
//! Guarantees: a guest runs only under a durable `Own`; whatever ends a hypervisor is noticed and reported; a restarted
//! worker finds its guests again. Does not move VMs: see `migration`.

pub mod converge;
pub mod disks;
pub mod fence;
pub mod managed;
pub mod plan;
pub mod records;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pageport_proto::VmId;

pub use managed::{ManagedVm, VmError, VmStatus};

use crate::store_identity::StoreAge;
use managed::Shared;

/// All VMs that this host knows of.
#[derive(Debug)]
pub struct Vms {
    shared: Arc<Shared>,
    all: Mutex<BTreeMap<VmId, Arc<ManagedVm>>>,
}

impl Vms {
    /// None yet: see [`Self::restore`].
    pub fn new(shared: Shared) -> Self {
        Self { shared: Arc::new(shared), all: Mutex::default() }
    }

    /// Finds the VMs that an earlier worker left: their records, and the hypervisors that still run. With a store that is new, a
    /// guest that runs is taken over, and anything else is ended: it may be the rest of what was refused.
    ///
    /// # Errors
    /// The store or the runtime folder cannot be read, or a record cannot be written.
    pub async fn restore(&self, age: StoreAge) -> Result<(), VmError> {
        let mut known = records::all(&self.shared.store)?;
        for running in crate::hypervisor::list_running(&self.shared.hypervisor.runtime_dir)? {
            if !known.contains(&running) {
                known.push(running);
            }
        }
        for id in known {
            self.get_or_create(id)?.restore(age).await?;
        }
        Ok(())
    }

    /// A VM, if this host knows of it.
    pub fn get(&self, id: VmId) -> Option<Arc<ManagedVm>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// A VM; one that is new here has an empty record.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn get_or_create(&self, id: VmId) -> Result<Arc<ManagedVm>, VmError> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.get(&id) {
            return Ok(found.clone());
        }
        let vm = Arc::new(ManagedVm::open(id, self.shared.clone())?);
        all.insert(id, vm.clone());
        Ok(vm)
    }

    /// Forgets a VM whose record is removed.
    pub fn forget(&self, id: VmId) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// All of them, in order of their ids.
    pub fn list(&self) -> Vec<Arc<ManagedVm>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
