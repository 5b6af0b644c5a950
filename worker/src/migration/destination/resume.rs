//! Phase `resume`: once released, the guest runs here.

use pageport_ownership::{Epoch, Event, Guest, Record};
use pageport_proto::v1::{Refused, Resumed, to_destination, to_source};

use super::admit::Admitted;
use super::{Arrival, DestinationError, RESUME_LIMIT};
use crate::clock::{at_ns, now_ns};
use crate::failpoint;
use crate::hypervisor::Vm;

impl Arrival {
    pub(super) async fn resume(&mut self, admitted: &Admitted) -> Result<(), DestinationError> {
        let Admitted { vm, epoch, qemu, .. } = admitted;
        let mut status = vm.watch();
        let heard = async {
            loop {
                match self.control.recv().await {
                    Some(Ok(to_destination::Kind::Release(release))) => {
                        vm.step(Event::Release(Epoch::from_raw(release.epoch))).await?;
                    }
                    Some(Ok(to_destination::Kind::Abort(abort))) => {
                        // Sent only after the source's revocation was durable.
                        vm.step(Event::Revoked(*epoch)).await?;
                        return Err(DestinationError::SourceAborted { reason: abort.reason });
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => {
                        tracing::warn!("the source is not heard; waiting for the controllers' word");
                        return std::future::pending().await;
                    }
                }
            }
        };
        let settled = status.wait_for(|now| now.volatile.guest != Guest::Loaded(*epoch));
        tokio::select! {
            heard = heard => return heard,
            _ = settled => {}
        }
        let record = vm.status().record;
        match record {
            Record::Own { own, .. } if own == *epoch => {
                failpoint::reach("destination", "acquired").await;
                let resumed_ns = resumed_at(qemu).await?;
                self.say(to_source::Kind::Resumed(Resumed { epoch: epoch.raw(), resumed_ns }));
            }
            _ => {
                let reason = "the image was dropped".to_owned();
                self.say(to_source::Kind::Refused(Refused { epoch: epoch.raw(), reason }));
            }
        }
        Ok(())
    }
}

/// When the guest began to run here, by this worker's clock.
async fn resumed_at(qemu: &Vm) -> Result<u64, DestinationError> {
    let limit = RESUME_LIMIT;
    let mut marks = qemu.marks();
    let resumed = tokio::time::timeout(limit, marks.wait_for(|marks| marks.resumed.is_some())).await;
    let marks = resumed.map_err(|_| DestinationError::TooLong { what: "the guest's resumption", limit })?;
    let at = marks.ok().and_then(|marks| marks.resumed);
    Ok(at.map_or_else(now_ns, |at| at_ns(at.received)))
}
