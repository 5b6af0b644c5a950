//! [`failovers`]: which VMs that fence themselves should run elsewhere, and where. Pure.
//!
//! A VM qualifies when it should run, its policy is `self-fence`, and its owner is not connected. It goes to the destination of its
//! move if the source has let go (the disk there is whole then, and perhaps the image), else to a connected worker with a
//! complete replica, the one with the newest recovery point first. Either must be guarded: where it is not, a stopped keeper would let the VM outlive the next lease, so it waits
//! (or an operator decides). Whether leases have run out is asked of [`super::leases`] afterwards: a hold must come before the look.
//!
//! [`Failovers`] carries this out: a VM that is failed over is held until the outcome is certain; an outcome that stays unknown in
//! this term is proposed again (it is idempotent).

use std::cmp::Reverse;
use std::time::Duration;

use pageport_ownership::{Epoch, Ownership, Policy, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use tokio::time::Instant;

use super::leases::Leases;
use super::observation::Observations;
use crate::model::State;
use crate::model::protection::Point;
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
    /// The recovery point that it would be booted from.
    pub point: Option<Point>,
}

impl Candidate {
    /// The command, once leases are out.
    pub fn order(self, proof: Proof<WorkerName>) -> Order {
        let Self { vm, site, worker, last, seen, point } = self;
        Order { vm, site, worker, last, proof, seen, ordered_by: None, point }
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
    let newest = |worker: &WorkerName| observations.newest_point(worker, id);
    let (site, worker) = heir(state, vm, &newest, &|worker| observations.guarded(worker, now))?;
    let point = newest(&worker);
    Some(Candidate { vm: id, site, worker, last: vm.ownership.last(), seen: silence(owner, observations, now), point })
}

/// A fit worker that holds what can become the VM's disk, and its site: the one with the newest recovery point, if any has one.
pub fn heir(
    state: &State,
    vm: &Vm,
    newest: &impl Fn(&WorkerName) -> Option<Point>,
    is_fit: &impl Fn(&WorkerName) -> bool,
) -> Option<(SiteName, WorkerName)> {
    if let Ownership::Migrating { to, released: true, refused: false, .. } = &vm.ownership
        && is_fit(to)
    {
        return Some((state.site_of(to)?.clone(), to.clone()));
    }
    let complete = vm.replicas.iter().filter(|(_, replica)| replica.phase == ReplicaPhase::Seeded);
    let fit = complete.map(|(site, replica)| (site, &replica.worker)).filter(|(_, worker)| is_fit(worker));
    // The clock is that of the VM's host at each of them.
    let best = fit.min_by_key(|(_, worker)| Reverse(newest(worker).map(|point| point.taken_unix_ms)));
    best.map(|(site, worker)| (site.clone(), worker.clone()))
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

/// Is it known what became of a proposal?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proposed {
    /// It was applied or refused, or never went into the log.
    Certain,
    /// It may yet be applied.
    Unknown,
}

/// Takes VMs over whose leases have run out.
#[derive(Debug, Default)]
pub struct Failovers {
    term: u64,
    /// Proposed, with an outcome that is not certain yet: their VMs stay held.
    unsettled: Vec<Order>,
}

impl Failovers {
    /// What is to be proposed now, in this term; say of each what became of it ([`Failovers::settled`]).
    pub fn due(
        &mut self,
        leases: &Leases,
        term: u64,
        state: &State,
        observations: &Observations,
        now: Instant,
    ) -> Vec<Order> {
        if term != self.term {
            // The leases of another term hold nothing.
            self.unsettled.clear();
            self.term = term;
        }
        let mut due = std::mem::take(&mut self.unsettled);
        for candidate in failovers(state, observations, now) {
            let Some(vm) = state.vms.get(&candidate.vm) else { continue };
            if due.iter().any(|other| other.vm == candidate.vm) {
                continue;
            }
            if let Some(proof) = leases.hold_if_out(term, candidate.vm, vm, &candidate.worker, now) {
                due.push(candidate.order(proof));
            }
        }
        due
    }

