//! Why there is no lab.

use std::io;
use std::path::PathBuf;

use super::READY_DEADLINE;
use super::ctl::CtlError;
use super::daemon::DaemonError;
use super::network::NetworkError;
use super::settings::SettingsError;
use super::tls::TlsError;

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The sites cannot be connected.
    #[error("start lab")]
    Network(#[from] NetworkError),
    /// No certificates.
    #[error("start lab")]
    Tls(#[from] TlsError),
    /// No configurations.
    #[error("start lab")]
    Settings(#[from] SettingsError),
    /// A daemon does not run.
    #[error("start lab")]
    Daemon(#[from] DaemonError),
    /// A file or folder cannot be made.
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
    /// The programs are not built.
    #[error("find {program}: run `cargo build --workspace` first")]
    NotBuilt {
        /// Which is missing.
        program: PathBuf,
    },
    /// Controllers do not begin anew.
    #[error("restore controllers from {backup}")]
    Restore {
        /// The backup.
        backup: PathBuf,
        /// Why.
        #[source]
        source: Box<CtlError>,
    },
    /// The workers do not connect.
    #[error("wait for the lab: not ready after {} s; logs are in {logs}; last seen: {seen}", READY_DEADLINE.as_secs())]
    NotReady {
        /// Where to look.
        logs: PathBuf,
        /// What the last look said.
        seen: String,
    },
}
