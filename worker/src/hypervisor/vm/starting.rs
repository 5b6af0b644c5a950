//! A QEMU of one's own: started, or found again.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageport_proto::VmId;
use tokio::process::Child;
use tokio::sync::{broadcast, watch};

use super::leftovers::{find, remove_leftovers};
use super::{ADOPT_DEADLINE, Host, Inner, KILL_DEADLINE, Marks, START_DEADLINE, Vm};
use crate::hypervisor::command_line::{Launch, arguments, check_spec};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::memory::GuestMemory;
use crate::hypervisor::paths::VmPaths;
use crate::hypervisor::process::{self, Process};
use crate::hypervisor::qmp::{Connected, Qmp, QmpError};
use crate::hypervisor::watcher::Watcher;
use crate::hypervisor::{guest_agent, keeper, tap};

/// Time for a QEMU that has closed its control socket while starting to end.
const GIVE_UP_DEADLINE: Duration = Duration::from_secs(2);
/// Time for a QEMU whose keeper was killed to follow it.
const ORPHAN_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks for the control socket of a QEMU that is starting.
const CONNECT_INTERVAL: Duration = Duration::from_millis(10);
/// Events that a slow subscriber may lag behind before it loses the oldest.
const EVENT_BACKLOG: usize = 256;

impl Vm {
    /// Starts QEMU. If it fails nothing is left running and no device is left behind; the log stays.
    pub async fn start(host: &Host, launch: &Launch) -> Result<Self, HypervisorError> {
        let (vm, paths) = (launch.vm, VmPaths::new(&host.runtime_dir, launch.vm));
        if let Some(running) = keeper::settle(vm, &paths).await? {
            return Err(HypervisorError::AlreadyRunning { vm, pid: running.pid() });
        }
        check_spec(&launch.spec)?;
        remove_leftovers(&paths).await;
        let dir = paths.dir().to_owned();
        tokio::fs::create_dir_all(&dir).await.map_err(file_error("create", dir))?;
        let taps = tap::create(vm, &launch.spec.nics).await.map_err(|source| HypervisorError::Tap { vm, source })?;
        match bring_up(host, launch, &paths, &taps).await {
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
        guest_agent::thaw_what_is_left(&adopted);
        Ok(adopted)
    }

    fn watched(id: VmId, paths: VmPaths, (process, keeper, (qmp, notices)): Running, child: Option<Child>) -> Self {
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
}

/// QEMU, its keeper, and the connection to it.
type Running = (Process, Process, Connected);

/// Has the keeper start QEMU, and connects to it. What does not come up is ended.
async fn bring_up(
    host: &Host,
    launch: &Launch,
    paths: &VmPaths,
    taps: &[String],
) -> Result<(Running, Child, GuestMemory), HypervisorError> {
    let vm = launch.vm;
    let memory = host.huge_pages.choose(vm, launch.spec.memory_bytes)?;
    let argv = arguments(launch, paths, host.accelerator, memory, taps)?;
    tokio::fs::write(paths.taps(), taps.join("\n")).await.map_err(file_error("write", paths.taps()))?;
    keeper::prepare(vm, paths, launch.deadline)?;
    let mut child =
        process::spawn(&host.keeper, &host.qemu, &argv, paths).map_err(file_error("start", host.keeper.clone()))?;
    match connect(vm, &mut child, paths).await {
        Ok(running) => Ok((running, child, memory)),
        Err(error) => {
            end_child(vm, child, paths).await;
            Err(error)
        }
    }
}

async fn connect(vm: VmId, child: &mut Child, paths: &VmPaths) -> Result<Running, HypervisorError> {
    let connection = first_connection(vm, child, paths).await?;
    // It has written its pid file before it listens.
    let process = find(paths)?.ok_or(HypervisorError::NotRunning { vm })?;
    let keeper = keeper_of(vm, &process, paths)?;
    Ok((process, keeper, connection))
}

fn file_error(operation: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> HypervisorError {
    move |source| HypervisorError::File { operation, path, source }
}

fn keeper_of(vm: VmId, qemu: &Process, paths: &VmPaths) -> Result<Process, HypervisorError> {
    let error = |source| HypervisorError::File { operation: "look for the keeper of", path: paths.pid(), source };
    qemu.keeper(paths).map_err(error)?.ok_or(HypervisorError::NotKept { vm, pid: qemu.pid() })
}

/// Ends a QEMU that did not come up, and its keeper with it; it may have ended by itself.
async fn end_child(vm: VmId, mut child: Child, paths: &VmPaths) {
    if let Err(error) = keeper::order_end(vm, paths) {
        tracing::warn!(vm_id = %vm, error = %error, "the keeper could not be told to end QEMU");
    } else if tokio::time::timeout(KILL_DEADLINE, child.wait()).await.is_ok() {
        return;
    }
    let _ = child.kill().await;
}

/// Connects as soon as QEMU listens; ends when QEMU does.
async fn first_connection(vm: VmId, child: &mut Child, paths: &VmPaths) -> Result<Connected, HypervisorError> {
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
