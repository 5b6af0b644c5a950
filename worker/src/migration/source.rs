//! The source of a move: its phases in order, and how each is undone.
//!
//! | phase | does | undone by |
//! |---|---|---|
//! | `connect` | connects, says what is to move; the preflight, after which bytes may move | abort, close |
//! | `disk-sync` | compares clocks, mirrors every disk until it keeps up, or will soon; is admitted | cancel mirrors |
//! | `memory` | writes `Prepared`, streams memory until the guest is stopped | cancel, write `revoked`, resume |
//! | `switchover` | finishes the mirrors, sends the rest, waits for `Ready`, writes `Released` | the same |
//! | `hand-over` | releases, waits for `Resumed`, ends its guest | not: the commit point is passed |
//!
//! The phases run through one wrapper ([`Move::phase`]) that gives the span, the timing and the seam for cancelling.
//! Each is a module of its own, and beside them are:
//!
//! | module | what |
//! |---|---|
//! | `undo` | what undoes all of them |
//! | `converging` | has memory converge |
//! | `figures` | progress, and the record |
//! | `leaving` | what a VM leaves behind, for the way back |
//! | `error` | why a move did not happen |

mod connect;
mod converging;
mod disk_sync;
mod error;
mod figures;
mod hand_over;
mod leaving;
mod memory;
mod switchover;
mod undo;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageport_common::telemetry;
use pageport_ownership::Epoch;
use pageport_proto::v1::{Finding, MigrationAssignment, MigrationRecord, PhaseTiming, Quote, ReplicationDisk, VmSpec};
use tracing::Instrument;

use self::converging::Converging;
pub use self::error::SourceError;
use self::switchover::Switched;
use super::control::Control;
use super::disks::Disks;
use super::outgoing::Outgoing;
use super::registry::MigrationEntry;
use crate::clock::Offset;
use crate::failpoint;
use crate::node::Node;
use crate::replication::registry::MigrationTurn;
use crate::transport::PeerConnection;
use crate::vms::ManagedVm;

/// What a move needs.
#[derive(Debug)]
pub struct Order {
    /// This worker.
    pub node: Arc<Node>,
    /// The VM.
    pub vm: Arc<ManagedVm>,
    /// Its definition.
    pub spec: VmSpec,
    /// The controllers' words.
    pub assignment: MigrationAssignment,
    /// Where progress goes, and where cancelling comes from.
    pub entry: Arc<MigrationEntry>,
}

/// Moves the VM. When this returns, the VM runs here as before (an error), has been handed over (a record), or is
/// in the controllers' hands ([`None`]: the commit point is passed and the destination could not be heard any more).
///
/// # Errors
/// Why it runs here still.
pub async fn run(order: Order) -> Result<Option<MigrationRecord>, SourceError> {
    let assignment = &order.assignment;
    let span = tracing::info_span!(
        "migration",
        migration_id = %assignment.migration_id,
        vm_id = %assignment.vm_id,
        epoch = assignment.epoch,
        role = "source"
    );
    telemetry::adopt_traceparent(&span, &assignment.traceparent);
    Move::new(order).run().instrument(span).await
}

struct Move {
    order: Order,
    epoch: Epoch,
    started: Instant,
    waited_before: Duration,
    /// The forecast; the worker forgets it when the VM leaves.
    quote: Option<Quote>,
    /// What the preflight warned of.
    warnings: Vec<Finding>,
    timings: Vec<PhaseTiming>,
    connection: Option<PeerConnection>,
    control: Option<Control>,
    offset: Offset,
    /// What the destination was told of the disks.
    told: Vec<ReplicationDisk>,
    disks: Option<Disks>,
    /// Dropped last: replication goes on from what the disks have left.
    turn: Option<MigrationTurn>,
    outgoing: Option<Outgoing>,
    memory_started: Option<Instant>,
    memory_held: bool,
    converging: Converging,
    /// Pages that the destination has kept.
    kept_pages: u64,
    downtime_marks: Vec<(&'static str, Instant)>,
}

impl Move {
    fn new(order: Order) -> Self {
        let ordered_ms = u64::try_from(order.assignment.ordered_unix_ms).unwrap_or(0);
        let since_order =
            SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_millis(ordered_ms)).unwrap_or_default();
        Self {
            epoch: Epoch::from_raw(order.assignment.epoch),
            quote: order.node.quotes.newest(order.vm.id(), &order.assignment.peer_worker),
            started: Instant::now(),
            waited_before: since_order.min(Duration::from_secs(3600)),
            warnings: Vec::new(),
            timings: Vec::new(),
            connection: None,
            control: None,
            offset: Offset::default(),
            told: Vec::new(),
            disks: None,
            turn: None,
            outgoing: None,
            memory_started: None,
            memory_held: false,
            converging: Converging::new(&order.assignment),
            kept_pages: 0,
            downtime_marks: Vec::new(),
            order,
        }
    }

    async fn run(mut self) -> Result<Option<MigrationRecord>, SourceError> {
        match self.until_released().await {
            Ok(switched) => Ok(self.phase_uncancelled("hand-over", async |this| this.hand_over(switched).await).await),
            Err(error) => {
                self.undo(&error).await;
                Err(error)
            }
        }
    }

    async fn until_released(&mut self) -> Result<Switched, SourceError> {
        let qemu = self.order.vm.qemu().await?;
        self.phase("connect", async |this| this.connect().await).await?;
        self.phase("disk-sync", async |this| this.sync_disks(&qemu).await).await?;
        self.phase("memory", async |this| this.move_memory(&qemu).await).await?;
        self.phase("switchover", async |this| this.switch_over(&qemu).await).await
    }

    /// One phase: span, timing, and the seam where a cancel is noticed.
    async fn phase<T>(
        &mut self,
        name: &'static str,
        body: impl AsyncFnOnce(&mut Self) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        let cancel = self.order.entry.cancel.clone();
        self.phase_uncancelled(name, async |this| {
            tokio::select! {
                biased;
                () = cancel.cancelled() => Err(SourceError::Cancelled),
                outcome = body(this) => outcome,
            }
        })
        .await
    }

    async fn phase_uncancelled<T>(&mut self, name: &'static str, body: impl AsyncFnOnce(&mut Self) -> T) -> T {
        let began = Instant::now();
        tracing::info!(phase = name, "phase begins");
        self.timings.push(PhaseTiming { name: name.to_owned(), duration_ms: 0 });
        self.report_progress(None);
        failpoint::reach("source", name).await;
        let outcome = body(self).instrument(tracing::info_span!("phase", phase = name)).await;
        let duration_ms = began.elapsed().as_millis() as u64;
        if let Some(timing) = self.timings.last_mut() {
            timing.duration_ms = duration_ms;
        }
        tracing::info!(phase = name, duration_ms, "phase ended");
        outcome
    }

    fn close(&mut self, reason: &str) {
        if let Some(connection) = &self.connection {
            connection.close(reason);
        }
    }
}
