//! [`reconcile`]: which commands the reports call for, as a pure function of state, observations and time.
//!
//! Each command closes one gap between what is committed and what a worker has durably done; once applied it is no
//! longer proposed. Progress and health cause none: they stay out of the log.

use std::time::Duration;

use pageport_ownership::{Evidence, Ownership, Record as OwnershipRecord, Report, controller};
use pageport_proto::v1::{self, VmState};
use pageport_proto::{VmId, WorkerName};
use tokio::time::Instant;

use super::assignment::concerns;
use super::observation::{Observations, Observed, is_up, record_of};
use crate::api::clip;
use crate::api::preflight::clipped;
use crate::model::command::Halt;
use crate::model::migration::{Phase, Record};
use crate::model::recovery::Recovering;
use crate::model::state::{Life, Power, Replica, ReplicaPhase, Vm, Worker};
use crate::model::{Migration, Order, State};

/// How long a move whose owner has changed waits for its figures.
pub const RECORD_WITHIN: Duration = Duration::from_secs(10);
/// Longest text of a worker that goes into the log, in characters.
const MAX_REASON_CHARS: usize = 500;

/// The moment, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For ages.
    pub instant: Instant,
    /// For the log.
    pub unix_ms: i64,
    /// A lease that controllers of an older generation granted is surely out so long after a worker has joined a newer one.
    pub older_leases_out: Duration,
}

/// Orders that the reports call for.
pub fn reconcile(state: &State, observations: &Observations, now: Now) -> Vec<Order> {
    let mut orders = vec![];
    for (name, observed) in observations.iter() {
        if observations.connected(name, now.instant).is_some() {
            orders.extend(registration(state, name, observed));
        }
    }
    // A failure's reason is noted, and figures are taken, before evidence ends the move.
    for migration in state.migrations.values() {
        orders.extend(moves(migration, observations, now));
    }
    for (id, recovering) in &state.recovering {
        orders.extend(joined(state, *id, recovering, observations, now));
    }
    for (id, vm) in &state.vms {
        orders.extend(evidence(*id, vm, observations, now));
        orders.extend(copies(*id, vm, observations, now));
        orders.extend(points(*id, vm, observations, now));
        orders.extend(disks(*id, vm, observations, now));
        orders.extend(halt(*id, vm, observations, now));
        orders.extend(forget(state, *id, vm, observations, now));
    }
    orders
}

fn shorten(text: &str) -> String {
    clip(text, MAX_REASON_CHARS)
}

fn registration(state: &State, name: &WorkerName, observed: &Observed) -> Option<Order> {
    let report = &observed.report;
    let worker = Worker {
        site: report.site.parse().ok()?,
        grpc_address: shorten(&report.grpc_address),
        peer_address: shorten(&report.peer_address),
        version: shorten(&report.version),
        qemu_version: shorten(&report.qemu_version),
        accelerator: shorten(&report.accelerator),
        memory_total_bytes: report.memory_total_bytes,
        store: report.store_id.parse().ok(),
    };
    let known = state.workers.get(name) == Some(&worker);
    (!known).then(|| Order::RegisterWorker { name: name.clone(), worker })
}

/// What workers that have joined this generation have of a VM of which it is not known who owns it.
fn joined(state: &State, id: VmId, recovering: &Recovering, observations: &Observations, now: Now) -> Vec<Order> {
    let mut orders = vec![];
    for (worker, observed) in observations.iter() {
        // Who was granted a lease by older controllers just before may still run a VM under it.
        let settled =
            observations.joined_for(worker, state, now.instant).is_some_and(|joined| joined >= now.older_leases_out);
        if !settled || observations.connected(worker, now.instant).is_none() {
            continue;
        }
        let of_vm = observed.vm(id);
        let record = of_vm.and_then(record_of).unwrap_or(OwnershipRecord::UNKNOWN);
        let whose = of_vm.and_then(|report| report.whose.parse().ok());
        let report = Report { record, whose };
        let runs = of_vm.is_some_and(is_up);
        if recovering.recover.said(worker) != Some(&report) || recovering.runs.contains(worker) != runs {
            orders.push(Order::Joined { vm: id, worker: worker.clone(), report, runs });
        }
    }
    orders
}

