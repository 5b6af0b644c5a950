//! [`apply`]: the one function that changes the state.
//!
//! Guarantees: deterministic; a rejected command changes nothing; a client's request id takes effect once. Orders that
//! come from reports are idempotent: a level-triggered reconciler may propose them more than once.

use pageport_ownership::{Evidence, Fact, Ownership};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};

use super::command::{Answer, ClientOrder, Command, Halt, Order, Outcome};
use super::disks;
use super::migration::{Cancel, Migration, Phase, Turn};
use super::protection;
use super::queue::{self, Wanted};
use super::recovery::{self, DeclaredDead};
use super::rejection::Rejection;
use super::schedule::{self, Terms};
use super::spec::Spec;
use super::state::{Life, MAX_MIGRATIONS, Power, Replica, ReplicaPhase, State, Vm};
use super::takeover::{self, take_over};

/// Applies one command.
pub fn apply(state: &mut State, command: Command) -> Outcome {
    let now = command.now_unix_ms;
    match command.order {
        Order::Client { request, order } => return client(state, request, order, now),
        Order::RegisterWorker { name, worker } => {
            state.workers.insert(name, worker);
        }
        Order::Evidence { vm, evidence } => follow(state, vm, &evidence, now),
        Order::SeedEnded { vm, site, seed_seq, failure } => {
            let replica = state.vms.get_mut(&vm).and_then(|vm| vm.replicas.get_mut(&site));
            // A copy that a protection has taken over from ends nothing.
            let its = |replica: &&mut Replica| replica.seed_seq == seed_seq && replica.protection.is_none();
            if let Some(replica) = replica.filter(its) {
                if failure.is_none() {
                    // None was added since the seed was ordered.
                    replica.lacks.clear();
                }
                replica.phase = failure.map_or(ReplicaPhase::Seeded, |reason| ReplicaPhase::Failed { reason });
            }
        }
        Order::ReachedPoint { vm, site, protect_seq } => protection::reached_a_point(state, vm, &site, protect_seq),
        Order::DiskMade { vm, disk } => disks::made(state, vm, &disk),
        Order::HoldsDisks { vm, site, protect_seq, disks } => disks::held(state, vm, &site, protect_seq, disks),
        Order::ReplicaRemoved { vm, site } => {
            if let Some(vm) = state.vms.get_mut(&vm) {
                vm.removals.remove(&site);
            }
        }
        Order::Admit { ids, seq } => queue::admit(state, &ids, seq, now),
        Order::GiveUp { id, reason } => queue::give_up(state, id, reason, now),
        Order::QueueDrain { spot, moves } => queue::queue_drain(state, &spot, moves, now),
        Order::MigrationFailing { id, reason } => failing(state, id, reason),
        Order::MigrationRecord { id, record } => {
            if let Some(migration) = state.migrations.get_mut(&id) {
                migration.take_record(record, now);
            }
            settle(state, id);
        }
        Order::MigrationComplete { id } => {
            if let Some(migration) = state.migrations.get_mut(&id) {
                migration.complete(now);
            }
            settle(state, id);
        }
        Order::MigrationEnded { id, worker } => {
            if let Some(migration) = state.migrations.get_mut(&id).filter(|migration| migration.is_over()) {
                migration.source_ended |= migration.from.worker == worker;
                migration.destination_ended |= migration.to.worker == worker;
            }
        }
        Order::VmHalted { vm, power_seq, cause, problem } => halted(state, vm, power_seq, cause, problem),
        Order::TakeOver(order) => return take_over(state, order, now),
        Order::Joined { vm, worker, report, runs } => recovery::joined(state, vm, worker, report, runs),
        Order::ForgetVm { vm } => {
            if state.vms.get(&vm).is_some_and(|vm| vm.life == Life::Deleted) {
                state.vms.remove(&vm);
            }
        }
    }
    Ok(Answer::Done)
}

