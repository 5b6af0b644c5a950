//! Phase `disk-sync`: compares clocks and mirrors the disks, while the destination's hypervisor starts.

use std::time::Duration;

use pageport_proto::v1::MigrationProgress;

use super::{Move, SourceError};
use crate::hypervisor::Vm;
use crate::migration::control::ControlError;
use crate::migration::disks::Disks;
use crate::migration::waits;

/// The destination starts a hypervisor and touches all of its memory before it admits.
const ADMIT_LIMIT: Duration = Duration::from_secs(90);
const CLOCK_LIMIT: Duration = Duration::from_secs(5);
/// A full comparison of large disks takes its time; a stalled one is noticed by the disk stream.
const DISK_SYNC_LIMIT: Duration = Duration::from_secs(24 * 3600);

impl Move {
    pub(super) async fn sync_disks(&mut self, qemu: &Vm) -> Result<(), SourceError> {
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
}
