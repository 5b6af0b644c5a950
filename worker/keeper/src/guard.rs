//! The guard of a host: ends what a keeper should have ended and did not.
//!
//! ```text
//!   worker ──writes──▶ <runtime_dir>/vm/<vm>/deadline ◀──reads── keeper ──SIGKILL at the deadline──▶ QEMU
//!                                     ▲                                                               ▲
//!                                     └── reads, 5 times a second ── guard ──SIGKILL, GRACE later ────┘
//!                                                                     └──▶ <runtime_dir>/guard: it lives
//! ```
//! A keeper that is stopped (SIGSTOP, a debugger, a frozen cgroup) kills nothing. The guard is one process per host that
//! reads the same deadline files. It is itself watched by systemd's watchdog (`deploy/systemd/pageport-guard.service`): a guard that
//! is stopped is killed and started again, so that *one* process that stands still never keeps a guest alive.
//!
//! Guarantees: QEMU does not outlive its deadline by more than [`GRACE`] + [`LOOK_INTERVAL`] and the time that the kernel needs to
//! kill it. It looks again right before it kills. A deadline that cannot be read stands as it was read last. Nothing is
//! signalled but a keeper of that very file and its children (`kept.rs`). It says that it lives only after it has looked at
//! every VM.
//!
//! Does not know whose lease it is, needs no worker and no controller. A VM whose deadline file this guard has never read has no
//! deadline for it. A host that freezes as a whole freezes its guard.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::boot_time::BootTime;
use crate::deadline_file::{DeadlineFile, DeadlineFileError, Expired, Lease};
use crate::heartbeat::{Heartbeat, HeartbeatError};
use crate::kept::Process;
use crate::watchdog::Watchdog;
use crate::{complaint, say};

/// Between two looks at all deadlines.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How long the keeper may take before the guard does its work.
pub const GRACE: Duration = Duration::from_millis(300);
/// A keeper that is well has followed its QEMU by then. One that is stopped holds the VM's place and is ended.
const KEEPER_GRACE: Duration = Duration::from_secs(2);

/// Why nothing is guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// Nobody would know that the guard lives.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
}

