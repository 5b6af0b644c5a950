//! The queue of moves: ordered, admitted, changed, given up.
//!
//! ```text
//!   order ──▶ Queued ── admitted (the scheduler's decision, as a command) ──▶ Running ──▶ ...
//!               ├── cancelled ──▶ Cancelled
//!               └── given up ───▶ Failed
//! ```
//! A queued move holds nothing: its VM can be stopped, protected or changed meanwhile. Whether the VM can still move is looked at
//! again when it is admitted.
//!
//! Guarantees: an admission counts only if nothing that it was decided from has been admitted or limited anew since
//! ([`Schedule::seq`](super::schedule::Schedule::seq)), so two that were decided at once do not exceed a limit together.

use std::collections::BTreeSet;

use pageport_ownership::{Epoch, Ownership};
use pageport_proto::{MigrationId, SiteName, StoreId, VmId, WorkerName};

use super::apply::{forget_old_migrations, not_migrating, vm_mut};
use super::command::{Answer, Outcome};
use super::convergence::Convergence;
use super::disks;
use super::migration::{Cancel, Migration, Phase, Place};
use super::protection::has_point;
use super::rejection::Rejection;
use super::schedule::{Change, Drain, DrainMove, Spot, Terms};
use super::state::{Life, Power, Replica, ReplicaPhase, State, Vm};

/// How a VM would go to a site.
#[derive(Debug, Clone)]
pub struct Route {
    /// From where.
    pub from: Place,
    /// To where.
    pub to: Place,
    to_store: Option<StoreId>,
    ownership: Ownership<WorkerName>,
}

/// Can the VM move to the site, as things stand?
///
/// # Errors
/// Why not.
pub fn route(state: &State, vm_id: VmId, site: &SiteName) -> Result<Route, Rejection> {
    let vm = state.vms.get(&vm_id).filter(|vm| vm.life == Life::Defined);
    let vm = vm.ok_or_else(|| Rejection::VmUnknown { vm: vm_id.to_string() })?;
    let name = vm.spec.name.clone();
    not_migrating(vm)?;
    let from_worker = vm.ownership.owner().0.clone();
    let Some(from_site) = state.site_of_vm(vm).cloned() else {
        return Err(Rejection::WorkerUnknown { worker: from_worker });
    };
    let site = site.clone();
    if from_site == site {
        return Err(Rejection::AlreadyThere { name, site });
    }
    if vm.power != Power::Run {
        return Err(Rejection::NotRunning { name });
    }
    let replica = movable_replica(vm, &site)?;
    let to = Place { site, worker: replica.worker.clone() };
    let to_store = state.workers.get(&to.worker).and_then(|worker| worker.store);
    let Some(ownership) = vm.ownership.order(to.worker.clone()) else {
        return Err(Rejection::NotConfirmed { name, worker: from_worker });
    };
    Ok(Route { from: Place { site: from_site, worker: from_worker }, to, to_store, ownership })
}

fn movable_replica<'a>(vm: &'a Vm, site: &SiteName) -> Result<&'a Replica, Rejection> {
    let (name, site) = (vm.spec.name.clone(), site.clone());
    let Some(replica) = vm.replicas.get(&site) else { return Err(Rejection::NoReplica { name, site }) };
    has_point(vm, &site, replica)?;
    disks::has_all_disks(vm, &site, replica)?;
    match replica.phase {
        ReplicaPhase::Seeded | ReplicaPhase::Mixed => Ok(replica),
        ReplicaPhase::Seeding | ReplicaPhase::Outdated | ReplicaPhase::Failed { .. } => {
            Err(Rejection::ReplicaNotSeeded { name, site })
        }
    }
}

/// What is ordered.
#[derive(Debug)]
pub(super) struct Wanted {
    pub id: MigrationId,
    pub vm: VmId,
    pub site: SiteName,
    pub traceparent: String,
    pub terms: Terms,
}

