//! One worker on its simulated host: the tasks of the daemon in the same order of steps.
//!
//! | file | in the daemon |
//! |---|---|
//! | this | `agent::{link, lease, dispatch}`: reports, the lease, who looks after what |
//! | [`host`] | what outlives a worker: its store, the copies, QEMUs and keepers |
//! | [`managed`] | `vms::managed`, `vms::converge` |
//! | [`moves`] | `migration::{source, destination}` |
//!
//! Between any two steps is a seam, at which the worker, or its whole host, may go down.

mod host;
mod managed;
mod moves;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use pageport_ownership::{Epoch, Event, Nonce, Record};
use pageport_proto::v1::{self, MigrationRole};
use pageport_proto::{MigrationId, VmId};
use tokio::sync::mpsc;

use self::host::Hello;
pub use self::host::Host;
use self::managed::Managed;
use self::moves::Destination;
use crate::calls::{self, Answer, Question, WorkerEnd};
use crate::controller;
use crate::executor::{ProcessId, Signal};
use crate::invariant::Fact;
use crate::network::Endpoint;
use crate::world::{Flaw, World};

const REPORT_EVERY: Duration = Duration::from_millis(500);
const REPORT_PAUSE: Duration = Duration::from_millis(50);
const SILENCE: Duration = Duration::from_secs(6);
const RETRY_PAUSE: Duration = Duration::from_millis(500);
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const RENEW_EVERY: Duration = Duration::from_secs(1);
const RENEWED_WITHIN: Duration = Duration::from_secs(2);

/// A move's side at this worker.
#[derive(Debug)]
struct Side {
    role: MigrationRole,
    cancelled: Cell<bool>,
    cancel: Signal,
    ended: Cell<bool>,
    failure: RefCell<String>,
    record: Cell<bool>,
}

impl Side {
    fn new(role: MigrationRole) -> Rc<Self> {
        Rc::new(Self {
            role,
            cancelled: Cell::default(),
            cancel: Signal::default(),
            ended: Cell::default(),
            failure: RefCell::default(),
            record: Cell::default(),
        })
    }
}

/// How far a copy is.
type Copied = Rc<RefCell<v1::SeedReport>>;

/// One worker process.
pub(crate) struct Worker {
    host: Rc<Host>,
    world: Rc<World>,
    process: ProcessId,
    vms: RefCell<BTreeMap<VmId, Rc<Managed>>>,
    /// Who is looked after.
    keepers: RefCell<BTreeMap<VmId, Rc<RefCell<Option<v1::VmAssignment>>>>>,
    assigned: RefCell<Option<Rc<v1::WorkerAssignment>>>,
    news: Signal,
    changed: Signal,
    lease_wanted: Signal,
    moves: RefCell<BTreeMap<MigrationId, Rc<Side>>>,
    /// Copies, by VM and site.
    seeds: RefCell<BTreeMap<(VmId, String), Copied>>,
    leader: Cell<u64>,
}

impl Worker {
    /// Here the worker, or its host, may go down.
    async fn seam(&self, name: &'static str) {
        let world = &self.world;
        if !world.unsafe_times.get() || !world.one_in(400) {
            return;
        }
        let whole = world.one_in(4);
        let what = if whole { "host" } else { "worker" };
        world.tell(&Fact::Fault { what: &format!("{what} of {} goes down at {name}", self.host.name) });
        let host = self.host.clone();
        let back_us = world.executor.now_us() + world.between(200_000, 5_000_000);
        if whole {
            host.power_off();
        } else {
            host.kill_worker();
        }
        world.executor.at(back_us, move || host.start());
        std::future::pending().await
    }

    async fn sleep(&self, duration: Duration) {
        self.host.clock.sleep(&self.world, duration).await;
    }

    async fn ask(&self, question: impl Fn() -> Question) -> Option<Answer> {
        calls::ask(&self.world, &self.host.cluster, self.host.endpoint, self.host.clock, &self.leader, question).await
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.executor.spawn(self.process, task);
    }

