//! The kept process: started so that it cannot outlive its keeper, and copied in death.
//!
//! The parent-death signal must be set by the child itself, between fork and exec, which in Rust takes `unsafe`. So the
//! keeper runs itself a second time: that *second stage* asks for SIGKILL at its parent's death, checks that its parent
//! is still the keeper (it may have died before the request), and becomes the program. The request survives that, as
//! long as the program is not set-user-id. It fires when the parent's *thread* ends: the keeper has only one.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, ExitStatus};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::{Pid, getpid, getppid};

use crate::FAILED;
use crate::watchdog;

/// This program, even if its file was replaced since.
const SELF: &str = "/proc/self/exe";
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";
/// Never the out-of-memory killer's choice: it would gain nothing and cost a guest.
const NEVER: &str = "-1000";

/// Why the second stage did not become the program.
#[derive(Debug, thiserror::Error)]
pub enum BecomeError {
    /// It could not ask to be killed with its parent.
    #[error("ask for the parent-death signal")]
    DeathSignal {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The keeper died first.
    #[error("the keeper {keeper} has ended")]
    Orphaned {
        /// Its process.
        keeper: i32,
    },
    /// It would have been deaf to the signals that the keeper blocks.
    #[error("unblock signals")]
    SignalMask {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It would have run with the keeper's protection.
    #[error("set oom_score_adj back to {score}")]
    OomScore {
        /// What it was.
        score: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program could not be started.
    #[error("start {}", program.display())]
    Exec {
        /// Which.
        program: OsString,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BecomeError {
    /// As shells have it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Exec { .. } => 126,
            _ => FAILED,
        }
    }
}

/// Starts the second stage.
pub(crate) fn start(program: &OsStr, arguments: &[OsString]) -> io::Result<Child> {
    let mut command = Command::new(SELF);
    command.arg0("pageport-keeper").arg("--become").arg(getpid().to_string());
    if let Some(score) = shield_from_oom_killer() {
        command.arg("--oom-score-adj").arg(score);
    }
    watchdog::VARIABLES.iter().fold(&mut command, |command, name| command.env_remove(name));
    command.arg("--").arg(program).args(arguments).spawn()
}

/// What the score was, if it could be changed.
fn shield_from_oom_killer() -> Option<String> {
    let before = std::fs::read_to_string(OOM_SCORE_ADJ).ok()?;
    std::fs::write(OOM_SCORE_ADJ, NEVER).ok()?;
    Some(before.trim().to_owned())
}

/// The second stage; returns only if it failed.
pub fn become_program(
    keeper: i32,
    oom_score_adj: Option<&str>,
    program: &OsStr,
    arguments: &[OsString],
) -> BecomeError {
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
        return BecomeError::DeathSignal { source: error.into() };
    }
    if getppid() != Pid::from_raw(keeper) {
        return BecomeError::Orphaned { keeper };
    }
    // The keeper blocks the signals that stop services, and a child inherits that.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        return BecomeError::SignalMask { source: error.into() };
    }
    if let Some(score) = oom_score_adj
        && let Err(source) = std::fs::write(OOM_SCORE_ADJ, score)
    {
        return BecomeError::OomScore { score: score.to_owned(), source };
    }
    let source = Command::new(program).args(arguments).exec();
    BecomeError::Exec { program: program.to_owned(), source }
}

/// Ends this process as the child ended: with its code, or by its signal, but without a core dump of its own.
pub(crate) fn end_like(status: ExitStatus) -> ExitCode {
    if let Some(number) = status.signal() {
        if let Ok(signal) = Signal::try_from(number) {
            // A core of the keeper would only be mistaken for the guest's.
            let _ = prctl::set_dumpable(false);
            let mut only = SigSet::empty();
            only.add(signal);
            let _ = only.thread_unblock();
            // Twice: the runtime takes the first SIGSEGV or SIGBUS for a stack overflow, and then steps aside.
            let _ = raise(signal);
            let _ = raise(signal);
        }
        // Still here: a signal that has no name or is ignored.
        return ExitCode::from(u8::try_from(number).map_or(FAILED, |number| number.saturating_add(128)));
    }
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED))
}
