//! The figures of a migration: as it goes on, and for its record.

use std::time::{Duration, Instant};

use pageport_proto::v1::{MigrationProgress, MigrationRecord, PhaseTiming};

use super::Move;
use super::switchover::Switched;
use crate::clock;
use crate::migration::disks::Disks;
use crate::migration::outgoing::Outgoing;
use crate::migration::page_counts;
use crate::transport::PeerConnection;

impl Move {
    /// What is kept of a migration that is complete.
    pub(super) fn record(&self, switched: &Switched, resumed_ns: u64) -> MigrationRecord {
        let ms = |duration: Duration| duration.as_millis() as u64;
        let since = |moment: Instant| self.offset.between(clock::at_ns(moment), resumed_ns);
        let sent = self.outgoing.as_ref().map(Outgoing::sent).unwrap_or_default();
        let steps = self.downtime_marks.windows(2).map(|pair| PhaseTiming {
            name: pair[1].0.to_owned(),
            duration_ms: ms(pair[1].1.duration_since(pair[0].1)),
        });
        let last = self.downtime_marks.last().map(|(_, at)| since(*at)).unwrap_or_default();
        let hand_over = PhaseTiming { name: "resume".to_owned(), duration_ms: ms(last) };
        let mut phases = self.timings.clone();
        if let Some(current) = phases.last_mut() {
            current.duration_ms = ms(last);
        }
        MigrationRecord {
            total_time_ms: ms(since(self.started) + self.waited_before),
            memory_time_ms: self.memory_started.map_or(0, |began| ms(since(began))),
            downtime_ms: self.downtime_marks.first().map_or(0, |(_, stopped)| ms(since(*stopped))),
            wan_bytes: self.memory_wan_bytes(),
            disk_wan_bytes: self.disks.as_ref().map_or(0, Disks::wan_bytes),
            memory_bytes: switched.totals.raw_bytes,
            pages: Some(page_counts(sent.pages)),
            stream_digest_match: switched.digest_match,
            phases,
            stream_digest: blake3::Hash::from_bytes(switched.totals.digest).to_hex().to_string(),
            downtime_parts: steps.chain([hand_over]).collect(),
            quote: self.quote.clone(),
            warnings: self.warnings.clone(),
            convergence: Some(self.converging.record()),
        }
    }

    /// What the connection sent, but for what the disks' streams had of it.
    fn memory_wan_bytes(&self) -> u64 {
        let sent = self.connection.as_ref().map_or(0, PeerConnection::sent_bytes);
        sent.saturating_sub(self.disks.as_ref().map_or(0, Disks::shared_bytes))
    }

    /// A step of the downtime has ended.
    pub(super) fn mark(&mut self, name: &'static str) {
        self.downtime_marks.push((name, Instant::now()));
    }

    /// What is shown while it goes on.
    pub(super) fn report_progress(&self, live: Option<MigrationProgress>) {
        let sent = self.outgoing.as_ref().map(Outgoing::sent).unwrap_or_default();
        self.order.entry.set_progress(MigrationProgress {
            phase: self.timings.last().map(|timing| timing.name.clone()).unwrap_or_default(),
            pages: Some(page_counts(sent.pages)),
            memory_bytes: sent.raw_bytes,
            wan_bytes: self.memory_wan_bytes(),
            disk_wan_bytes: self.disks.as_ref().map_or(0, Disks::wan_bytes),
            elapsed_ms: (self.started.elapsed() + self.waited_before).as_millis() as u64,
            ..live.unwrap_or_default()
        });
    }
}
