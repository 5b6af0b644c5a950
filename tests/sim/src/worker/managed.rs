//! One VM at a worker: its record, its hypervisor, its fence; the only way to change any of them.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use pageport_keeper::BootTime;
use pageport_ownership::{
    Durable, Effect, Epoch, Event, Guest, MayRun, Nonce, Policy, Record, Standing, Volatile, needs_grant, worker_step,
};
use pageport_proto::VmId;
use pageport_proto::v1::{self, VmState};
use pageport_worker::vms::fence::{self, Fence};
use pageport_worker::vms::plan::{self, Stop};
use tokio::sync::Mutex;

use super::Worker;
use crate::calls::{Answer, Question};
use crate::executor::Signal;
use crate::hypervisor::{Cause, Qemu, Run};
use crate::invariant::Fact;

const ACPI_PATIENCE_US: u64 = 10_000_000;

/// What is known of it without waiting.
#[derive(Debug, Clone, Copy)]
struct Status {
    record: Record,
    volatile: Volatile,
    crashed: bool,
    halted_under: Option<u64>,
}

struct State {
    durable: Durable,
    volatile: Volatile,
    qemu: Option<Rc<Qemu>>,
    asked_to_end_us: Option<u64>,
    fence: Fence,
}

/// See the module.
pub(super) struct Managed {
    id: VmId,
    worker: Weak<Worker>,
    state: Mutex<State>,
    status: Cell<Status>,
    power_seq: Cell<u64>,
    /// Raised when the status changes.
    pub(super) changed: Signal,
    this: RefCell<Weak<Self>>,
}

impl Managed {
    pub(super) fn open(worker: &Rc<Worker>, id: VmId) -> Rc<Self> {
        let kept = worker.host.store.borrow().get(&id).copied().unwrap_or_default();
        let durable = Durable::read(|| Ok::<_, ()>(kept.record));
        let durable = durable.unwrap_or_else(|()| unreachable!("reading a map does not fail"));
        let fence = Fence::new(kept.policy);
        let volatile =
            Volatile { standing: fence.standing(worker.host.clock.boot_time(&worker.world)), ..Volatile::default() };
        let status = Status { record: durable.record(), volatile, crashed: false, halted_under: None };
        let vm = Rc::new(Self {
            id,
            worker: Rc::downgrade(worker),
            state: Mutex::new(State { durable, volatile, qemu: None, asked_to_end_us: None, fence }),
            status: Cell::new(status),
            power_seq: Cell::new(0),
            changed: Signal::default(),
            this: RefCell::default(),
        });
        *vm.this.borrow_mut() = Rc::downgrade(&vm);
        vm
    }

    fn worker(&self) -> Rc<Worker> {
        self.worker.upgrade().unwrap_or_else(|| unreachable!("tasks of a worker hold it"))
    }

    pub(super) fn id(&self) -> VmId {
        self.id
    }

    pub(super) fn record(&self) -> Record {
        self.status.get().record
    }

    pub(super) fn guest(&self) -> Guest {
        self.status.get().volatile.guest
    }

    pub(super) fn authorised(&self) -> Option<Epoch> {
        self.status.get().volatile.authorised
    }

    pub(super) fn permits(&self, epoch: Epoch) -> bool {
        self.status.get().volatile.standing.permits(epoch)
    }

    pub(super) fn fences_itself(&self) -> bool {
        self.status.get().volatile.standing != Standing::KeepRunning
    }

    pub(super) fn may_prepare(&self, epoch: Epoch) -> bool {
        let status = self.status.get();
        matches!(status.record, Record::Own { seen, .. } if epoch > seen) && status.volatile.guest == Guest::Running
    }

    pub(super) async fn qemu(&self) -> Option<Rc<Qemu>> {
        self.state.lock().await.qemu.clone()
    }

    pub(super) fn report(&self, copied: bool) -> v1::VmReport {
        let status = self.status.get();
        let state = match status.volatile.guest {
            Guest::Absent if status.crashed => VmState::Crashed,
            Guest::Absent => VmState::Stopped,
            Guest::Running => VmState::Running,
            Guest::Paused | Guest::Loaded(_) => VmState::Paused,
        };
        v1::VmReport {
            vm_id: self.id.to_string(),
            state: state.into(),
            record: Some(v1::OwnershipRecord::from(status.record)),
            has_replica: copied && status.record.owned().is_none(),
            halted_power_seq: status.halted_under.unwrap_or_default(),
            ..v1::VmReport::default()
        }
    }

