//! [`View`]: state and observations into API messages. Pure.
//!
//! What a VM does is told by its owner's last report while that worker is connected; else it is *unknown*, or, past the
//! commit point of a move, *in doubt*.

use pageport_ownership::{Epoch, Policy, Proof};
use pageport_proto::v1::{self, MigrationState, ReplicaState, VmState};
use pageport_proto::{SiteName, VmId, WorkerName};
use tokio::time::Instant;

use crate::link::budget;
use crate::link::observation::Observations;
use crate::model::migration::{Cancel, Phase};
use crate::model::protection::told_places;
use crate::model::recovery::Recovering;
use crate::model::state::{Life, Power, Replica, ReplicaPhase, Vm};
use crate::model::takeover::Takeover;
use crate::model::{Migration, State};

/// Renders one moment.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    state: &'a State,
    pub(super) observations: &'a Observations,
    pub(super) now: Instant,
}

impl<'a> View<'a> {
    /// Of this moment.
    pub fn new(state: &'a State, observations: &'a Observations, now: Instant) -> Self {
        Self { state, observations, now }
    }

    /// All sites.
    pub fn sites(&self) -> Vec<v1::Site> {
        self.state.sites().iter().map(|site| self.site(site)).collect()
    }

    fn site(&self, site: &SiteName) -> v1::Site {
        let here: Vec<_> = self.state.workers.iter().filter(|(_, worker)| worker.site == *site).collect();
        let runs = |id: &VmId, vm: &Vm| {
            let here = self.state.site_of_vm(vm) == Some(site) && vm.life == Life::Defined;
            here && matches!(self.vm_state(*id, vm), VmState::Running | VmState::Paused | VmState::Migrating)
        };
        v1::Site {
            name: site.to_string(),
            workers: here.iter().map(|(name, _)| name.to_string()).collect(),
            vms_running: self.state.vms.iter().filter(|(id, vm)| runs(id, vm)).count() as u32,
            reachable: here.iter().any(|(name, _)| self.observations.connected(name, self.now).is_some()),
        }
    }

    /// All workers.
    pub fn workers(&self) -> Vec<v1::Worker> {
        let connected = |name| self.observations.connected(name, self.now);
        let workers = self.state.workers.iter().map(|(name, worker)| v1::Worker {
            name: name.to_string(),
            site: worker.site.to_string(),
            connected: connected(name).is_some(),
            grpc_address: worker.grpc_address.clone(),
            peer_address: worker.peer_address.clone(),
            version: worker.version.clone(),
            qemu_version: worker.qemu_version.clone(),
            accelerator: worker.accelerator.clone(),
            last_seen_unix_ms: self.observations.last(name).map_or(0, |observed| observed.at_unix_ms),
            memory_total_bytes: worker.memory_total_bytes,
            guarded: self.observations.guarded(name, self.now),
            drained: self.state.schedule.is_drained(name, &worker.site),
            pools: connected(name).map(|observed| observed.report.pools.clone()).unwrap_or_default(),
        });
        workers.collect()
    }

    /// All VMs.
    pub fn vms(&self) -> Vec<v1::Vm> {
        let defined = self.state.vms.iter().filter(|(_, vm)| vm.life == Life::Defined);
        let known = defined.map(|(id, vm)| self.vm(*id, vm));
        let unknown = self.state.recovering.iter().filter(|(_, recovering)| recovering.vm.life == Life::Defined);
        known.chain(unknown.map(|(id, recovering)| self.recovering(*id, recovering))).collect()
    }

    /// One of which it is not known who owns it.
    pub fn recovering(&self, id: VmId, recovering: &Recovering) -> v1::Vm {
        v1::Vm {
            id: id.to_string(),
            spec: Some(v1::VmSpec::from(&recovering.vm.spec)),
            state: VmState::Unknown.into(),
            desired_running: recovering.vm.power == Power::Run,
            problem: recovering.problem(),
            ..v1::Vm::default()
        }
    }

