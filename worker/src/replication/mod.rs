//! Standing replication: recovery points of running VMs, kept at other sites (docs/rfc/0004).
//!
//! ```text
//!   source worker                                          destination worker
//!   source ─▶ round ─▶ control ═══════ control stream ════▶ serve ─▶ replica::points
//!     │         └─▶ hypervisor::freeze ─▶ pull ─▶ replica::session ═▶ replica::serve ┘
//!     └─ schedule, throttle: pure
//! ```
//! - [`replicators`]: from an assignment to tasks.
//! - [`source`]: one task per VM and site: round after round.
//! - [`round`]: one point, from the frozen moment to its commit.
//! - [`frozen_copy`]: a frozen point on its way into disk sessions.
//! - [`pull`]: one frozen disk, read from the hypervisor.
//! - [`control`], [`serve`]: the two ends of a session's control stream.
//! - [`schedule`]: when the next point is taken, and how old the newest became.
//! - [`throttle`]: how fast a full copy may go.
//! - [`scrub`]: whether the replica's files hold what they should, and their repair.
//! - [`plan`]: what the replica's points and the hypervisor's bitmaps mean for the next point.
//! - [`mark`]: the names of bitmaps.
//! - [`moving`], [`last_increment`]: the disks of a migration that starts from a standing replica.
//! - [`registry`]: reports, and the turn that rounds and migrations share.
//!
//! Guarantees: the guest never waits for a worker or the WAN; a replica is at its newest recovery point, whatever ends whenever.

pub mod control;
pub mod frozen_copy;
pub mod last_increment;
pub mod mark;
pub mod moving;
pub mod plan;
pub mod pull;
pub mod registry;
pub mod replicators;
pub mod round;
pub mod schedule;
pub mod scrub;
pub mod serve;
pub mod source;
pub mod throttle;
