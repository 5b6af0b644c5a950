//! QEMU's process: started in a session of its own, found again, watched, killed.
//!
//! A process is held by a pidfd, so a signal never reaches another process that was given the same number. The order is
//! always: open the pidfd, *then* check in `/proc` that this is the VM's QEMU. What was checked is what is signalled.
//!
//! QEMU is the child of its keeper, which is started through `setsid`; both keep running when the worker ends. The keeper
//! ends as QEMU does, so its exit status is QEMU's. QEMU is not started with `-daemonize`: that forks, which the
//! sandbox (`spawn=deny`) forbids, and hides the exit status.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use super::command_line::qmp_argument;
use super::paths::VmPaths;

/// How much of QEMU's log an exit report carries.
pub const LOG_TAIL_BYTES: u64 = 2048;
/// Longest command line, and the like, that is looked at when a process is checked.
const MAX_PROC_BYTES: u64 = 1024 * 1024;
/// The keeper's option that also tells a VM's keeper from other processes.
const DEADLINE_OPTION: &str = "--deadline-file";
/// Longest pid file.
const MAX_PID_FILE_BYTES: u64 = 32;

/// A process that was checked to be a VM's QEMU, or its keeper.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// The VM's QEMU as its pid file and `/proc` say; `None` when it does not run.
    pub fn find(paths: &VmPaths) -> io::Result<Option<Self>> {
        let text = match read_limited(&paths.pid(), MAX_PID_FILE_BYTES) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // QEMU creates the file before it writes the number.
        let Ok(pid) = String::from_utf8_lossy(&text).trim().parse::<u32>() else { return Ok(None) };
        let Some(process) = Self::open(pid)? else { return Ok(None) };
        Ok(process.is_qemu_of(paths)?.then_some(process))
    }

    fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => Ok(Some(Self { pid, pidfd: watched(pidfd)? })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The keeper of this QEMU: its parent, if that is one. `None` also when QEMU has ended meanwhile.
    pub fn keeper(&self, paths: &VmPaths) -> io::Result<Option<Self>> {
        let Some(parent) = self.parent()? else { return Ok(None) };
        let Some(keeper) = Self::open(parent)? else { return Ok(None) };
        // Asked again: only a parent of now is sure to have been the same process all along.
        let is_keeper = keeper.is_keeper_of(paths)? && self.parent()? == Some(parent);
        Ok(is_keeper.then_some(keeper))
    }

    // The command line of a zombie is empty, so one that has ended is not taken for a running VM. The keeper has QEMU's
    // arguments too, after its own.
    fn is_qemu_of(&self, paths: &VmPaths) -> io::Result<bool> {
        let marker = qmp_argument(paths);
        let is_qemu = self.arguments()?.iter().any(|argument| argument == marker.as_bytes());
        Ok(is_qemu && !self.is_keeper_of(paths)?)
    }

    fn is_keeper_of(&self, paths: &VmPaths) -> io::Result<bool> {
        let arguments = self.arguments()?;
        let file = paths.deadline();
        let is_ours =
            |pair: &[Vec<u8>]| pair[0] == DEADLINE_OPTION.as_bytes() && pair[1] == file.as_os_str().as_bytes();
        let own = arguments.split(|argument| argument == b"--").next().unwrap_or_default();
        Ok(own.windows(2).any(is_ours))
    }

    fn arguments(&self) -> io::Result<Vec<Vec<u8>>> {
        Ok(self.read_proc("cmdline")?.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
    }

    fn parent(&self) -> io::Result<Option<u32>> {
        // After the name, which may hold anything: state, parent.
        let stat = String::from_utf8_lossy(&self.read_proc("stat")?).into_owned();
        Ok(stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok()))
    }

    // Empty when the process is gone.
    fn read_proc(&self, name: &str) -> io::Result<Vec<u8>> {
        match read_limited(Path::new(&format!("/proc/{}/{name}", self.pid)), MAX_PROC_BYTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(Vec::new()),
            read => read,
        }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Pulls the plug. A process that has ended is no error.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended.
    pub async fn gone(&self) -> io::Result<()> {
        // A pidfd becomes readable when its process ends, and stays so.
        self.pidfd.readable().await.map(|_| ())
    }
}

// The deprecation is about descriptors that may be closed while registered; an owned one is not. The replacement is
// `unsafe`, which this workspace forbids.
#[allow(deprecated, reason = "an OwnedFd stays open as long as it is registered")]
fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(pidfd)
}

/// Ends every process that was told to write to `file`: a tool that outlived its worker. Waits for their ends. The caller writes to it by no process.
///
/// # Errors
/// Processes cannot be looked at.
pub async fn end_writers_of(file: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(process) = Process::open(pid)? else { continue };
        // The program itself is no file to write to.
        if process.arguments()?.iter().skip(1).any(|argument| argument == file.as_os_str().as_bytes()) {
            tracing::warn!(pid, file = %file.display(), "a tool that an earlier worker left is ended");
            process.kill()?;
            process.gone().await?;
        }
    }
    Ok(())
}

/// Starts QEMU below a keeper; the output of both goes to the VM's log. The child is the keeper (`setsid` becomes it).
pub fn spawn(keeper: &Path, qemu: &str, arguments: &[String], paths: &VmPaths) -> io::Result<Child> {
    let log = std::fs::File::create(paths.log())?;
    let mut command = Command::new("setsid");
    command.arg("--").arg(keeper).arg(DEADLINE_OPTION).arg(paths.deadline()).arg("--").arg(qemu).args(arguments);
    // The worker's own line to systemd is not for its children.
    for name in pageport_keeper::watchdog::VARIABLES {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

/// The end of the VM's log.
pub fn log_tail(paths: &VmPaths) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(paths.log())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    read().map(|tail| String::from_utf8_lossy(&tail).trim().to_owned()).unwrap_or_default()
}

fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(limit).read_to_end(&mut content)?;
    Ok(content)
}
