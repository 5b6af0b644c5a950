//! Why a group of points did not do as told.

use std::io;

use pageport_common::store::StoreError;
use pageport_proto::PoolName;

use crate::pool::{key, place};

/// Which of the bounds was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// For one VM, or the file system's.
    OneVm,
    /// For all of the pool.
    AllVms,
}

impl Bound {
    /// Whose it is, and what sets it.
    fn told(self, pool: &PoolName) -> String {
        match self {
            Self::OneVm => "by this vm (replication.points_bytes)".to_owned(),
            Self::AllVms => format!("by all vms ({})", key(pool, "all_points_bytes")),
        }
    }
}

/// Why a group of points did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// The worker's store failed.
    #[error("{what} the record of the recovery points")]
    Store {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The record in the worker's store cannot be read.
    #[error("the record of the recovery points is damaged")]
    Record(#[source] serde_json::Error),
    /// An earlier write to the worker's store failed: whether it took effect is found by opening the group again.
    #[error("it is not known whether the last change of the recovery points took effect: open them again")]
    Unsure,
    /// The group was closed: its disks have been given another use.
    #[error("the recovery points are closed: their disks have been given another use")]
    Closed,
    /// A journal or undo file, or their folder, failed.
    #[error("{what} {file}")]
    File {
        /// The operation.
        what: &'static str,
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The replica's file failed.
    #[error("{what} the replica of disk {disk:?}")]
    Disk {
        /// The operation.
        what: &'static str,
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No room, even without older points.
    #[error(
        "no space for recovery points: {needed_bytes} bytes are needed, {} {used_bytes} of {limit_bytes} are used, and {free_bytes} are free {}, where {} \
         stay free; raise the limit or free some space", bound.told(pool), place(pool), key(pool, "reserve_bytes")
    )]
    NoSpace {
        /// What was to be written.
        needed_bytes: u64,
        /// What journals and undo files occupy.
        used_bytes: u64,
        /// What they may.
        limit_bytes: u64,
        /// Whose.
        bound: Bound,
        /// What the file system has left.
        free_bytes: u64,
        /// Where they lie.
        pool: PoolName,
    },
    /// A change that no honest peer sends.
    #[error("the peer worker asked for what cannot be: {what}")]
    Hostile {
        /// What it was.
        what: &'static str,
    },
    /// There is no such disk.
    #[error("the recovery points are not of a disk {disk:?}")]
    NoDisk {
        /// Its name.
        disk: String,
    },
    /// Another point is due.
    #[error("point {asked} of lineage {asked_lineage} cannot follow: the newest is {newest}")]
    NotNext {
        /// The point.
        asked: u64,
        /// Its lineage.
        asked_lineage: super::Lineage,
        /// The newest point and its lineage.
        newest: String,
    },
    /// What arrived is not what the source sent. The journal is discarded.
    #[error("point {number} arrived changed: its digest differs from the source's")]
    Digest {
        /// The point.
        number: u64,
    },
    /// The journal was committed, discarded, or replaced by a later one.
    #[error("this journal is closed")]
    JournalClosed,
    /// Not while a migration writes the replica.
    #[error("a migration writes this replica: its layer is open")]
    LayerOpen,
    /// The layer was undone, kept, or broken by an error before.
    #[error("this layer is closed")]
    LayerClosed,
    /// There are no points.
    #[error("this replica has no recovery points: copy it first")]
    Empty,
    /// There is no such point.
    #[error("there is no recovery point {number}")]
    NoPoint {
        /// The point.
        number: u64,
    },
    /// Too many are held.
    #[error("{} recovery points are held open already: close one of them first", super::MAX_LEASES)]
    Leases,
    /// The points were forgotten while the reader was open.
    #[error("recovery point {number} is gone: the replica has been given another use")]
    Gone {
        /// The point.
        number: u64,
    },
    /// Older points cannot be read any more. The newest is whole.
    #[error("older recovery points are lost: {reason}")]
    Lost {
        /// What was found.
        reason: String,
    },
    /// The newest point cannot be trusted.
    #[error("the replica is damaged and must be copied again: {reason}")]
    Damaged {
        /// What was found.
        reason: String,
    },
}
