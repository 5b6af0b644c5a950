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

mod converging;
mod figures;
mod leaving;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageport_common::telemetry;
use pageport_ownership::{Epoch, Event, Record};
use pageport_proto::v1::{
    Abort, Convergence, DiskHello, DiskSpec, Finding, MigrationAssignment, MigrationHello, MigrationProgress,
    MigrationRecord, PhaseTiming, Quote, Release, ReplicationDisk, StreamEnd, VmSpec, to_destination, to_source,
};
use tracing::Instrument;

use self::converging::{Converging, Seen};
use super::control::{Control, ControlError};
use super::convergence::policy::GivenUp;
use super::convergence::rounds::Observation;
use super::disks::{Disks, DisksError};
use super::outgoing::{Held, Outgoing, OutgoingError, StreamTotals};
use super::registry::MigrationEntry;
use super::stream::{self, StreamError};
use super::waits;
use crate::clock::Offset;
use crate::failpoint;
use crate::hypervisor::migrate::AutoConverge;
use crate::hypervisor::{HypervisorError, MigrationStatus, RunState, Vm};
use crate::node::Node;
use crate::preflight::{self, Way};
use crate::replica::copy::{CopyError, hello};
use crate::replication::registry::MigrationTurn;
use crate::transport::{PeerConnection, TransportError};
use crate::vms::{ManagedVm, VmError};

/// The destination starts a hypervisor and touches all of its memory before it admits.
const ADMIT_LIMIT: Duration = Duration::from_secs(90);
const CLOCK_LIMIT: Duration = Duration::from_secs(5);
/// A full comparison of large disks takes its time; a stalled one is noticed by the disk stream.
const DISK_SYNC_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// Longest move of memory; what becomes sooner of one that does not converge is its policy's.
const MEMORY_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// The guest stands still: what is not done by then goes back.
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(30);
/// After the controllers have said that the guest runs elsewhere, the destination's word about it has this long; they wait
/// 10 s for the figures.
const FIGURES_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at the hypervisor's figures.
const OBSERVE_INTERVAL: Duration = Duration::from_millis(200);
/// What a link is taken to carry until it has shown more, in bytes per second.
const RATE_FLOOR_BYTES_PER_S: u64 = 1_000_000;
const UNDO_LIMIT: Duration = Duration::from_secs(20);

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

/// What the switchover brought.
struct Switched {
    totals: StreamTotals,
    digest_match: bool,
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

    /// While the destination looks at itself its hypervisor starts; bytes move after both.
    async fn connect(&mut self) -> Result<(), SourceError> {
        let Order { node, vm, spec, assignment, .. } = &self.order;
        let (node, vm, spec) = (node.clone(), vm.id(), spec.clone());
        let MigrationAssignment { peer_worker, peer_address, .. } = assignment.clone();
        let way = Way { vm, spec: &spec, peer_worker: &peer_worker, peer_address: &peer_address };
        let looked = async { Ok::<_, SourceError>(preflight::look(&node, way).await) };
        let ((), findings) = tokio::try_join!(self.greet(), looked)?;
        match preflight::hindrance(&findings) {
            Some(hindrance) => Err(SourceError::Preflight { hindrance }),
            None => {
                self.warnings = preflight::warnings(findings);
                Ok(())
            }
        }
    }

    async fn greet(&mut self) -> Result<(), SourceError> {
        if !self.order.vm.may_prepare(self.epoch) {
            return Err(SourceError::NotPermitted { record: self.order.vm.status().record });
        }
        let disks = self.disks_as_they_are().map_err(SourceError::Look)?;
        self.told.clone_from(&disks);
        let assignment = &self.order.assignment;
        let connection = self.order.node.endpoint.connect(&assignment.peer_worker, &assignment.peer_address).await?;
        let hello = MigrationHello {
            migration_id: assignment.migration_id.clone(),
            vm_id: assignment.vm_id.clone(),
            epoch: assignment.epoch,
            source_worker: self.order.node.config.name.to_string(),
            kept_from_migration: self
                .kept()
                .and_then(|kept| kept.migration())
                .map_or_else(String::new, |id| id.to_string()),
            disks,
        };
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        self.connection = Some(connection.clone());
        self.control = Some(Control::open(&connection, hello, &traceparent).await?);
        Ok(())
    }

    fn disks_as_they_are(&self) -> Result<Vec<ReplicationDisk>, CopyError> {
        let Order { node, vm, spec, .. } = &self.order;
        let disk = |disk: &DiskSpec| {
            let DiskHello { disk: name, size_bytes, .. } = hello(node, vm.id(), &disk.name)?;
            Ok(ReplicationDisk { name, size_bytes, ..ReplicationDisk::default() })
        };
        tokio::task::block_in_place(|| spec.disks.iter().map(disk).collect())
    }

