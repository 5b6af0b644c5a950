//! The keeper's loop.
//!
//! ```text
//!   lock, read the lease, start the child
//!     └▶ has it ended? ─yes─▶ say why if it was us ─▶ end as it did
//!          │ no
//!          ▼
//!        read the lease (one that cannot be read: as last read) ─ passed? ─▶ SIGKILL
//!          ▼
//!        sleep until the deadline, the next look, or the child's end ─▶ again
//! ```
//! Guarantees: the kill is the first thing that happens at a deadline; words about it come after. It looks again right
//! before it kills, so that an extension which is there counts, however late it came. Nothing is started under a
//! lease that cannot be read or has run out.
//!
//! Sleeps on a timer of `CLOCK_BOOTTIME`: after a suspend it wakes at once if the deadline passed meanwhile.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::boot_time::BootTime;
use crate::deadline_file::{DeadlineFile, DeadlineFileError, Expired, Lease};
use crate::watchdog::Watchdog;
use crate::{child, say};

/// Longest time between two looks at the lease.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A worker that asks whether a keeper lives holds the lock for an instant; another keeper holds it for good.
const LOCK_DEADLINE: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
/// Signals that mean the keeper's service or terminal, not its guest.
const NOT_FOR_US: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// Why nothing was kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The lease is not to be had.
    #[error("{}", path.display())]
    Lease {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: DeadlineFileError,
    },
    /// Another keeper has it.
    #[error("{} is kept by another keeper", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
    },
    /// It had run out.
    #[error("the lease ran out before the start: {deadline}, it is {now}")]
    TooLate {
        /// The deadline.
        deadline: BootTime,
        /// The time.
        now: BootTime,
    },
    /// The system refused something that the keeper cannot do without.
    #[error("{operation}")]
    System {
        /// What.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> KeepError {
    move |source| KeepError::System { operation, source: source.into() }
}

/// What a moment asks for.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Sleep { until: BootTime },
    Kill { deadline: BootTime },
}

fn step(now: BootTime, lease: Lease) -> Step {
    let next_look = now + LOOK_INTERVAL;
    match lease {
        Lease::Until(deadline) if deadline <= now => Step::Kill { deadline },
        Lease::Until(deadline) => Step::Sleep { until: deadline.min(next_look) },
        Lease::Disarmed => Step::Sleep { until: next_look },
    }
}

/// Starts `program` and keeps it until it has ended: how it ended.
///
/// # Errors
/// Nothing was started, or the system failed the keeper: then the child ends with this process.
pub fn run(deadline_file: &Path, program: &OsStr, arguments: &[OsString]) -> Result<ExitStatus, KeepError> {
    let of_file = |source| KeepError::Lease { path: deadline_file.to_owned(), source };
    // Blocked, not ignored: the second stage can undo that.
    let mut blocked: SigSet = NOT_FOR_US.into_iter().collect();
    blocked.add(Signal::SIGCHLD);
    blocked.thread_block().map_err(system("block signals"))?;
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&child_ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
    let signals = signals.map_err(system("watch for the child's end"))?;
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK);
    let timer = timer.map_err(system("make a timer"))?;

    let file = DeadlineFile::open(deadline_file).map_err(of_file)?;
    lock(&file, deadline_file)?;
    let lease = file.lease().map_err(of_file)?;
    let now = BootTime::now();
    if let Step::Kill { deadline } = step(now, lease) {
        return Err(KeepError::TooLate { deadline, now });
    }
    // Without this the keeper may wait for a slow swap device at the deadline; where it is not allowed, so be it.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT);
    let child = child::start(program, arguments).map_err(system("start the second stage"))?;
    let watchdog = Watchdog::from_environment();
    watchdog.ready();
    Keeper { file, lease, unreadable: false, child, signals, timer, watchdog, killed: None }.keep()
}

