//! Why a move did not happen.

use std::time::Duration;

use pageport_ownership::Record;

use crate::hypervisor::HypervisorError;
use crate::migration::control::ControlError;
use crate::migration::convergence::policy::GivenUp;
use crate::migration::disks::DisksError;
use crate::migration::outgoing::OutgoingError;
use crate::migration::stream::StreamError;
use crate::replica::copy::CopyError;
use crate::transport::TransportError;
use crate::vms::VmError;

/// Why a move did not happen.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] TransportError),
    /// The control stream.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The disks.
    #[error("bring the replica up to date")]
    Disks(#[from] DisksError),
    /// It would not go well.
    #[error("nothing was moved: {hindrance}")]
    Preflight {
        /// What hinders it, and what to do about that.
        hindrance: String,
    },
    /// The disks cannot be looked at.
    #[error("look at the disks")]
    Look(#[source] CopyError),
    /// A disk has grown just now.
    #[error("a disk has changed while the move began: order the move again")]
    DisksChanged,
    /// The memory.
    #[error("move the memory")]
    Memory(#[from] OutgoingError),
    /// The hypervisor.
    #[error("drive the hypervisor")]
    Hypervisor(#[from] HypervisorError),
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The hypervisor's stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Asked to.
    #[error("cancelled")]
    Cancelled,
    /// Its policy asks for it.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
    /// The record does not permit a move.
    #[error("the vm's ownership record does not permit this move: {record:?}")]
    NotPermitted {
        /// The record.
        record: Record,
    },
    /// The destination rebuilt something else.
    #[error("the destination rebuilt another stream than was sent: nothing was switched over")]
    DigestMismatch,
    /// Not in time.
    #[error("{what} took longer than {} s", limit.as_secs())]
    TooLong {
        /// What.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
}
