//! NBD between the worker and clients and servers nearby: both ends, on unix sockets; exports also on a TCP address.
//!
//! ```text
//!   QEMU's mirror ──unix──▶ server (accept) ─▶ connection (one per client) ─▶ BlockTarget
//!   a drill's reader ─unix, TCP──┘
//!                              negotiate            ≤ 16 requests, ≤ 32 MiB in flight
//!   client ──unix──▶ QEMU's frozen disks
//! ```
//!
//! Guarantees of the server: requests run concurrently within named bounds; FLUSH waits for everything that was sent before it; a FUA
//! write is answered only after the target has flushed; a request that the target does not do within its deadline is
//! answered with an error (its call is dropped); bytes that are no NBD end the connection, and nothing else.
//!
//! It does not speak TLS, structured replies or TRIM: its clients are local, and need none of them. It does not ask who they are either: who
//! reaches the socket gets in. A target's error reaches the client as that request's error, and QEMU then ends its job.
//!
//! Why not a crate: `nbd` (0.3) is synchronous and an early version; `tokio-nbd` (0.3) is GPL and answers one
//! request at a time, so a mirror over a WAN would wait a round trip for each.

mod client;
mod connection;
mod negotiation;
mod protocol;
mod server;

use std::future::Future;
use std::io;

use bytes::Bytes;

pub use client::{ClientError, Content, Extent, NbdClient, State, States};
pub use protocol::{Access, MAX_NAME_BYTES, MAX_PAYLOAD_BYTES, ProtocolError, block_size};
pub use server::{ExportError, NbdServer, Place};

/// What an export reads and writes. Ranges lie within the size, are not empty, and are multiples of
/// [`block_size`]`(size)`. Calls come concurrently; a client that wants an order waits for the answers. A call may be dropped
/// before it is done: when the server closes, its client goes, or its deadline passes.
pub trait BlockTarget: Send + Sync + 'static {
    /// Bytes in all; constant.
    fn size(&self) -> u64;

    /// What clients may do; constant.
    fn access(&self) -> Access {
        Access::ReadWrite
    }

    /// Gives exactly `length` bytes.
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = io::Result<Bytes>> + Send;

    /// Takes bytes; they need not be stable.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = io::Result<()>> + Send;

    /// Makes a range read as zeroes; holes are welcome.
    fn zero(&self, offset: u64, length: u32) -> impl Future<Output = io::Result<()>> + Send;

    /// Makes everything that was answered before stable.
    fn flush(&self) -> impl Future<Output = io::Result<()>> + Send;
}

/// Takes what is read of an export. Calls come concurrently, for ranges that do not overlap.
pub trait Sink: Send + Sync + 'static {
    /// Takes bytes.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = io::Result<()>> + Send;

    /// Takes a range of zeroes.
    fn zero(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + Send;
}
