//! [`State`]: everything that is committed, in ordered maps so that every node walks it alike.
//!
//! Holds intent and what workers have durably recorded, never what they last said about progress or health.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pageport_ownership::{Generation, Ownership};
use pageport_proto::{MigrationId, PoolName, RequestId, RestorationId, SiteName, StoreId, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::command::Answer;
use super::migration::Migration;
use super::protection::{Links, Places, Protection};
use super::recovery::{DeclaredDead, Recovering};
use super::schedule::Schedule;
use super::shelf::Shelf;
use super::spec::Spec;
use super::takeover::Takeover;

/// Answers kept for repeated requests; older ones are forgotten.
pub const MAX_ANSWERS: usize = 4096;
/// Ended migrations kept; the oldest are forgotten.
pub const MAX_MIGRATIONS: usize = 1024;

/// What is known of a worker for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Its site.
    pub site: SiteName,
    /// host:port of its gRPC.
    pub grpc_address: String,
    /// host:port of its QUIC endpoint.
    pub peer_address: String,
    /// Its version.
    pub version: String,
    /// Its hypervisor's version.
    pub qemu_version: String,
    /// "kvm" or "tcg".
    pub accelerator: String,
    /// Memory of the host.
    pub memory_total_bytes: u64,
    /// Its durable store; [`None`]: it has never said.
    #[serde(default)]
    pub store: Option<StoreId>,
}

impl Worker {
    /// One of which nothing but its site is known.
    pub fn at(site: SiteName) -> Self {
        Self {
            site,
            grpc_address: String::new(),
            peer_address: String::new(),
            version: String::new(),
            qemu_version: String::new(),
            accelerator: String::new(),
            memory_total_bytes: 0,
            store: None,
        }
    }
}

/// What a VM should be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// Run.
    Run,
    /// Stop, by asking the guest.
    Stop,
    /// Stop at once.
    Kill,
    /// Stay down: the hypervisor ended without being told to.
    Crashed,
}

/// How far a replica is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaPhase {
    /// Being copied.
    Seeding,
    /// Equal to the disk as it was at some moment; a protected one: can be brought back to its newest recovery point.
    Seeded,
    /// Complete, but perhaps of several moments: a move writes into it, or one that wrote into it did not end there. Good for
    /// another move or copy, which compares; not good to boot from.
    Mixed,
    /// The VM's own disk as it was when the VM was taken over from there.
    Outdated,
    /// The copy failed.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A copy of a VM's disks at a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The worker that holds it.
    pub worker: WorkerName,
    /// Number of the order to copy, so that an old result is not taken for a new one.
    pub seed_seq: u64,
    /// How far it is.
    pub phase: ReplicaPhase,
    /// It is kept up to date; [`None`]: it is left as it is.
    #[serde(default)]
    pub protection: Option<Protection>,
    /// Disks that were added to the VM and that it does not hold yet.
    #[serde(default)]
    pub lacks: BTreeSet<String>,
}

impl Replica {
    /// One that holds, or is to hold, all of the VM's disks.
    pub fn new(worker: WorkerName, seed_seq: u64, phase: ReplicaPhase, protection: Option<Protection>) -> Self {
        Self { worker, seed_seq, phase, protection, lacks: BTreeSet::new() }
    }

    /// Was it complete once? Before, it may not even have a place.
    pub fn is_there(&self) -> bool {
        match self.phase {
            ReplicaPhase::Seeding | ReplicaPhase::Failed { .. } => false,
            ReplicaPhase::Seeded | ReplicaPhase::Mixed | ReplicaPhase::Outdated => true,
        }
    }

    /// Is this the order that it is kept up to date by?
    pub fn is_protected_by(&self, protect_seq: u64) -> bool {
        self.protection.is_some_and(|protection| protection.seq == protect_seq)
    }
}

/// Is the VM part of the fleet?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// Yes.
    Defined,
    /// It was deleted; workers still hold something of it.
    Deleted,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What it is.
    pub spec: Spec,
    /// Who may run it.
    pub ownership: Ownership<WorkerName>,
    /// What it should be doing.
    pub power: Power,
    /// Number of the order that this comes from: an end of the guest counts only against the order it ended under.
    pub power_seq: u64,
    /// Copies of its disks, by site.
    pub replicas: BTreeMap<SiteName, Replica>,
    /// Copies to be removed, by site.
    pub removals: BTreeMap<SiteName, WorkerName>,
    /// Where copies of its disks were ordered to lie, by site; also while the VM itself lives on them.
    #[serde(default)]
    pub places: BTreeMap<SiteName, Places>,
    /// The pools that copies of its disks were ordered to lie in, by site; likewise.
    #[serde(default)]
    pub pools: BTreeMap<SiteName, PoolName>,
    /// The newest error that an operator should see.
    pub problem: String,
    /// Changes of owner that no worker's record proves, newest last.
    pub takeovers: Vec<Takeover>,
    /// Is it part of the fleet?
    pub life: Life,
    /// The move that is under way.
    pub migration: Option<MigrationId>,
}

