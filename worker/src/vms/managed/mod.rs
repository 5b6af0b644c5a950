//! One VM at this worker: its record, its hypervisor, and the only way to change either.
//!
//! ```text
//!   event ─▶ worker_step (pure) ─▶ record to disk ─▶ effects: boot, resume, pause, kill ─▶ events of their own
//! ```
//! | part | what |
//! |---|---|
//! | this file | the step: record, then effects; orders about power; status |
//! | `guest` | the effects: boot, resume, pause, kill; a hypervisor that ends |
//! | `leased` | policy and lease |
//! | `found` | what an earlier worker left |
//! | `flat` | images that become raw once the VM has left |
//!
//! Guarantees: one step at a time; effects only after the record is durable; a guest is booted or resumed only with the
//! proof of a durable `Own` in hand.

mod flat;
mod found;
mod guest;
mod leased;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pageport_common::store::{Store, StoreError};
use pageport_keeper::BootTime;
use pageport_ownership::{Durable, Effect, Epoch, Event, Guest, Record, Volatile, worker_step};
use pageport_proto::VmId;
use pageport_proto::v1::{VmSpec, VmState};
use tokio::sync::{Mutex, Notify, watch};

use super::fence::Fence;
use super::records::{self, RecordError};
use crate::generation::Joined;
use crate::hypervisor::console::ConsoleError;
use crate::hypervisor::{self, Console, HypervisorError, StartMode, Vm};
use crate::replica::flatten::Flattenings;
use crate::replica::groups::{Groups, GroupsError};
use crate::replica::points::LeaseEnd;
use crate::replica::store::{ReplicaError, ReplicaStore};

/// How long a guest has to shut down when asked; then it is asked again.
const ACPI_PATIENCE: Duration = Duration::from_secs(60);

/// Epochs of which it is remembered whose they are, until a record speaks of them.
const MAX_SAID: usize = 8;

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
    /// Their recovery points.
    #[error(transparent)]
    Points(#[from] GroupsError),
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
    /// The store that knew is lost, and the VM has moved since it was defined.
    #[error(
        "where disk {disk} of vm {vm} lies is not known any more, since this worker lost its store: seed it from another site, or resolve the vm to a site that holds a replica"
    )]
    DiskForgotten {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
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
    /// Disks that were to be a replica's.
    #[error("a hypervisor has, or may have, the disks of vm {vm}, or they were removed")]
    DisksTaken {
        /// The VM.
        vm: VmId,
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
    /// Which controllers are heard.
    pub joined: Arc<Joined>,
    /// How QEMU is run.
    pub hypervisor: hypervisor::Host,
    /// Disks and replicas.
    pub replicas: Arc<ReplicaStore>,
    /// Recovery points of replicas.
    pub groups: Arc<Groups>,
    /// Images that become raw.
    pub flattenings: Arc<Flattenings>,
    /// Notified when a report would differ from the one before.
    pub changed: Arc<Notify>,
}

/// What can be known of a VM without waiting for its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    /// The durable record.
    pub record: Record,
    /// Whose its newest epoch is, where that is another worker and known; else empty.
    pub whose: String,
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
    whose: String,
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
    /// The newest epochs that were said to be another worker's, and whose each is.
    said: std::sync::Mutex<BTreeMap<Epoch, String>>,
    /// It was this worker's when it started, and no hypervisor was there.
    found_down: AtomicBool,
    status: watch::Sender<VmStatus>,
}

