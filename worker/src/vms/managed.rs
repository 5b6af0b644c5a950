//! One VM at this worker: its record, its hypervisor, and the only way to change either.
//!
//! ```text
//!   event ─▶ worker_step (pure) ─▶ record to disk ─▶ effects: boot, resume, pause, kill ─▶ events of their own
//! ```
//! Guarantees: one step at a time; effects only after the record is durable; a guest is booted or resumed only with the
//! proof of a durable `Own` in hand.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageport_common::store::{Store, StoreError};
use pageport_keeper::BootTime;
use pageport_ownership::{
    Durable, Effect, Epoch, Event, Guest, MayRun, Nonce, Policy, Record, Standing, Volatile, worker_step,
};
use pageport_proto::VmId;
use pageport_proto::v1::{IsolationPolicy, VmSpec, VmState};
use tokio::sync::{Mutex, Notify, watch};

use super::fence::{self, Fence};
use super::records::{self, RecordError};
use crate::hypervisor::console::ConsoleError;
use crate::hypervisor::{self, Console, HypervisorError, Launch, MigrationStatus, RunState, StartMode, Vm, VmPaths};
use crate::replica::store::{ReplicaError, ReplicaStore};

/// How long a guest has to shut down when asked; then it is asked again.
const ACPI_PATIENCE: Duration = Duration::from_secs(60);
/// A mirror that an earlier worker left has this long to end.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM could not be brought to where it should be.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The ownership record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The disks.
    #[error(transparent)]
    Disk(#[from] ReplicaError),
    /// The serial console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The store.
    #[error("forget the vm")]
    Store(#[from] StoreError),
    /// A step asked for what the record does not permit: a bug, and nothing was done.
    #[error("the ownership record of vm {vm} does not permit it to run")]
    NotPermitted {
        /// The VM.
        vm: VmId,
    },
    /// Nobody has said what the VM is.
    #[error("the definition of vm {vm} has not arrived yet")]
    Undefined {
        /// The VM.
        vm: VmId,
    },
    /// The VM fences itself, and there is no lease.
    #[error("vm {vm} fences itself and this worker holds no valid lease for it: are the controllers reachable?")]
    NoLease {
        /// The VM.
        vm: VmId,
    },
    /// The note about a loaded image.
    #[error("note which image vm {vm} holds")]
    Image {
        /// The VM.
        vm: VmId,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No hypervisor.
    #[error("vm {vm} does not run here")]
    NotHere {
        /// The VM.
        vm: VmId,
    },
}

/// What all VMs of a host share.
#[derive(Debug)]
pub struct Shared {
    /// Records.
    pub store: Arc<Store>,
    /// How QEMU is run.
    pub hypervisor: hypervisor::Host,
    /// Disks and replicas.
    pub replicas: Arc<ReplicaStore>,
    /// Notified when a report would differ from the one before.
    pub changed: Arc<Notify>,
}

/// What can be known of a VM without waiting for its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    /// The durable record.
    pub record: Record,
    /// The hypervisor.
    pub volatile: Volatile,
    /// For people.
    pub state: VmState,
    /// For people; empty when all is well.
    pub problem: String,
    /// Number of the order to run under which the hypervisor ended; a newer one is needed.
    pub halted_under: Option<u64>,
}

#[derive(Debug)]
struct State {
    durable: Durable,
    volatile: Volatile,
    qemu: Option<Vm>,
    /// When the hypervisor was last told to end.
    asked_to_end: Option<Instant>,
    console: Option<Console>,
    spec: Option<VmSpec>,
    fence: Fence,
}

/// One VM.
#[derive(Debug)]
pub struct ManagedVm {
    id: VmId,
    shared: Arc<Shared>,
    state: Mutex<State>,
    power_seq: AtomicU64,
    /// It was this worker's when it started, and no hypervisor was there.
    found_down: AtomicBool,
    status: watch::Sender<VmStatus>,
}

impl ManagedVm {
    pub(super) fn open(id: VmId, shared: Arc<Shared>) -> Result<Self, VmError> {
        let durable = Durable::read(|| records::read(&shared.store, id))?;
        let fence = Fence::new(records::read_policy(&shared.store, id)?);
        let volatile = Volatile { standing: fence.standing(BootTime::now()), ..Volatile::default() };
        let (status, _) = watch::channel(VmStatus {
            record: durable.record(),
            volatile,
            state: VmState::Stopped,
            problem: String::new(),
            halted_under: None,
        });
        let state = State { durable, volatile, qemu: None, asked_to_end: None, console: None, spec: None, fence };
        Ok(Self {
            id,
            shared,
            state: Mutex::new(state),
            power_seq: AtomicU64::new(0),
            found_down: AtomicBool::new(false),
            status,
        })
    }

    /// Which VM.
    pub fn id(&self) -> VmId {
        self.id
    }

    /// What is known of it now.
    pub fn status(&self) -> VmStatus {
        self.status.borrow().clone()
    }

    /// Follows what is known of it.
    pub fn watch(&self) -> watch::Receiver<VmStatus> {
        self.status.subscribe()
    }

    /// The definition, once it has arrived.
    ///
    /// # Errors
    /// Its policy could not be noted, or not be put into effect.
    pub async fn set_spec(self: &Arc<Self>, spec: &VmSpec) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        if state.spec.as_ref() != Some(spec) {
            state.spec = Some(spec.clone());
        }
        let policy = policy_of(spec);
        if state.fence.policy() == Some(policy) {
            return Ok(());
        }
        tokio::task::block_in_place(|| records::write_policy(&self.shared.store, self.id, policy))?;
        state.fence.set_policy(policy);
        self.stand(&mut state).await
    }

    /// Does it run under a lease only?
    pub fn fences_itself(&self) -> bool {
        self.status.borrow().volatile.standing != Standing::KeepRunning
    }

    /// The question for a lease leaves now.
    pub async fn lease_asked(&self, nonce: Nonce, now: BootTime) {
        self.state.lock().await.fence.asked(nonce, now);
    }

    /// What came of the question: a lease for one epoch, of so many milliseconds, or none.
    ///
    /// # Errors
    /// The keeper could not be given its new deadline, or what waited for the lease did not run.
    pub async fn lease_answered(self: &Arc<Self>, nonce: Nonce, lease: Option<(Epoch, u64)>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        if let Some((own, lease_ms)) = lease {
            state.fence.granted(nonce, own, lease_ms);
        }
        self.stand(&mut state).await
    }

    /// Lets policy and lease take effect.
    async fn stand(self: &Arc<Self>, state: &mut State) -> Result<(), VmError> {
        let standing = state.fence.standing(BootTime::now());
        let effects = self.commit(state, Event::Standing(standing))?;
        let outcome = self.carry_out(state, effects).await;
        self.publish(state);
        outcome
    }

    /// Sets running what this worker owns and what yet stands still: when it was to run, its hypervisor did not answer.
    ///
    /// # Errors
    /// It still does not.
    pub async fn resume_what_waits(self: &Arc<Self>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let waits = matches!(state.volatile.guest, Guest::Paused | Guest::Loaded(_));
        match state.durable.record() {
            Record::Own { .. } if waits => self.stand(&mut state).await,
            _ => Ok(()),
        }
    }

    /// The VM was here and down when this worker started, and waits for an order: it stays down under this one.
    pub fn stay_down(&self, power_seq: u64) {
        if self.found_down.swap(false, Ordering::SeqCst) {
            self.modify(|status| status.halted_under = Some(power_seq));
        }
    }

    /// The running hypervisor.
    ///
    /// # Errors
    /// [`VmError::NotHere`].
    pub async fn qemu(&self) -> Result<Vm, VmError> {
        self.state.lock().await.qemu.clone().ok_or(VmError::NotHere { vm: self.id })
    }

    /// The serial console; one bridge serves all viewers.
    ///
    /// # Errors
    /// The VM does not run here, or its console does not answer.
    pub async fn console(&self) -> Result<Console, VmError> {
        let mut state = self.state.lock().await;
        if let Some(console) = &state.console {
            return Ok(console.clone());
        }
        let qemu = state.qemu.clone().ok_or(VmError::NotHere { vm: self.id })?;
        let console = Console::open(&qemu.paths().console()).await?;
        state.console = Some(console.clone());
        Ok(console)
    }

    /// One event: the record is persisted, then its effects are carried out. Returns the new record.
    ///
    /// # Errors
    /// The record could not be written (nothing changed), or an effect failed (the record stands).
    pub async fn step(self: &Arc<Self>, event: Event) -> Result<Record, VmError> {
        let mut state = self.state.lock().await;
        let effects = self.commit(&mut state, event)?;
        let outcome = self.carry_out(&mut state, effects).await;
        self.publish(&state);
        outcome?;
        self.note_image(&state).await?;
        Ok(state.durable.record())
    }

    /// Starts a hypervisor that waits for the image of a move, as [`Effect::LoadImage`] asks.
    ///
    /// # Errors
    /// The disks are not here, or the hypervisor did not start.
    pub async fn load_image(self: &Arc<Self>, spec: &VmSpec) -> Result<Vm, VmError> {
        let mut state = self.state.lock().await;
        state.spec = Some(spec.clone());
        let qemu = self.launch(&mut state, StartMode::Incoming, None).await;
        self.publish(&state);
        qemu
    }

    /// Ends an image that was not completed: nobody was told that it is here. A later move's image is left alone.
    ///
    /// # Errors
    /// The hypervisor could not be ended.
    pub async fn drop_image(self: &Arc<Self>, image: &Vm) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let same = state.qemu.as_ref().is_some_and(|qemu| qemu.pid() == image.pid());
        if same && state.durable.record().owned().is_none() {
            self.end_qemu(&mut state).await?;
            self.publish(&state);
        }
        Ok(())
    }

    /// Asks the guest to shut down, and again when it has not for [`ACPI_PATIENCE`]; does not wait for it.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    pub async fn ask_to_shut_down(&self) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let Some(qemu) = state.qemu.clone() else { return Ok(()) };
        if state.asked_to_end.is_none_or(|asked| asked.elapsed() >= ACPI_PATIENCE) {
            qemu.powerdown().await?;
            state.asked_to_end = Some(Instant::now());
        }
        Ok(())
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// The hypervisor could not be ended.
    pub async fn pull_the_plug(&self) -> Result<(), VmError> {
        let qemu = {
            let mut state = self.state.lock().await;
            let Some(qemu) = state.qemu.clone() else { return Ok(()) };
            state.asked_to_end = Some(Instant::now());
            qemu
        };
        qemu.kill().await?;
        Ok(())
    }

    /// The order about power that is in force.
    pub fn take_power_order(&self, seq: u64) {
        self.power_seq.store(seq, Ordering::SeqCst);
    }

    /// It has been ordered not to run: that it had crashed is over.
    pub fn clear_crash(&self) {
        self.modify(|status| {
            if status.state == VmState::Crashed {
                status.state = VmState::Stopped;
            }
        });
    }

    /// Something that an operator should see; empty: it is over.
    pub fn set_problem(&self, problem: String) {
        self.modify(|status| status.problem = problem);
    }

    /// Removes everything that this worker holds of the VM but its original disk.
    ///
    /// # Errors
    /// The hypervisor could not be ended or files not be removed.
    pub async fn purge(self: &Arc<Self>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        self.end_qemu(&mut state).await?;
        hypervisor::remove(&self.shared.hypervisor.runtime_dir, self.id).await?;
        let (store, replicas, id) = (self.shared.store.clone(), self.shared.replicas.clone(), self.id);
        tokio::task::block_in_place(|| {
            replicas.remove(id)?;
            records::remove(&store, id)?;
            Ok(())
        })
    }

    /// Looks at what an earlier worker left, and takes it over.
    pub(super) async fn restore(self: &Arc<Self>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let runtime_dir = &self.shared.hypervisor.runtime_dir;
        let found = match Vm::adopt(runtime_dir, self.id).await {
            Ok(qemu) => {
                let found = found_guest(&qemu).await?;
                self.install(&mut state, qemu);
                found
            }
            Err(HypervisorError::NotRunning { .. }) => {
                hypervisor::clean_up(runtime_dir, self.id).await?;
                self.found_down.store(state.durable.record().owned().is_some(), Ordering::SeqCst);
                Guest::Absent
            }
            Err(error) => return Err(error.into()),
        };
        let effects = self.commit(&mut state, Event::Restarted(found))?;
        let outcome = self.carry_out(&mut state, effects).await;
        tracing::info!(vm_id = %self.id, ?found, record = ?state.durable.record(), "vm restored");
        self.publish(&state);
        outcome
    }

    fn commit(&self, state: &mut State, event: Event) -> Result<Vec<Effect>, VmError> {
        let before = state.durable;
        let step = worker_step(&before.record(), &state.volatile, event);
        let committed = tokio::task::block_in_place(|| {
            step.commit(before, |record| records::write(&self.shared.store, self.id, record))
        })?;
        if committed.record != before {
            tracing::info!(vm_id = %self.id, ?event, record = ?committed.record.record(), "ownership record written");
        }
        state.durable = committed.record;
        state.volatile = committed.volatile;
        Ok(committed.effects)
    }

    async fn carry_out(self: &Arc<Self>, state: &mut State, effects: Vec<Effect>) -> Result<(), VmError> {
        for effect in effects {
            match effect {
                Effect::Resume => {
                    let permission = self.permission(state)?;
                    self.resume(state, permission).await?;
                }
                Effect::Boot => {
                    let permission = self.permission(state)?;
                    self.boot(state, permission).await?;
                }
                Effect::Pause => {
                    if let Some(qemu) = &state.qemu {
                        qemu.stop().await?;
                    }
                }
                Effect::KillGuest | Effect::DropImage => self.end_qemu(state).await?,
                // The destination of the move does that: it needs the definition that comes with the move.
                Effect::LoadImage(_) => {}
                Effect::Arm => {
                    if let (Some(qemu), Some(deadline)) = (&state.qemu, state.fence.deadline(BootTime::now())) {
                        qemu.arm(deadline)?;
                    }
                }
                Effect::Disarm => {
                    if let Some(qemu) = &state.qemu {
                        qemu.disarm()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn permission(&self, state: &State) -> Result<MayRun, VmError> {
        let licence = state.fence.licence(BootTime::now()).ok_or(VmError::NoLease { vm: self.id })?;
        state.durable.may_run(licence).ok_or(VmError::NotPermitted { vm: self.id })
    }

    async fn resume(&self, state: &mut State, permission: MayRun) -> Result<(), VmError> {
        let qemu = state.qemu.clone().ok_or(VmError::NotHere { vm: self.id })?;
        // From now on the hypervisor changes the disks.
        self.shared.replicas.close(self.id);
        if let Some(until_ms) = permission.deadline_ms() {
            qemu.arm(fence::deadline(until_ms))?;
        }
        qemu.cont().await?;
        tracing::info!(vm_id = %self.id, epoch = %permission.own(), "guest resumed");
        self.commit(state, Event::Resumed).map(drop)
    }

    /// Notes which image QEMU holds, so that another worker can vouch for it; the note goes when the guest runs or QEMU ends. It
    /// matters only while this QEMU lives, so it need not be on stable storage.
    async fn note_image(&self, state: &State) -> Result<(), VmError> {
        let Some(qemu) = &state.qemu else { return Ok(()) };
        let path = qemu.paths().image();
        let noted = match state.volatile.guest {
            Guest::Loaded(epoch) => tokio::fs::write(&path, epoch.raw().to_string()).await,
            Guest::Absent | Guest::Running | Guest::Paused => match tokio::fs::remove_file(&path).await {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            },
        };
        noted.map_err(|source| VmError::Image { vm: self.id, source })
    }

    async fn boot(self: &Arc<Self>, state: &mut State, permission: MayRun) -> Result<(), VmError> {
        self.modify(|status| status.state = VmState::Starting);
        self.shared.replicas.close(self.id);
        let Some(until_ms) = permission.deadline_ms() else {
            self.launch(state, StartMode::Running, None).await?;
            tracing::info!(vm_id = %self.id, epoch = %permission.own(), "guest booted");
            return self.commit(state, Event::Resumed).map(drop);
        };
        // Starting takes time: the guest waits until the lease has been looked at once more.
        self.launch(state, StartMode::Paused, Some(fence::deadline(until_ms))).await?;
        let resumed = match self.permission(state) {
            Ok(permission) => self.resume(state, permission).await,
            Err(error) => Err(error),
        };
        if resumed.is_err() {
            self.end_qemu(state).await?;
        }
        resumed
    }

    async fn launch(
        self: &Arc<Self>,
        state: &mut State,
        mode: StartMode,
        deadline: Option<BootTime>,
    ) -> Result<Vm, VmError> {
        let spec = state.spec.clone().ok_or(VmError::Undefined { vm: self.id })?;
        let disk_paths = self.disk_paths(&spec, mode)?;
        let launch = Launch { vm: self.id, spec, disk_paths, mode, deadline };
        let qemu = Vm::start(&self.shared.hypervisor, &launch).await?;
        self.install(state, qemu.clone());
        Ok(qemu)
    }

    fn disk_paths(&self, spec: &VmSpec, mode: StartMode) -> Result<BTreeMap<String, PathBuf>, VmError> {
        let locate = |disk: &pageport_proto::v1::DiskSpec| {
            let path = match mode {
                // A destination has its replicas; the definition's path is another host's.
                StartMode::Incoming => {
                    let found = self.shared.replicas.locate(self.id, &disk.name)?;
                    let missing = || ReplicaError::Missing { vm: self.id, disk: disk.name.clone() };
                    found.ok_or_else(missing)?.path
                }
                StartMode::Running | StartMode::Paused => {
                    self.shared.replicas.locate_or_adopt(self.id, &disk.name, disk.path.as_ref())?
                }
            };
            Ok((disk.name.clone(), path))
        };
        tokio::task::block_in_place(|| spec.disks.iter().map(locate).collect())
    }

    fn install(self: &Arc<Self>, state: &mut State, qemu: Vm) {
        state.qemu = Some(qemu.clone());
        state.asked_to_end = None;
        state.console = None;
        let vm = Arc::downgrade(self);
        tokio::spawn(async move {
            let report = exit_report(&qemu).await;
            if let (Some(vm), Some(report)) = (vm.upgrade(), report) {
                vm.qemu_ended(&qemu, &report).await;
            }
        });
    }

    async fn qemu_ended(self: &Arc<Self>, ended: &Vm, report: &hypervisor::ExitReport) {
        let mut state = self.state.lock().await;
        if state.qemu.as_ref().is_none_or(|qemu| qemu.pid() != ended.pid()) {
            return;
        }
        // Who ended as told boots again when the next order says so.
        let unasked = state.durable.record().owned().is_some() && state.asked_to_end.is_none();
        state.qemu = None;
        state.console = None;
        if let Err(error) = self.commit(&mut state, Event::QemuGone) {
            tracing::error!(vm_id = %self.id, %error, "the end of the hypervisor could not be recorded");
        }
        self.publish(&state);
        if unasked {
            self.modify(|status| {
                status.halted_under = Some(self.power_seq.load(Ordering::SeqCst));
                if !report.expected() {
                    status.state = VmState::Crashed;
                    status.problem =
                        format!("the hypervisor ended unexpectedly ({}): {}", report.status, report.log_tail);
                }
            });
        }
    }

    async fn end_qemu(&self, state: &mut State) -> Result<(), VmError> {
        if let Some(qemu) = state.qemu.take() {
            qemu.kill().await?;
            state.console = None;
            self.commit(state, Event::QemuGone)?;
        }
        Ok(())
    }

    fn publish(&self, state: &State) {
        let guest = state.volatile.guest;
        self.modify(|status| {
            status.record = state.durable.record();
            status.volatile = state.volatile;
            if guest != Guest::Absent || status.state != VmState::Crashed {
                status.state = match guest {
                    Guest::Absent => VmState::Stopped,
                    Guest::Running => VmState::Running,
                    Guest::Paused | Guest::Loaded(_) => VmState::Paused,
                };
            }
            if guest == Guest::Running {
                status.problem.clear();
            }
        });
    }

    fn modify(&self, change: impl FnOnce(&mut VmStatus)) {
        let changed = self.status.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
        if changed {
            self.shared.changed.notify_one();
        }
    }

    /// The record allows a move of this epoch to begin here as its source.
    pub fn may_prepare(&self, epoch: Epoch) -> bool {
        let status = self.status.borrow();
        matches!(status.record, Record::Own { seen, .. } if epoch > seen) && status.volatile.guest == Guest::Running
    }
}

/// Waits for the end of a hypervisor, as long as it takes.
async fn exit_report(qemu: &Vm) -> Option<hypervisor::ExitReport> {
    const A_DAY: Duration = Duration::from_secs(24 * 3600);
    loop {
        match qemu.wait_exit(A_DAY).await {
            Ok(report) => return Some(report),
            Err(HypervisorError::Deadline { .. }) => {}
            Err(_) => return None,
        }
    }
}

/// What an adopted hypervisor does. What an earlier worker had under way in it is given up. An image that was received
/// counts as a guest that must not run, unless the earlier worker noted that it had vouched for it.
async fn found_guest(qemu: &Vm) -> Result<Guest, VmError> {
    let image = image_note(qemu.paths()).await;
    let found = match (qemu.run_state().await?, image) {
        (RunState::Running, _) => Guest::Running,
        (_, Some(epoch)) => Guest::Loaded(epoch),
        (_, None) => Guest::Paused,
    };
    let status = qemu.migration_info().await?.status;
    if let Some(MigrationStatus::Setup | MigrationStatus::Active | MigrationStatus::PreSwitchover) = status {
        qemu.cancel_migration().await?;
    }
    qemu.end_orphaned_mirrors(ORPHAN_LIMIT).await?;
    Ok(found)
}

async fn image_note(paths: &VmPaths) -> Option<Epoch> {
    let text = tokio::fs::read_to_string(paths.image()).await.ok()?;
    text.trim().parse().ok().map(Epoch::from_raw)
}

fn policy_of(spec: &VmSpec) -> Policy {
    match spec.on_isolation() {
        IsolationPolicy::Unspecified | IsolationPolicy::KeepRunning => Policy::KeepRunning,
        IsolationPolicy::SelfFence => Policy::SelfFence,
    }
}