impl Vm {
    /// One that was just defined.
    pub fn new(spec: Spec, ownership: Ownership<WorkerName>, power: Power) -> Self {
        Self {
            spec,
            ownership,
            power,
            power_seq: 0,
            replicas: BTreeMap::new(),
            removals: BTreeMap::new(),
            places: BTreeMap::new(),
            pools: BTreeMap::new(),
            problem: String::new(),
            takeovers: vec![],
            life: Life::Defined,
            migration: None,
        }
    }
}

/// Answers to the newest requests, oldest first out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    by_request: BTreeMap<RequestId, Answer>,
    order: VecDeque<RequestId>,
}

impl Answers {
    /// The answer that was given to this request.
    pub fn get(&self, request: &RequestId) -> Option<&Answer> {
        self.by_request.get(request)
    }

    /// Remembers an answer.
    pub fn put(&mut self, request: RequestId, answer: Answer) {
        if self.by_request.insert(request, answer).is_none() {
            self.order.push_back(request);
        }
        while self.order.len() > MAX_ANSWERS {
            if let Some(oldest) = self.order.pop_front() {
                self.by_request.remove(&oldest);
            }
        }
    }
}

/// Everything that is committed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Workers that have ever reported.
    pub workers: Shelf<WorkerName, Worker>,
    /// VMs, deleted ones until nothing is left of them.
    pub vms: Shelf<VmId, Vm>,
    /// Moves, ended ones for a while.
    pub migrations: Shelf<MigrationId, Migration>,
    /// Number of the newest order to copy.
    pub seed_seq: u64,
    /// Number of the newest order to protect, or of the newest turn of a protection.
    #[serde(default)]
    pub protect_seq: u64,
    /// Caps of links.
    #[serde(default)]
    pub links: Links,
    /// What the scheduler is told.
    #[serde(default)]
    pub schedule: Schedule,
    /// Answers to repeated requests.
    pub answers: Answers,
    /// How often the controllers were restored from a backup.
    #[serde(default)]
    pub generation: Generation,
    /// By which restore that was; two from one backup differ. Of some earlier versions it is not known.
    #[serde(default)]
    pub restoration: Option<RestorationId>,
    /// After a restore: VMs of which it is not known who owns them.
    #[serde(default)]
    pub recovering: BTreeMap<VmId, Recovering>,
    /// Workers that an operator declared dead after a restore; the newest word on each.
    #[serde(default)]
    pub declared_dead: BTreeMap<WorkerName, DeclaredDead>,
}

impl State {
    /// The VM of this id or name.
    pub fn find_vm(&self, id_or_name: &str) -> Option<(VmId, &Vm)> {
        let mut defined = self.vms.iter().filter(|(_, vm)| vm.life == Life::Defined);
        if let Ok(id) = id_or_name.parse::<VmId>()
            && let Some(vm) = self.vms.get(&id).filter(|vm| vm.life == Life::Defined)
        {
            return Some((id, vm));
        }
        defined.find(|(_, vm)| vm.spec.name == id_or_name).map(|(key, vm)| (*key, vm))
    }

    /// By which restore these controllers began, as it is told; empty: by none.
    pub fn restoration_id(&self) -> String {
        self.restoration.map(|restoration| restoration.to_string()).unwrap_or_default()
    }

    /// Names of all sites.
    pub fn sites(&self) -> Vec<SiteName> {
        let mut sites: Vec<_> = self.workers.values().map(|worker| worker.site.clone()).collect();
        sites.sort();
        sites.dedup();
        sites
    }

    /// The site of a worker.
    pub fn site_of(&self, worker: &WorkerName) -> Option<&SiteName> {
        self.workers.get(worker).map(|worker| &worker.site)
    }

    /// Where other workers reach a worker; empty while that is not known.
    pub fn peer_address(&self, worker: &WorkerName) -> String {
        self.workers.get(worker).map(|worker| worker.peer_address.clone()).unwrap_or_default()
    }

    /// Where a VM may run.
    pub fn site_of_vm(&self, vm: &Vm) -> Option<&SiteName> {
        self.site_of(vm.ownership.owner().0)
    }
}
