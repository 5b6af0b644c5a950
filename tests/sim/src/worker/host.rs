//! A host: what outlives its worker. The store that the worker keeps its records in, the copies of disks, QEMUs and keepers.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};

use pageport_ownership::{Epoch, Policy, Record};
use pageport_proto::{MigrationId, SiteName, StoreId, VmId, WorkerName};
use tokio::sync::mpsc;

use super::Worker;
use super::moves::{FromDestination, FromSource};
use crate::calls::Cluster;
use crate::executor::{ProcessId, Signal};
use crate::hypervisor::Hypervisors;
use crate::invariant::Fact;
use crate::network::{End, Endpoint};
use crate::world::{Clock, Flaw, World};

/// What a worker keeps of a VM on stable storage.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kept {
    pub(super) record: Option<Record>,
    pub(super) policy: Option<Policy>,
}

/// A move that a source has announced, and its end of the pipe.
pub(super) struct Hello {
    pub(super) migration: MigrationId,
    pub(super) vm: VmId,
    pub(super) epoch: Epoch,
    pub(super) end: End<FromDestination, FromSource>,
}

/// A host: what outlives its worker.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct Host {
    pub(super) world: Rc<World>,
    /// Its worker's name.
    pub name: WorkerName,
    /// Where it is.
    pub site: SiteName,
    /// On the network.
    pub endpoint: Endpoint,
    /// Its clock.
    pub clock: Clock,
    /// QEMU and keepers.
    pub hypervisors: Rc<Hypervisors>,
    pub(super) store: RefCell<BTreeMap<VmId, Kept>>,
    /// With a store that lies: what is really on the disk.
    stale: RefCell<BTreeMap<VmId, Kept>>,
    /// Which store it is, and whether the worker has noted that.
    pub(super) identity: Cell<(StoreId, bool)>,
    /// VMs of which a copy is here.
    pub(super) copies: RefCell<BTreeSet<VmId>>,
    pub(super) cluster: Cluster,
    pub(super) peers: RefCell<Vec<Weak<Host>>>,
    process: Cell<Option<ProcessId>>,
    pub(super) calls: RefCell<Option<mpsc::UnboundedSender<Hello>>>,
    /// It stays down until this is taken back.
    pub locked_down: Cell<bool>,
}

impl Host {
    /// One whose worker was never started.
    pub fn new(
        world: &Rc<World>,
        cluster: &Cluster,
        name: WorkerName,
        site: SiteName,
        endpoint: Endpoint,
        clock: Clock,
    ) -> Rc<Self> {
        Rc::new(Self {
            world: world.clone(),
            hypervisors: Rc::new(Hypervisors::new(world.clone(), name.clone(), clock)),
            name,
            site,
            endpoint,
            clock,
            store: RefCell::default(),
            stale: RefCell::default(),
            identity: Cell::new((new_store(world), false)),
            copies: RefCell::default(),
            cluster: cluster.clone(),
            peers: RefCell::default(),
            process: Cell::default(),
            calls: RefCell::default(),
            locked_down: Cell::default(),
        })
    }

    /// The other hosts.
    pub fn meet(&self, hosts: &[Rc<Self>]) {
        *self.peers.borrow_mut() = hosts.iter().map(Rc::downgrade).collect();
    }

    /// The worker's process, if it is up.
    pub fn process(&self) -> Option<ProcessId> {
        self.process.get()
    }

    /// Starts the worker, if it is down.
    pub fn start(self: &Rc<Self>) {
        if self.process.get().is_some() || self.locked_down.get() {
            return;
        }
        let process = self.world.executor.process();
        let (calls, called) = mpsc::unbounded_channel();
        self.process.set(Some(process));
        *self.calls.borrow_mut() = Some(calls);
        let worker = Rc::new(Worker {
            host: self.clone(),
            world: self.world.clone(),
            process,
            vms: RefCell::default(),
            keepers: RefCell::default(),
            assigned: RefCell::default(),
            news: Signal::default(),
            changed: Signal::default(),
            lease_wanted: Signal::default(),
            moves: RefCell::default(),
            seeds: RefCell::default(),
            leader: Cell::new(1),
        });
        self.world.executor.spawn(process, worker.run(called));
    }

    /// SIGKILL of the worker.
    pub fn kill_worker(&self) {
        if let Some(process) = self.process.take() {
            self.calls.take();
            self.world.executor.kill(process);
        }
    }

    /// The host loses its power.
    pub fn power_off(&self) {
        self.kill_worker();
        self.hypervisors.end_all();
        if self.world.flaw == Flaw::LazyRecord {
            *self.store.borrow_mut() = self.stale.borrow().clone();
        }
    }

    /// The disk with the store is lost, and the worker with it.
    pub fn lose_store(&self) {
        self.kill_worker();
        self.store.take();
        self.stale.take();
        self.identity.set((new_store(&self.world), false));
        self.world.tell(&Fact::StoreLost { worker: &self.name });
    }

    pub(super) fn keep(&self, vm: VmId, change: impl FnOnce(&mut Kept)) {
        let mut store = self.store.borrow_mut();
        if self.world.flaw == Flaw::LazyRecord {
            *self.stale.borrow_mut() = store.clone();
        }
        change(store.entry(vm).or_default());
    }
}

fn new_store(world: &World) -> StoreId {
    let id = uuid::Uuid::from_u128(u128::from(world.number())).to_string().parse();
    id.unwrap_or_else(|_| unreachable!("an id made of a uuid"))
}