    /// One VM.
    pub fn vm(&self, id: VmId, vm: &Vm) -> v1::Vm {
        let (owner, own) = vm.ownership.owner();
        let report = self.observations.connected(owner, self.now).and_then(|observed| observed.vm(id));
        let reported = report.map(|report| report.problem.clone()).unwrap_or_default();
        v1::Vm {
            id: id.to_string(),
            spec: Some(v1::VmSpec::from(&vm.spec)),
            owner_site: self.state.site_of(owner).map(ToString::to_string).unwrap_or_default(),
            owner_worker: owner.to_string(),
            owner_epoch: own.raw(),
            state: self.vm_state(id, vm).into(),
            desired_running: vm.power == Power::Run,
            problem: [reported, self.unguarded(vm), vm.problem.clone(), self.behind(id, vm)]
                .into_iter()
                .find(|problem| !problem.is_empty())
                .unwrap_or_default(),
            replicas: self.replicas(id, vm),
            migration_id: vm.migration.map(|id| id.to_string()).unwrap_or_default(),
            doubt: self.doubt(vm),
            takeovers: vm.takeovers.iter().map(takeover).collect(),
            disks: report.map(|report| report.disks.clone()).unwrap_or_default(),
        }
    }

    /// What is wrong with where a VM that fences itself is, while that is known.
    fn unguarded(&self, vm: &Vm) -> String {
        let owner = vm.ownership.owner().0;
        let known = self.observations.connected(owner, self.now).is_some();
        if !known || vm.spec.on_isolation == Policy::KeepRunning || self.observations.guarded(owner, self.now) {
            return String::new();
        }
        format!("it fences itself, and worker \"{owner}\" has no guard: start pageport-guard.service on its host")
    }

    /// Why a VM is in doubt, and what would settle it.
    fn doubt(&self, vm: &Vm) -> String {
        let silent = |worker: &&WorkerName| self.observations.connected(worker, self.now).is_none();
        let holders = vm.ownership.possible_holders();
        let absent: Vec<_> = holders.into_iter().filter(silent).map(WorkerName::as_str).collect();
        if absent.is_empty() || vm.power != Power::Run && vm.migration.is_none() {
            return String::new();
        }
        let (who, is) = (absent.join(" and "), if absent.len() == 1 { "is" } else { "are" });
        let cause = if vm.ownership.in_doubt() {
            format!("the source has handed the vm over, and {who} {is} not connected")
        } else {
            format!("{who}, which may run it, {is} not connected")
        };
        let settles = match vm.spec.on_isolation {
            Policy::SelfFence => "once every lease has run out it is started at a replica whose worker is guarded",
            Policy::KeepRunning => {
                "it is started nowhere else until that worker reports, its host is fenced, or an operator resolves it"
            }
        };
        format!("{cause}; {settles}")
    }

    /// What a VM does.
    pub fn vm_state(&self, id: VmId, vm: &Vm) -> VmState {
        let migration = vm.migration.and_then(|id| self.state.migrations.get(&id));
        let connected = |worker| self.observations.connected(worker, self.now);
        if let Some(migration) = migration.filter(|migration| !migration.is_settled()) {
            let both = connected(&migration.from.worker).is_some() && connected(&migration.to.worker).is_some();
            return match migration.phase {
                Phase::Released { .. } if !both => VmState::InDoubt,
                _ => VmState::Migrating,
            };
        }
        let Some(owner) = connected(vm.ownership.owner().0) else { return VmState::Unknown };
        let reported = owner.vm(id).map(|report| report.state()).filter(|state| *state != VmState::Unspecified);
        match (reported, vm.power) {
            (Some(VmState::Stopped) | None, Power::Crashed) => VmState::Crashed,
            (Some(state), _) => state,
            (None, Power::Run) => VmState::Starting,
            (None, Power::Stop | Power::Kill) => VmState::Stopped,
        }
    }

    /// A VM's replicas.
    pub fn replicas(&self, id: VmId, vm: &Vm) -> Vec<v1::Replica> {
        vm.replicas.iter().map(|(site, replica)| self.replica(id, vm, site, replica)).collect()
    }

