//! QEMU's process: started in a session of its own, found again, watched, killed.
//!
//! A process is held by a pidfd, so a signal never reaches another process that was given the same number. The order is
//! always: open the pidfd, *then* check in `/proc` that this is the VM's QEMU. What was checked is what is signalled.
//!
//! QEMU is started through `setsid`, keeps running when the worker ends, and is not started with `-daemonize`: that
//! forks, which the sandbox (`spawn=deny`) forbids, and hides the exit status.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use super::command_line::qmp_argument;
use super::paths::VmPaths;

/// How much of QEMU's log an exit report carries.
pub const LOG_TAIL_BYTES: u64 = 2048;
/// Longest command line that is looked at when a process is checked.
const MAX_CMDLINE_BYTES: u64 = 1024 * 1024;
/// Longest pid file.
const MAX_PID_FILE_BYTES: u64 = 32;

/// A process that was checked to be a VM's QEMU.
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

    // The command line of a zombie is empty, so one that has ended is not taken for a running VM.
    fn is_qemu_of(&self, paths: &VmPaths) -> io::Result<bool> {
        let marker = qmp_argument(paths);
        match read_limited(Path::new(&format!("/proc/{}/cmdline", self.pid)), MAX_CMDLINE_BYTES) {
            Ok(cmdline) => Ok(cmdline.split(|byte| *byte == 0).any(|argument| argument == marker.as_bytes())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
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

/// Starts QEMU; its output goes to the VM's log. The child is QEMU itself (`setsid` becomes it).
pub fn spawn(qemu: &str, arguments: &[String], paths: &VmPaths) -> io::Result<(Child, Process)> {
    let log = std::fs::File::create(paths.log())?;
    let child = Command::new("setsid")
        .arg("--")
        .arg(qemu)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    // Our own child that nobody has waited for: its number cannot have passed to another process.
    let process = child.id().map(Process::open).transpose()?.flatten();
    let process = process.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok((child, process))
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