    async fn sync_disks(&mut self, qemu: &Vm) -> Result<(), SourceError> {
        let order = &self.order;
        let turn = order.node.replications.turn(order.vm.id());
        // A round of replication that is under way makes room; none begins, and no disk changes, until the migration is over.
        self.turn = Some(turn.take_for_migration().await);
        if self.disks_as_they_are().map_err(SourceError::Look)? != self.told {
            return Err(SourceError::DisksChanged);
        }
        let order = &self.order;
        let connection = self.connection.as_ref().ok_or(ControlError::OutOfTurn { expected: "a connection" })?;
        let control = self.control.as_mut().ok_or(ControlError::OutOfTurn { expected: "a connection" })?;
        let copies =
            Disks::start(&order.node, qemu, &order.spec, connection, &order.assignment, order.entry.pace.cap());
        let (copies, offset) = tokio::join!(copies, control.probe_clock(CLOCK_LIMIT));
        let disks = self.disks.insert(copies?);
        self.offset = offset?;
        let entry = &self.order.entry;
        let (started, waited) = (self.started, self.waited_before);
        let ready = disks.wait_ready(DISK_SYNC_LIMIT, |progress| {
            entry.set_progress(MigrationProgress {
                phase: "disk-sync".to_owned(),
                disk_done_bytes: progress.done_bytes,
                disk_total_bytes: progress.total_bytes,
                disk_wan_bytes: progress.wan_bytes,
                rate_bps: progress.rate_bps,
                elapsed_ms: (started.elapsed() + waited).as_millis() as u64,
                waits_for: waits::for_replica(progress.done_bytes, progress.total_bytes),
                ..MigrationProgress::default()
            });
        });
        tokio::pin!(ready);
        // Meanwhile the destination's hypervisor starts; either may be first.
        {
            let admitted = control.admission(ADMIT_LIMIT);
            tokio::pin!(admitted);
            tokio::select! {
                ready = &mut ready => {
                    ready?;
                    self.kept_pages = admitted.await?.kept_pages;
                    return Ok(());
                }
                admitted = &mut admitted => self.kept_pages = admitted?.kept_pages,
            }
        }
        tokio::select! {
            ready = ready => Ok(ready?),
            trouble = control.trouble() => Err(trouble.into()),
        }
    }

    async fn move_memory(&mut self, qemu: &Vm) -> Result<(), SourceError> {
        self.memory_started = Some(Instant::now());
        let record = self.order.vm.step(Event::Authorise(self.epoch)).await?;
        if !matches!(record, Record::Prepared { epoch, .. } if epoch == self.epoch) {
            return Err(SourceError::NotPermitted { record });
        }
        let connection = self.connection.clone().ok_or(ControlError::OutOfTurn { expected: "a connection" })?;
        let auto_converge = if self.order.assignment.can_throttle { AutoConverge::On } else { AutoConverge::Off };
        let socket = stream::begin(qemu, RATE_FLOOR_BYTES_PER_S, auto_converge).await?;
        let disks = self.order.node.views.of(self.order.vm.id(), &self.order.assignment.peer_worker).await;
        // It may have kept another migration's, or a part.
        let kept = self.kept().filter(|kept| kept.count() == self.kept_pages);
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        let migration_id = self.order.assignment.migration_id.clone();
        let (held, keeping) = (Held { disks, kept }, self.begin_keeping());
        let cap = self.order.entry.pace.cap();
        let outgoing =
            Outgoing::start(connection.clone(), &migration_id, &traceparent, socket, held, keeping, cap).await?;
        if let Some(control) = &self.control {
            control.attach(outgoing.answers());
        }
        self.outgoing = Some(outgoing);

        let paused = qemu.wait_migration(MigrationStatus::PreSwitchover, MEMORY_LIMIT);
        tokio::pin!(paused);
        let mut tick = tokio::time::interval(OBSERVE_INTERVAL);
        loop {
            let (Some(control), Some(outgoing)) = (self.control.as_mut(), self.outgoing.as_mut()) else {
                return Err(ControlError::OutOfTurn { expected: "a connection" }.into());
            };
            tokio::select! {
                paused = &mut paused => return Ok(paused?),
                trouble = control.trouble() => return Err(trouble.into()),
                ended = outgoing.sent_all() => return Err(ended.err().unwrap_or(OutgoingError::Ended).into()),
                _ = tick.tick() => self.observe(qemu, &connection).await?,
            }
        }
    }

