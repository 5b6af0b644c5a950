//! One VM's QEMU: started or found again, commanded, watched, ended.
//!
//! ```text
//!   start ──▶ lease, keeper, QMP ┐                       ┌─▶ events (broadcast)
//!   adopt ──▶ pid file, check, ──┴─▶ Vm ◀── watcher task ┼─▶ migration status, last stop, last resume (watch)
//!             QMP                    │                   └─▶ exit report (watch); removes sockets and taps
//!                                    └─ arm, disarm ─▶ deadline file ─▶ keeper
//! ```
//!
//! Guarantees: QEMU outlives the worker. Its end is noticed by its pidfd, whoever caused it, and reported once, with its
//! cause and the end of its log; then its keeper, its tap devices and its folder's files but the log are gone. When every [`Vm`] of a QEMU
//! has been dropped its control socket is free for the next [`Vm::adopt`]. A QEMU has a keeper, which kills it when its
//! lease runs out, whatever has become of the worker.
//!
//! Does not decide whether the VM may run: [`Vm::start`] and [`Vm::cont`] are called by who holds its ownership record.
//!
//! | module | what |
//! |---|---|
//! | `starting` | start and adopt |
//! | `lease` | arm and disarm |
//! | `leftovers` | which QEMUs run, and what those that ended have left |

mod lease;
mod leftovers;
mod starting;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageport_proto::VmId;
use serde::Deserialize;
use tokio::sync::{broadcast, watch};

pub use self::leftovers::{clean_up, list_running, remove};
pub(super) use self::leftovers::{find, remove_leftovers};
use super::accel::Accelerator;
use super::error::HypervisorError;
use super::event::{EventTime, ExitReport, MigrationStatus, VmEvent};
use super::memory::HugePages;
use super::paths::VmPaths;
use super::process::Process;
use super::qmp::{Command, Ignored, Qmp, qmp_command};

/// Time for QEMU to open its control socket.
pub const START_DEADLINE: Duration = Duration::from_secs(60);
/// Time for a running QEMU to answer a new connection.
pub const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// Time for the kernel to end a killed QEMU; freeing much memory takes a moment.
pub const KILL_DEADLINE: Duration = Duration::from_secs(20);

qmp_command!(/// Is the guest running?
    QueryStatus = "query-status" -> StatusReply {});
qmp_command!(/// Runs the guest.
    Cont = "cont" -> Ignored {});
qmp_command!(/// Pauses the guest.
    Stop = "stop" -> Ignored {});
qmp_command!(/// Writes guest memory to a file.
    PhysicalMemorySave = "pmemsave" -> Ignored { val: u64, size: u64, filename: String });
qmp_command!(/// Presses the power button.
    Powerdown = "system_powerdown" -> Ignored {});

/// What `query-status` answers.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct StatusReply {
    status: RunState,
}

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// It runs.
    Running,
    /// It was paused.
    Paused,
    /// It has not run yet.
    Prelaunch,
    /// It waits for, or receives, a migration stream.
    Inmigrate,
    /// It is paused for the last part of a migration.
    FinishMigrate,
    /// It has been sent away. Running it again would be a second copy.
    Postmigrate,
    /// It has shut down.
    Shutdown,
    /// It stopped on a disk error.
    IoError,
    /// It cannot go on.
    InternalError,
    /// It panicked.
    GuestPanicked,
    /// Anything else.
    #[serde(other)]
    Other,
}

/// How this host runs QEMU.
#[derive(Debug, Clone)]
pub struct Host {
    /// The binary.
    pub qemu: String,
    /// The keeper's program: see [`super::keeper::locate`].
    pub keeper: PathBuf,
    /// Found by [`super::accel::probe`] or forced by the configuration.
    pub accelerator: Accelerator,
    /// Whether guests get huge pages.
    pub huge_pages: HugePages,
    /// The worker's runtime folder.
    pub runtime_dir: PathBuf,
}

/// A handle on one VM's QEMU; clones share it.
#[derive(Debug, Clone)]
pub struct Vm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: VmId,
    paths: VmPaths,
    process: Arc<Process>,
    keeper: Arc<Process>,
    lease: Mutex<()>,
    frozen: Arc<tokio::sync::Mutex<()>>,
    agent: Arc<tokio::sync::Mutex<()>>,
    graph: Arc<tokio::sync::Mutex<()>>,
    qmp: Qmp,
    end_ordered: Arc<AtomicBool>,
    events: broadcast::Sender<VmEvent>,
    marks: Arc<watch::Sender<Marks>>,
    exit: watch::Receiver<Option<ExitReport>>,
}

