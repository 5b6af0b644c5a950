//! Why a node cannot go on.

use crate::consensus::membership::ChangeError;
use crate::consensus::snapshot::SnapshotError;
use crate::consensus::storage::LogError;
use crate::consensus::way_out::WayOut;

/// Why a node cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The disk.
    #[error("the replicated log cannot go on")]
    Log(#[source] LogError),
    /// The disk has no room.
    #[error(
        "the disk is full and this controller stops: make room where its data_dir is and start it again; nothing that it acknowledged is lost"
    )]
    Full(#[source] LogError),
    /// A snapshot that came cannot be used.
    #[error("a peer's snapshot cannot be used")]
    Snapshot(#[from] SnapshotError),
    /// This node is no member any more.
    #[error(
        "controller {id} was removed from the cluster (\"pageportctl cluster remove {id}\"): stop its service for good and \
         delete its data_dir; to use this host again add it under another number"
    )]
    Removed {
        /// This node.
        id: u64,
    },
    /// The others know it with another store.
    #[error(
        "controller {id} has lost its data: the others know it with another data_dir. If that one is still there, point data_dir to it. \
         The way out otherwise, {}",
        WayOut(*id)
    )]
    OtherStore {
        /// This node.
        id: u64,
    },
    /// Another cluster has taken its place.
    #[error(
        "controller {id} belongs to a cluster that was given up: the controllers were restored from a backup since. Stop its service, move its data_dir \
         away, and to use this host again add it under a number that the restored ones do not have"
    )]
    OlderGeneration {
        /// This node.
        id: u64,
    },
    /// An entry that changes the members cannot be read.
    #[error("decode entry {index} of the replicated log, which changes the members")]
    Members {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: ChangeError,
    },
    /// An entry that changes the members is damaged.
    #[error("decode entry {index} of the replicated log, which changes the members")]
    MembersDamaged {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: prost_011::DecodeError,
    },
    /// raft refuses its configuration or its log.
    #[error("start raft")]
    Start(#[source] raft::Error),
    /// An entry is no command of this version.
    #[error("decode entry {index} of the replicated log: is this controller older than its peers?")]
    Decode {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl From<LogError> for NodeError {
    fn from(error: LogError) -> Self {
        if error.is_full() { Self::Full(error) } else { Self::Log(error) }
    }
}
