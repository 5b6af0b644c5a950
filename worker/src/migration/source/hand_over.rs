//! Phase `hand-over`: past the commit point. The destination runs the guest, and this one's is ended.

use std::time::Duration;

use pageport_ownership::{Event, Record};
use pageport_proto::v1::{MigrationRecord, Release, to_destination, to_source};

use super::Move;
use super::switchover::Switched;
use crate::transport::PeerConnection;

/// After the controllers have said that the guest runs elsewhere, the destination's word about it has this long; they wait
/// 10 s for the figures.
const FIGURES_LIMIT: Duration = Duration::from_secs(5);

impl Move {
    /// Past the commit point: nothing here may fail the move any more.
    pub(super) async fn hand_over(&mut self, switched: Switched) -> Option<MigrationRecord> {
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
}
