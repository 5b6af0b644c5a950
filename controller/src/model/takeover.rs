//! Takeovers: a VM is given to another worker without the word of the one that had it.
//!
//! What permits it is a [`Proof`]: leases that have run out, a fence agent's word, or an operator's.
//!
//! Guarantees: each takeover is recorded with its proof and gets an epoch of its own, so that whoever had the VM
//! finds the tombstone when it comes back. The disk that is left behind is kept as an outdated replica, never
//! overwritten before somebody asks for a new seed; but where the replica was protected the protection turns round, and the
//! disk that is left behind is brought up to date once its worker is back. What the VM had written since the replica was
//! last synchronised, or since its newest recovery point, is lost: the VM's problem says so. Whether the proof is true is
//! not decided here.

use pageport_ownership::{Epoch, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::apply::{settle, vm_mut};
use super::command::{Answer, Outcome};
use super::disks::make_what_is_lacking;
use super::migration::Turn;
use super::protection::{Point, has_point, turn_round};
use super::rejection::Rejection;
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
    /// The operator who had the worker's host fenced; [`None`]: nobody ordered it, or the proof names who did.
    #[serde(default)]
    pub ordered_by: Option<String>,
    /// The recovery point that it was booted from; [`None`]: the disk had none, or was whole.
    #[serde(default)]
    pub point: Option<Point>,
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
    /// The operator who had the worker's host fenced.
    #[serde(default)]
    pub ordered_by: Option<String>,
    /// The newest recovery point that the worker holds, if it has said.
    #[serde(default)]
    pub point: Option<Point>,
}

/// Gives the VM to the worker.
///
/// # Errors
/// The VM is unknown or has changed hands, nothing at the site can become its disk, or the proof does not suffice.
pub fn take_over(state: &mut State, order: Order, now: i64) -> Outcome {
    let id = order.vm;
    let unknown = state.recovering.get(&id).cloned();
    if let Proof::Override { .. } = order.proof {
        state.leave_to_the_operator(id);
    }
    let outcome = take_over_known(state, order, now);
    if let (Err(_), Some(unknown)) = (&outcome, unknown) {
        // What is rejected changes nothing.
        state.vms.remove(&id);
        state.recovering.insert(id, unknown);
    }
    outcome
}

fn take_over_known(state: &mut State, order: Order, now: i64) -> Outcome {
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
    // Neither the owner's own disk nor one that was handed over goes back to a point.
    let point = order.point.filter(|_| from != order.worker && !is_handed_over(vm, &order.worker));
    let policy = vm.spec.on_isolation;
    let next = vm.ownership.fail_over(order.worker.clone(), policy, &order.proof);
    let next = next.map_err(|error| Rejection::NotToBeTaken { name, why: error.to_string() })?;
    let epoch = next.last();
    vm.ownership = next;
    let taken = vm.replicas.remove(&order.site);
    let problem = loss(&from, point, now);
    let migration = vm.migration;
    if from != order.worker
        && let Some(site) = from_site
    {
        let protection = turn_round(&mut state.protect_seq, taken.as_ref());
        let left = Replica::new(from.clone(), 0, ReplicaPhase::Outdated, protection);
        let vm = vm_mut(state, order.vm)?;
        vm.replicas.insert(site, left);
        if let Some(taken) = &taken {
            make_what_is_lacking(vm, taken);
        }
    }
    let vm = vm_mut(state, order.vm)?;
    let Order { worker: to, proof, seen, ordered_by, .. } = order;
    vm.takeovers.push(Takeover { at_unix_ms: now, proof, from, to, epoch, seen, ordered_by, point });
    let surplus = vm.takeovers.len().saturating_sub(MAX_TAKEOVERS);
    vm.takeovers.drain(..surplus);
    if let Some(id) = migration {
        if let Some(migration) = state.migrations.get_mut(&id) {
            migration.follow(Turn::TakenOver, now);
        }
        settle(state, id);
    }
    vm_mut(state, order.vm)?.problem = problem;
    Ok(Answer::Vm(order.vm))
}

/// What a takeover has cost.
fn loss(from: &WorkerName, point: Option<Point>, now: i64) -> String {
    match point {
        Some(Point { number, taken_unix_ms }) => {
            let seconds = now.saturating_sub(taken_unix_ms).max(0) / 1000;
            format!(
                "taken over from worker \"{from}\" at recovery point {number}, which was {seconds} s old: what the vm wrote after it is lost"
            )
        }
        None => format!(
            "taken over from worker \"{from}\": what the vm wrote there since this replica was last synchronised is lost"
        ),
    }
}

/// The source has let go: it does so only when the destination's disk is whole and on stable storage.
fn is_handed_over(vm: &Vm, to: &WorkerName) -> bool {
    vm.ownership.in_doubt() && vm.ownership.possible_holders().contains(&to)
}

