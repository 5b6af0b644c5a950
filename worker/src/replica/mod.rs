//! Copies of other sites' disks, and the way to them.
//!
//! ```text
//!  source worker                                              destination worker
//!  QEMU ─mirror─▶ nbd ─▶ session (drops what view says       ┌─▶ serve ─▶ store (files)
//!                         the replica holds) ──QUIC stream───┘      │
//!                           ▲ view (digest of every block) ◀── done ┘
//! ```
//! - [`store`]: which file holds a VM's disk on this host, and reads and writes of replicas.
//! - [`serve`]: the destination's end of a disk stream.
//! - [`view`]: what the source knows of a replica: the block index that both the mirror and the codec ask.
//! - [`session`]: the source's end of a disk stream; an NBD target for QEMU's mirror.
//! - [`copy`]: all disks of a running VM at once, through the hypervisor's mirrors.
//! - [`seed`]: a full copy while the guest runs.
//!
//! Guarantees: a block enters the index only after the destination has acknowledged it, and leaves it before it is
//! overwritten. A replica is never written while this host may run the VM. Crash consistency of a replica (recovery
//! points) is not here yet: a seed that broke off leaves a mixture, and is said to be unfinished.

pub mod copy;
pub mod seed;
pub mod serve;
pub mod session;
pub mod store;
pub mod view;
