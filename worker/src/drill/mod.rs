//! Drills: a recovery point of a replica is opened for reading, over NBD, while replication goes on.
//!
//! ```text
//!   order ─▶ exports ─▶ export: lease (replica::points) ─▶ target of each disk ─▶ nbd ◀── qemu-img, nbd-client, a guest of the drill
//!              │ ▲           └─ ends: closed, run out, or the lease says why
//!              │ └─ restore: what an earlier worker had open
//!              └─ reports: what is open, what has ended and why
//! ```
//! | where | what |
//! |---|---|
//! | `<runtime_dir>/points/<vm>-<point>.sock` | the export's socket, in a folder that only the worker's user may enter |
//! | key `export/<vm>/<point>` of the worker's store | an export that is open |
//!
//! - [`order`]: what an operator asked for, checked.
//! - [`exports`]: all of this worker. [`export`]: one, from its lease to its end.
//! - [`target`]: a disk as it was at the point. [`record`]: what of an export outlives the worker.
//!
//! Guarantees: what is read is the point, byte for byte, whatever is committed, put in place or pruned meanwhile; nothing can be written; an
//! export ends at its time at the latest, also across restarts of the worker; it never keeps a newer point from being received, nor costs
//! a recovery point that is to be kept; why it ended is told.
//!
//! Does not ask who reads: NBD has neither users nor encryption. So it is a socket of the worker's user, and TCP only if asked for, on the
//! loopback or on addresses that `worker.toml` names.

pub mod export;
pub mod exports;
pub mod order;
pub mod record;
pub mod target;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;

use pageport_common::store::StoreError;
use pageport_proto::VmId;

use crate::nbd::ExportError;
use crate::replica::groups::GroupsError;
use crate::replica::points::PointError;

/// Why a recovery point is not open for reading.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// The request makes no sense.
    #[error("{what}")]
    Request {
        /// What does not, and what would.
        what: String,
    },
    /// Others could read it.
    #[error(
        "{address} is not the loopback, and NBD has neither users nor encryption: whoever reaches the port reads the disks. \
         If that is meant, name the address in drill.listen of the worker's worker.toml"
    )]
    Address {
        /// The address.
        address: IpAddr,
    },
    /// This host may run the VM.
    #[error("this site runs vm {vm} itself: its disks are no replica")]
    Owned {
        /// The VM.
        vm: VmId,
    },
    /// It is open elsewhere.
    #[error("recovery point {point} is open already, and listens at {listens}: close it first")]
    Listens {
        /// The point.
        point: u64,
        /// Where.
        listens: String,
    },
    /// It is not open.
    #[error("recovery point {point} is not open: `pageportctl recovery-point list` shows what is")]
    NotOpen {
        /// The point.
        point: u64,
    },
    /// It ended while it was asked for.
    #[error("recovery point {point} is open no longer: {reason}")]
    Ended {
        /// The point.
        point: u64,
        /// Why.
        reason: String,
    },
    /// The replica.
    #[error(transparent)]
    Replica(#[from] GroupsError),
    /// Its points.
    #[error(transparent)]
    Points(#[from] PointError),
    /// The NBD server.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The folder of the sockets.
    #[error("make the folder of the exports' sockets")]
    Folder(#[source] io::Error),
    /// The worker's store.
    #[error("note what is open")]
    Store(#[from] StoreError),
    /// What was noted cannot be read.
    #[error("what was noted of an open recovery point is damaged")]
    Record(#[from] serde_json::Error),
    /// A thread ended.
    #[error("the thread that opened the recovery point ended")]
    Thread(#[from] tokio::task::JoinError),
}
