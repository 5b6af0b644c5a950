//! A worker without a hypervisor: the real ownership rules and the real worker link, guests that are only a word.
//!
//! What workers say to each other goes over a shared board instead of QUIC.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageport_common::tls::Identity;
use pageport_ownership::{
    Durable, Effect, Epoch, Event, Guest, Licence, Message, Nonce, Owner, Policy, Record, Volatile, emits, needs_grant,
    worker_step,
};
use pageport_proto::StoreId;
use pageport_proto::v1::worker_link_service_client::WorkerLinkServiceClient;
use pageport_proto::v1::{self, MigrationRole, VmState, vm_assignment};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{Cluster, dial};

/// What all fake workers of one test share.
#[derive(Default)]
pub struct Board {
    said: BTreeMap<(String, String), Vec<Message>>,
    /// Sources do not pause: migrations stay before the commit point.
    pub hold: bool,
    /// Destinations give up with this reason.
    pub refuse: Option<String>,
    /// The next running guest crashes with this problem.
    pub crash: Option<String>,
    /// Destinations ask nothing.
    pub mute: bool,
    /// Why destinations were not authorised.
    pub denials: Vec<String>,
    /// Workers that answer to questions with another store than they began with.
    pub stores: BTreeMap<String, StoreId>,
    /// Sources report no figures.
    pub no_record: bool,
    /// A guard watches the workers' keepers.
    pub guarded: bool,
    /// How often each VM was set running, and by whom.
    pub runs: Vec<(String, String)>,
    /// The newest recovery point that each worker holds of each VM.
    points: BTreeMap<(String, String), v1::RecoveryPoint>,
    /// Replication makes no points, for this reason.
    pub no_points: Option<String>,
    /// Age of each newest point, as it is reported.
    pub lag_ms: u64,
    /// Controllers that workers were not started with.
    pub controllers: Vec<String>,
    /// Workers that reach no controller.
    pub cut: BTreeSet<String>,
    /// How often a worker turned controllers away that it is deaf to.
    pub turned_away: usize,
    /// What workers find where they are asked for a preflight.
    pub findings: Vec<v1::Finding>,
    /// The preflights that they were last asked for.
    pub preflights: Vec<v1::PreflightAssignment>,
    /// What each worker says of its pools.
    pub pools: Vec<v1::Pool>,
    /// What owners were last told to replicate.
    pub replications: BTreeMap<String, Vec<v1::ReplicationAssignment>>,
}

pub type Shared = Arc<Mutex<Board>>;

struct Vm {
    record: Durable,
    volatile: Volatile,
    has_replica: bool,
    problem: String,
    crashed_under: Option<u64>,
    /// Whose the newest epochs are, as they were told.
    said: BTreeMap<Epoch, String>,
    /// As it was last assigned.
    spec: Option<v1::VmSpec>,
}

struct Worker {
    name: String,
    site: String,
    store: StoreId,
    board: Shared,
    channels: Vec<Channel>,
    leader: usize,
    vms: BTreeMap<String, Vm>,
    migrations: BTreeMap<String, v1::MigrationReport>,
    seeds: Vec<v1::SeedReport>,
    replications: Vec<v1::ReplicationReport>,
    preflights: Vec<v1::PreflightReport>,
    seq: u64,
    next_nonce: u64,
    identity: Identity,
    met: usize,
    generation: u32,
    restoration_id: String,
    /// VMs of the newest assignment.
    spoken_of: BTreeSet<String>,
}

pub fn start(cluster: &Cluster, name: &str, site: &str, board: &Shared) -> JoinHandle<()> {
    let identity = cluster.worker_identity(name);
    let worker = Worker {
        name: name.to_owned(),
        site: site.to_owned(),
        store: StoreId::generate(),
        board: board.clone(),
        channels: cluster.addresses().iter().map(|address| dial(&identity, address)).collect(),
        leader: 0,
        vms: BTreeMap::new(),
        migrations: BTreeMap::new(),
        seeds: vec![],
        replications: vec![],
        preflights: vec![],
        seq: 0,
        next_nonce: 1,
        identity,
        met: 0,
        generation: 0,
        restoration_id: String::new(),
        spoken_of: BTreeSet::new(),
    };
    tokio::spawn(worker.run())
}

