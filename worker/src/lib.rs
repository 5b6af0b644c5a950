//! The Pageport daemon on each hypervisor host: owns the host's VMs, disks and replicas.
//!
//! ```text
//!   controller ◀──gRPC── agent ──▶ vms ──▶ hypervisor (QEMU over QMP)
//!                          │                    ▲ │ stream, NBD
//!                          ▼                    │ ▼
//!                 migration {source, destination} · replication · drill · replica {seed, session, store, points} · image
//!                          ▲                    │
//!                          └──── transport (QUIC, mutual TLS) ◀──▶ the peer worker
//! ```

pub mod agent;
pub mod clock;
pub mod config;
pub mod drill;
pub mod failpoint;
pub mod generation;
pub mod hypervisor;
pub mod image;
pub mod memory;
pub mod migration;
pub mod nbd;
pub mod node;
pub mod pool;
pub mod preflight;
pub mod questions;
pub mod quota;
pub mod quote;
pub mod replica;
pub mod replication;
pub mod store_identity;
pub mod transport;
pub mod vms;

use pageport_common::error;

#[cfg(test)]
mod test_support;
