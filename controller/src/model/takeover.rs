//! Takeovers: a VM is given to another worker without the word of the one that had it.
//!
//! What permits it is a [`Proof`]: leases that have run out, a fence agent's word, or an operator's.
//!
//! Guarantees: each takeover is recorded with its proof and gets an epoch of its own, so that whoever had the VM
//! finds the tombstone when it comes back. The disk that is left behind is kept as an outdated replica, never
//! overwritten before somebody asks for a new seed. What the VM had written since the replica was last synchronised is
//! lost: the VM's problem says so. Whether the proof is true is not decided here.

use pageport_ownership::{Epoch, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::apply::{settle, vm_mut};
use super::command::{Answer, Outcome, Rejection};
use super::migration::Turn;
use super::state::{Replica, ReplicaPhase, State, Vm};

/// Takeovers kept for each VM; the oldest are forgotten.
pub const MAX_TAKEOVERS: usize = 64;

/// One takeover, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// When it was committed.
    pub at_unix_ms: i64,
    /// What permitted it.
    pub proof: Proof<WorkerName>,
    /// Who had it.
    pub from: WorkerName,
    /// Who has it now.
    pub to: WorkerName,
    /// Under which epoch.
    pub epoch: Epoch,
    /// What was seen.
    pub seen: String,
}

/// Who gets the VM, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The VM.
    pub vm: VmId,
    /// The site it is started at.
    pub site: SiteName,
    /// The worker there.
    pub worker: WorkerName,
    /// The newest epoch of the VM when it was looked at.
    pub last: Epoch,
    /// What permits it.
    pub proof: Proof<WorkerName>,
    /// What was seen.
    pub seen: String,
}

/// Gives the VM to the worker.
///
/// # Errors
/// The VM is unknown or has changed hands, nothing at the site can become its disk, or the proof does not suffice.
pub fn take_over(state: &mut State, order: Order, now: i64) -> Outcome {
    let (from, from_site) = match state.vms.get(&order.vm) {
        Some(vm) => (vm.ownership.owner().0.clone(), state.site_of_vm(vm).cloned()),
        None => return Err(Rejection::VmUnknown { vm: order.vm.to_string() }),
    };
    let vm = vm_mut(state, order.vm)?;
    let name = vm.spec.name.clone();
    if vm.ownership.last() != order.last {
        return Err(Rejection::Overtaken { name });
    }
    if from != order.worker {
        has_disk(vm, &order)?;
    }
    let policy = vm.spec.on_isolation;
    let next = vm.ownership.fail_over(order.worker.clone(), policy, &order.proof);
    let next = next.map_err(|error| Rejection::NotToBeTaken { name, why: error.to_string() })?;
    let epoch = next.last();
    vm.ownership = next;
    vm.replicas.remove(&order.site);
    if from != order.worker
        && let Some(site) = from_site
    {
        vm.replicas.insert(site, Replica { worker: from.clone(), seed_seq: 0, phase: ReplicaPhase::Outdated });
    }
    let problem = format!(
        "taken over from worker \"{from}\": what the vm wrote there since this replica was last synchronised is lost"
    );
    let Order { worker: to, proof, seen, .. } = order;
    vm.takeovers.push(Takeover { at_unix_ms: now, proof, from, to, epoch, seen });
    let surplus = vm.takeovers.len().saturating_sub(MAX_TAKEOVERS);
    vm.takeovers.drain(..surplus);
    if let Some(id) = vm.migration {
        if let Some(migration) = state.migrations.get_mut(&id) {
            migration.follow(Turn::TakenOver, now);
        }
        settle(state, id);
    }
    vm_mut(state, order.vm)?.problem = problem;
    Ok(Answer::Vm(order.vm))
}

/// The worker holds something that can become the VM's disk.
fn has_disk(vm: &Vm, order: &Order) -> Result<(), Rejection> {
    let (name, site) = (vm.spec.name.clone(), order.site.clone());
    match vm.replicas.get(&order.site).filter(|replica| replica.worker == order.worker) {
        None => Err(Rejection::NoReplica { name, site }),
        Some(Replica { phase: ReplicaPhase::Seeded, .. }) => Ok(()),
        Some(Replica { phase: ReplicaPhase::Outdated, .. }) => match order.proof {
            // An operator may know that the old disk is the best there is.
            Proof::Override { .. } => Ok(()),
            Proof::LeasesOut { .. } | Proof::Fenced { .. } => Err(Rejection::ReplicaNotSeeded { name, site }),
        },
        Some(Replica { phase: ReplicaPhase::Seeding | ReplicaPhase::Failed { .. }, .. }) => {
            Err(Rejection::ReplicaNotSeeded { name, site })
        }
    }
}