    /// Takes over what an earlier worker left.
    pub(super) async fn restore(&self, store_known: bool) {
        let worker = self.worker();
        let mut state = self.state.lock().await;
        let found = match worker.host.hypervisors.find(self.id) {
            None => Guest::Absent,
            Some(qemu) => {
                self.install(&mut state, qemu.clone());
                match (qemu.run(), qemu.image.get()) {
                    (Run::Running { .. }, _) => Guest::Running,
                    (_, Some(epoch)) => Guest::Loaded(epoch),
                    (_, None) => Guest::Paused,
                }
            }
        };
        let event = if store_known { Event::Restarted(found) } else { Event::StoreLost(found) };
        let effects = self.commit(&mut state, event).await;
        self.carry_out(&mut state, effects).await;
        self.publish(&state);
    }

    /// One event: the record is persisted, then its effects are carried out. Returns the new record.
    pub(super) async fn step(&self, event: Event) -> Record {
        let mut state = self.state.lock().await;
        self.stepped(&mut state, event).await;
        if let Some(qemu) = &state.qemu {
            qemu.image.set(match state.volatile.guest {
                Guest::Loaded(epoch) => Some(epoch),
                Guest::Absent | Guest::Running | Guest::Paused => None,
            });
        }
        state.durable.record()
    }

    async fn stepped(&self, state: &mut State, event: Event) {
        let effects = self.commit(state, event).await;
        self.carry_out(state, effects).await;
        self.publish(state);
    }

    async fn commit(&self, state: &mut State, event: Event) -> Vec<Effect> {
        let worker = self.worker();
        let before = state.durable;
        let step = worker_step(&before.record(), &state.volatile, event);
        let writes = step.record.is_some();
        if writes {
            worker.seam("before a record").await;
            worker.sleep(Duration::from_micros(worker.world.between(100, 20_000))).await;
        }
        let committed = step.commit(before, |record| {
            worker.host.keep(self.id, |kept| kept.record = Some(*record));
            Ok::<(), ()>(())
        });
        let committed = committed.unwrap_or_else(|()| unreachable!("writing a map does not fail"));
        if writes {
            let (name, record) = (&worker.host.name, committed.record.record());
            worker.world.tell(&Fact::RecordWritten { worker: name, vm: self.id, record });
        }
        state.durable = committed.record;
        state.volatile = committed.volatile;
        if writes {
            worker.seam("after a record").await;
        }
        committed.effects
    }

    fn publish(&self, state: &State) {
        let mut status = self.status.get();
        status.record = state.durable.record();
        status.volatile = state.volatile;
        if state.volatile.guest != Guest::Absent {
            status.crashed = false;
        }
        self.set(status);
    }

    fn set(&self, status: Status) {
        let before = self.status.replace(status);
        let key = |it: &Status| (it.record, it.volatile, it.crashed, it.halted_under);
        if key(&before) != key(&status) {
            self.changed.raise();
            self.worker().changed.raise();
        }
    }

    fn now(&self) -> BootTime {
        let worker = self.worker();
        worker.host.clock.boot_time(&worker.world)
    }

    fn permission(&self, state: &State) -> Option<MayRun> {
        state.durable.may_run(state.fence.licence(self.now())?)
    }

    async fn carry_out(&self, state: &mut State, effects: Vec<Effect>) {
        let worker = self.worker();
        let hypervisors = worker.host.hypervisors.clone();
        for effect in effects {
            worker.seam("before an effect").await;
            match effect {
                Effect::Resume => {
                    let Some(permission) = self.permission(state) else { return };
                    if !self.resume(state, permission).await {
                        return;
                    }
                }
                Effect::Boot => {
                    let Some(permission) = self.permission(state) else { return };
                    self.boot(state, permission).await;
                }
                Effect::Pause => {
                    if let Some(qemu) = &state.qemu {
                        hypervisors.stop(qemu);
                    }
                }
                Effect::KillGuest | Effect::DropImage => self.end_qemu(state).await,
                Effect::LoadImage(_) => {}
                Effect::Arm => {
                    if let (Some(qemu), Some(deadline)) = (&state.qemu, state.fence.deadline(self.now())) {
                        hypervisors.arm(qemu, deadline);
                    }
                }
                Effect::Disarm => {
                    if let Some(qemu) = &state.qemu {
                        hypervisors.disarm(qemu);
                    }
                }
            }
        }
    }

