//! [`assignment`]: what a worker should do, all of it, as a pure function of the committed state; [`Telling`]: what of it a
//! worker has been told.
//!
//! After a restore from a backup a worker is told nothing of a VM of which it is not known who owns it: what runs, runs on.
//!
//! A worker is told of a VM while it owns it, holds (or should remove) a copy of it, or takes part in a move of it; of
//! a deleted VM until nothing is left of it; of an ended move until it has reported that it is done with it.

use std::sync::Arc;

use pageport_ownership::Ownership;
use pageport_proto::v1::{self, vm_assignment};
use pageport_proto::{SiteName, VmId, WorkerName};

use super::budget;
use crate::model::migration::{Cancel, Phase};
use crate::model::protection::told_places;
use crate::model::state::{Life, Power, Replica, ReplicaPhase, Vm};
use crate::model::{Migration, State};

/// What this worker should do. `seq` and `term` are left for the sender.
pub fn assignment(state: &State, worker: &WorkerName) -> v1::WorkerAssignment {
    let mine = state.vms.iter().filter(|(_, vm)| concerns(vm, worker)).map(|(id, vm)| (*id, vm));
    let cap_bps = |to: &SiteName| state.site_of(worker).map(|from| budget::replication_bps(state, from, to));
    assignment_of(state, worker, mine, state.migrations.values(), |to| cap_bps(to).unwrap_or_default())
}

/// As [`assignment`], of the VMs that the worker has to do with and of moves among which its own are. `cap_bps`: what its
/// replication and seeds may send to a site, in bits per second; 0: no cap.
pub fn assignment_of<'a>(
    state: &State,
    worker: &WorkerName,
    vms: impl Iterator<Item = (VmId, &'a Vm)>,
    migrations: impl Iterator<Item = &'a Migration>,
    cap_bps: impl Fn(&SiteName) -> u64,
) -> v1::WorkerAssignment {
    let mut out = v1::WorkerAssignment {
        migrations: migrations.filter_map(|migration| migration_for(state, migration, worker)).collect(),
        generation: state.generation.0.into(),
        restoration_id: state.restoration_id(),
        ..v1::WorkerAssignment::default()
    };
    for (id, vm) in vms {
        out.vms.push(vm_for(id, vm));
        if vm.life == Life::Deleted {
            continue;
        }
        if vm.ownership.owner().0 == worker {
            out.seeds.extend(seeds_for(state, id, vm, &cap_bps));
            out.replications.extend(replications_for(state, id, vm, &cap_bps));
        }
        if vm.removals.values().any(|holder| holder == worker) {
            out.replica_removals.push(v1::ReplicaRemoval { vm_id: id.to_string() });
        }
    }
    out
}

/// Does this worker have to do with the VM?
pub fn concerns(vm: &Vm, worker: &WorkerName) -> bool {
    parties(vm).any(|party| party == worker)
}

/// The workers that have to do with the VM; one may be named more than once.
pub fn parties(vm: &Vm) -> impl Iterator<Item = &WorkerName> {
    let (first, second) = match &vm.ownership {
        Ownership::Owned { owner, .. } => (owner, None),
        Ownership::Migrating { from, to, .. } => (from, Some(to)),
    };
    let holders = vm.replicas.values().map(|replica| &replica.worker);
    std::iter::once(first).chain(second).chain(holders).chain(vm.removals.values())
}

fn vm_for(id: VmId, vm: &Vm) -> v1::VmAssignment {
    let (owner, own) = vm.ownership.owner();
    let (released, refused) = match &vm.ownership {
        Ownership::Owned { .. } => (None, None),
        Ownership::Migrating { epoch, released, refused, .. } => {
            (released.then_some(*epoch), refused.then_some(*epoch))
        }
    };
    let power = match vm.power {
        Power::Run => vm_assignment::Power::Run,
        Power::Stop | Power::Crashed => vm_assignment::Power::Stop,
        Power::Kill => vm_assignment::Power::Kill,
    };
    v1::VmAssignment {
        vm_id: id.to_string(),
        spec: Some(v1::VmSpec::from(&vm.spec)),
        owner_worker: owner.to_string(),
        owner_epoch: own.raw(),
        power: power.into(),
        power_seq: vm.power_seq,
        released_epoch: released.unwrap_or_default().raw(),
        refused_epoch: refused.unwrap_or_default().raw(),
        deleted: vm.life == Life::Deleted,
    }
}