/// The worker holds something that can become the VM's disk.
fn has_disk(vm: &Vm, order: &Order) -> Result<(), Rejection> {
    let (name, site) = (vm.spec.name.clone(), order.site.clone());
    if is_handed_over(vm, &order.worker) {
        return Ok(());
    }
    match vm.replicas.get(&order.site).filter(|replica| replica.worker == order.worker) {
        None => Err(Rejection::NoReplica { name, site }),
        Some(Replica { phase: ReplicaPhase::Seeded, .. }) => Ok(()),
        Some(Replica { phase: ReplicaPhase::Mixed | ReplicaPhase::Outdated, .. }) => match order.proof {
            // An operator may know that this disk is the best there is.
            Proof::Override { .. } => Ok(()),
            Proof::LeasesOut { .. } | Proof::Fenced { .. } => Err(Rejection::ReplicaNotSeeded { name, site }),
        },
        Some(replica @ Replica { phase: ReplicaPhase::Seeding | ReplicaPhase::Failed { .. }, .. }) => {
            has_point(vm, &order.site, replica)?;
            Err(Rejection::ReplicaNotSeeded { name, site })
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use pageport_ownership::{Evidence, Fact, Ownership};
    use pageport_proto::{MigrationId, RequestId, v1};

    use super::*;
    use crate::model::command::{ClientOrder, Command};
    use crate::model::spec::tests::sample;
    use crate::model::state::{Power, Worker};
    use crate::model::{Spec, apply, command};

    const NAMES: [&str; 2] = ["worker-a", "worker-b"];

    fn worker(index: usize) -> WorkerName {
        NAMES[index].parse().unwrap()
    }

    /// A VM that fences itself runs at site a; site b has a complete replica.
    fn state() -> (State, VmId) {
        let mut state = State::default();
        for (index, site) in ["a", "b"].iter().enumerate() {
            let known = Worker::at(site.parse().unwrap());
            state.workers.insert(worker(index), known);
        }
        let spec = v1::VmSpec { on_isolation: v1::IsolationPolicy::SelfFence.into(), ..sample("web") };
        let mut vm = Vm::new(Spec::try_from(spec).unwrap(), Ownership::first(worker(0)), Power::Run);
        let replica = Replica::new(worker(1), 1, ReplicaPhase::Seeded, None);
        vm.replicas.insert("b".parse().unwrap(), replica);
        let id = VmId::generate();
        state.vms.insert(id, vm);
        (state, id)
    }

    fn leases_out(state: &State, id: VmId) -> Order {
        let last = state.vms[&id].ownership.last();
        let proof = Proof::LeasesOut { workers: vec![worker(0)], last };
        Order {
            vm: id,
            site: "b".parse().unwrap(),
            worker: worker(1),
            last,
            proof,
            seen: "silent".into(),
            ordered_by: None,
            point: None,
        }
    }

    fn carry_out(state: &mut State, order: command::Order) -> Outcome {
        apply(state, Command { now_unix_ms: 1, order })
    }

    fn begin_move(state: &mut State, id: VmId) -> MigrationId {
        let (worker, own) = state.vms[&id].ownership.owner();
        let evidence = Evidence { worker: worker.clone(), fact: Fact::Acquired(own) };
        carry_out(state, command::Order::Evidence { vm: id, evidence }).unwrap();
        let migration = MigrationId::generate();
        let order = ClientOrder::CreateMigration {
            id: migration,
            vm: id,
            site: "b".parse().unwrap(),
            traceparent: String::new(),
        };
        carry_out(state, command::Order::Client { request: RequestId::generate(), order }).unwrap();
        migration
    }

    #[test]
    fn the_heir_owns_the_vm_and_the_disk_left_behind_is_an_outdated_replica() {
        let (mut state, id) = state();
        let order = leases_out(&state, id);
        carry_out(&mut state, command::Order::TakeOver(order.clone())).unwrap();
        let vm = &state.vms[&id];
        assert_eq!(vm.ownership.owner().0, &worker(1));
        assert_eq!(vm.replicas.keys().map(SiteName::as_str).collect::<Vec<_>>(), ["a"]);
        assert_eq!(vm.replicas.values().next().unwrap().phase, ReplicaPhase::Outdated);
        assert_eq!((vm.takeovers.len(), vm.takeovers[0].from.clone()), (1, worker(0)));
        // The same word once more is about an epoch that has passed.
        let again = carry_out(&mut state, command::Order::TakeOver(order));
        assert!(matches!(again, Err(Rejection::Overtaken { .. })), "{again:?}");
    }

    #[test]
    fn a_disk_that_a_move_writes_into_is_not_booted_unless_the_source_has_let_go() {
        let (mut state, id) = state();
        let migration = begin_move(&mut state, id);
        let order = leases_out(&state, id);
        let refused = carry_out(&mut state, command::Order::TakeOver(order));
        assert!(matches!(refused, Err(Rejection::ReplicaNotSeeded { .. })), "{refused:?}");
        let epoch = state.migrations[&migration].epoch;
        let evidence = Evidence { worker: worker(0), fact: Fact::Released(epoch) };
        carry_out(&mut state, command::Order::Evidence { vm: id, evidence }).unwrap();
        let order = leases_out(&state, id);
        carry_out(&mut state, command::Order::TakeOver(order)).unwrap();
        assert_eq!(state.vms[&id].ownership.inherits(&worker(1)), Some(epoch));
        assert!(state.migrations[&migration].is_over() && state.vms[&id].migration.is_none());
    }

    #[test]
    fn a_move_that_broke_off_leaves_a_disk_for_another_move_but_not_for_a_takeover() {
        let (mut state, id) = state();
        let migration = begin_move(&mut state, id);
        let epoch = state.migrations[&migration].epoch;
        let evidence = Evidence { worker: worker(0), fact: Fact::Revoked(epoch) };
        carry_out(&mut state, command::Order::Evidence { vm: id, evidence }).unwrap();
        let order = leases_out(&state, id);
        let refused = carry_out(&mut state, command::Order::TakeOver(order));
        assert!(matches!(refused, Err(Rejection::ReplicaNotSeeded { .. })), "{refused:?}");
        let mut by_hand = leases_out(&state, id);
        by_hand.proof = Proof::Override { who: "ann".into(), reason: "all that is left".into() };
        carry_out(&mut state.clone(), command::Order::TakeOver(by_hand)).unwrap();
        begin_move(&mut state, id);
    }
}
