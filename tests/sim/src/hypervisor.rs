//! QEMU and its keeper on a simulated host: both outlive the worker, and both die with the host.
//!
//! A guest is what it remembers: which boot it is of, and for how long it has run since. An image of it is a copy of that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use pageport_keeper::BootTime;
use pageport_ownership::Epoch;
use pageport_proto::{VmId, WorkerName};

use crate::executor::Signal;
use crate::invariant::Fact;
use crate::world::{Clock, Flaw, World};

/// After a deadline the keeper needs so long at most; leases count with it.
pub const FENCE_LATENCY_MS: u64 = 500;

/// What a guest remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory {
    /// Which boot.
    pub boot: u64,
    /// How long it has run since, in microseconds.
    pub ran_us: u64,
}

/// What QEMU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// The guest runs, since this moment of the world.
    Running {
        /// Since.
        since_us: u64,
    },
    /// It stands still.
    Paused,
    /// It waits for an image.
    Incoming,
}

/// Why QEMU ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its worker told it to.
    Told,
    /// The keeper, at the deadline.
    Lease,
    /// A fault.
    Struck,
    /// The guest shut down.
    ByItself,
}

/// One QEMU and its keeper.
#[derive(Debug)]
pub struct Qemu {
    /// No other has this number.
    pub instance: u64,
    /// Whose.
    pub vm: VmId,
    run: Cell<Run>,
    memory: Cell<Memory>,
    /// The worker's note about the image that it holds.
    pub image: Cell<Option<Epoch>>,
    /// When the keeper ends it, by the host's clock.
    pub deadline: Cell<Option<BootTime>>,
    ended: Cell<Option<Cause>>,
    exit: Signal,
}

impl Qemu {
    /// Why it ended, if it has.
    pub fn ended(&self) -> Option<Cause> {
        self.ended.get()
    }

    /// Waits for its end.
    pub async fn exit(&self) -> Cause {
        loop {
            let version = self.exit.version();
            if let Some(cause) = self.ended.get() {
                return cause;
            }
            self.exit.changed_since(version).await;
        }
    }

    /// What it does.
    pub fn run(&self) -> Run {
        self.run.get()
    }

    /// What its guest remembers now.
    pub fn memory(&self, world: &World) -> Memory {
        let memory = self.memory.get();
        match self.run.get() {
            Run::Running { since_us } => {
                Memory { ran_us: memory.ran_us + world.executor.now_us() - since_us, ..memory }
            }
            Run::Paused | Run::Incoming => memory,
        }
    }
}

/// The hypervisors of one host.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct Hypervisors {
    world: Rc<World>,
    /// Whose host.
    pub worker: WorkerName,
    /// The host's clock.
    pub clock: Clock,
    qemus: RefCell<BTreeMap<VmId, Rc<Qemu>>>,
}

impl Hypervisors {
    /// None yet.
    pub fn new(world: Rc<World>, worker: WorkerName, clock: Clock) -> Self {
        Self { world, worker, clock, qemus: RefCell::default() }
    }

    /// The VM's QEMU, if there is one.
    pub fn find(&self, vm: VmId) -> Option<Rc<Qemu>> {
        self.qemus.borrow().get(&vm).cloned()
    }

    /// All VMs that have one.
    pub fn vms(&self) -> Vec<VmId> {
        self.qemus.borrow().keys().copied().collect()
    }

    /// Starts one that stands still, with a guest that has just been booted.
    pub fn launch(self: &Rc<Self>, vm: VmId, deadline: Option<BootTime>) -> Rc<Qemu> {
        let memory = Memory { boot: self.world.number(), ran_us: 0 };
        let qemu = self.install(vm, Run::Paused, memory, deadline);
        self.world.tell(&Fact::Booted { worker: &self.worker, vm });
        self.world.tell(&Fact::Loaded { vm, instance: qemu.instance, memory });
        qemu
    }