fn lock(file: &DeadlineFile, path: &Path) -> Result<(), KeepError> {
    let give_up = BootTime::now() + LOCK_DEADLINE;
    loop {
        match file.try_lock() {
            Ok(true) => return Ok(()),
            Ok(false) if BootTime::now() >= give_up => return Err(KeepError::Taken { path: path.to_owned() }),
            Ok(false) => std::thread::sleep(LOCK_INTERVAL),
            Err(source) => return Err(KeepError::Lease { path: path.to_owned(), source }),
        }
    }
}

struct Keeper {
    file: DeadlineFile,
    lease: Lease,
    unreadable: bool,
    child: Child,
    signals: SignalFd,
    timer: TimerFd,
    watchdog: Watchdog,
    killed: Option<Expired>,
}

impl Keeper {
    fn keep(mut self) -> Result<ExitStatus, KeepError> {
        loop {
            if let Some(status) = self.child.try_wait().map_err(system("wait for the child"))? {
                self.explain(status);
                return Ok(status);
            }
            let now = BootTime::now();
            self.look();
            let until = match step(now, self.lease) {
                Step::Sleep { until } if self.killed.is_none() => until,
                // What was killed stays killed, whatever the lease says since.
                Step::Sleep { .. } => now + LOOK_INTERVAL,
                Step::Kill { deadline } => {
                    // It fails only for a child that has ended, which the next round sees.
                    let _ = self.child.kill();
                    self.killed.get_or_insert(Expired { deadline, killed_at: now });
                    now + LOOK_INTERVAL
                }
            };
            self.watchdog.alive(now);
            self.sleep(until)?;
        }
    }

    fn look(&mut self) {
        match self.file.lease() {
            Ok(lease) => {
                self.lease = lease;
                self.unreadable = false;
            }
            Err(error) => {
                if !self.unreadable {
                    say(&format!("{}; the lease stands as last read: {:?}", crate::complaint(&error), self.lease));
                }
                self.unreadable = true;
            }
        }
    }

    fn explain(&self, status: ExitStatus) {
        let Some(expired) = self.killed.filter(|_| status.signal() == Some(Signal::SIGKILL as i32)) else { return };
        if let Err(error) = self.file.set_expired(expired) {
            say(&crate::complaint(&error));
        }
        let late = expired.killed_at.saturating_since(expired.deadline);
        say(&format!("the lease ran out {}; killed {} ms later", expired.deadline, late.as_millis()));
    }

    fn sleep(&self, until: BootTime) -> Result<(), KeepError> {
        // A timer of zero would never ring.
        let until = TimeSpec::from_duration(Duration::from_nanos(until.as_nanos().max(1)));
        let alarm = Expiration::OneShot(until);
        self.timer.set(alarm, TimerSetTimeFlags::TFD_TIMER_ABSTIME).map_err(system("set the timer"))?;
        let mut waited_for =
            [PollFd::new(self.timer.as_fd(), PollFlags::POLLIN), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited_for, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(system("wait for the deadline")(error)),
        }
        // Setting the timer forgets that it rang; the signal has to be taken.
        while let Ok(Some(_)) = self.signals.read_signal() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_met_to_the_nanosecond_and_looks_are_never_further_apart_than_they_may() {
        let at = BootTime::from_nanos;
        let interval = LOOK_INTERVAL.as_nanos() as u64;
        let now = at(1_000_000_000);
        assert_eq!(step(now, Lease::Disarmed), Step::Sleep { until: now + LOOK_INTERVAL });
        let table = [
            (0, Step::Kill { deadline: at(0) }),
            (999_999_999, Step::Kill { deadline: at(999_999_999) }),
            (1_000_000_000, Step::Kill { deadline: now }),
            (1_000_000_001, Step::Sleep { until: at(1_000_000_001) }),
            (1_000_000_000 + interval, Step::Sleep { until: now + LOOK_INTERVAL }),
            (1_000_000_001 + interval, Step::Sleep { until: now + LOOK_INTERVAL }),
            (u64::MAX, Step::Sleep { until: now + LOOK_INTERVAL }),
        ];
        for (deadline, expected) in table {
            assert_eq!(step(now, Lease::Until(at(deadline))), expected, "{deadline}");
        }
    }
}
