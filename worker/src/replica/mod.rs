//! Copies of other sites' disks, and the way to them.
//!
//! ```text
//!  source worker                                              destination worker
//!  QEMU ─mirror─▶ nbd ─▶ session (drops what view says       ┌─▶ serve ─▶ store (files)
//!                         the replica holds) ──QUIC stream───┘      │
//!                           ▲ view (digest of every block) ◀── done ┘
//! ```
//! - [`store`]: which file holds a VM's disk on this host, and reads and writes of replicas.
//! - [`flatten`]: raw files of qcow2 images, before they are replicas.
//! - [`points`], [`groups`]: their recovery points.
//! - [`serve`]: the destination's end of a disk stream.
//! - [`view`]: what the source knows of a replica: the block index that both the copies and the codec ask.
//! - [`session`]: the source's end of a disk stream; an NBD target for QEMU's jobs. [`planner`]: what it must send, or have copied.
//! - [`merge`]: a mirror and a frozen point into one session.
//! - [`change`]: a digest of what a session has sent. [`cap`]: how fast it may.
//! - [`copy`]: all disks of a running VM at once, through the hypervisor's mirrors.
//! - [`seed`]: a full copy while the guest runs, without recovery points.
//!
//! Guarantees: a block enters the index only after the destination has acknowledged it, and leaves it before it is
//! overwritten. A replica is never written while this host may run the VM. A replica with recovery points can be brought to
//! any of them at all times; one that was only seeded is a mixture while a seed is under way.

mod blocks;
pub mod cap;
pub mod change;
pub mod copy;
pub mod flatten;
pub mod groups;
mod in_flight;
pub mod merge;
mod planner;
pub mod points;
pub mod seed;
pub mod serve;
pub mod session;
pub mod store;
pub mod view;

pub use planner::CopiesFrom;
