//! Why the matrix, or one case of it, could not be run. What a case *finds* is no error: see [`super::judge`].

use std::path::PathBuf;

use crate::lab::daemon::DaemonError;
use crate::lab::guest::BuildError;
use crate::lab::guest::client::GuestError;
use crate::lab::network::NetworkError;
use crate::lab::{CtlError, LabError};

/// Why not.
#[derive(Debug, thiserror::Error)]
pub enum FaultsError {
    /// No guest.
    #[error("build the guest")]
    Build(#[from] BuildError),
    /// No lab.
    #[error("run the lab")]
    Lab(#[from] LabError),
    /// No network.
    #[error("reach the wan")]
    Network(#[from] NetworkError),
    /// A daemon does not do as told.
    #[error("strike or heal a daemon")]
    Daemon(#[from] DaemonError),
    /// A command failed.
    #[error("ask the controllers")]
    Ctl(#[from] CtlError),
    /// The guest does not answer.
    #[error("talk to the guest")]
    Guest(#[from] GuestError),
    /// The link cannot be cut or healed.
    #[error("change the link between {from} and {to}")]
    Link {
        /// From where.
        from: String,
        /// To where.
        to: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Heartbeats are not seen.
    #[error("listen for heartbeats")]
    Heartbeats(#[source] std::io::Error),
    /// A file.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A signal cannot be sent.
    #[error("send {signal} to process {pid}")]
    Signal {
        /// Which.
        signal: &'static str,
        /// To whom.
        pid: i32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An image cannot be copied, compared or examined.
    #[error("examine an image")]
    Image(#[source] std::io::Error),
    /// It never came to that.
    #[error("waited {seconds} s for {what}; last seen: {seen}")]
    InVain {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What was seen last.
        seen: String,
    },
    /// An answer without what must be in it.
    #[error("find {what} in {answer}")]
    Answer {
        /// What is missing.
        what: &'static str,
        /// In what.
        answer: String,
    },
    /// Nothing is meant.
    #[error("no case is meant by \"{pattern}\": see --list")]
    NoSuchPair {
        /// The pattern.
        pattern: String,
    },
    /// A lane ended by itself.
    #[error("run cases side by side")]
    Lane(#[source] tokio::task::JoinError),
    /// Without namespaces.
    #[error("run the matrix: it needs network namespaces (root and /dev/net/tun)")]
    NoNamespaces,
}