    fn vm(self: &Rc<Self>, id: VmId) -> Rc<Managed> {
        if let Some(found) = self.vms.borrow().get(&id) {
            return found.clone();
        }
        let vm = Managed::open(self, id);
        self.vms.borrow_mut().insert(id, vm.clone());
        vm
    }

    fn known(&self, id: VmId) -> Option<Rc<Managed>> {
        self.vms.borrow().get(&id).cloned()
    }

    async fn run(self: Rc<Self>, called: mpsc::UnboundedReceiver<Hello>) {
        let mut known: Vec<VmId> = self.host.store.borrow().keys().copied().collect();
        known.extend(self.host.hypervisors.vms());
        known.sort();
        known.dedup();
        for id in known {
            let vm = self.vm(id);
            vm.restore(self.host.identity.get().1).await;
        }
        self.seam("before the store is noted").await;
        self.host.identity.set((self.host.identity.get().0, true));
        self.spawn(self.clone().link());
        self.spawn(self.clone().dispatch());
        self.spawn(self.clone().leases());
        self.spawn(self.clone().accept(called));
    }

    async fn accept(self: Rc<Self>, mut called: mpsc::UnboundedReceiver<Hello>) {
        while let Some(hello) = called.recv().await {
            self.spawn(Destination::new(self.clone(), hello).serve());
        }
    }

    async fn link(self: Rc<Self>) {
        loop {
            let near: RefCell<Option<WorkerEnd>> = RefCell::default();
            let linked = self
                .ask(|| {
                    let to = self.host.cluster.get(&self.leader.get()).map_or(0, |machine| machine.endpoint());
                    let (end, far) = self.world.pipe(self.host.endpoint, to);
                    *near.borrow_mut() = Some(end);
                    Question::Link(self.host.name.clone(), far)
                })
                .await;
            if let (Some(Answer::Linked), Some(end)) = (linked, near.take()) {
                self.session(end).await;
            }
            self.sleep(RETRY_PAUSE).await;
        }
    }

    async fn session(&self, mut end: WorkerEnd) {
        let mut seq = 0;
        let mut heard_us = self.host.clock.us(&self.world);
        loop {
            let seen = self.changed.version();
            end.send(self.report(seq));
            let pause = self.host.clock.sleep(&self.world, REPORT_PAUSE);
            let mut pause = std::pin::pin!(pause);
            let mut paused = false;
            let beat = self.host.clock.sleep(&self.world, REPORT_EVERY);
            let mut beat = std::pin::pin!(beat);
            loop {
                tokio::select! {
                    biased;
                    assignment = end.recv() => {
                        let Some(assignment) = assignment else { return };
                        heard_us = self.host.clock.us(&self.world);
                        seq = assignment.seq;
                        *self.assigned.borrow_mut() = Some(Rc::new(assignment));
                        self.news.raise();
                    }
                    () = &mut pause, if !paused => paused = true,
                    () = self.changed.changed_since(seen), if paused => break,
                    () = &mut beat => break,
                }
            }
            if self.host.clock.us(&self.world) - heard_us > SILENCE.as_micros() as u64 {
                return;
            }
        }
    }

    fn report(&self, assignment_seq: u64) -> v1::WorkerReport {
        let vms = self.vms.borrow();
        let moves = self.moves.borrow();
        v1::WorkerReport {
            worker: self.host.name.to_string(),
            site: self.host.site.to_string(),
            peer_address: self.host.endpoint.to_string(),
            vms: vms.values().map(|vm| vm.report(self.host.copies.borrow().contains(&vm.id()))).collect(),
            migrations: moves
                .iter()
                .map(|(id, side)| v1::MigrationReport {
                    migration_id: id.to_string(),
                    role: side.role.into(),
                    record: side.record.get().then(v1::MigrationRecord::default),
                    failure: side.failure.borrow().clone(),
                    ended: side.ended.get(),
                    ..v1::MigrationReport::default()
                })
                .collect(),
            seeds: self.seeds.borrow().values().map(|seed| seed.borrow().clone()).collect(),
            assignment_seq,
            guarded: true,
            store_id: self.host.identity.get().0.to_string(),
            ..v1::WorkerReport::default()
        }
    }