    /// False: the hypervisor did not answer; it is tried again.
    async fn resume(&self, state: &mut State, permission: MayRun) -> bool {
        let worker = self.worker();
        let Some(qemu) = state.qemu.clone() else { return false };
        if let Some(until_ms) = permission.deadline_ms() {
            worker.host.hypervisors.arm(&qemu, fence::deadline(until_ms));
        }
        worker.seam("before the guest runs").await;
        worker.sleep(Duration::from_micros(worker.world.between(100, 10_000))).await;
        if worker.world.unsafe_times.get() && worker.world.one_in(60) {
            worker.sleep(Duration::from_secs(3)).await;
            return false;
        }
        if qemu.ended().is_some() {
            return false;
        }
        worker.host.hypervisors.cont(&qemu);
        worker.seam("after the guest runs").await;
        let _ = self.commit(state, Event::Resumed).await;
        true
    }

    async fn boot(&self, state: &mut State, permission: MayRun) {
        let worker = self.worker();
        worker.sleep(Duration::from_millis(worker.world.between(50, 1500))).await;
        let deadline = permission.deadline_ms().map(fence::deadline);
        let qemu = worker.host.hypervisors.launch(self.id, deadline);
        self.install(state, qemu.clone());
        if deadline.is_none() {
            worker.host.hypervisors.cont(&qemu);
            let _ = self.commit(state, Event::Resumed).await;
            return;
        }
        worker.seam("between boot and run").await;
        let resumed = match self.permission(state) {
            Some(permission) => self.resume(state, permission).await,
            None => false,
        };
        if !resumed {
            self.end_qemu(state).await;
        }
    }

    /// Starts a hypervisor that waits for an image.
    pub(super) async fn load_image(&self) -> Rc<Qemu> {
        let worker = self.worker();
        let mut state = self.state.lock().await;
        worker.sleep(Duration::from_millis(worker.world.between(50, 1000))).await;
        let qemu = worker.host.hypervisors.launch_incoming(self.id);
        self.install(&mut state, qemu.clone());
        self.publish(&state);
        qemu
    }

    /// Ends an image that was not completed.
    pub(super) async fn drop_image(&self, image: &Rc<Qemu>) {
        let mut state = self.state.lock().await;
        let same = state.qemu.as_ref().is_some_and(|qemu| qemu.instance == image.instance);
        if same && state.durable.record().owned().is_none() {
            self.end_qemu(&mut state).await;
            self.publish(&state);
        }
    }

    fn install(&self, state: &mut State, qemu: Rc<Qemu>) {
        state.qemu = Some(qemu.clone());
        state.asked_to_end_us = None;
        let Some(vm) = self.this.borrow().upgrade() else { return };
        self.worker().spawn(async move {
            let cause = qemu.exit().await;
            vm.ended(&qemu, cause).await;
        });
    }

    async fn ended(&self, ended: &Rc<Qemu>, cause: Cause) {
        let mut state = self.state.lock().await;
        if state.qemu.as_ref().is_none_or(|qemu| qemu.instance != ended.instance) {
            return;
        }
        let fenced = cause == Cause::Lease;
        let unasked = state.durable.record().owned().is_some() && state.asked_to_end_us.is_none() && !fenced;
        state.qemu = None;
        let _ = self.commit(&mut state, Event::QemuGone).await;
        self.publish(&state);
        if unasked {
            let mut status = self.status.get();
            status.halted_under = Some(self.power_seq.get());
            status.crashed = cause != Cause::ByItself;
            self.set(status);
        }
    }

    async fn end_qemu(&self, state: &mut State) {
        let worker = self.worker();
        if let Some(qemu) = state.qemu.take() {
            worker.sleep(Duration::from_millis(worker.world.between(1, 50))).await;
            worker.host.hypervisors.end(&qemu, Cause::Told);
            let _ = self.commit(state, Event::QemuGone).await;
        }
    }