fn client(state: &mut State, request: RequestId, order: ClientOrder, now: i64) -> Outcome {
    if let Some(answer) = state.answers.get(&request) {
        let fits = answers(&order, answer);
        return if fits { Ok(answer.clone()) } else { Err(Rejection::RequestReused { request }) };
    }
    let answer = match order {
        ClientOrder::DefineVm { id, spec, worker } => define(state, id, *spec, worker),
        ClientOrder::SetPower { vm, power } => set_power(state, vm, power),
        ClientOrder::Resolve(order) => take_over(state, order, now),
        ClientOrder::DeclareDead { worker, by, reason } => {
            recovery::declare_dead(state, worker, DeclaredDead { at_unix_ms: now, by, reason })
        }
        ClientOrder::AdoptVm { vm, spec, worker } => recovery::adopt(state, vm, *spec, worker),
        ClientOrder::DeleteVm { vm } => delete(state, vm),
        ClientOrder::SeedReplica { vm, site, worker } => seed(state, vm, site, worker),
        ClientOrder::Protect { vm, site, worker, terms, at } => protection::protect(state, vm, site, worker, terms, at),
        ClientOrder::Unprotect { vm, site } => protection::unprotect(state, vm, site),
        ClientOrder::Scrub { vm, site } => protection::scrub(state, vm, site),
        ClientOrder::SetLinkCap { from, to, cap_bps } => protection::set_link_cap(state, from, to, cap_bps),
        ClientOrder::DeleteReplica { vm, site } => delete_replica(state, vm, site),
        ClientOrder::ResizeDisk { vm, disk, size_bytes } => disks::resize(state, vm, &disk, size_bytes),
        ClientOrder::AddDisk { vm, disk, path, size_bytes } => disks::add(state, vm, disk, path, size_bytes),
        ClientOrder::QueueMigration { id, vm, site, traceparent, terms, admitted } => {
            let wanted = Wanted { id, vm, site, traceparent, terms: *terms };
            let queued = queue::enqueue(state, wanted, now)?;
            if let Some(seq) = admitted {
                queue::admit(state, &[id], seq, now);
            }
            Ok(queued)
        }
        ClientOrder::ChangeMigration { id, change } => queue::change(state, id, change),
        ClientOrder::SetLinkLimits { from, to, limits } => schedule::set_link_limits(state, from, to, limits),
        ClientOrder::SetLimits { limits } => schedule::set_limits(state, limits),
        ClientOrder::Drain { spot, to, priority } => queue::drain(state, spot, to, priority, now),
        ClientOrder::Undrain { spot } => queue::undrain(state, &spot, now),
        ClientOrder::CreateMigration { id, vm, site, traceparent } => {
            let wanted = Wanted { id, vm, site, traceparent, terms: Terms::default() };
            let queued = queue::enqueue(state, wanted, now)?;
            queue::start(state, id, now);
            Ok(queued)
        }
        ClientOrder::CancelMigration { id } => cancel(state, id, now),
    }?;
    state.answers.put(request, answer.clone());
    Ok(answer)
}

/// Can this have been the answer to that order?
fn answers(order: &ClientOrder, answer: &Answer) -> bool {
    match (order, answer) {
        (ClientOrder::DefineVm { .. }, Answer::Vm(_))
        | (ClientOrder::CreateMigration { .. } | ClientOrder::QueueMigration { .. }, Answer::Migration(_))
        | (
            ClientOrder::DeleteVm { .. }
            | ClientOrder::DeclareDead { .. }
            | ClientOrder::DeleteReplica { .. }
            | ClientOrder::Unprotect { .. }
            | ClientOrder::SetLinkCap { .. }
            | ClientOrder::SetLinkLimits { .. }
            | ClientOrder::SetLimits { .. }
            | ClientOrder::Drain { .. }
            | ClientOrder::Undrain { .. },
            Answer::Done,
        ) => true,
        (
            ClientOrder::SetPower { vm, .. }
            | ClientOrder::ResizeDisk { vm, .. }
            | ClientOrder::AddDisk { vm, .. }
            | ClientOrder::AdoptVm { vm, .. }
            | ClientOrder::Resolve(takeover::Order { vm, .. }),
            Answer::Vm(answered),
        ) => vm == answered,
        (
            ClientOrder::CancelMigration { id } | ClientOrder::ChangeMigration { id, .. },
            Answer::Migration(answered),
        ) => id == answered,
        (
            ClientOrder::SeedReplica { vm, site, .. }
            | ClientOrder::Protect { vm, site, .. }
            | ClientOrder::Scrub { vm, site },
            Answer::Replica(answered, at),
        ) => vm == answered && site == at,
        (_, Answer::Done | Answer::Vm(_) | Answer::Migration(_) | Answer::Replica(..)) => false,
    }
}

pub(super) fn vm_mut(state: &mut State, id: VmId) -> Result<&mut Vm, Rejection> {
    if let Some((_, recovering)) = state.find_recovering(&id.to_string()) {
        return Err(recovering.refusal());
    }
    let vm = state.vms.get_mut(&id).filter(|vm| vm.life == Life::Defined);
    vm.ok_or_else(|| Rejection::VmUnknown { vm: id.to_string() })
}