    /// One replica.
    pub fn replica(&self, id: VmId, vm: &Vm, site: &SiteName, replica: &Replica) -> v1::Replica {
        let (state, problem) = match &replica.phase {
            ReplicaPhase::Seeding => (ReplicaState::Seeding, String::new()),
            ReplicaPhase::Seeded => (ReplicaState::Seeded, String::new()),
            ReplicaPhase::Mixed => (ReplicaState::Seeded, self.mixed(vm)),
            ReplicaPhase::Outdated if replica.protection.is_some() => (ReplicaState::Outdated, String::new()),
            ReplicaPhase::Outdated => (ReplicaState::Outdated, "seed it again: only what differs is sent".to_owned()),
            ReplicaPhase::Failed { reason } => (ReplicaState::Failed, reason.clone()),
        };
        let owner = self.observations.connected(vm.ownership.owner().0, self.now);
        let seed =
            owner.and_then(|owner| owner.seed(id, replica.seed_seq)).filter(|seed| seed.to_site == site.as_str());
        let (site_name, worker) = (site.to_string(), replica.worker.to_string());
        let lacks = replica.lacks.iter().cloned().collect();
        let places = told_places(vm.places.get(site));
        let pool = vm.pools.get(site).map(ToString::to_string).unwrap_or_default();
        let mut out = v1::Replica {
            site: site_name,
            worker,
            state: state.into(),
            problem,
            lacks,
            places,
            pool,
            ..v1::Replica::default()
        };
        if let Some(seed) = seed {
            out.done_bytes = seed.done_bytes;
            out.total_bytes = seed.total_bytes;
            out.wan_bytes = seed.wan_bytes;
            out.rate_bps = if state == ReplicaState::Seeding { seed.rate_bps } else { 0 };
        } else if let Some(disk) = owner.and_then(|owner| owner.vm(id)).filter(|_| state == ReplicaState::Seeded) {
            out.done_bytes = disk.disk_bytes;
            out.total_bytes = disk.disk_bytes;
        }
        self.kept_up_to_date(id, vm, site, replica, &mut out);
        let holder = self.observations.connected(&replica.worker, self.now);
        out.flattening = holder.and_then(|holder| holder.vm(id)).and_then(|report| report.flattening.clone());
        if out.problem.is_empty() && !out.lacks.is_empty() {
            out.problem = format!("does not hold what was added: disk {}", out.lacks.join(", "));
        }
        if let Some(flattening) = out.flattening.as_ref().filter(|flattening| !flattening.problem.is_empty()) {
            out.problem.clone_from(&flattening.problem);
        }
        out
    }

    /// What replication says of a replica stands above what is left of a seed.
    fn kept_up_to_date(&self, id: VmId, vm: &Vm, site: &SiteName, replica: &Replica, out: &mut v1::Replica) {
        let Some(status) = self.replication(id, vm, site, replica) else { return };
        out.protection = replica.protection.map(|protection| protection.terms.into());
        out.scrub_seq = replica.protection.map_or(0, |protection| protection.scrub_seq);
        let report = self.observations.last(vm.ownership.owner().0).and_then(|owner| owner.replication(id, site));
        out.wan_bytes = report.map_or(0, |report| report.wan_bytes);
        out.rate_bps = status.rate_bps;
        if status.total_bytes > 0 && replica.phase != ReplicaPhase::Seeded {
            (out.done_bytes, out.total_bytes) = (status.done_bytes, status.total_bytes);
        }
        if out.problem.is_empty() {
            out.problem.clone_from(&status.problem);
        }
        out.replication = Some(status);
    }

    /// Why a replica is not one to boot from.
    fn mixed(&self, vm: &Vm) -> String {
        match vm.migration {
            Some(_) => String::new(),
            None => "a move into it broke off: no disk to boot from before the next seed or move".to_owned(),
        }
    }

