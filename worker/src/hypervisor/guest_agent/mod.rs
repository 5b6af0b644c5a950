//! The guest's file systems at rest for a moment, through the QEMU guest agent, where the guest has one.
//!
//! ```text
//!   quiesce ─▶ task: sync ─▶ status ─▶ note on the host ─▶ freeze ─▶ at rest ──┐
//!                                                                             │ the caller takes its moment
//!   Quiescence ◀─ note removed ◀─ thaw, until it is answered ◀─ status ◀──────┴─ thaw ordered, handle dropped, or window over
//! ```
//! - [`client`]: the agent's protocol over its socket, for a guest that is not trusted.
//! - [`quiesce`]: the task that holds the agent from before the freeze until after the thaw.
//!
//! Guarantees: the order to thaw leaves this host at most [`WINDOW`] after the order to freeze, whatever the caller, the hypervisor and
//! the guest do. A thaw that is not answered is repeated until it is, or QEMU ends. A worker that ends meanwhile leaves a note; the next one that
//! adopts the VM thaws before anything else. File systems count as having been at rest only if the freeze had succeeded before the
//! moment and the agent said after it that they were still frozen.
//!
//! Does not thaw while no worker runs on the host, and cannot make an agent answer that hangs.

mod client;
mod quiesce;

use std::time::Duration;

pub use client::AgentError;
pub(super) use quiesce::thaw_what_is_left;
pub use quiesce::{GuestAtRest, Quiescence};

/// Time for an agent to show that it is there.
pub const HELLO_LIMIT: Duration = Duration::from_secs(2);
/// From the order to freeze to the order to thaw. The guest's writes wait so long, and as long again as the agent takes to obey.
pub const WINDOW: Duration = Duration::from_secs(3);
/// Time for an agent to answer a thaw before it is ordered again.
const THAW_LIMIT: Duration = Duration::from_secs(1);

/// Why a guest's file systems were not at rest, or may not be awake again. For operators; the same cause has the same words each time.
#[derive(Debug, thiserror::Error)]
pub enum NotQuiesced {
    /// Nobody answers.
    #[error("no guest agent answers: install qemu-guest-agent in the guest and start it, or protect without --quiesce")]
    NoAgent(#[source] AgentError),
    /// The file systems were frozen already.
    #[error("the guest's file systems were frozen already, and have been thawed")]
    WasFrozen,
    /// An earlier thaw has not been answered.
    #[error("the guest agent does not answer the order to thaw its file systems, which is repeated: look at the guest")]
    ThawUnanswered,
    /// There is nothing to freeze.
    #[error("the guest agent found no file system that can be frozen")]
    NothingToFreeze,
    /// The agent did not do it.
    #[error("the guest agent did not freeze the file systems")]
    Freeze(#[source] AgentError),
    /// They did not stay at rest until the moment was taken.
    #[error("the guest's file systems were not at rest until the point was taken, within {} s", WINDOW.as_secs())]
    NotLongEnough,
    /// The note for the next worker was not written.
    #[error("note on this host that a guest's file systems are to be frozen")]
    Note(#[source] std::io::Error),
    /// The task ended: this worker is ending.
    #[error("the worker is ending")]
    Ended,
}
