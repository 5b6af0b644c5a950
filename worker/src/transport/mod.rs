//! Worker to worker over QUIC with mutual TLS.
//!
//! A migration from a standing replica uses one connection: two that compete leave a part of the link unused for many seconds, because each takes the
//! other's share for a narrow link, and goes on doing so when the other has ended.
//!
//! | streams | priority |
//! |---|---|
//! | control of the migration, and of its disks (bidirectional) | highest |
//! | fallback | |
//! | memory, and one bidirectional stream per disk | all alike |
//!
//! Seeds, replication, probes, preflights, and the disks of a migration that are compared whole have a connection of their own. Every stream the source opens begins with a
//! [`StreamHello`](pageport_proto::v1::StreamHello). Nothing here knows what the messages mean.

pub mod endpoint;
pub mod message;
pub mod probe;

pub use endpoint::{PeerConnection, PeerEndpoint, TransportError};
pub use message::{MessageError, MessageReader, MessageWriter};

/// Version of the messages between workers that this build speaks and accepts.
pub const PROTOCOL_VERSION: u32 = 2;

/// Stream priorities of the memory connection; quinn sends the highest first.
pub mod priority {
    /// Hand-over messages and acknowledgements.
    pub const CONTROL: i32 = 20;
    /// Batches asked for again: nothing may wait behind what waits for them.
    pub const FALLBACK: i32 = 10;
    /// The bulk of memory.
    pub const MEMORY: i32 = 0;
    /// What only tries the path.
    pub const PROBE: i32 = -10;
}