pub(crate) fn not_migrating(vm: &Vm) -> Result<(), Rejection> {
    match vm.migration {
        Some(id) if vm.ownership.in_doubt() => Err(Rejection::InDoubt { name: vm.spec.name.clone(), id }),
        Some(id) => Err(Rejection::AlreadyMigrating { name: vm.spec.name.clone(), id }),
        None => Ok(()),
    }
}

pub(super) fn must_be_free(state: &State, name: &str) -> Result<(), Rejection> {
    let taken = state.find_vm(name).is_some() || state.find_recovering(name).is_some();
    if taken { Err(Rejection::NameTaken { name: name.to_owned() }) } else { Ok(()) }
}

fn define(state: &mut State, id: VmId, spec: Spec, worker: WorkerName) -> Outcome {
    must_be_free(state, &spec.name)?;
    if !state.workers.contains_key(&worker) {
        return Err(Rejection::WorkerUnknown { worker });
    }
    state.vms.insert(id, Vm::new(spec, Ownership::first(worker), Power::Stop));
    Ok(Answer::Vm(id))
}

fn set_power(state: &mut State, id: VmId, power: Power) -> Outcome {
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    vm.power = power;
    vm.power_seq += 1;
    vm.problem.clear();
    Ok(Answer::Vm(id))
}

/// A guest that ended stays down, unless it has been ordered to run since.
fn halted(state: &mut State, id: VmId, power_seq: u64, cause: Halt, problem: String) {
    let in_force = |vm: &&mut Vm| vm.power == Power::Run && vm.power_seq == power_seq && vm.migration.is_none();
    let Some(vm) = state.vms.get_mut(&id).filter(in_force) else { return };
    vm.power = match cause {
        Halt::ByItself => Power::Stop,
        Halt::Crashed => Power::Crashed,
    };
    vm.problem = problem;
}

fn delete(state: &mut State, id: VmId) -> Outcome {
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    if vm.power == Power::Run {
        return Err(Rejection::StillRunning { name: vm.spec.name.clone() });
    }
    vm.life = Life::Deleted;
    Ok(Answer::Done)
}

fn seed(state: &mut State, id: VmId, site: SiteName, worker: WorkerName) -> Outcome {
    if state.site_of(&worker) != Some(&site) {
        return Err(Rejection::WorkerUnknown { worker });
    }
    let seed_seq = state.seed_seq + 1;
    let owner_site = state.vms.get(&id).and_then(|vm| state.site_of_vm(vm)).cloned();
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    let name = vm.spec.name.clone();
    if owner_site.as_ref() == Some(&site) {
        return Err(Rejection::AlreadyThere { name, site });
    }
    if vm.removals.contains_key(&site) {
        return Err(Rejection::ReplicaLeaving { name, site });
    }
    if vm.replicas.get(&site).is_some_and(|replica| replica.protection.is_some()) {
        return Err(Rejection::KeptUpToDate { name, site });
    }
    // Where it has no point yet, only a protection makes it at its place.
    let is_there = vm.replicas.get(&site).is_some_and(Replica::is_there);
    if (vm.places.contains_key(&site) || vm.pools.contains_key(&site)) && !is_there {
        return Err(Rejection::ToBePlaced { name, site });
    }
    let fresh = Replica::new(worker, seed_seq, ReplicaPhase::Seeding, None);
    // Files of an earlier copy lie at the worker that made it: the new one goes on there.
    let replica = vm.replicas.entry(site.clone()).or_insert(fresh);
    replica.seed_seq = seed_seq;
    replica.phase = ReplicaPhase::Seeding;
    state.seed_seq = seed_seq;
    Ok(Answer::Replica(id, site))
}

fn delete_replica(state: &mut State, id: VmId, site: SiteName) -> Outcome {
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    if vm.replicas.get(&site).is_some_and(|replica| replica.protection.is_some()) {
        return Err(Rejection::StillProtected { name: vm.spec.name.clone(), site });
    }
    match vm.replicas.remove(&site) {
        Some(replica) => {
            vm.places.remove(&site);
            vm.pools.remove(&site);
            vm.removals.insert(site, replica.worker);
            Ok(Answer::Done)
        }
        None => Err(Rejection::NoReplica { name: vm.spec.name.clone(), site }),
    }
}

