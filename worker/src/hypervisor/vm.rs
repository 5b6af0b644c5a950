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

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageport_keeper::{BootTime, Lease};
use pageport_proto::VmId;
use serde::Deserialize;
use tokio::sync::{broadcast, watch};

use super::accel::Accelerator;
use super::command_line::{Launch, arguments};
use super::error::HypervisorError;
use super::event::{EventTime, ExitReport, MigrationStatus, VmEvent};
use super::keeper;
use super::memory::HugePages;
use super::paths::VmPaths;
use super::process::{self, Process};
use super::qmp::{Command, Ignored, Qmp, QmpError, qmp_command};
use super::tap;
use super::watcher::Watcher;

/// Time for QEMU to open its control socket.
pub const START_DEADLINE: Duration = Duration::from_secs(60);
/// Time for a running QEMU to answer a new connection.
pub const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// Time for the kernel to end a killed QEMU; freeing much memory takes a moment.
pub const KILL_DEADLINE: Duration = Duration::from_secs(20);
/// Time for a QEMU that has closed its control socket while starting to end.
const GIVE_UP_DEADLINE: Duration = Duration::from_secs(2);
/// Time for a QEMU whose keeper was killed to follow it.
const ORPHAN_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks for the control socket of a QEMU that is starting.
const CONNECT_INTERVAL: Duration = Duration::from_millis(10);
/// Events that a slow subscriber may lag behind before it loses the oldest.
const EVENT_BACKLOG: usize = 256;

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
    /// Starts QEMU. If it fails nothing is left running and no device is left behind; the log stays.
    pub async fn start(host: &Host, launch: &Launch) -> Result<Self, HypervisorError> {
        let (vm, paths) = (launch.vm, VmPaths::new(&host.runtime_dir, launch.vm));
        if let Some(running) = keeper::settle(vm, &paths).await? {
            return Err(HypervisorError::AlreadyRunning { vm, pid: running.pid() });
        }
        super::command_line::check_spec(&launch.spec)?;
        remove_leftovers(&paths).await;
        let file_error = |operation, path: PathBuf| move |source| HypervisorError::File { operation, path, source };
        let dir = paths.dir().to_owned();
        tokio::fs::create_dir_all(&dir).await.map_err(file_error("create", dir))?;
        let taps = tap::create(vm, &launch.spec.nics).await.map_err(|source| HypervisorError::Tap { vm, source })?;
        let started = async {
            let memory = host.huge_pages.choose(vm, launch.spec.memory_bytes)?;
            let argv = arguments(launch, &paths, host.accelerator, memory, &taps)?;
            tokio::fs::write(paths.taps(), taps.join("\n")).await.map_err(file_error("write", paths.taps()))?;
            keeper::prepare(vm, &paths, launch.deadline)?;
            let mut child = process::spawn(&host.keeper, &host.qemu, &argv, &paths)
                .map_err(file_error("start", host.keeper.clone()))?;
            let connected = async {
                let connection = first_connection(vm, &mut child, &paths).await?;
                // It has written its pid file before it listens.
                let process = find(&paths)?.ok_or(HypervisorError::NotRunning { vm })?;
                let keeper = keeper_of(vm, &process, &paths)?;
                Ok((process, keeper, connection))
            };
            match connected.await {
                Ok(running) => Ok((running, child, memory)),
                Err(error) => {
                    end_child(vm, child, &paths).await;
                    Err(error)
                }
            }
        };
        match started.await {
            Ok((running, child, memory)) => {
                tracing::info!(vm_id = %vm, pid = running.0.pid(), mode = ?launch.mode, ?memory, "QEMU started");
                Ok(Self::watched(vm, paths, running, Some(child)))
            }
            Err(error) => {
                tap::remove(&taps).await;
                remove_leftovers(&paths).await;
                Err(error)
            }
        }
    }

    /// Takes over a QEMU that an earlier worker started. A guest that it left with frozen file systems is thawed.
    pub async fn adopt(runtime_dir: &Path, vm: VmId) -> Result<Self, HypervisorError> {
        let paths = VmPaths::new(runtime_dir, vm);
        let Some(process) = keeper::settle(vm, &paths).await? else { return Err(HypervisorError::NotRunning { vm }) };
        let keeper = match keeper_of(vm, &process, &paths) {
            // Its keeper was killed a moment ago, and it is about to follow.
            Err(HypervisorError::NotKept { .. })
                if tokio::time::timeout(ORPHAN_DEADLINE, process.gone()).await.is_ok() =>
            {
                return Err(HypervisorError::NotRunning { vm });
            }
            keeper => keeper?,
        };
        let connection = Qmp::connect(&paths.qmp(), ADOPT_DEADLINE).await?;
        tracing::info!(vm_id = %vm, pid = process.pid(), keeper = keeper.pid(), "QEMU adopted");
        let adopted = Self::watched(vm, paths, (process, keeper, connection), None);
        super::guest_agent::thaw_what_is_left(&adopted);
        Ok(adopted)
    }

    fn watched(
        id: VmId,
        paths: VmPaths,
        (process, keeper, (qmp, notices)): (Process, Process, super::qmp::Connected),
        child: Option<tokio::process::Child>,
    ) -> Self {
        let (process, keeper) = (Arc::new(process), Arc::new(keeper));
        let end_ordered = Arc::new(AtomicBool::new(false));
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let marks = Arc::new(watch::Sender::new(Marks::default()));
        let (exit_sender, exit) = watch::channel(None);
        let watcher = Watcher {
            vm: id,
            paths: paths.clone(),
            process: Arc::clone(&process),
            keeper: Arc::clone(&keeper),
            child,
            notices,
            end_ordered: Arc::clone(&end_ordered),
            events: events.clone(),
            marks: Arc::clone(&marks),
            exit: exit_sender,
        };
        tokio::spawn(watcher.run());
        let inner = Inner {
            id,
            paths,
            process,
            keeper,
            lease: Mutex::new(()),
            frozen: Arc::default(),
            agent: Arc::default(),
            graph: Arc::default(),
            qmp,
            end_ordered,
            events,
            marks,
            exit,
        };
        Self { inner: Arc::new(inner) }
    }

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

    /// Has the keeper kill QEMU at `deadline`, or later if it was armed for later: a deadline is not moved back by a
    /// request that was overtaken. Cheap enough for any thread.
    ///
    /// # Errors
    /// The deadline file is gone or cannot be written: the lease that the keeper read last stands.
    pub fn arm(&self, deadline: BootTime) -> Result<(), HypervisorError> {
        self.change_lease("extend", |standing| match standing {
            Some(Lease::Until(later)) if later >= deadline => None,
            _ => Some(Lease::Until(deadline)),
        })
    }

    /// As [`Self::arm`], but also to an earlier time.
    ///
    /// # Errors
    /// As there.
    pub fn arm_exactly(&self, deadline: BootTime) -> Result<(), HypervisorError> {
        self.change_lease("set", |_| Some(Lease::Until(deadline)))
    }

    /// Lets QEMU live without a limit.
    ///
    /// # Errors
    /// As [`Self::arm`].
    pub fn disarm(&self) -> Result<(), HypervisorError> {
        self.change_lease("disarm", |_| Some(Lease::Disarmed))
    }

    /// The lease that stands.
    ///
    /// # Errors
    /// The deadline file cannot be read.
    pub fn lease(&self) -> Result<Lease, HypervisorError> {
        keeper::lease(self.id(), self.paths())
    }

    fn change_lease(
        &self,
        operation: &'static str,
        new: impl FnOnce(Option<Lease>) -> Option<Lease>,
    ) -> Result<(), HypervisorError> {
        let _one_at_a_time = self.inner.lease.lock().unwrap_or_else(PoisonError::into_inner);
        keeper::change(self.id(), self.paths(), operation, new)
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

/// The VMs whose QEMU runs, as the runtime folder and `/proc` say.
pub fn list_running(runtime_dir: &Path) -> Result<Vec<VmId>, HypervisorError> {
    let all = VmPaths::all(runtime_dir);
    let file_error = |source| HypervisorError::File { operation: "list", path: all.clone(), source };
    let entries = match std::fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file_error(error)),
    };
    let mut running = Vec::new();
    for entry in entries {
        let name = entry.map_err(file_error)?.file_name();
        let Some(vm) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) else { continue };
        if find(&VmPaths::new(runtime_dir, vm))?.is_some() {
            running.push(vm);
        }
    }
    running.sort();
    Ok(running)
}

