//! Live moves. Source and destination each read as a list of phases.
//!
//! ```text
//!  source                                                     destination
//!  connect     MigrationHello ──────────────────────────────▶ admit    (asks the controllers, starts the hypervisor)
//!  disk-sync   mirror every disk; only differences cross ───▶          (replica::serve)
//!              ◀────────────────────────────────── Accepted
//!  memory      durable Prepared; batches ───────────────────▶ receive  (decode, restore, verify, write)
//!              ◀────────────── BatchAck, FallbackRequest ────
//!  switchover  guest stopped; finish mirrors, flush, last
//!              batches, StreamEnd(digest) ──────────────────▶ load     (digests agree, hypervisor has it, fsync)
//!              ◀───────────────────────────────────── Ready ─
//!              durable Released          == commit point ==
//!  hand-over   Release ─────────────────────────────────────▶ resume   (durable Own, then cont)
//!              ◀─────────────────────────────────── Resumed ─
//!              kills its guest, becomes the replica
//! ```
//! Guarantees: before the commit point any failure leaves the source running, and the record says durably that this
//! epoch is revoked; after it the source never resumes by itself, and the controllers relay what the connection no longer
//! can. A destination that has vouched for its image never drops it on its own.

pub mod control;
pub mod convergence;
pub mod destination;
pub mod disks;
pub mod incoming;
pub mod outgoing;
pub mod pace;
pub mod registry;
pub mod source;
pub mod stream;
mod waits;
pub mod window;

use pageport_proto::v1;

/// The codec's counts on the wire.
fn page_counts(pages: pageport_teleport::PageCounts) -> v1::PageCounts {
    let pageport_teleport::PageCounts { zero, teleported, literal, fallback } = pages;
    v1::PageCounts { zero, teleported, literal, fallback }
}