    /// What became of an order that was due.
    pub fn settled(&mut self, leases: &Leases, order: Order, proposed: Proposed, now: Instant) {
        match proposed {
            Proposed::Certain => leases.let_go(self.term, order.vm, now),
            Proposed::Unknown => self.unsettled.push(order),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use pageport_proto::v1;

    use super::*;
    use crate::link::observation::Observed;
    use crate::model::Spec;
    use crate::model::spec::tests::sample;
    use crate::model::state::Replica;

    fn says(name: &str, guarded: bool, at: Instant) -> (WorkerName, Observed) {
        holds(name, guarded, vec![], at)
    }

    fn holds(name: &str, guarded: bool, vms: Vec<v1::VmReport>, at: Instant) -> (WorkerName, Observed) {
        let report = v1::WorkerReport { worker: name.into(), guarded, vms, ..v1::WorkerReport::default() };
        (name.parse().unwrap(), Observed { report: Arc::new(report), at, at_unix_ms: 0, assigned: None })
    }

    /// A VM that fences itself runs at worker-a, which is silent; two others hold a complete replica.
    fn state() -> State {
        let spec = v1::VmSpec { on_isolation: v1::IsolationPolicy::SelfFence.into(), ..sample("web") };
        let owner = Ownership::first("worker-a".parse().unwrap());
        let mut vm = Vm::new(Spec::try_from(spec).unwrap(), owner, Power::Run);
        for (site, worker) in [("b", "worker-b"), ("c", "worker-c")] {
            let worker = worker.parse().unwrap();
            let replica = Replica::new(worker, 1, ReplicaPhase::Seeded, None);
            vm.replicas.insert(site.parse().unwrap(), replica);
        }
        State { vms: [(VmId::generate(), vm)].into(), ..State::default() }
    }

    #[test]
    fn a_vm_is_taken_over_where_keepers_are_guarded_and_waits_while_they_are_nowhere() {
        let (state, now) = (state(), Instant::now());
        let heirs = |reports: &[(&str, bool)]| {
            let mut observations = Observations::default();
            for (name, guarded) in reports {
                let (name, observed) = says(name, *guarded, now);
                observations.put(name, observed);
            }
            let found = failovers(&state, &observations, now);
            found.into_iter().map(|candidate| candidate.worker.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(heirs(&[("worker-b", true), ("worker-c", true)]), ["worker-b"]);
        assert_eq!(heirs(&[("worker-b", false), ("worker-c", true)]), ["worker-c"]);
        assert!(heirs(&[("worker-b", false), ("worker-c", false)]).is_empty());
        // Its owner answers: guarded or not, the VM stays there.
        assert!(heirs(&[("worker-a", false), ("worker-b", true)]).is_empty());
    }

    #[test]
    fn a_vm_is_taken_over_where_the_newest_recovery_point_is_and_the_order_says_which() {
        let (state, now) = (state(), Instant::now());
        let id = *state.vms.keys().next().unwrap();
        let vm = |number, taken_unix_ms| {
            let point = v1::RecoveryPoint { number, taken_unix_ms, ..v1::RecoveryPoint::default() };
            let recovery_points = vec![v1::RecoveryPoint::default(), point];
            v1::VmReport { vm_id: id.to_string(), recovery_points, ..v1::VmReport::default() }
        };
        let heir_of = |of_b: Vec<v1::VmReport>, of_c: Vec<v1::VmReport>| {
            let mut observations = Observations::default();
            for (name, vms) in [("worker-b", of_b), ("worker-c", of_c)] {
                let (name, observed) = holds(name, true, vms, now);
                observations.put(name, observed);
            }
            let found = failovers(&state, &observations, now).remove(0);
            (found.worker.to_string(), found.point.map(|point| point.number))
        };
        assert_eq!(heir_of(vec![vm(9, 1_000)], vec![vm(4, 2_000)]), ("worker-c".to_owned(), Some(4)));
        assert_eq!(heir_of(vec![vm(9, 3_000)], vec![vm(4, 2_000)]), ("worker-b".to_owned(), Some(9)));
        // A copy of unknown age comes after one of a known age.
        assert_eq!(heir_of(vec![], vec![vm(4, 2_000)]), ("worker-c".to_owned(), Some(4)));
        assert_eq!(heir_of(vec![], vec![]), ("worker-b".to_owned(), None));
    }
}