/// Removes what a VM's QEMU left behind when it ended without a worker: tap devices and sockets. Does nothing while it
/// runs.
pub async fn clean_up(runtime_dir: &Path, vm: VmId) -> Result<(), HypervisorError> {
    let paths = VmPaths::new(runtime_dir, vm);
    if keeper::settle(vm, &paths).await?.is_none() {
        if let Some(expired) = keeper::expired(&paths) {
            tracing::warn!(vm_id = %vm, deadline = %expired.deadline, "QEMU's lease ran out while no worker watched");
        }
        remove_leftovers(&paths).await;
    }
    Ok(())
}

fn keeper_of(vm: VmId, qemu: &Process, paths: &VmPaths) -> Result<Process, HypervisorError> {
    let error = |source| HypervisorError::File { operation: "look for the keeper of", path: paths.pid(), source };
    qemu.keeper(paths).map_err(error)?.ok_or(HypervisorError::NotKept { vm, pid: qemu.pid() })
}

/// Ends a QEMU that did not come up, and its keeper with it; it may have ended by itself.
async fn end_child(vm: VmId, mut child: tokio::process::Child, paths: &VmPaths) {
    if let Err(error) = keeper::order_end(vm, paths) {
        tracing::warn!(vm_id = %vm, error = %error, "the keeper could not be told to end QEMU");
    } else if tokio::time::timeout(KILL_DEADLINE, child.wait()).await.is_ok() {
        return;
    }
    let _ = child.kill().await;
}

