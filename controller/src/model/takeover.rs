//! Takeovers: a VM is given to another worker without the word of the one that had it.
//!
//! | ground | who says that the VM runs nowhere else |
//! |---|---|
//! | [`Ground::LeaseExpired`] | time: every lease under which it could run has surely run out (`self-fence` only) |
//! | [`Ground::Fenced`] | a fence agent that turned the host off |
//! | [`Ground::Override`] | an operator, by name |
//!
//! Guarantees: each takeover is recorded with its ground and reason and gets an epoch of its own, so that whoever had the VM
//! finds the tombstone when it comes back. The disk that is left behind is kept as an outdated replica, never
//! overwritten before somebody asks for a new seed. What the VM had written since the replica was last synchronised is
//! lost: the record says so. Whether the ground is true is not decided here.

use pageport_ownership::{Epoch, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::apply::{settle, vm_mut};
use super::command::{Answer, Outcome, Rejection};
use super::migration::Turn;
use super::state::{Replica, ReplicaPhase, State, Vm};

/// Takeovers kept for each VM; the oldest are forgotten.
pub const MAX_TAKEOVERS: usize = 64;

/// Why the VM surely runs nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ground {
    /// Every lease under which it could run has run out.
    LeaseExpired,
    /// A fence agent turned these workers' hosts off.
    Fenced {
        /// The workers.
        workers: Vec<WorkerName>,
    },
    /// An operator said so.
    Override {
        /// The name in the operator's certificate.
        operator: String,
    },
}

impl Ground {
    fn proof(&self) -> Proof<WorkerName> {
        match self {
            Self::LeaseExpired => Proof::LeasesOut,
            Self::Fenced { workers } => Proof::Fenced { workers: workers.iter().cloned().collect() },
            Self::Override { .. } => Proof::Override,
        }
    }
}

/// One takeover, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// When it was committed.
    pub at_unix_ms: i64,
    /// Why the VM surely ran nowhere else.
    pub ground: Ground,
    /// Who had it.
    pub from: WorkerName,
    /// Who has it now.
    pub to: WorkerName,
    /// Under which epoch.
    pub epoch: Epoch,
    /// An operator's words, or what was seen.
    pub reason: String,
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
    /// The newest epoch of the VM that the ground is about: it says nothing about later ones.
    pub last: Epoch,
    /// Why it surely runs nowhere else.
    pub ground: Ground,
    /// An operator's words, or what was seen.
    pub reason: String,
}

/// Gives the VM to the worker.
///
/// # Errors
/// The VM is unknown or already there, nothing at the site can become its disk, or the ground does not suffice.
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
    let Some(next) = vm.ownership.fail_over(order.worker.clone(), policy, &order.ground.proof()) else {
        return Err(Rejection::NotToBeTaken { name, site: order.site });
    };
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
    let Order { worker: to, ground, reason, .. } = order;
    vm.takeovers.push(Takeover { at_unix_ms: now, ground, from, to, epoch, reason });
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
        Some(Replica { phase: ReplicaPhase::Outdated, .. }) => match order.ground {
            // An operator may know that the old disk is the best there is.
            Ground::Override { .. } => Ok(()),
            Ground::LeaseExpired | Ground::Fenced { .. } => Err(Rejection::ReplicaNotSeeded { name, site }),
        },
        Some(Replica { phase: ReplicaPhase::Seeding | ReplicaPhase::Failed { .. }, .. }) => {
            Err(Rejection::ReplicaNotSeeded { name, site })
        }
    }
}