/// Queues a move.
pub(super) fn enqueue(state: &mut State, wanted: Wanted, now: i64) -> Outcome {
    let Wanted { id, vm, site, traceparent, terms } = wanted;
    if state.migrations.contains_key(&id) {
        return Err(Rejection::MigrationKnown { id });
    }
    let Route { from, to, .. } = route(state, vm, &site)?;
    let name = vm_mut(state, vm)?.spec.name.clone();
    if let Some(queued) = queued_of(state, vm) {
        return Err(Rejection::AlreadyQueued { name, id: queued });
    }
    let unknown = terms.after.iter().find(|earlier| !state.migrations.contains_key(earlier));
    if let Some(earlier) = unknown {
        return Err(Rejection::MigrationUnknown { id: earlier.to_string() });
    }
    let migration = Migration {
        id,
        vm,
        vm_name: name,
        from,
        to,
        epoch: Epoch::ZERO,
        to_store: None,
        created_unix_ms: now,
        started_unix_ms: None,
        traceparent,
        terms,
        can_throttle: false,
        phase: Phase::Queued,
        failure: None,
        record: None,
        source_ended: false,
        destination_ended: false,
    };
    state.migrations.insert(id, migration);
    forget_old_migrations(state);
    Ok(Answer::Migration(id))
}

/// The queued move of a VM.
pub fn queued_of(state: &State, vm: VmId) -> Option<MigrationId> {
    state.migrations.values().find(|it| it.vm == vm && it.phase == Phase::Queued).map(|it| it.id)
}

/// Lets queued moves begin that were decided on when `seq` was the newest number. One that cannot move any more stays queued.
pub(super) fn admit(state: &mut State, ids: &[MigrationId], seq: u64, now: i64) {
    if state.schedule.seq != seq {
        return;
    }
    for id in ids {
        start(state, *id, now);
    }
}

/// Authorises a queued move.
pub(super) fn start(state: &mut State, id: MigrationId, now: i64) {
    let Some(migration) = state.migrations.get(&id).filter(|it| it.phase == Phase::Queued) else { return };
    let (vm_id, site) = (migration.vm, migration.to.site.clone());
    let Ok(Route { from, to, to_store, ownership }) = route(state, vm_id, &site) else { return };
    state.schedule.seq += 1;
    let Some(vm) = state.vms.get_mut(&vm_id) else { return };
    let Some(migration) = state.migrations.get_mut(&id) else { return };
    migration.epoch = ownership.last();
    (migration.from, migration.to, migration.to_store) = (from, to, to_store);
    migration.started_unix_ms = Some(now);
    migration.can_throttle = migration.terms.convergence == Convergence::Throttle;
    migration.phase = Phase::Running { cancel: Cancel::NotAsked };
    vm.ownership = ownership;
    let unprotected = |replica: &&mut Replica| replica.protection.is_none();
    if let Some(replica) = vm.replicas.get_mut(&site).filter(unprotected) {
        replica.phase = ReplicaPhase::Mixed;
    }
    vm.migration = Some(id);
    vm.problem.clear();
}

/// Ends a queued move that will not be made.
pub(super) fn give_up(state: &mut State, id: MigrationId, reason: String, now: i64) {
    let Some(migration) = state.migrations.get_mut(&id).filter(|it| it.phase == Phase::Queued) else { return };
    if let Some(vm) = state.vms.get_mut(&migration.vm) {
        vm.problem = format!("migration to site \"{}\" was not made: {reason}", migration.to.site);
    }
    migration.leave_queue(Phase::Failed { at_unix_ms: now, reason });
}

