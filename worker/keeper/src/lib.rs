//! The parent of one QEMU: kills it when its lease runs out, whether or not a worker lives.
//!
//! ```text
//!   worker ──writes──▶ deadline file ◀──reads, at least 5 times a second── pageport-keeper (one thread)
//!     │                     ▲  └──────── "the lease ran out": its verdict ─────┘ │ SIGKILL at the deadline
//!     └──── setsid, starts ─│─────────────────────────────────────▶ keeper ──────┤
//!                           └── locked by the keeper while it lives              ▼
//!                              stage two: SIGKILL when the keeper dies, then exec ─▶ QEMU
//! ```
//! - [`boot_time`]: the one clock of leases.
//! - [`deadline_file`]: the two records in the file, one written by each side.
//! - [`keep`]: the loop. [`child`]: stage two, and dying as the child did. [`watchdog`]: signs of life for systemd.
//! - [`guard`]: the same program as the guard of a host, which does a keeper's work when that stands still; [`heartbeat`]: how it
//!   shows that it lives; `kept`: how it finds a keeper and its child.
//!
//! Guarantees: QEMU does not outlive its keeper, nor its deadline by more than the time that the kernel needs to kill it
//! (a deadline that was set less than [`keep::LOOK_INTERVAL`] ahead may be noticed that much late). The keeper ends as
//! QEMU did, with the same code or by the same signal. Whatever becomes of the file, the deadline that was read last
//! stands. It is not stopped by SIGTERM, SIGINT, SIGHUP or SIGQUIT: whoever stops a service does not mean its guests.
//!
//! Does not speak to QEMU, does not know whose lease it is, and cannot act while it is itself stopped (SIGSTOP, a
//! frozen cgroup): that takes the guard. A host that freezes as a whole freezes both.

pub mod boot_time;
pub mod child;
mod command_line;
pub mod deadline_file;
pub mod guard;
pub mod heartbeat;
pub mod keep;
mod kept;
mod record;
pub mod watchdog;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

pub use boot_time::BootTime;
pub use deadline_file::{DeadlineFile, DeadlineFileError, Expired, Lease};

use command_line::Order;

/// The exit code when the keeper itself failed, as `env` and `timeout` have it.
pub const FAILED: u8 = 125;

/// The program: `arguments` without its own name.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let failed = match command_line::parse(arguments) {
        Ok(Order::Keep { deadline_file, program, arguments }) => {
            match keep::run(&deadline_file, &program, &arguments) {
                Ok(status) => return child::end_like(status),
                Err(error) => complaint(&error),
            }
        }
        Ok(Order::Become { parent, oom_score_adj, program, arguments }) => {
            let error = child::become_program(parent, oom_score_adj.as_deref(), &program, &arguments);
            say(&complaint(&error));
            return ExitCode::from(error.exit_code());
        }
        Ok(Order::Guard { runtime_dir }) => {
            let Err(error) = guard::run(&runtime_dir);
            complaint(&error)
        }
        Ok(Order::Version) => {
            let written = writeln!(std::io::stdout(), "pageport-keeper {}", env!("CARGO_PKG_VERSION"));
            return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) };
        }
        Err(error) => complaint(&error),
    };
    say(&failed);
    ExitCode::from(FAILED)
}

/// One line to standard error, which is QEMU's log, or the journal for the guard. What cannot be said is not said: the keeper goes on.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "pageport-keeper: {line}");
}

fn complaint(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}
