//! Phase `switchover`: the guest stands still; what is left goes over, and the destination vouches for it. Ends with the
//! commit point.

use std::time::{Duration, Instant};

use pageport_ownership::{Event, Record};
use pageport_proto::v1::{StreamEnd, to_destination, to_source};

use super::{Move, SourceError};
use crate::hypervisor::{MigrationStatus, Vm};
use crate::migration::control::ControlError;
use crate::migration::outgoing::{OutgoingError, StreamTotals};

/// The guest stands still: what is not done by then goes back.
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(30);

/// What the switchover brought.
pub(super) struct Switched {
    pub(super) totals: StreamTotals,
    pub(super) digest_match: bool,
}

impl Move {
    pub(super) async fn switch_over(&mut self, qemu: &Vm) -> Result<Switched, SourceError> {
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
}
