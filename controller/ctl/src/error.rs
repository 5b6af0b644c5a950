//! What can go wrong in a command, each with the fix where there is one.
//!
//! The messages of the modules below are passed through; what a controller said is shown as it said it.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use pageport_common::error::with_causes;

use crate::client::ClientError;
use crate::config::ConfigError;
use crate::console::ConsoleError;
use crate::host::HostError;
use crate::vmfile::VmFileError;

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// The asynchronous runtime did not start.
    #[error("start the runtime")]
    Runtime {
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Settings are missing or wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No controller took the command, or one refused it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The VM's description is wrong.
    #[error(transparent)]
    VmFile(#[from] VmFileError),
    /// The console failed.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A worker did not do what only it can do.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Nobody was asked, since it is not clear whom.
    #[error("{problem}: {fix}")]
    Site {
        /// What is not clear.
        problem: String,
        /// What would be.
        fix: &'static str,
    },
    /// The file of a backup.
    #[error("write the backup {}", path.display())]
    Backup {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is there.
    #[error("{} is there already: name another file, or give --replace", path.display())]
    BackupThere {
        /// Which.
        path: PathBuf,
    },
    /// What came is not what was sent.
    #[error("the backup did not arrive as it was sent; nothing was written, try again")]
    BackupDamaged(#[source] pageport_common::backup::BackupError),
    /// The file of a backup cannot be read.
    #[error("read the backup {}", path.display())]
    NoBackup {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of a backup is none.
    #[error("{}", path.display())]
    BackupUnusable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: pageport_common::backup::BackupError,
    },
    /// There is no program that could restore.
    #[error("run {}: a restore is made on the host of the new cluster's first controller, where it is installed", program.display())]
    NoController {
        /// What was looked for.
        program: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The controller's program did not restore.
    #[error("nothing was restored: {said}")]
    NotRestored {
        /// Its words.
        said: String,
    },
    /// A controller left out what its answer must hold.
    #[error("the controller's answer to {operation} lacks its {field}: is it of another version?")]
    Incomplete {
        /// What was asked.
        operation: &'static str,
        /// What is absent.
        field: &'static str,
    },
    /// A migration that was watched did not complete.
    #[error("migration {id} of {vm} {outcome}{}", because(reason))]
    Migration {
        /// The migration.
        id: String,
        /// The VM's name.
        vm: String,
        /// `failed` or `was cancelled`.
        outcome: &'static str,
        /// The controller's reason.
        reason: String,
    },
    /// A preflight found what keeps the move from being made.
    #[error(
        "{vm} cannot move to {to_site}: {blocking} of the findings block it; \"pageportctl migration preflight {vm} --to {to_site}\" looks again"
    )]
    Preflight {
        /// The VM's name, as it was given.
        vm: String,
        /// Where to.
        to_site: String,
        /// How many.
        blocking: usize,
    },
    /// A seed that was watched did not complete.
    #[error("the replica of {vm} at {site} failed{}", because(reason))]
    Seed {
        /// The VM.
        vm: String,
        /// The replica's site.
        site: String,
        /// The controller's reason.
        reason: String,
    },
    /// A protection that was watched did not reach a recovery point.
    #[error("{vm} is not protected at {site}{}", because(reason))]
    Protection {
        /// The VM.
        vm: String,
        /// The replica's site.
        site: String,
        /// The controller's reason.
        reason: String,
    },
    /// A fence changed nothing.
    #[error("worker {worker} was not fenced, and nothing was taken over{}", because(reason))]
    Fence {
        /// The worker.
        worker: String,
        /// The controller's reason, with the agent's words.
        reason: String,
    },
    /// A fence agent is not fit for use.
    #[error("the fence agent for worker {worker} cannot do its work{}", because(reason))]
    FenceCheck {
        /// The worker.
        worker: String,
        /// The controller's reason, with the agent's words.
        reason: String,
    },
    /// What was watched is gone.
    #[error("{subject} is no longer there")]
    Gone {
        /// What.
        subject: String,
    },
    /// A dangerous command was not confirmed.
    #[error("not confirmed: give the name once more with --confirm NAME, or run this at a terminal")]
    Unconfirmed,
    /// The terminal could not be read.
    #[error("read the confirmation")]
    Terminal(#[source] io::Error),
    /// The user interrupted a watch.
    #[error("interrupted: {hint}")]
    Interrupted {
        /// What goes on without us.
        hint: String,
    },
    /// Types and description of the API do not fit together: this binary was built wrongly.
    #[error("render the message {message} as JSON")]
    Json {
        /// Its name in the API.
        message: &'static str,
    },
    /// Standard output failed.
    #[error("write the output")]
    Output {
        /// The system's reason.
        #[from]
        source: io::Error,
    },
}

impl CtlError {
    /// The reader of our output went away.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output { source } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

/// An error and its causes, with all white space as single spaces: it is one line of a terminal, whoever wrote the messages.
pub fn one_line(error: &dyn Error) -> String {
    with_causes(error).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_with_sources_is_one_line() {
        let source = io::Error::other("first line\n  second line");
        assert_eq!(one_line(&CtlError::Runtime { source }), "start the runtime: first line second line");
    }

    #[test]
    fn a_reason_is_shown_only_when_there_is_one() {
        let error = |reason: &str| CtlError::Migration {
            id: "m1".into(),
            vm: "web".into(),
            outcome: "failed",
            reason: reason.into(),
        };
        assert_eq!(one_line(&error("")), "migration m1 of web failed");
        assert_eq!(one_line(&error("no space at b")), "migration m1 of web failed: no space at b");
    }
}