impl ManagedVm {
    pub(super) fn open(id: VmId, shared: Arc<Shared>) -> Result<Self, VmError> {
        let durable = Durable::read(|| records::read(&shared.store, id))?;
        let whose = records::read_whose(&shared.store, id)?;
        let fence = Fence::new(records::read_policy(&shared.store, id)?);
        let volatile = Volatile { standing: fence.standing(BootTime::now()), ..Volatile::default() };
        let (status, _) = watch::channel(VmStatus {
            record: durable.record(),
            whose: whose.clone(),
            volatile,
            state: VmState::Stopped,
            problem: String::new(),
            halted_under: None,
        });
        let state =
            State { durable, whose, volatile, qemu: None, asked_to_end: None, console: None, spec: None, fence };
        Ok(Self {
            id,
            shared,
            state: Mutex::new(state),
            power_seq: AtomicU64::new(0),
            said: std::sync::Mutex::default(),
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

    /// The record and the guest as they are, not as they were last published: waits for the step that is being carried out.
    pub async fn decided(&self) -> (Record, Guest) {
        let state = self.state.lock().await;
        (state.durable.record(), state.volatile.guest)
    }

    /// Follows what is known of it.
    pub fn watch(&self) -> watch::Receiver<VmStatus> {
        self.status.subscribe()
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
        self.step_locked(&mut state, event).await
    }

    async fn step_locked(self: &Arc<Self>, state: &mut State, event: Event) -> Result<Record, VmError> {
        let effects = self.commit(state, event)?;
        let outcome = self.carry_out(state, effects).await;
        self.publish(state);
        outcome?;
        self.note_image(state).await?;
        Ok(state.durable.record())
    }

    /// This epoch is that worker's: the owner that the controllers name, or the other side of a move. Kept with the record, for controllers
    /// that are restored from a backup.
    pub fn note_whose(&self, epoch: Epoch, worker: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.insert(epoch, worker.to_owned());
        while said.len() > MAX_SAID {
            said.pop_first();
        }
    }

    /// The controllers were restored from a backup: what older ones said counts no more, and a move before its commit point is given up.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub async fn join(self: &Arc<Self>) -> Result<Record, VmError> {
        let mut state = self.state.lock().await;
        state.volatile.question = None;
        self.step_locked(&mut state, Event::Join).await
    }

    /// Starts a hypervisor that waits for the image of a move, as [`Effect::LoadImage`] asks.
    ///
    /// # Errors
    /// The disks are not here, the definition could not be noted, or the hypervisor did not start.
    pub async fn load_image(self: &Arc<Self>, spec: &VmSpec) -> Result<Vm, VmError> {
        let mut state = self.state.lock().await;
        self.take_spec(&mut state, spec)?;
        let qemu = self.launch(&mut state, StartMode::Incoming, None).await;
        self.publish(&state);
        qemu
    }

    /// The image that this hypervisor holds is complete.
    ///
    /// # Errors
    /// Another hypervisor has taken its place, or as [`Self::step`].
    pub async fn loaded(self: &Arc<Self>, image: &Vm, epoch: Epoch) -> Result<Record, VmError> {
        let mut state = self.state.lock().await;
        if state.qemu.as_ref().is_none_or(|qemu| qemu.pid() != image.pid()) {
            return Err(VmError::NotHere { vm: self.id });
        }
        self.step_locked(&mut state, Event::Loaded(epoch)).await
    }

    /// Ends a hypervisor that waits for, or receives, an image that nobody has vouched for. `true`: there was one; the controllers
    /// must be asked again for the next.
    ///
    /// # Errors
    /// It could not be ended.
    pub async fn drop_unfinished_image(self: &Arc<Self>) -> Result<bool, VmError> {
        let mut state = self.state.lock().await;
        let receives = state.volatile.guest == Guest::Absent && state.durable.record().owned().is_none();
        if !receives || state.qemu.is_none() {
            return Ok(false);
        }
        tracing::info!(vm_id = %self.id, "an image that an earlier attempt began to send is dropped");
        self.end_qemu(&mut state).await?;
        self.publish(&state);
        Ok(true)
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
        let Shared { store, replicas, groups, flattenings, .. } = &*self.shared;
        let id = self.id;
        flattenings.end(id).await;
        tokio::task::block_in_place(|| {
            groups.forget(id, &LeaseEnd::Removed)?;
            replicas.remove(id)?;
            records::remove(store, id)?;
            Ok(())
        })
    }

    fn commit(&self, state: &mut State, event: Event) -> Result<Vec<Effect>, VmError> {
        if let Event::Authorise(epoch) = event
            && !self.shared.joined.follows(epoch)
        {
            tracing::info!(vm_id = %self.id, %epoch, "a move that lost controllers ordered is not begun");
            return Ok(vec![]);
        }
        let before = state.durable;
        let step = worker_step(&before.record(), &state.volatile, event);
        let committed = tokio::task::block_in_place(|| {
            step.commit(before, |record| {
                let whose = self.whose(record);
                records::write(&self.shared.store, self.id, record, &whose)
            })
        })?;
        if committed.record != before {
            state.whose = self.whose(&committed.record.record());
            tracing::info!(vm_id = %self.id, ?event, record = ?committed.record.record(), "ownership record written");
        }
        state.durable = committed.record;
        state.volatile = committed.volatile;
        Ok(committed.effects)
    }

    /// Whose the newest epoch of a record is, if it is another worker's.
    fn whose(&self, record: &Record) -> String {
        match record {
            Record::Own { .. } | Record::Prepared { .. } => String::new(),
            Record::Replica { .. } | Record::Released { .. } => {
                let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                said.get(&record.seen()).cloned().unwrap_or_default()
            }
        }
    }

    fn publish(&self, state: &State) {
        let guest = state.volatile.guest;
        self.modify(|status| {
            status.record = state.durable.record();
            status.whose.clone_from(&state.whose);
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

    /// A replication session has ended: what it left of a move is undone, unless a hypervisor waits here for that move.
    pub async fn settle_replica(&self) {
        self.settle_disks(&*self.state.lock().await);
    }

    /// It is this worker's, and its guest runs.
    pub fn owns_and_runs(&self) -> bool {
        let status = self.status.borrow();
        matches!(status.record, Record::Own { .. }) && status.volatile.guest == Guest::Running
    }

    /// The record allows a move of this epoch to begin here as its source.
    pub fn may_prepare(&self, epoch: Epoch) -> bool {
        let status = self.status.borrow();
        matches!(status.record, Record::Own { seen, .. } if epoch > seen) && status.volatile.guest == Guest::Running
    }
}