    /// The definition has arrived.
    pub(super) async fn learn(&self, spec: &v1::VmSpec) {
        self.set_policy(Policy::from(spec.on_isolation())).await;
    }

    async fn set_policy(&self, policy: Policy) {
        let worker = self.worker();
        let mut state = self.state.lock().await;
        if state.fence.policy() != Some(policy) {
            worker.host.keep(self.id, |kept| kept.policy = Some(policy));
            state.fence.set_policy(policy);
            self.stand(&mut state).await;
        }
    }

    async fn stand(&self, state: &mut State) {
        let standing = state.fence.standing(self.now());
        self.stepped(state, Event::Standing(standing)).await;
    }

    pub(super) async fn lease_asked(&self, nonce: Nonce, at: BootTime) {
        self.state.lock().await.fence.asked(nonce, at);
    }

    pub(super) async fn lease_answered(&self, nonce: Nonce, lease: Option<(Epoch, u64)>) {
        let mut state = self.state.lock().await;
        if let Some((own, lease_ms)) = lease {
            state.fence.granted(nonce, own, lease_ms);
        }
        self.stand(&mut state).await;
    }

    async fn resume_what_waits(&self) {
        let mut state = self.state.lock().await;
        let waits = matches!(state.volatile.guest, Guest::Paused | Guest::Loaded(_));
        if waits && matches!(state.durable.record(), Record::Own { .. }) {
            self.stand(&mut state).await;
        }
    }

    async fn stop(&self, how: Stop) {
        let worker = self.worker();
        let mut state = self.state.lock().await;
        let Some(qemu) = state.qemu.clone() else { return };
        let now_us = worker.host.clock.us(&worker.world);
        let due = state.asked_to_end_us.is_none_or(|asked_us| now_us - asked_us >= ACPI_PATIENCE_US);
        let (delay_us, cause) = match how {
            Stop::Ask if !due => return,
            Stop::Ask => (worker.world.between(50_000, 2_000_000), Cause::ByItself),
            Stop::PullThePlug => (worker.world.between(100, 20_000), Cause::Told),
        };
        state.asked_to_end_us = Some(now_us);
        let hypervisors = worker.host.hypervisors.clone();
        worker.world.executor.at(worker.world.executor.now_us() + delay_us, move || {
            // A guest that stands still hears nothing.
            if how == Stop::PullThePlug || matches!(qemu.run(), Run::Running { .. }) {
                hypervisors.end(&qemu, cause);
            }
        });
    }

    /// Brings it a step closer to its assignment.
    pub(super) async fn converge(&self, wanted: &v1::VmAssignment) {
        let worker = self.worker();
        let me = worker.host.name.as_str();
        if let Some(spec) = &wanted.spec {
            self.learn(spec).await;
        }
        for event in plan::ownership(wanted, me) {
            self.step(event).await;
        }
        self.power_seq.set(wanted.power_seq);
        if wanted.power() != v1::vm_assignment::Power::Run {
            let mut status = self.status.get();
            status.crashed = false;
            self.set(status);
        }
        let status = self.status.get();
        if let Some(how) = plan::stop(wanted, &status.record) {
            self.stop(how).await;
        }
        let owned = plan::owned(wanted, me);
        let power_on = plan::power_on(wanted, status.halted_under);
        if power_on && owned.is_some() {
            self.resume_what_waits().await;
        }
        for _ in 0..2 {
            let status = self.status.get();
            if !needs_grant(&status.record, &status.volatile, power_on, owned) || !self.ask_grant().await {
                return;
            }
        }
    }

    async fn ask_grant(&self) -> bool {
        let worker = self.worker();
        let nonce = worker.world.number();
        self.step(Event::Asked(Nonce(nonce))).await;
        let (name, vm_id) = (worker.host.name.to_string(), self.id.to_string());
        let question = || Question::Grant(v1::AskGrantRequest { worker: name.clone(), vm_id: vm_id.clone(), nonce });
        let Some(Answer::Granted(answer)) = worker.ask(question).await else { return false };
        let Some(event) = plan::granted(&answer) else { return false };
        self.step(event).await;
        true
    }
}