/// Changes the terms of a move that has not ended.
pub(super) fn change(state: &mut State, id: MigrationId, change: Change) -> Outcome {
    let migration = state.migrations.get_mut(&id).ok_or_else(|| Rejection::MigrationUnknown { id: id.to_string() })?;
    match migration.phase {
        Phase::Queued | Phase::Running { cancel: Cancel::NotAsked } => {}
        Phase::Running { cancel: Cancel::Asked } => return Err(Rejection::BeingCancelled { id }),
        Phase::Released { .. } | Phase::Acquired { .. } => return Err(Rejection::HandedOver { id }),
        Phase::Completed { .. } | Phase::Failed { .. } | Phase::Cancelled { .. } => {
            return Err(Rejection::AlreadyEnded { id });
        }
    }
    let Change { priority, rate_bps, paused, convergence } = change;
    if convergence == Some(Convergence::Throttle) && !migration.can_throttle && migration.phase != Phase::Queued {
        return Err(Rejection::CannotThrottle { id });
    }
    let terms = &mut migration.terms;
    terms.priority = priority.unwrap_or(terms.priority);
    terms.rate_bps = rate_bps.unwrap_or(terms.rate_bps);
    terms.paused = paused.unwrap_or(terms.paused);
    terms.convergence = convergence.unwrap_or(terms.convergence);
    state.schedule.seq += 1;
    Ok(Answer::Migration(id))
}

/// Begins to empty a place; ordered again: on other terms.
pub(super) fn drain(state: &mut State, spot: Spot, to: Option<SiteName>, priority: u8, now: i64) -> Outcome {
    let moved = state.schedule.drain(&spot).map_or(0, |known| known.moved);
    let drain = Drain { to, priority, ordered_unix_ms: now, moved };
    match spot {
        Spot::Site(site) => {
            if !state.workers.values().any(|worker| worker.site == site) {
                return Err(Rejection::SiteWithoutWorkers { site });
            }
            if drain.to.as_ref() == Some(&site) {
                return Err(Rejection::NoLink { site });
            }
            state.schedule.sites.insert(site, drain);
        }
        Spot::Worker(worker) => {
            if !state.workers.contains_key(&worker) {
                return Err(Rejection::WorkerUnknown { worker });
            }
            state.schedule.workers.insert(worker, drain);
        }
    }
    state.schedule.seq += 1;
    Ok(Answer::Done)
}

/// Ends that a place is emptied: what has not begun is cancelled, what is under way goes on.
pub(super) fn undrain(state: &mut State, spot: &Spot, now: i64) -> Outcome {
    let ended = match spot {
        Spot::Site(site) => state.schedule.sites.remove(site),
        Spot::Worker(worker) => state.schedule.workers.remove(worker),
    };
    if ended.is_none() {
        return Err(Rejection::NotDrained { spot: spot.clone() });
    }
    let still_drained = |from: &Place| state.schedule.is_drained(&from.worker, &from.site);
    let orphaned = |it: &Migration| it.phase == Phase::Queued && it.terms.drains && !still_drained(&it.from);
    for migration in state.migrations.select_mut(orphaned) {
        migration.leave_queue(Phase::Cancelled { at_unix_ms: now });
    }
    state.schedule.seq += 1;
    Ok(Answer::Done)
}

/// Queues moves of a place that is being emptied. One that cannot be queued is left out: it is planned anew.
pub(super) fn queue_drain(state: &mut State, spot: &Spot, moves: Vec<DrainMove>, now: i64) {
    let Some(priority) = state.schedule.drain(spot).map(|drain| drain.priority) else { return };
    for DrainMove { id, vm, site } in moves {
        let terms = Terms { priority, drains: true, ..Terms::default() };
        // Whatever hinders it is seen by the next plan.
        let _ = enqueue(state, Wanted { id, vm, site, traceparent: String::new(), terms }, now);
    }
}

/// Moves that queued ones still wait for, or whose end they are still to learn.
pub(super) fn awaited(state: &State) -> BTreeSet<MigrationId> {
    let queued = state.migrations.values().filter(|it| it.phase == Phase::Queued);
    queued.flat_map(|it| it.terms.after.iter().copied()).collect()
}