    /// Tells the hypervisor what the link really carries, and the watchers how it goes.
    async fn observe(&mut self, qemu: &Vm, connection: &PeerConnection) -> Result<(), SourceError> {
        let Some(outgoing) = &self.outgoing else { return Ok(()) };
        let (lately, peak) = outgoing.rates_bytes_per_s();
        let carried = peak.max(lately).max(connection.path_bytes_per_s()).max(RATE_FLOOR_BYTES_PER_S);
        let (disk_lag_bytes, last_increment_bytes) = match &self.disks {
            Some(disks) => (disks.lag_bytes().await?, disks.last_increment_bytes()?),
            None => (0, 0),
        };
        let disk_lag_bytes = disk_lag_bytes + last_increment_bytes;
        let disks_lag = waits::disks_lag(disk_lag_bytes, carried);
        let paused = self.order.entry.pace.is_paused();
        // Planned for nothing, memory does not converge under a guest that writes.
        let planned_bytes_per_s = self.converging.planned_bytes_per_s(carried);
        qemu.set_switchover_bandwidth(if disks_lag || paused { 0 } else { planned_bytes_per_s }).await?;
        let info = qemu.migration_info().await?;
        let Some(ram) = info.ram else { return Ok(()) };
        let hold = paused || waits::holds_memory(ram.remaining, last_increment_bytes);
        if std::mem::replace(&mut self.memory_held, hold) != hold {
            qemu.hold_memory(hold).await?;
        }
        outgoing.set_left(ram.remaining);
        let sent = outgoing.sent();
        let seen = Seen {
            observation: Observation {
                round: ram.dirty_sync_count,
                left_bytes: ram.remaining,
                sent_bytes: ram.sent_bytes(),
                wire_bytes: sent.wire_bytes,
                at: Instant::now(),
            },
            throttle_percent: info.cpu_throttle_percentage.unwrap_or(0),
            planned_bytes_per_s,
            held: hold,
        };
        let convergence = self.converging.observe(qemu, self.order.entry.pace.policy(), seen).await?;
        let sent_bytes_per_s =
            sent.raw_bytes as f64 / self.memory_started.map_or(1.0, |began| began.elapsed().as_secs_f64()).max(0.001);
        let rest_s = ram.remaining as f64 / sent_bytes_per_s.max(1.0);
        let not_converging = convergence.outlook() == Convergence::No;
        let foreseeable = !not_converging && sent_bytes_per_s >= 1.0;
        self.report_progress(Some(MigrationProgress {
            rate_bps: lately * 8,
            remaining_bytes: ram.remaining,
            dirty_rate_bps: ram.dirty_pages_rate * ram.page_size * 8,
            eta_ms: (foreseeable && !paused).then_some((rest_s * 1000.0) as u64),
            not_converging,
            disk_lag_bytes,
            waits_for: match (paused, disks_lag) {
                (true, _) => waits::for_an_operator(),
                (false, true) => waits::for_disks(disk_lag_bytes),
                (false, false) => waits::for_memory(ram.remaining),
            },
            round: ram.dirty_sync_count as u32,
            convergence: Some(convergence),
            ..MigrationProgress::default()
        }));
        Ok(())
    }

    async fn switch_over(&mut self, qemu: &Vm) -> Result<Switched, SourceError> {
        let limit = SWITCHOVER_LIMIT;
        tokio::time::timeout(limit, self.switch_over_in_time(qemu))
            .await
            .map_err(|_| SourceError::TooLong { what: "the switchover", limit })?
    }

    async fn switch_over_in_time(&mut self, qemu: &Vm) -> Result<Switched, SourceError> {
        let stopped = qemu.marks().borrow().stopped.map_or_else(Instant::now, |at| at.received);
        self.downtime_marks.push(("stop", stopped));
        self.order.entry.pace.lift();
        if let Some(disks) = &mut self.disks {
            disks.finish().await?;
        }
        self.mark("disks");
        qemu.continue_switchover().await?;
        let outgoing = self.outgoing.as_mut().ok_or(OutgoingError::Ended)?;
        let totals = outgoing.sent_all().await?;
        self.mark("last-pages");
        let control = self.control.as_mut().ok_or(ControlError::OutOfTurn { expected: "a connection" })?;
        let end =
            StreamEnd { digest: totals.digest.to_vec().into(), batches: totals.batches, raw_bytes: totals.raw_bytes };
        control.send(to_destination::Kind::StreamEnd(end)).await?;
        qemu.wait_migration(MigrationStatus::Completed, SWITCHOVER_LIMIT).await?;
        self.order.vm.step(Event::Paused).await?;
        let ready = control
            .expect("readiness", SWITCHOVER_LIMIT, |kind| match kind {
                to_source::Kind::Ready(ready) => Some(ready),
                _ => None,
            })
            .await?;
        self.mark("ready");
        let digest_match = ready.digest[..] == totals.digest[..];
        if !digest_match || ready.epoch != self.epoch.raw() {
            return Err(SourceError::DigestMismatch);
        }
        let record = self.order.vm.step(Event::Ready(self.epoch)).await?;
        match record {
            Record::Released { epoch } if epoch == self.epoch => {
                self.mark("released");
                Ok(Switched { totals, digest_match })
            }
            record => Err(SourceError::NotPermitted { record }),
        }
    }

