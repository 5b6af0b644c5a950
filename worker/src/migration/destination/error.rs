//! Why the destination gave up, or refused to begin.

use std::time::Duration;

use pageport_ownership::Record;

use crate::agent::controllers::ControllerError;
use crate::hypervisor::HypervisorError;
use crate::migration::incoming::IncomingError;
use crate::replica::store::ReplicaError;
use crate::transport::{MessageError, TransportError};
use crate::vms::VmError;

/// Why this side gave up, or refused to begin.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The hello makes no sense.
    #[error("the source's request makes no sense: {what}")]
    Request {
        /// What does not.
        what: &'static str,
    },
    /// The controllers were not heard.
    #[error("ask the controllers whether this move may come here")]
    Controllers(#[from] ControllerError),
    /// The controllers said no.
    #[error("the controllers do not authorise this move: {reason}")]
    NotAuthorised {
        /// Their words.
        reason: String,
    },
    /// This host's record forbids it.
    #[error("the vm's ownership record here does not permit this move: {record:?}")]
    NotPermitted {
        /// The record.
        record: Record,
    },
    /// This host's hypervisor must not receive.
    #[error("{reason}")]
    Hypervisor {
        /// Why.
        reason: String,
    },
    /// Too little memory.
    #[error(
        "no memory for a guest of {needed_bytes} bytes, since only {available_bytes} bytes are available on the destination's host: stop or move \
         something there, or choose another worker"
    )]
    NoMemory {
        /// The guest's.
        needed_bytes: u64,
        /// The host's.
        available_bytes: u64,
    },
    /// The host's memory cannot be looked at.
    #[error("look at this host's memory")]
    Memory(#[source] std::io::Error),
    /// The disks.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The hypervisor.
    #[error("drive the hypervisor")]
    Qemu(#[from] HypervisorError),
    /// The hypervisor's socket.
    #[error("connect to the hypervisor")]
    Socket(#[source] std::io::Error),
    /// The streams.
    #[error("accept the source's streams")]
    Streams(#[from] TransportError),
    /// The control stream.
    #[error("talk to the source")]
    Control(#[from] MessageError),
    /// The memory.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// Something else was rebuilt than was sent.
    #[error("the stream that was rebuilt is not the one that was sent")]
    DigestMismatch,
    /// The source gave up.
    #[error("the source gave up: {reason}")]
    SourceAborted {
        /// Its words.
        reason: String,
    },
    /// The connection ended before the image was complete.
    #[error("the connection to the source ended before the image was complete")]
    Lost,
    /// A replica could not be brought to stable storage.
    #[error("bring the replica {disk} to stable storage")]
    Sync {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A replica could not be made as large as its disk.
    #[error("make the replica {disk} as large as the disk")]
    Grow {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not in time.
    #[error("{what} took longer than {} s", limit.as_secs())]
    TooLong {
        /// What.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
}
