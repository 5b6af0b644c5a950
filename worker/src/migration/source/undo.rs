//! Undoes a move that has not reached its commit point.

use std::time::Duration;

use pageport_ownership::Event;
use pageport_proto::v1::{Abort, to_destination};

use super::{Move, SourceError};
use crate::hypervisor::RunState;
use crate::migration::stream;
use crate::vms::VmError;

const UNDO_LIMIT: Duration = Duration::from_secs(20);

impl Move {
    /// Before the commit point: the guest goes on here, durably, and nothing is left behind.
    pub(super) async fn undo(&mut self, why: &SourceError) {
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
}