    /// Starts one that waits for an image.
    pub fn launch_incoming(self: &Rc<Self>, vm: VmId) -> Rc<Qemu> {
        self.install(vm, Run::Incoming, Memory { boot: 0, ran_us: 0 }, None)
    }

    fn install(self: &Rc<Self>, vm: VmId, run: Run, memory: Memory, deadline: Option<BootTime>) -> Rc<Qemu> {
        let qemu = Rc::new(Qemu {
            instance: self.world.number(),
            vm,
            run: Cell::new(run),
            memory: Cell::new(memory),
            image: Cell::new(None),
            deadline: Cell::new(None),
            ended: Cell::new(None),
            exit: Signal::default(),
        });
        if let Some(deadline) = deadline {
            self.arm(&qemu, deadline);
        }
        self.qemus.borrow_mut().insert(vm, qemu.clone());
        qemu
    }

    /// Puts an image in.
    pub fn load(&self, qemu: &Qemu, memory: Memory) {
        qemu.memory.set(memory);
        qemu.run.set(Run::Paused);
        self.world.tell(&Fact::Loaded { vm: qemu.vm, instance: qemu.instance, memory });
    }

    /// Moves the keeper's deadline; never back.
    pub fn arm(self: &Rc<Self>, qemu: &Rc<Qemu>, deadline: BootTime) {
        let later = qemu.deadline.get().map_or(deadline, |before| before.max(deadline));
        qemu.deadline.set(Some(later));
        let latency_us = self.world.between(0, FENCE_LATENCY_MS * 1000 * 9 / 10);
        let due_us = self.clock.when_us(deadline.as_nanos() / 1000) + latency_us;
        let (host, qemu) = (self.clone(), qemu.clone());
        self.world.executor.at(due_us, move || {
            let now = host.clock.boot_time(&host.world);
            if qemu.deadline.get().is_some_and(|deadline| deadline <= now) && host.world.flaw != Flaw::DeafKeeper {
                host.end(&qemu, Cause::Lease);
            }
        });
    }

    /// Takes the deadline away.
    pub fn disarm(&self, qemu: &Qemu) {
        qemu.deadline.set(None);
    }

    /// The guest runs from now on.
    pub fn cont(&self, qemu: &Qemu) {
        if qemu.ended.get().is_some() || matches!(qemu.run.get(), Run::Running { .. }) {
            return;
        }
        qemu.run.set(Run::Running { since_us: self.world.executor.now_us() });
        let memory = qemu.memory.get();
        let (worker, vm, instance) = (&self.worker, qemu.vm, qemu.instance);
        self.world.tell(&Fact::GuestRuns { worker, vm, instance, memory });
    }

    /// The guest stands still from now on.
    pub fn stop(&self, qemu: &Qemu) {
        if let Run::Running { .. } = qemu.run.get() {
            let memory = qemu.memory(&self.world);
            qemu.memory.set(memory);
            qemu.run.set(Run::Paused);
            let (worker, vm, instance) = (&self.worker, qemu.vm, qemu.instance);
            self.world.tell(&Fact::GuestStops { worker, vm, instance, memory });
        }
    }

    /// Ends one.
    pub fn end(&self, qemu: &Rc<Qemu>, cause: Cause) {
        if qemu.ended.get().is_some() {
            return;
        }
        self.stop(qemu);
        qemu.ended.set(Some(cause));
        let mut qemus = self.qemus.borrow_mut();
        if qemus.get(&qemu.vm).is_some_and(|found| found.instance == qemu.instance) {
            qemus.remove(&qemu.vm);
        }
        drop(qemus);
        let (worker, vm, instance) = (&self.worker, qemu.vm, qemu.instance);
        self.world.tell(&Fact::GuestGone { worker, vm, instance, cause });
        qemu.exit.raise();
    }

    /// The host goes down.
    pub fn end_all(&self) {
        for vm in self.vms() {
            if let Some(qemu) = self.find(vm) {
                self.end(&qemu, Cause::Struck);
            }
        }
    }
}
