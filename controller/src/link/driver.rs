//! Runs [`reconcile`](super::reconcile::reconcile) at the leader whenever state or reports change, and proposes what it
//! finds.
//!
//! An order that fails to commit is simply found again. Does nothing on other nodes.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::observation::Hub;
use super::reconcile::{Now, reconcile};
use crate::api::unix_ms;
use crate::consensus::Consensus;
use crate::model::{Command, Order};

/// Some gaps open by time alone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reconciles until told to stop.
pub async fn drive(consensus: Consensus, hub: Hub, stop: CancellationToken) {
    let mut state = consensus.watch_state();
    let mut status = consensus.watch_status();
    let mut observations = hub.watch();
    loop {
        // Before looking: what changes meanwhile wakes the loop again.
        state.mark_unchanged();
        observations.mark_unchanged();
        if status.borrow_and_update().serving {
            let now = Now { instant: Instant::now(), unix_ms: unix_ms() };
            for order in reconcile(&consensus.applied(), &hub.now(), now) {
                propose(&consensus, order).await;
            }
        }
        let changed = tokio::select! {
            () = stop.cancelled() => return,
            changed = state.changed() => changed,
            changed = observations.changed() => changed,
            changed = status.changed() => changed,
            () = tokio::time::sleep(LOOK_EVERY) => Ok(()),
        };
        if changed.is_err() {
            return;
        }
    }
}

async fn propose(consensus: &Consensus, order: Order) {
    let command = Command { now_unix_ms: unix_ms(), order };
    match consensus.propose(&command).await {
        Ok(Ok(_)) => tracing::info!(order = ?command.order, "a report was recorded"),
        Ok(Err(rejection)) => tracing::warn!(%rejection, order = ?command.order, "a report was not recorded"),
        Err(error) => tracing::info!(%error, "a report could not be recorded yet"),
    }
}
