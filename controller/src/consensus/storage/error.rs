//! Why the log could not be kept or read.

use crate::consensus::disk::DiskError;
use crate::consensus::snapshot::SnapshotError;

/// Why the log could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk said no.
    #[error("keep the replicated log")]
    Disk(#[from] DiskError),
    /// The snapshot cannot be made or read.
    #[error("keep the replicated state")]
    Snapshot(#[from] SnapshotError),
    /// The members cannot be written as JSON.
    #[error("encode the members")]
    Members(#[source] serde_json::Error),
    /// The snapshot is older than the beginning of the log, or gone.
    #[error(
        "the log begins after entry {log}, and the snapshot reaches only to entry {snapshot} (0: it is missing): what lies between is lost here"
    )]
    Gap {
        /// The last entry that was dropped from the log.
        log: u64,
        /// The entry that the snapshot reaches to.
        snapshot: u64,
    },
    /// Entries that were committed are missing.
    #[error("the log ends at entry {last}, and entry {commit} was committed: the end of the log is lost here")]
    Short {
        /// The last entry that is there.
        last: u64,
        /// One that was.
        commit: u64,
    },
    /// A value is not what was written.
    #[error("the replicated log is damaged at {key}")]
    Damaged {
        /// Where.
        key: String,
    },
}

impl LogError {
    /// Is what is on the disk not what was written? Anything else may pass, or be put right outside it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Disk(error) => error.is_damage(),
            Self::Snapshot(error) => error.is_damage(),
            Self::Gap { .. } | Self::Short { .. } | Self::Damaged { .. } => true,
            Self::Members(_) => false,
        }
    }

    /// Is there no room?
    pub fn is_full(&self) -> bool {
        let causes = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        causes.filter_map(io_error).any(|error| error.kind() == std::io::ErrorKind::StorageFull)
    }
}

fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    match error.downcast_ref::<pageport_common::store::EngineError>() {
        Some(pageport_common::store::EngineError::Io(error)) => Some(error),
        _ => error.downcast_ref(),
    }
}