/// The newest of each kind of event, for who comes late or lags.
#[derive(Debug, Clone, Copy, Default)]
pub struct Marks {
    /// When the guest last stopped.
    pub stopped: Option<EventTime>,
    /// When the guest last resumed.
    pub resumed: Option<EventTime>,
    /// Where the migration is.
    pub migration: Option<MigrationStatus>,
    /// The pass over the guest's memory that the migration is in.
    pub migration_pass: u64,
    /// QEMU has ended.
    pub ended: bool,
}

impl Vm {
    /// Which VM this is.
    pub fn id(&self) -> VmId {
        self.inner.id
    }

    /// Where its sockets lie.
    pub fn paths(&self) -> &VmPaths {
        &self.inner.paths
    }

    /// QEMU's process number.
    pub fn pid(&self) -> u32 {
        self.inner.process.pid()
    }

    /// The process number of QEMU's keeper.
    pub fn keeper_pid(&self) -> u32 {
        self.inner.keeper.pid()
    }

    /// Everything that happens from now on.
    pub fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.inner.events.subscribe()
    }

    /// The newest stop, resume and migration status.
    pub fn marks(&self) -> watch::Receiver<Marks> {
        self.inner.marks.subscribe()
    }

    /// Held by whose turn it is to freeze the disks; `None`: someone holds it.
    pub(super) fn take_freeze_turn(&self) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        Arc::clone(&self.inner.frozen).try_lock_owned().ok()
    }

    /// Held by who talks to the guest's agent, which takes one client at a time; `None`: someone does.
    pub(super) fn take_agent_turn(&self) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        Arc::clone(&self.inner.agent).try_lock_owned().ok()
    }

    /// Held by who holds the block jobs while it changes the block graph.
    pub(super) async fn graph_turn(&self) -> tokio::sync::OwnedMutexGuard<()> {
        Arc::clone(&self.inner.graph).lock_owned().await
    }

    /// Forgets the last migration, so that its end is not taken for the next one's.
    pub(super) fn forget_migration(&self) {
        self.inner.marks.send_modify(|marks| (marks.migration, marks.migration_pass) = (None, 0));
    }

    /// How QEMU ended, if it has.
    pub fn exited(&self) -> Option<ExitReport> {
        self.inner.exit.borrow().clone()
    }

    /// For who waits for QEMU's end without a handle on it.
    pub(super) fn exit_watch(&self) -> watch::Receiver<Option<ExitReport>> {
        self.inner.exit.clone()
    }

    /// Waits for QEMU's end.
    pub async fn wait_exit(&self, deadline: Duration) -> Result<ExitReport, HypervisorError> {
        let mut exit = self.inner.exit.clone();
        let ended = tokio::time::timeout(deadline, exit.wait_for(Option::is_some)).await;
        let report = ended.ok().and_then(|report| report.ok().and_then(|report| report.clone()));
        report.ok_or(HypervisorError::Deadline { vm: self.id(), operation: "end", deadline })
    }

    /// What the guest is doing.
    pub async fn run_state(&self) -> Result<RunState, HypervisorError> {
        Ok(self.execute(&QueryStatus {}).await?.status)
    }

    /// Runs the guest.
    pub async fn cont(&self) -> Result<(), HypervisorError> {
        self.execute(&Cont {}).await.map(drop)
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<(), HypervisorError> {
        self.execute(&Stop {}).await.map(drop)
    }

    /// Writes the first `bytes` of the guest's physical memory to a file, as it is now: to compare two guests that stand
    /// still.
    pub async fn save_memory(&self, bytes: u64, path: &Path) -> Result<(), HypervisorError> {
        let filename = path.to_string_lossy().into_owned();
        self.execute(&PhysicalMemorySave { val: 0, size: bytes, filename }).await.map(drop)
    }

    /// Asks the guest through ACPI to shut down. A guest that does not listen keeps running.
    pub async fn powerdown(&self) -> Result<(), HypervisorError> {
        self.execute(&Powerdown {}).await.map(drop)
    }

    /// Pulls the plug, and waits until QEMU and what it left are gone. A QEMU that has ended is no error.
    pub async fn kill(&self) -> Result<ExitReport, HypervisorError> {
        self.inner.end_ordered.store(true, Ordering::SeqCst);
        self.inner.process.kill().map_err(|source| HypervisorError::File {
            operation: "kill QEMU of",
            path: self.inner.paths.dir().to_owned(),
            source,
        })?;
        self.wait_exit(KILL_DEADLINE).await
    }

    pub(super) async fn execute<C: Command>(&self, command: &C) -> Result<C::Reply, HypervisorError> {
        Ok(self.inner.qmp.execute(command).await?)
    }

    pub(super) async fn execute_within<C: Command>(
        &self,
        command: &C,
        deadline: Duration,
    ) -> Result<C::Reply, HypervisorError> {
        Ok(self.inner.qmp.execute_within(command, deadline).await?)
    }
}