/// Why a look was not complete.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("list {}", path.display())]
    List {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("end what {} should have ended", path.display())]
    End {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Guards the VMs of a runtime folder for ever.
///
/// # Errors
/// The guard cannot show that it lives: then it must not go on.
pub fn run(runtime_dir: &Path) -> Result<std::convert::Infallible, GuardError> {
    let heartbeat = Heartbeat::claim(runtime_dir)?;
    // Without this the guard may wait for a slow swap device at a deadline; where it is not allowed, so be it.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT);
    let watchdog = Watchdog::from_environment();
    let mut guard = Guard { vms: runtime_dir.join("vm"), known: BTreeMap::new() };
    let (mut announced, mut said) = (false, String::new());
    loop {
        match guard.look() {
            Ok(()) => {
                said.clear();
                let now = BootTime::now();
                heartbeat.beat(now)?;
                if !std::mem::replace(&mut announced, true) {
                    watchdog.ready();
                }
                watchdog.alive(now);
            }
            // No sign of life: the worker reports it, and systemd's watchdog starts the guard anew.
            Err(error) => {
                let line = complaint(&error);
                if line != said {
                    say(&line);
                    said = line;
                }
            }
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

struct Guard {
    vms: PathBuf,
    /// By deadline file.
    known: BTreeMap<PathBuf, Known>,
}

/// What is remembered of a deadline file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    lease: Lease,
    /// Nobody is kept under this lease, and nobody will be: a keeper starts nothing under a lease that is over.
    done: bool,
}

impl Guard {
    fn look(&mut self) -> Result<(), LookError> {
        let mut present = BTreeMap::new();
        let mut failed = None;
        for path in self.deadline_files()? {
            let Some(mut known) = self.read(&path) else { continue };
            if let Some(deadline) = overdue(BootTime::now(), known.lease)
                && !known.done
            {
                match self.end(&path, deadline) {
                    Ok(left) => known.done = left == Left::Nothing,
                    Err(source) => failed = Some(LookError::End { path: path.clone(), source }),
                }
            }
            present.insert(path, known);
        }
        self.known = present;
        failed.map_or(Ok(()), Err)
    }

    /// One for each VM's folder, whether it is there or not.
    fn deadline_files(&self) -> Result<Vec<PathBuf>, LookError> {
        let failed = |source| LookError::List { path: self.vms.clone(), source };
        match std::fs::read_dir(&self.vms) {
            Ok(entries) => entries.map(|entry| Ok(entry.map_err(failed)?.path().join("deadline"))).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            Err(error) => Err(failed(error)),
        }
    }

    /// The lease, as it is or as it was read last.
    fn read(&self, path: &Path) -> Option<Known> {
        let before = self.known.get(path).copied();
        match DeadlineFile::open(path).and_then(|file| file.lease()) {
            Ok(lease) => before.filter(|before| before.lease == lease).or(Some(Known { lease, done: false })),
            Err(_) => before,
        }
    }

    fn end(&self, path: &Path, deadline: BootTime) -> io::Result<Left> {
        let keepers = Process::keepers_of(path)?;
        if keepers.is_empty() {
            return Ok(Left::Nothing);
        }
        let mut children = vec![];
        for keeper in &keepers {
            children.extend(keeper.children(path)?);
        }
        // Right before the kill: an extension that is there counts.
        let extended = |known: Known| overdue(BootTime::now(), known.lease).is_none();
        if self.read(path).is_some_and(extended) {
            return Ok(Left::Something);
        }
        let now = BootTime::now();
        let mut killed = Ok(());
        for child in &children {
            killed = killed.and(child.kill());
        }
        let late = now.saturating_since(deadline);
        if !children.is_empty() && killed.is_ok() {
            leave_word(path, Expired { deadline, killed_at: now });
            let pids = children.iter().map(|child| child.pid().to_string()).collect::<Vec<_>>().join(", ");
            say(&format!(
                "{}: the lease ran out {deadline} and the keeper did nothing; process {pids} was killed {} ms later",
                path.display(),
                late.as_millis()
            ));
        }
        if late > KEEPER_GRACE {
            for keeper in &keepers {
                say(&format!("{}: the keeper {} does not end; it is killed", path.display(), keeper.pid()));
                killed = killed.and(keeper.kill());
            }
        }
        killed.map(|()| Left::Something)
    }
}

/// Whether anybody is kept under a lease that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Something,
    Nothing,
}

/// As the keeper would have: the file is gone only with its VM.
fn leave_word(path: &Path, expired: Expired) {
    let said = DeadlineFile::open(path).and_then(|file| match file.expired()? {
        Some(word) if word.deadline == expired.deadline => Ok(()),
        _ => file.set_expired(expired),
    });
    match said {
        Err(DeadlineFileError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => say(&format!("{}: {}", path.display(), complaint(&error))),
        Ok(()) => {}
    }
}

/// The deadline, if the keeper has had its time.
fn overdue(now: BootTime, lease: Lease) -> Option<BootTime> {
    match lease {
        Lease::Until(deadline) if deadline + GRACE <= now => Some(deadline),
        Lease::Until(_) | Lease::Disarmed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> (tempfile::TempDir, Guard, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let vms = folder.path().join("vm");
        std::fs::create_dir_all(vms.join("one")).unwrap();
        let path = vms.join("one/deadline");
        (folder, Guard { vms, known: BTreeMap::new() }, path)
    }

    #[test]
    fn the_keeper_has_its_time_and_nobody_without_a_deadline_is_ever_late() {
        let at = BootTime::from_nanos;
        let grace = GRACE.as_nanos() as u64;
        assert_eq!(overdue(at(7 + grace), Lease::Until(at(7))), Some(at(7)));
        assert_eq!(overdue(at(6 + grace), Lease::Until(at(7))), None);
        assert_eq!(overdue(at(u64::MAX), Lease::Disarmed), None);
    }

    #[test]
    fn a_lease_that_cannot_be_read_stands_as_it_was_read_last_and_one_that_never_was_is_none() {
        let (_folder, mut guard, path) = guard();
        std::fs::write(&path, [0xa5; 64]).unwrap();
        guard.look().unwrap();
        assert!(guard.known.is_empty());
        let lease = Lease::Until(BootTime::now() + Duration::from_secs(600));
        DeadlineFile::create(&path, lease).unwrap();
        guard.look().unwrap();
        for spoilt in [&b""[..], b"PPLEASE1", &[0xff; 32]] {
            std::fs::write(&path, spoilt).unwrap();
            guard.look().unwrap();
            assert_eq!(guard.known[&path], Known { lease, done: false });
        }
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
        guard.look().unwrap();
        assert!(guard.known.is_empty());
    }

    #[test]
    fn a_lease_that_is_over_and_keeps_nobody_is_looked_for_once_and_a_new_one_counts_again() {
        let (_folder, mut guard, path) = guard();
        let over = Lease::Until(BootTime::ZERO);
        let file = DeadlineFile::create(&path, over).unwrap();
        guard.look().unwrap();
        assert_eq!(guard.known[&path], Known { lease: over, done: true });
        assert_eq!(file.expired().unwrap(), None, "nobody was killed");
        file.set_lease(Lease::Disarmed).unwrap();
        guard.look().unwrap();
        assert_eq!(guard.known[&path], Known { lease: Lease::Disarmed, done: false });
    }
}