    /// Past the commit point: nothing here may fail the move any more.
    async fn hand_over(&mut self, switched: Switched) -> Option<MigrationRecord> {
        let mut status = self.order.vm.watch();
        let resumed = async {
            let control = self.control.as_mut()?;
            control.send(to_destination::Kind::Release(Release { epoch: self.epoch.raw() })).await.ok()?;
            control
                .expect("resumption", Duration::from_secs(3600), |kind| match kind {
                    to_source::Kind::Resumed(resumed) => Some(resumed),
                    _ => None,
                })
                .await
                .inspect_err(|error| tracing::warn!(%error, "the destination is not heard; the controllers relay"))
                .ok()
        };
        let settled_elsewhere = async {
            let settled = status.wait_for(|status| !matches!(status.record, Record::Released { .. })).await;
            settled.is_ok_and(|status| matches!(status.record, Record::Replica { .. }))
        };
        let resumed = {
            let mut resumed = std::pin::pin!(resumed);
            tokio::select! {
                resumed = &mut resumed => resumed,
                // The controllers' relay was quicker than the destination's own word, which carries the figures.
                elsewhere = settled_elsewhere => match elsewhere {
                    true => tokio::time::timeout(FIGURES_LIMIT, resumed).await.ok().flatten(),
                    false => None,
                },
            }
        };
        let Some(resumed) = resumed else {
            // The record leaves `Released` by what the controllers relay.
            let _ = self.order.vm.watch().wait_for(|status| !matches!(status.record, Record::Released { .. })).await;
            self.close("the commit point is passed");
            return None;
        };
        let record = self.record(&switched, resumed.resumed_ns);
        let flat = self.is_flat();
        if let Err(error) = self.order.vm.step(Event::Acquired(self.epoch)).await {
            tracing::error!(%error, "the guest that was handed over could not be ended");
        } else {
            self.keep_memory().await;
            if flat {
                self.keep_as_replica();
            }
        }
        self.close("migration complete");
        tracing::info!(
            total_time_ms = record.total_time_ms,
            memory_time_ms = record.memory_time_ms,
            downtime_ms = record.downtime_ms,
            wan_bytes = record.wan_bytes,
            lost_packets = self.connection.as_ref().map_or(0, PeerConnection::lost_packets),
            "migration complete"
        );
        Some(record)
    }

    /// Before the commit point: the guest goes on here, durably, and nothing is left behind.
    async fn undo(&mut self, why: &SourceError) {
        let reason = crate::error::with_causes(why);
        tracing::warn!(reason, "migration given up; the guest goes on here");
        self.order.entry.gives_up(&reason);
        self.outgoing = None;
        let undone = tokio::time::timeout(UNDO_LIMIT, async {
            if let Ok(qemu) = self.order.vm.qemu().await {
                stream::cancel(&qemu).await;
                // It is still there if the hypervisor did not come in time.
                if let Err(error) = stream::remove_socket(&qemu.paths().outgoing()) {
                    tracing::warn!(%error, "the migration's socket is left behind");
                }
                // Stopped by the hypervisor for the switchover, perhaps without our having taken note.
                if !matches!(qemu.run_state().await, Ok(RunState::Running)) {
                    self.order.vm.step(Event::Paused).await?;
                }
            }
            if let Some(disks) = &mut self.disks {
                disks.cancel().await;
            }
            Ok::<(), VmError>(())
        });
        if !matches!(undone.await, Ok(Ok(()))) {
            tracing::warn!("the hypervisor did not give the migration up in time");
        }
        // Durable first: from here on the destination may never acquire this epoch, then the guest resumes.
        if let Err(error) = self.order.vm.step(Event::Cancel(self.epoch)).await {
            tracing::error!(%error, "the migration could not be revoked; it is tried again");
        }
        if let Some(control) = &mut self.control {
            // The destination may be the reason; then it knows.
            let _ = control.send(to_destination::Kind::Abort(Abort { reason: reason.clone() })).await;
        }
        self.disks = None;
        self.close(&reason);
    }

    fn close(&mut self, reason: &str) {
        if let Some(connection) = &self.connection {
            connection.close(reason);
        }
    }
}