    /// One move.
    pub fn migration(&self, migration: &Migration) -> v1::Migration {
        let late = |cancel: Cancel| match cancel {
            Cancel::Asked => "the cancel came too late: the source had already handed the vm over".to_owned(),
            Cancel::NotAsked => String::new(),
        };
        let (state, reason) = match &migration.phase {
            Phase::Queued => (MigrationState::Requested, String::new()),
            Phase::Running { cancel: Cancel::NotAsked } => (MigrationState::Running, self.waits_for(migration)),
            Phase::Running { cancel: Cancel::Asked } => (MigrationState::Cancelling, self.waits_for(migration)),
            Phase::Released { .. } => (MigrationState::Committed, self.waits_for(migration)),
            Phase::Acquired { cancel, .. } => (MigrationState::Committed, late(*cancel)),
            Phase::Completed { cancel, .. } => (MigrationState::Completed, late(*cancel)),
            Phase::Failed { reason, .. } => (MigrationState::Failed, reason.clone()),
            Phase::Cancelled { .. } => (MigrationState::Cancelled, "cancelled on request".to_owned()),
        };
        v1::Migration {
            id: migration.id.to_string(),
            vm_id: migration.vm.to_string(),
            vm_name: migration.vm_name.clone(),
            from_site: migration.from.site.to_string(),
            to_site: migration.to.site.to_string(),
            state: state.into(),
            epoch: migration.epoch.raw(),
            created_unix_ms: migration.created_unix_ms,
            ended_unix_ms: migration.ended_unix_ms().unwrap_or_default(),
            reason,
            progress: self.progress(migration),
            record: migration.record.as_ref().map(|record| record.0.as_ref().clone()),
            terms: Some(terms(migration)),
            started_unix_ms: started(migration),
            rate_bps: budget::rate_bps(self.state, migration),
        }
    }

    fn waits_for(&self, migration: &Migration) -> String {
        let away = |worker| self.observations.connected(worker, self.now).is_none();
        match (away(&migration.from.worker), away(&migration.to.worker), &migration.failure) {
            (true, _, _) => format!("waits for worker \"{}\", which is not connected", migration.from.worker),
            (_, true, _) => format!("waits for worker \"{}\", which is not connected", migration.to.worker),
            (false, false, Some(reason)) => reason.clone(),
            (false, false, None) => String::new(),
        }
    }

    /// The source sees both ends; the destination's word counts while the source has none.
    fn progress(&self, migration: &Migration) -> Option<v1::MigrationProgress> {
        let of = |worker| self.observations.last(worker)?.migration(migration.id)?.progress.clone();
        of(&migration.from.worker).or_else(|| of(&migration.to.worker))
    }
}

fn terms(migration: &Migration) -> v1::MigrationTerms {
    let terms = &migration.terms;
    let (convergence, longest_pause_ms) = terms.convergence.told();
    v1::MigrationTerms {
        priority: terms.priority.into(),
        rate_bps: terms.rate_bps,
        deadline_unix_ms: terms.deadline_unix_ms.unwrap_or_default(),
        window: terms.window.map(|window| window.to_string()).unwrap_or_default(),
        after_ids: terms.after.iter().map(ToString::to_string).collect(),
        paused: terms.paused,
        drains: terms.drains,
        convergence: convergence.into(),
        longest_pause_ms,
    }
}

/// When it began. A move that never did has no epoch; one without a time of its own began when it was ordered.
fn started(migration: &Migration) -> i64 {
    let begun = migration.epoch != Epoch::ZERO;
    migration.started_unix_ms.unwrap_or(if begun { migration.created_unix_ms } else { 0 })
}

/// What was seen, and where the disk comes from.
fn grounds(seen: &str, takeover: &Takeover) -> String {
    let Some(point) = takeover.point else { return seen.to_owned() };
    let seconds = takeover.at_unix_ms.saturating_sub(point.taken_unix_ms).max(0) / 1000;
    let number = point.number;
    let gap = if seen.is_empty() { "" } else { "; " };
    format!("{seen}{gap}it boots from recovery point {number}, which was {seconds} s old")
}

fn takeover(takeover: &Takeover) -> v1::Takeover {
    let by = takeover.ordered_by.as_ref();
    let (ground, reason, operator, agent) = match &takeover.proof {
        Proof::LeasesOut { .. } => (v1::takeover::Ground::LeaseExpired, &takeover.seen, by, None),
        Proof::Fenced { agent, .. } => (v1::takeover::Ground::Fenced, &takeover.seen, by, Some(agent)),
        Proof::Override { who, reason } => (v1::takeover::Ground::Override, reason, Some(who), None),
    };
    v1::Takeover {
        at_unix_ms: takeover.at_unix_ms,
        ground: ground.into(),
        from_worker: takeover.from.to_string(),
        to_worker: takeover.to.to_string(),
        epoch: takeover.epoch.raw(),
        reason: grounds(reason, takeover),
        operator: operator.cloned().unwrap_or_default(),
        agent: agent.cloned().unwrap_or_default(),
    }
}