impl Worker {
    async fn run(mut self) {
        loop {
            let (cut, new) = {
                let board = self.board.lock().unwrap();
                (board.cut.contains(&self.name), board.controllers[self.met..].to_vec())
            };
            self.met += new.len();
            self.channels.extend(new.iter().map(|address| dial(&self.identity, address)));
            if !cut {
                self.link().await;
            }
            self.leader = (self.leader + 1) % self.channels.len();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn client(&self) -> WorkerLinkServiceClient<Channel> {
        WorkerLinkServiceClient::new(self.channels[self.leader].clone())
    }

    async fn link(&mut self) {
        let (reports, stream) = mpsc::channel(4);
        let Ok(answer) = self.client().link(ReceiverStream::new(stream)).await else { return };
        let mut assignments = answer.into_inner();
        let mut assignment = v1::WorkerAssignment::default();
        let mut look = tokio::time::interval(Duration::from_millis(30));
        loop {
            if reports.send(self.report()).await.is_err() {
                return;
            }
            tokio::select! {
                next = assignments.message() => match next {
                    Ok(Some(next)) => assignment = next,
                    Ok(None) | Err(_) => return,
                },
                _ = look.tick() => {}
            }
            if assignment.seq != 0 && self.is_deaf_to(&assignment) {
                self.board.lock().unwrap().turned_away += 1;
                return;
            }
            if self.board.lock().unwrap().cut.contains(&self.name) {
                return;
            }
            if assignment.seq != 0 {
                self.join(&assignment);
                self.work(&assignment).await;
            }
        }
    }

    fn is_deaf_to(&self, assignment: &v1::WorkerAssignment) -> bool {
        let another = assignment.restoration_id != self.restoration_id;
        assignment.generation < self.generation || (assignment.generation == self.generation && another)
    }

    /// Hears no other controllers any more, but newer ones.
    fn join(&mut self, assignment: &v1::WorkerAssignment) {
        if assignment.generation > self.generation {
            (self.generation, self.restoration_id) = (assignment.generation, assignment.restoration_id.clone());
            for id in self.vms.keys().cloned().collect::<Vec<_>>() {
                self.vms.get_mut(&id).unwrap().volatile.question = None;
                self.handle(&id, Event::Join);
            }
        }
    }

    async fn work(&mut self, assignment: &v1::WorkerAssignment) {
        self.spoken_of.clear();
        for vm in &assignment.vms {
            self.work_on_vm(vm).await;
        }
        self.migrations.retain(|id, _| assignment.migrations.iter().any(|migration| migration.migration_id == *id));
        for migration in &assignment.migrations {
            self.work_on_migration(migration).await;
        }
        for seed in &assignment.seeds {
            self.seeds.retain(|report| report.to_site != seed.to_site);
            self.seeds.push(v1::SeedReport {
                vm_id: seed.vm_id.clone(),
                to_site: seed.to_site.clone(),
                seed_seq: seed.seed_seq,
                complete: true,
                ..v1::SeedReport::default()
            });
        }
        self.replicate(&assignment.replications);
        self.look(&assignment.preflights);
        for removal in &assignment.replica_removals {
            if let Some(vm) = self.vms.get_mut(&removal.vm_id) {
                vm.has_replica = false;
            }
        }
        self.seq = assignment.seq;
    }

    /// Every preflight finds the same.
    fn look(&mut self, asked: &[v1::PreflightAssignment]) {
        let mut board = self.board.lock().unwrap();
        if !asked.is_empty() {
            board.preflights = asked.to_vec();
        }
        let answer =
            |it: &v1::PreflightAssignment| v1::PreflightReport { seq: it.seq, findings: board.findings.clone() };
        self.preflights = asked.iter().map(answer).collect();
    }

    /// Each look makes a point at once, unless it is to make none.
    fn replicate(&mut self, assigned: &[v1::ReplicationAssignment]) {
        let mut board = self.board.lock().unwrap();
        board.replications.insert(self.name.clone(), assigned.to_vec());
        self.replications.clear();
        for order in assigned {
            let key = (order.peer_worker.clone(), order.vm_id.clone());
            let problem = board.no_points.clone().unwrap_or_default();
            if problem.is_empty() {
                let number = board.points.get(&key).map_or(1, |point| point.number + 1);
                board.points.insert(key.clone(), v1::RecoveryPoint { number, ..v1::RecoveryPoint::default() });
            }
            let status = v1::ReplicationStatus {
                phase: v1::ReplicationPhase::Idle.into(),
                newest: board.points.get(&key).copied(),
                lag_ms: board.lag_ms,
                problem,
                ..v1::ReplicationStatus::default()
            };
            self.replications.push(v1::ReplicationReport {
                vm_id: order.vm_id.clone(),
                to_site: order.to_site.clone(),
                protect_seq: order.protect_seq,
                status: Some(status),
                wan_bytes: 4096,
            });
        }
    }

    async fn work_on_vm(&mut self, assigned: &v1::VmAssignment) {
        let id = &assigned.vm_id;
        self.spoken_of.insert(id.clone());
        if assigned.deleted {
            self.vms.remove(id);
            return;
        }
        self.vms.entry(id.clone()).or_insert_with(|| Vm {
            record: Durable::read(|| Ok::<_, ()>(None)).unwrap(),
            volatile: Volatile::default(),
            has_replica: assigned.owner_worker != self.name,
            problem: String::new(),
            crashed_under: None,
            said: BTreeMap::new(),
            spec: None,
        });
        self.vms.get_mut(id).unwrap().spec.clone_from(&assigned.spec);
        let mine = assigned.owner_worker == self.name;
        let epoch = Epoch::from_raw(assigned.owner_epoch);
        let owner = if mine { Owner::Me } else { Owner::Other };
        self.vms.get_mut(id).unwrap().said.insert(epoch, assigned.owner_worker.clone());
        self.handle(id, Event::Owned { epoch, owner });
        if assigned.released_epoch != 0 {
            self.handle(id, Event::Release(Epoch::from_raw(assigned.released_epoch)));
        }
        if assigned.refused_epoch != 0 {
            self.handle(id, Event::Refused(Epoch::from_raw(assigned.refused_epoch)));
        }
        let runs = assigned.power() == vm_assignment::Power::Run;
        let running = self.vms[id].volatile.guest == Guest::Running;
        let crash = if running { self.board.lock().unwrap().crash.take() } else { None };
        if let Some(problem) = crash {
            let vm = self.vms.get_mut(id).unwrap();
            (vm.problem, vm.crashed_under) = (problem, Some(assigned.power_seq));
            self.handle(id, Event::QemuGone);
        }
        let vm = &self.vms[id];
        if !runs && vm.volatile.guest == Guest::Running {
            self.handle(id, Event::QemuGone);
        }
        if runs
            && needs_grant(
                &self.vms[id].record.record(),
                &self.vms[id].volatile,
                self.vms[id].crashed_under != Some(assigned.power_seq),
                mine.then_some(epoch),
            )
        {
            self.ask_grant(id).await;
        }
        if !runs {
            let vm = self.vms.get_mut(id).unwrap();
            (vm.problem, vm.crashed_under) = (String::new(), None);
        }
    }

    async fn ask_grant(&mut self, id: &str) {
        let nonce = Nonce(self.next_nonce);
        self.next_nonce += 1;
        self.handle(id, Event::Asked(nonce));
        let request = v1::AskGrantRequest { worker: self.name.clone(), vm_id: id.to_owned(), nonce: nonce.0 };
        if let Ok(answer) = self.client().ask_grant(request).await.map(|answer| answer.into_inner())
            && answer.granted
        {
            self.handle(id, Event::Grant { nonce: Nonce(answer.nonce), own: Epoch::from_raw(answer.own) });
        }
    }

    async fn work_on_migration(&mut self, assigned: &v1::MigrationAssignment) {
        let (id, epoch) = (&assigned.vm_id, Epoch::from_raw(assigned.epoch));
        let (hold, refuse, no_record) = {
            let board = self.board.lock().unwrap();
            (board.hold, board.refuse.clone(), board.no_record)
        };
        let mut report = v1::MigrationReport {
            migration_id: assigned.migration_id.clone(),
            role: assigned.role,
            progress: Some(v1::MigrationProgress { phase: "memory".into(), ..v1::MigrationProgress::default() }),
            ..v1::MigrationReport::default()
        };
        self.vms.get_mut(id).unwrap().said.insert(epoch, assigned.peer_worker.clone());
        if assigned.role() == MigrationRole::Source {
            self.handle(id, if assigned.cancel { Event::Cancel(epoch) } else { Event::Authorise(epoch) });
            if !hold && matches!(self.vms[id].record.record(), Record::Prepared { .. }) {
                self.handle(id, Event::Paused);
            }
            self.listen(id, &assigned.peer_worker);
            let handed_over = matches!(self.vms[id].record.record(), Record::Replica { .. });
            if handed_over && !no_record {
                report.record = Some(v1::MigrationRecord { total_time_ms: 1234, ..v1::MigrationRecord::default() });
            }
        } else if let Some(reason) = refuse.filter(|_| !assigned.over) {
            report.failure = reason;
            self.handle(id, Event::Refuse(epoch));
        } else {
            self.listen(id, &assigned.peer_worker);
            if matches!(self.vms[id].record.record(), Record::Replica { seen, .. } if seen < epoch)
                && self.vms[id].volatile.guest == Guest::Absent
            {
                self.ask_authorisation(assigned).await;
            }
        }
        report.ended = assigned.over;
        self.migrations.insert(assigned.migration_id.clone(), report);
    }

    async fn ask_authorisation(&mut self, assigned: &v1::MigrationAssignment) {
        if self.board.lock().unwrap().mute {
            return;
        }
        let nonce = self.next_nonce;
        self.next_nonce += 1;
        self.handle(&assigned.vm_id, Event::Asked(Nonce(nonce)));
        let request = v1::AskAuthorisationRequest {
            worker: self.name.clone(),
            vm_id: assigned.vm_id.clone(),
            migration_id: assigned.migration_id.clone(),
            epoch: assigned.epoch,
            nonce,
            store_id: self.store_id(),
        };
        let answer = self.client().ask_authorisation(request).await.map(|answer| answer.into_inner());
        if let Ok(v1::AskAuthorisationResponse { authorised: false, reason, .. }) = &answer {
            self.board.lock().unwrap().denials.push(reason.clone());
        }
        if let Ok(answer) = answer
            && answer.authorised
        {
            assert!(answer.spec.is_some(), "an authorisation carries the definition");
            let epoch = Epoch::from_raw(assigned.epoch);
            self.handle(&assigned.vm_id, Event::AuthReply { nonce: Nonce(answer.nonce), epoch });
        }
    }

    /// Takes in what the peer says.
    fn listen(&mut self, vm: &str, peer: &str) {
        let said = self.board.lock().unwrap().said.get(&(peer.to_owned(), vm.to_owned())).cloned();
        for message in said.unwrap_or_default() {
            let event = match message {
                Message::Ready(epoch) => Event::Ready(epoch),
                Message::Release(epoch) => Event::Release(epoch),
                Message::Revoked(epoch) => Event::Revoked(epoch),
                Message::Refused(epoch) => Event::Refused(epoch),
                Message::Acquired(epoch) => Event::Acquired(epoch),
            };
            self.handle(vm, event);
        }
    }

    fn handle(&mut self, id: &str, event: Event) {
        let vm = self.vms.get_mut(id).unwrap();
        let step = worker_step(&vm.record.record(), &vm.volatile, event);
        let done = step.commit(vm.record, |_| Ok::<_, ()>(())).unwrap();
        vm.record = done.record;
        vm.volatile = done.volatile;
        let key = (self.name.clone(), id.to_owned());
        self.board.lock().unwrap().said.insert(key, emits(&vm.record.record(), &vm.volatile));
        for effect in done.effects {
            let next = match effect {
                Effect::Resume | Effect::Boot => {
                    let licence = Licence::of(Policy::KeepRunning, None).unwrap();
                    assert!(self.vms[id].record.may_run(licence).is_some(), "set running without a durable record");
                    self.board.lock().unwrap().runs.push((id.to_owned(), self.name.clone()));
                    Event::Resumed
                }
                Effect::Pause => Event::Paused,
                Effect::KillGuest | Effect::DropImage => Event::QemuGone,
                Effect::LoadImage(epoch) => Event::Loaded(epoch),
                Effect::Arm | Effect::Disarm => unreachable!("no vm here fences itself"),
            };
            self.handle(id, next);
        }
    }

    fn store_id(&self) -> String {
        let stores = &self.board.lock().unwrap().stores;
        stores.get(&self.name).copied().unwrap_or(self.store).to_string()
    }

    fn points_of(&self, vm: &str) -> Vec<v1::RecoveryPoint> {
        let board = self.board.lock().unwrap();
        board.points.get(&(self.name.clone(), vm.to_owned())).copied().into_iter().collect()
    }

    fn report(&self) -> v1::WorkerReport {
        let vms = self.vms.iter().map(|(id, vm)| v1::VmReport {
            vm_id: id.clone(),
            state: match vm.volatile.guest {
                _ if vm.crashed_under.is_some() => VmState::Crashed,
                Guest::Absent => VmState::Stopped,
                Guest::Running => VmState::Running,
                Guest::Paused | Guest::Loaded(_) => VmState::Paused,
            }
            .into(),
            problem: vm.problem.clone(),
            record: Some(vm.record.record().into()),
            whose: match vm.record.record() {
                Record::Own { .. } | Record::Prepared { .. } => String::new(),
                record => vm.said.get(&record.seen()).cloned().unwrap_or_default(),
            },
            has_replica: vm.has_replica,
            recovery_points: self.points_of(id),
            halted_power_seq: vm.crashed_under.unwrap_or_default(),
            spec: vm.spec.clone().filter(|_| !self.spoken_of.contains(id)),
            ..v1::VmReport::default()
        });
        let pools = self.board.lock().unwrap().pools.clone();
        v1::WorkerReport {
            worker: self.name.clone(),
            site: self.site.clone(),
            grpc_address: "127.0.0.1:7500".into(),
            peer_address: "127.0.0.1:7501".into(),
            vms: vms.collect(),
            migrations: self.migrations.values().cloned().collect(),
            seeds: self.seeds.clone(),
            replications: self.replications.clone(),
            preflights: self.preflights.clone(),
            assignment_seq: self.seq,
            store_id: self.store_id(),
            generation: self.generation,
            restoration_id: self.restoration_id.clone(),
            guarded: self.board.lock().unwrap().guarded,
            pools,
            ..v1::WorkerReport::default()
        }
    }
}