fn migration_for(state: &State, migration: &Migration, worker: &WorkerName) -> Option<v1::MigrationAssignment> {
    let (role, peer, ended) = if migration.from.worker == *worker {
        (v1::MigrationRole::Source, &migration.to.worker, migration.source_ended)
    } else if migration.to.worker == *worker {
        (v1::MigrationRole::Destination, &migration.from.worker, migration.destination_ended)
    } else {
        return None;
    };
    if ended || migration.phase == Phase::Queued {
        return None;
    }
    let is_source = role == v1::MigrationRole::Source;
    let (convergence, longest_pause_ms) =
        if is_source { migration.terms.convergence.told() } else { Default::default() };
    Some(v1::MigrationAssignment {
        migration_id: migration.id.to_string(),
        vm_id: migration.vm.to_string(),
        epoch: migration.epoch.raw(),
        role: role.into(),
        peer_worker: peer.to_string(),
        peer_address: state.peer_address(peer),
        cancel: matches!(migration.phase, Phase::Running { cancel: Cancel::Asked }),
        traceparent: migration.traceparent.clone(),
        ordered_unix_ms: migration.started_unix_ms.unwrap_or(migration.created_unix_ms),
        over: migration.is_over(),
        rate_bps: if is_source { budget::rate_bps(state, migration) } else { 0 },
        paused: is_source && migration.terms.paused,
        convergence: convergence.into(),
        longest_pause_ms,
        can_throttle: is_source && migration.can_throttle,
    })
}

fn seeds_for(state: &State, id: VmId, vm: &Vm, cap_bps: &impl Fn(&SiteName) -> u64) -> Vec<v1::SeedAssignment> {
    // A replica that is kept up to date gets its first copy that way, too.
    let wanted = |replica: &Replica| replica.phase == ReplicaPhase::Seeding && replica.protection.is_none();
    let seeding = vm.replicas.iter().filter(|(_, replica)| wanted(replica));
    seeding
        .filter_map(|(site, replica)| {
            let peer = state.workers.get(&replica.worker)?;
            Some(v1::SeedAssignment {
                vm_id: id.to_string(),
                to_site: site.to_string(),
                peer_worker: replica.worker.to_string(),
                peer_address: peer.peer_address.clone(),
                seed_seq: replica.seed_seq,
                cap_bps: cap_bps(site),
            })
        })
        .collect()
}

/// Every protected replica, whatever its phase: the owner says how far it is, also while the VM moves.
fn replications_for(
    state: &State,
    id: VmId,
    vm: &Vm,
    cap_bps: &impl Fn(&SiteName) -> u64,
) -> Vec<v1::ReplicationAssignment> {
    let replications = vm.replicas.iter().filter_map(|(site, replica)| {
        let protection = replica.protection?;
        let peer = state.workers.get(&replica.worker)?;
        Some(v1::ReplicationAssignment {
            vm_id: id.to_string(),
            to_site: site.to_string(),
            peer_worker: replica.worker.to_string(),
            peer_address: peer.peer_address.clone(),
            protect_seq: protection.seq,
            protection: Some(protection.terms.into()),
            cap_bps: cap_bps(site),
            scrub_seq: protection.scrub_seq,
            places: told_places(vm.places.get(site)),
            pool: vm.pools.get(site).map(ToString::to_string).unwrap_or_default(),
        })
    });
    replications.collect()
}

/// Is there something to say?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Say {
    /// Whether or not: as a sign of life.
    Always,
    /// If it is news.
    News,
}

/// What one worker has been told on one stream; what is news gets a number of its own.
#[derive(Debug)]
pub struct Telling {
    seq: u64,
    last: Option<Arc<v1::WorkerAssignment>>,
    controllers: Vec<String>,
}

impl Telling {
    /// Nothing yet; numbers begin after `seq`, which no earlier stream of this worker has reached.
    pub fn new(seq: u64) -> Self {
        Self { seq, last: None, controllers: vec![] }
    }

    /// These are the addresses of the controllers from now on.
    pub fn controllers_are(&mut self, addresses: Vec<String>) {
        self.controllers = addresses;
    }

    /// What to send now, if anything, of what the worker should do.
    pub fn next(&mut self, mut next: v1::WorkerAssignment, term: u64, say: Say) -> Option<v1::WorkerAssignment> {
        next.controllers.clone_from(&self.controllers);
        let before = self.last.as_deref();
        next.term = before.map_or(0, |last| last.term);
        next.seq = before.map_or(0, |last| last.seq);
        let news = before != Some(&next);
        if !news && say == Say::News {
            return None;
        }
        if news {
            self.seq += 1;
            next.seq = self.seq;
        }
        next.term = term;
        Some(next)
    }

    /// It went out.
    pub fn sent(&mut self, assignment: v1::WorkerAssignment) {
        self.last = Some(Arc::new(assignment));
    }

    /// The assignment of this number, if it is the newest.
    pub fn told(&self, seq: u64) -> Option<Arc<v1::WorkerAssignment>> {
        self.last.clone().filter(|last| last.seq == seq)
    }
}