    async fn leases(self: Rc<Self>) {
        loop {
            let wanted = self.lease_wanted.version();
            if self.vms.borrow().values().any(|vm| vm.fences_itself()) {
                self.renew().await;
            }
            tokio::select! {
                biased;
                () = self.lease_wanted.changed_since(wanted) => {}
                () = self.sleep(RENEW_EVERY) => {}
            }
        }
    }

    async fn renew(&self) {
        let nonce = Nonce(self.world.number());
        let asked = self.host.clock.boot_time(&self.world);
        let vms: Vec<Rc<Managed>> = self.vms.borrow().values().cloned().collect();
        for vm in &vms {
            vm.lease_asked(nonce, asked).await;
        }
        let request = v1::RenewLeaseRequest { worker: self.host.name.to_string(), nonce: nonce.0 };
        let answer = tokio::select! {
            biased;
            answer = self.ask(|| Question::Lease(request.clone())) => answer,
            () = self.sleep(RENEWED_WITHIN) => None,
        };
        let (lease_ms, covered) = match answer {
            Some(Answer::Leased(answer)) if answer.nonce == nonce.0 => {
                // With a leader that counts too short, workers count as they did.
                let flawed = self.world.flaw == Flaw::ShortLease;
                (if flawed { controller::LEASE_MS } else { answer.lease_ms }, answer.vms)
            }
            _ => (0, vec![]),
        };
        for vm in vms {
            let own = covered.iter().find(|leased| leased.vm_id == vm.id().to_string());
            vm.lease_answered(nonce, own.map(|own| (Epoch::from_raw(own.own), lease_ms))).await;
        }
    }