fn evidence(id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Vec<Order> {
    let witnesses = match &vm.ownership {
        Ownership::Owned { confirmed: true, .. } => vec![],
        Ownership::Owned { owner, .. } => vec![owner],
        Ownership::Migrating { from, to, .. } => vec![from, to],
    };
    let mut orders = vec![];
    for worker in witnesses {
        let record =
            observations.connected(worker, now.instant).and_then(|observed| observed.vm(id)).and_then(record_of);
        for fact in record.iter().flat_map(controller::facts) {
            let evidence = Evidence { worker: worker.clone(), fact };
            if vm.ownership.step(&evidence).is_some() {
                orders.push(Order::Evidence { vm: id, evidence });
            }
        }
    }
    orders
}

fn copies(id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Vec<Order> {
    let mut orders = vec![];
    let owner = observations.connected(vm.ownership.owner().0, now.instant);
    let copied = |replica: &Replica| replica.phase == ReplicaPhase::Seeding && replica.protection.is_none();
    for (site, replica) in vm.replicas.iter().filter(|(_, replica)| copied(replica)) {
        let report = owner.and_then(|owner| owner.seed(id, replica.seed_seq));
        let Some(report) = report.filter(|report| report.to_site == site.as_str()) else { continue };
        let failure = (!report.failure.is_empty()).then(|| shorten(&report.failure));
        if report.complete || failure.is_some() {
            orders.push(Order::SeedEnded { vm: id, site: site.clone(), seed_seq: replica.seed_seq, failure });
        }
    }
    for (site, worker) in &vm.removals {
        let holder = observations.connected(worker, now.instant).filter(|observed| observed.assigned_removal(id));
        if holder.is_some_and(|holder| holder.vm(id).is_none_or(|report| !report.has_replica)) {
            orders.push(Order::ReplicaRemoved { vm: id, site: site.clone() });
        }
    }
    orders
}

/// A protected replica counts as complete from its first recovery point on, by its owner's word.
fn points(id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Vec<Order> {
    if vm.life != Life::Defined {
        return vec![];
    }
    let Some(owner) = observations.connected(vm.ownership.owner().0, now.instant) else { return vec![] };
    let waiting = vm.replicas.iter().filter(|(_, replica)| replica.phase != ReplicaPhase::Seeded);
    let reached = waiting.filter_map(|(site, replica)| {
        let protection = replica.protection?;
        let report = owner.replication(id, site).filter(|report| report.protect_seq == protection.seq)?;
        report.status.as_ref()?.newest?;
        Some(Order::ReachedPoint { vm: id, site: site.clone(), protect_seq: protection.seq })
    });
    reached.collect()
}

/// Disks that were added: their owner has made them, or a replica holds them.
fn disks(id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Vec<Order> {
    if vm.life != Life::Defined {
        return vec![];
    }
    let Some(owner) = observations.connected(vm.ownership.owner().0, now.instant) else { return vec![] };
    let reported = |disk: &&str| {
        owner.vm(id).is_some_and(|report| owns(report) && report.disks.iter().any(|seen| seen.name == **disk))
    };
    let made = vm.spec.disks_to_make().filter(reported).map(|disk| Order::DiskMade { vm: id, disk: disk.to_owned() });
    let lacking = vm.replicas.iter().filter(|(_, replica)| !replica.lacks.is_empty());
    let held = lacking.filter_map(|(site, replica)| {
        let protect_seq = replica.protection?.seq;
        let report = owner.replication(id, site).filter(|report| report.protect_seq == protect_seq)?;
        let disks = report.status.as_ref()?.newest?.disks as usize;
        let news = vm.spec.disk_names().take(disks).any(|disk| replica.lacks.contains(disk));
        news.then(|| Order::HoldsDisks { vm: id, site: site.clone(), protect_seq, disks })
    });
    made.chain(held).collect()
}

/// What a worker says of disks counts once they are its own.
fn owns(report: &v1::VmReport) -> bool {
    record_of(report).is_some_and(|record| record.owned().is_some())
}

fn halt(id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Option<Order> {
    if vm.power != Power::Run || vm.migration.is_some() {
        return None;
    }
    let owner = observations.connected(vm.ownership.owner().0, now.instant)?;
    let report = owner.vm(id).filter(|report| report.halted_power_seq == vm.power_seq)?;
    let cause = if report.state() == VmState::Crashed { Halt::Crashed } else { Halt::ByItself };
    let problem = match cause {
        Halt::Crashed if report.problem.is_empty() => "the hypervisor ended unexpectedly".to_owned(),
        Halt::Crashed | Halt::ByItself => shorten(&report.problem),
    };
    Some(Order::VmHalted { vm: id, power_seq: vm.power_seq, cause, problem })
}

fn forget(state: &State, id: VmId, vm: &Vm, observations: &Observations, now: Now) -> Option<Order> {
    if vm.life != Life::Deleted {
        return None;
    }
    let clean = |worker: &WorkerName| {
        let observed = observations.connected(worker, now.instant);
        let told = observed.filter(|observed| observed.assigned_vm(id).is_some_and(|told| told.deleted));
        told.is_some_and(|observed| observed.vm(id).is_none())
    };
    let mut holders = state.workers.keys().filter(|worker| concerns(vm, worker));
    holders.all(clean).then_some(Order::ForgetVm { vm: id })
}

fn moves(migration: &Migration, observations: &Observations, now: Now) -> Vec<Order> {
    let id = migration.id;
    let mut orders = vec![];
    if migration.source_ended && migration.destination_ended {
        return orders;
    }
    for (worker, ended) in
        [(&migration.from.worker, migration.source_ended), (&migration.to.worker, migration.destination_ended)]
    {
        let Some(observed) = observations.connected(worker, now.instant) else { continue };
        let Some(report) = observed.migration(id) else { continue };
        if let Some(record) = &report.record
            && migration.record.is_none()
        {
            let warnings = record.warnings.iter().map(|warning| clipped(warning, MAX_REASON_CHARS)).collect();
            let record = v1::MigrationRecord { warnings, ..record.clone() };
            orders.push(Order::MigrationRecord { id, record: Record(Box::new(record)) });
        }
        if !report.failure.is_empty() && migration.wants_reason() {
            orders.push(Order::MigrationFailing { id, reason: shorten(&report.failure) });
        }
        if report.ended && migration.is_over() && !ended {
            orders.push(Order::MigrationEnded { id, worker: worker.clone() });
        }
    }
    // Whichever leader's clock was ahead when the owner changed: only figures can be lost by it.
    if let Phase::Acquired { at_unix_ms, .. } = migration.phase
        && u128::from(now.unix_ms.abs_diff(at_unix_ms)) >= RECORD_WITHIN.as_millis()
    {
        orders.push(Order::MigrationComplete { id });
    }
    orders
}
