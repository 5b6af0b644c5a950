//! Why a guest cannot be built or talked to.

use std::io;
use std::path::PathBuf;

/// Why a guest cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file or folder operation failed.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A tool cannot be run.
    #[error("run {program} (tools/setup.sh installs what the lab needs)")]
    Run {
        /// Which tool.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// Which tool.
        program: String,
        /// The end of what it said.
        said: String,
    },
    /// The package index does not know the kernel.
    #[error("find the kernel package behind {meta} (run tools/setup.sh)")]
    NoKernelPackage {
        /// The package that depends on it.
        meta: &'static str,
    },
    /// The unpacked package lacks a file.
    #[error("find {what} in its package")]
    NotInPackage {
        /// What is missing.
        what: String,
    },
    /// A library of the guest agent is not on this machine.
    #[error(
        "find {library}, which the guest agent needs, on this machine (tools/setup.sh installs QEMU, which needs it too)"
    )]
    NoLibrary {
        /// What the agent calls it.
        library: String,
    },
    /// The machine has too little to copy.
    #[error("collect {wanted} bytes of files below /usr: there are only {found}")]
    TooFewFiles {
        /// How many bytes were wanted.
        wanted: u64,
        /// How many there are.
        found: u64,
    },
}

/// Names the operation and the path of an I/O error.
pub(super) trait Named<T> {
    /// `operation` is a verb; the path follows it.
    fn named(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T, BuildError>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T, BuildError> {
        self.map_err(|source| BuildError::Io { operation, path: path.into(), source })
    }
}

/// Runs a tool to its end and hands back what it printed.
pub(super) fn run(command: &mut std::process::Command) -> Result<String, BuildError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| BuildError::Run { program: program.clone(), source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let start = said.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
        return Err(BuildError::Failed { program, said: said[start..].trim().to_owned() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