    async fn dispatch(self: Rc<Self>) {
        loop {
            let seen = self.news.version();
            let assignment = self.assigned.borrow().clone();
            if let Some(assignment) = assignment {
                self.keep_vms(&assignment);
                for migration in &assignment.migrations {
                    self.drive(&assignment, migration).await;
                }
                let named = |id: &MigrationId| assignment.migrations.iter().any(|it| it.migration_id == id.to_string());
                self.moves.borrow_mut().retain(|id, side| named(id) || !side.ended.get());
                self.start_seeds(&assignment);
                for removal in &assignment.replica_removals {
                    if let Ok(id) = removal.vm_id.parse::<VmId>()
                        && self.known(id).is_none_or(|vm| matches!(vm.record(), Record::Replica { .. }))
                    {
                        self.host.copies.borrow_mut().remove(&id);
                        self.changed.raise();
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.news.changed_since(seen) => {}
                () = self.sleep(LOOK_AGAIN) => {}
            }
        }
    }

    fn keep_vms(self: &Rc<Self>, assignment: &v1::WorkerAssignment) {
        let named: BTreeMap<VmId, &v1::VmAssignment> =
            assignment.vms.iter().filter_map(|vm| Some((vm.vm_id.parse().ok()?, vm))).collect();
        let mut keepers = self.keepers.borrow_mut();
        keepers.retain(|id, wanted| {
            let stays = named.contains_key(id);
            if !stays {
                wanted.take();
            }
            stays
        });
        for (id, wanted) in named {
            let news = Some(wanted.clone());
            match keepers.get(&id) {
                Some(held) => *held.borrow_mut() = news,
                None => {
                    let held = Rc::new(RefCell::new(news));
                    keepers.insert(id, held.clone());
                    self.spawn(self.clone().look_after(id, held));
                }
            }
        }
    }

    async fn look_after(self: Rc<Self>, id: VmId, wanted: Rc<RefCell<Option<v1::VmAssignment>>>) {
        loop {
            let news = self.news.version();
            let Some(now) = wanted.borrow().clone() else { return };
            let vm = self.vm(id);
            vm.converge(&now).await;
            let seen = vm.changed.version();
            tokio::select! {
                biased;
                () = self.news.changed_since(news) => {}
                () = vm.changed.changed_since(seen) => {}
                () = self.sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn drive(self: &Rc<Self>, assignment: &v1::WorkerAssignment, order: &v1::MigrationAssignment) {
        let (Ok(id), Ok(vm_id)) = (order.migration_id.parse::<MigrationId>(), order.vm_id.parse::<VmId>()) else {
            return;
        };
        let epoch = Epoch::from_raw(order.epoch);
        let vm = self.vm(vm_id);
        let known = self.moves.borrow().get(&id).cloned();
        match order.role() {
            MigrationRole::Source => {
                if let Some(side) = known {
                    if order.cancel || order.over {
                        side.cancelled.set(true);
                        side.cancel.raise();
                    }
                    return;
                }
                if !assignment.vms.iter().any(|it| it.vm_id == order.vm_id) {
                    return;
                }
                let side = Side::new(MigrationRole::Source);
                self.moves.borrow_mut().insert(id, side.clone());
                if order.cancel || order.over || !vm.may_prepare(epoch) {
                    vm.step(Event::Cancel(epoch)).await;
                    *side.failure.borrow_mut() = "not begun".to_owned();
                    side.ended.set(true);
                    self.changed.raise();
                    return;
                }
                let peer = order.peer_address.parse::<Endpoint>().ok();
                let peers = self.host.peers.borrow();
                let peer = peers.iter().filter_map(Weak::upgrade).find(|host| Some(host.endpoint) == peer);
                if let Some(peer) = peer {
                    self.spawn(moves::source(self.clone(), vm, id, epoch, peer, side));
                }
            }
            MigrationRole::Destination if order.over => {
                if matches!(vm.record(), Record::Replica { .. }) {
                    vm.step(Event::Revoked(epoch)).await;
                }
                if known.is_none() {
                    let side = Side::new(MigrationRole::Destination);
                    side.ended.set(true);
                    self.moves.borrow_mut().insert(id, side);
                    self.changed.raise();
                }
            }
            MigrationRole::Destination | MigrationRole::Unspecified => {}
        }
    }

    fn start_seeds(self: &Rc<Self>, assignment: &v1::WorkerAssignment) {
        let key = |seed: &v1::SeedAssignment| Some((seed.vm_id.parse::<VmId>().ok()?, seed.to_site.clone()));
        let named: Vec<_> = assignment.seeds.iter().filter_map(key).collect();
        self.seeds.borrow_mut().retain(|key, _| named.contains(key));
        for order in &assignment.seeds {
            let Some(key) = key(order) else { continue };
            if self.seeds.borrow().get(&key).is_some_and(|held| held.borrow().seed_seq == order.seed_seq) {
                continue;
            }
            let report = v1::SeedReport {
                vm_id: order.vm_id.clone(),
                to_site: order.to_site.clone(),
                seed_seq: order.seed_seq,
                ..v1::SeedReport::default()
            };
            let report = Rc::new(RefCell::new(report));
            self.seeds.borrow_mut().insert(key.clone(), report.clone());
            let peer = order.peer_address.parse::<Endpoint>().ok();
            self.spawn(self.clone().seed(key.0, peer, report));
        }
    }

    /// Copies the disks of a VM that runs here.
    async fn seed(self: Rc<Self>, vm: VmId, peer: Option<Endpoint>, report: Copied) {
        let took = Duration::from_millis(self.world.between(50, 3000));
        self.sleep(took).await;
        let peers = self.host.peers.borrow().clone();
        let peer = peers.iter().filter_map(Weak::upgrade).find(|host| Some(host.endpoint) == peer);
        let copied = peer.filter(|peer| {
            let reached = peer.process().is_some() && !self.world.network.is_cut(self.host.endpoint, peer.endpoint);
            reached && self.host.hypervisors.find(vm).is_some()
        });
        match copied {
            Some(peer) => {
                peer.copies.borrow_mut().insert(vm);
                report.borrow_mut().complete = true;
            }
            None => report.borrow_mut().failure = "the copy broke off".to_owned(),
        }
        self.changed.raise();
    }
}