/// Removes everything of a deleted VM, its log too. Does nothing while it runs.
pub async fn remove(runtime_dir: &Path, vm: VmId) -> Result<(), HypervisorError> {
    clean_up(runtime_dir, vm).await?;
    let paths = VmPaths::new(runtime_dir, vm);
    if find(&paths)?.is_some() {
        return Ok(());
    }
    match tokio::fs::remove_dir_all(paths.dir()).await {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(HypervisorError::File { operation: "remove", path: paths.dir().to_owned(), source })
        }
        _ => Ok(()),
    }
}

pub(super) fn find(paths: &VmPaths) -> Result<Option<Process>, HypervisorError> {
    Process::find(paths).map_err(|source| HypervisorError::File { operation: "check", path: paths.pid(), source })
}

/// Removes taps and everything in the VM's folder but its log. Only for a QEMU that does not run.
pub(super) async fn remove_leftovers(paths: &VmPaths) {
    if let Ok(names) = tokio::fs::read_to_string(paths.taps()).await {
        let taps: Vec<String> = names.lines().filter(|name| !name.is_empty()).map(str::to_owned).collect();
        tap::remove(&taps).await;
    }
    let Ok(mut entries) = tokio::fs::read_dir(paths.dir()).await else { return };
    while let Ok(Some(entry)) = entries.next_entry().await {
        if entry.path() != paths.log()
            && let Err(error) = tokio::fs::remove_file(entry.path()).await
        {
            tracing::warn!(path = %entry.path().display(), error = %error, "file not removed");
        }
    }
}

/// Connects as soon as QEMU listens; ends when QEMU does.
async fn first_connection(
    vm: VmId,
    child: &mut tokio::process::Child,
    paths: &VmPaths,
) -> Result<super::qmp::Connected, HypervisorError> {
    let connect = async {
        loop {
            match Qmp::connect(&paths.qmp(), START_DEADLINE).await {
                // QEMU is not there yet; it gives no other sign of when it will be.
                Err(QmpError::Connect { .. }) => tokio::time::sleep(CONNECT_INTERVAL).await,
                connected => return connected,
            }
        }
    };
    let connected = tokio::select! {
        connected = tokio::time::timeout(START_DEADLINE, connect) => connected,
        status = child.wait() => return Err(start_failed(vm, status, paths)),
    };
    match connected {
        Ok(Ok(connected)) => Ok(connected),
        // A QEMU that gives up closes its socket first, and then ends.
        Ok(Err(error)) => match tokio::time::timeout(GIVE_UP_DEADLINE, child.wait()).await {
            Ok(status) => Err(start_failed(vm, status, paths)),
            Err(_) => Err(error.into()),
        },
        Err(_) => Err(HypervisorError::Deadline { vm, operation: "start", deadline: START_DEADLINE }),
    }
}

fn start_failed(vm: VmId, status: std::io::Result<std::process::ExitStatus>, paths: &VmPaths) -> HypervisorError {
    let status = status.map(|status| status.to_string()).unwrap_or_default();
    HypervisorError::StartFailed { vm, status, log_tail: process::log_tail(paths) }
}
