//! [`failovers`]: which VMs that fence themselves should run elsewhere, and where. Pure.
//!
//! A VM qualifies when it should run, its policy is `self-fence`, and its owner is not connected. It goes to the destination of its
//! move if the source has let go (the disk there is whole then, and perhaps the image), else to a connected worker with a
//! complete replica. Whether leases have run out is asked of [`super::leases`] afterwards: a hold must come before the look.

use std::time::Duration;

use pageport_ownership::{Epoch, Ownership, Policy, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use tokio::time::Instant;

use super::observation::Observations;
use crate::model::State;
use crate::model::state::{Life, Power, ReplicaPhase, Vm};
use crate::model::takeover::Order;

/// A takeover that waits only for leases to run out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The VM.
    pub vm: VmId,
    /// Where it should run.
    pub site: SiteName,
    /// The worker there.
    pub worker: WorkerName,
    /// The VM's newest epoch.
    pub last: Epoch,
    /// What was seen of its owner.
    pub seen: String,
}

impl Candidate {
    /// The command, once leases are out.
    pub fn order(self, proof: Proof<WorkerName>) -> Order {
        let Self { vm, site, worker, last, seen } = self;
        Order { vm, site, worker, last, proof, seen, ordered_by: None }
    }
}

/// Takeovers that wait only for leases to run out.
pub fn failovers(state: &State, observations: &Observations, now: Instant) -> Vec<Candidate> {
    let wanted = state.vms.iter().filter(|(_, vm)| {
        vm.life == Life::Defined && vm.power == Power::Run && vm.spec.on_isolation == Policy::SelfFence
    });
    wanted.filter_map(|(id, vm)| failover(state, *id, vm, observations, now)).collect()
}

fn failover(state: &State, id: VmId, vm: &Vm, observations: &Observations, now: Instant) -> Option<Candidate> {
    let answers = |worker: &WorkerName| observations.connected(worker, now).is_some();
    let owner = vm.ownership.owner().0;
    if answers(owner) {
        return None;
    }
    // A destination that answers settles its move by its record, unless only the source could.
    let (site, worker) = heir(state, vm, &answers)?;
    Some(Candidate { vm: id, site, worker, last: vm.ownership.last(), seen: silence(owner, observations, now) })
}

/// A connected worker that holds what can become the VM's disk, and its site.
pub fn heir(state: &State, vm: &Vm, answers: &impl Fn(&WorkerName) -> bool) -> Option<(SiteName, WorkerName)> {
    if let Ownership::Migrating { to, released: true, refused: false, .. } = &vm.ownership
        && answers(to)
    {
        return Some((state.site_of(to)?.clone(), to.clone()));
    }
    let complete = vm.replicas.iter().filter(|(_, replica)| replica.phase == ReplicaPhase::Seeded);
    complete.map(|(site, replica)| (site.clone(), replica.worker.clone())).find(|(_, worker)| answers(worker))
}

fn silence(owner: &WorkerName, observations: &Observations, now: Instant) -> String {
    let since = observations.last(owner).map(|observed| now.saturating_duration_since(observed.at));
    match since {
        Some(silent) => {
            let silent = Duration::from_secs(silent.as_secs());
            format!("worker \"{owner}\" has been silent for {} s and its lease has run out", silent.as_secs())
        }
        None => format!("worker \"{owner}\" has not reported to this leader and its lease has run out"),
    }
}
