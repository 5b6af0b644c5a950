//! Phase `memory`: streams the guest's memory until the hypervisor has stopped it, and looks meanwhile how that goes.

use std::time::{Duration, Instant};

use pageport_common::telemetry;
use pageport_ownership::{Event, Record};
use pageport_proto::v1::{Convergence, MigrationProgress};

use super::converging::Seen;
use super::{Move, SourceError};
use crate::hypervisor::migrate::AutoConverge;
use crate::hypervisor::{MigrationStatus, Vm};
use crate::migration::control::ControlError;
use crate::migration::convergence::rounds::Observation;
use crate::migration::outgoing::{Held, Outgoing, OutgoingError};
use crate::migration::{stream, waits};
use crate::transport::PeerConnection;

/// Longest move of memory; what becomes sooner of one that does not converge is its policy's.
const MEMORY_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// Between two looks at the hypervisor's figures.
const OBSERVE_INTERVAL: Duration = Duration::from_millis(200);
/// What a link is taken to carry until it has shown more, in bytes per second.
const RATE_FLOOR_BYTES_PER_S: u64 = 1_000_000;

impl Move {
    pub(super) async fn move_memory(&mut self, qemu: &Vm) -> Result<(), SourceError> {
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
}