fn cancel(state: &mut State, id: MigrationId, now: i64) -> Outcome {
    let migration = state.migrations.get_mut(&id).ok_or_else(|| Rejection::MigrationUnknown { id: id.to_string() })?;
    match &mut migration.phase {
        Phase::Queued => {
            migration.leave_queue(Phase::Cancelled { at_unix_ms: now });
            Ok(Answer::Migration(id))
        }
        Phase::Running { cancel } => {
            *cancel = Cancel::Asked;
            Ok(Answer::Migration(id))
        }
        Phase::Released { .. } | Phase::Acquired { .. } => Err(Rejection::TooLate { id }),
        Phase::Completed { .. } | Phase::Failed { .. } | Phase::Cancelled { .. } => Err(Rejection::AlreadyEnded { id }),
    }
}

/// Lets evidence change who owns a VM, and lets the move follow.
fn follow(state: &mut State, vm_id: VmId, evidence: &Evidence<WorkerName>, now: i64) {
    let Some(vm) = state.vms.get_mut(&vm_id) else { return };
    let Some(next) = vm.ownership.step(evidence) else { return };
    let before = std::mem::replace(&mut vm.ownership, next);
    if let Ownership::Owned { .. } = before {
        return;
    }
    let turn = match (&vm.ownership, evidence.fact) {
        (Ownership::Migrating { .. }, Fact::Refused(_)) => Turn::Refused,
        (Ownership::Migrating { .. }, _) => Turn::Released,
        (Ownership::Owned { own, .. }, _) if *own == before.owner().1 => Turn::Revoked,
        (Ownership::Owned { .. }, Fact::Acquired(_)) => Turn::Acquired,
        (Ownership::Owned { .. }, _) => Turn::GivenBack,
    };
    let migration = vm.migration;
    if turn == Turn::Acquired {
        // The old place still holds the whole disk as it was at the move; the new place's replica is the disk now.
        let (from, to) = (before.owner().0, vm.ownership.owner().0.clone());
        recovery::moved(state, vm_id, from, &to, ReplicaPhase::Seeded);
        if let Some(site) = state.site_of(from).cloned() {
            state.schedule.has_left(from, &site);
        }
    }
    // After a restore from a backup the end of a move has no record.
    let Some(id) = migration else { return };
    let Some(migration) = state.migrations.get_mut(&id) else { return };
    migration.follow(turn, now);
    settle(state, id);
}

/// A move that is over no longer occupies its VM; a failed one leaves its reason there.
pub(super) fn settle(state: &mut State, id: MigrationId) {
    let Some(migration) = state.migrations.get(&id).filter(|migration| migration.is_over()) else { return };
    let Some(vm) = state.vms.get_mut(&migration.vm).filter(|vm| vm.migration == Some(id)) else { return };
    vm.migration = None;
    if let Some(problem) = failure(migration) {
        vm.problem = problem;
    }
}

/// Notes why a move fails. When it has failed already, its VM shows the better reason too.
fn failing(state: &mut State, id: MigrationId, reason: String) {
    let Some(migration) = state.migrations.get_mut(&id) else { return };
    let shown = failure(migration);
    migration.note_failure(reason);
    let Some(vm) = state.vms.get_mut(&migration.vm) else { return };
    if shown.is_some_and(|shown| shown == vm.problem) {
        vm.problem = failure(migration).unwrap_or_default();
    }
}

/// What a failed move leaves at its VM.
fn failure(migration: &Migration) -> Option<String> {
    match &migration.phase {
        Phase::Failed { reason, .. } => Some(format!("migration to site \"{}\" failed: {reason}", migration.to.site)),
        Phase::Queued
        | Phase::Running { .. }
        | Phase::Released { .. }
        | Phase::Acquired { .. }
        | Phase::Completed { .. }
        | Phase::Cancelled { .. } => None,
    }
}

pub(super) fn forget_old_migrations(state: &mut State) {
    if state.migrations.len() <= MAX_MIGRATIONS {
        return;
    }
    let awaited = queue::awaited(state);
    while state.migrations.len() > MAX_MIGRATIONS {
        let ended =
            |migration: &Migration| migration.is_over() && migration.source_ended && migration.destination_ended;
        let done = |migration: &Migration| ended(migration) && !awaited.contains(&migration.id);
        let oldest = state.migrations.values().filter(|migration| done(migration));
        match oldest.min_by_key(|migration| (migration.created_unix_ms, migration.id)).map(|migration| migration.id) {
            Some(id) => state.migrations.remove(&id),
            None => return,
        };
    }
}
