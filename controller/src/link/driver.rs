//! Runs [`reconcile`](super::reconcile::reconcile) and [`failovers`] at the leader whenever state or reports change, and
//! proposes what they find.
//!
//! An order that fails to commit is simply found again. A VM that is failed over is held until the outcome is certain: an
//! outcome that stays unknown in this term is proposed again (it is idempotent). Does nothing on other nodes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::failover::failovers;
use super::leases::Leases;
use super::observation::Hub;
use super::reconcile::{Now, reconcile};
use crate::api::unix_ms;
use crate::consensus::{Consensus, ConsensusError};
use crate::model::{Command, Order, Outcome, takeover};

/// Some gaps open by time alone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reconciles until told to stop.
pub async fn drive(consensus: Consensus, hub: Hub, leases: Arc<Leases>, stop: CancellationToken) {
    let mut state = consensus.watch_state();
    let mut status = consensus.watch_status();
    let mut observations = hub.watch();
    let mut takeovers = Failovers { leases, term: 0, unsettled: vec![] };
    loop {
        // Before looking: what changes meanwhile wakes the loop again.
        state.mark_unchanged();
        observations.mark_unchanged();
        if status.borrow_and_update().serving {
            let now = Now { instant: Instant::now(), unix_ms: unix_ms() };
            for order in reconcile(&consensus.applied(), &hub.now(), now) {
                propose(&consensus, order).await;
            }
            takeovers.look(&consensus, &hub).await;
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

/// Takes VMs over whose leases have run out.
#[derive(Debug)]
struct Failovers {
    leases: Arc<Leases>,
    term: u64,
    /// Proposed, with an outcome that is not certain yet: their VMs stay held.
    unsettled: Vec<takeover::Order>,
}

impl Failovers {
    async fn look(&mut self, consensus: &Consensus, hub: &Hub) {
        let term = consensus.status().term;
        if term != self.term {
            // The leases of another term hold nothing.
            self.unsettled.clear();
            self.term = term;
        }
        for order in std::mem::take(&mut self.unsettled) {
            self.propose(consensus, order).await;
        }
        let state = consensus.applied();
        for candidate in failovers(&state, &hub.now(), Instant::now()) {
            let Some(vm) = state.vms.get(&candidate.vm) else { continue };
            if self.unsettled.iter().any(|other| other.vm == candidate.vm) {
                continue;
            }
            let proof = self.leases.hold_if_out(term, candidate.vm, vm, &candidate.worker, Instant::now());
            if let Some(proof) = proof {
                self.propose(consensus, candidate.order(proof)).await;
            }
        }
    }

    async fn propose(&mut self, consensus: &Consensus, order: takeover::Order) {
        let command = Command { now_unix_ms: unix_ms(), order: Order::TakeOver(order.clone()) };
        match tell(&command, consensus.propose_in_term(&command, self.term).await) {
            Proposed::Certain => self.leases.let_go(self.term, order.vm, Instant::now()),
            Proposed::Unknown => self.unsettled.push(order),
        }
    }
}

/// Is it known what became of a proposal?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proposed {
    /// It was applied or refused, or never went into the log.
    Certain,
    /// It may yet be applied.
    Unknown,
}

async fn propose(consensus: &Consensus, order: Order) {
    let command = Command { now_unix_ms: unix_ms(), order };
    tell(&command, consensus.propose(&command).await);
}

fn tell(command: &Command, outcome: Result<Outcome, ConsensusError>) -> Proposed {
    match outcome {
        Ok(Ok(_)) => tracing::info!(order = ?command.order, "a report was recorded"),
        Ok(Err(rejection)) => tracing::warn!(%rejection, order = ?command.order, "a report was not recorded"),
        Err(error) => {
            tracing::info!(%error, "a report could not be recorded yet");
            if matches!(error, ConsensusError::Unknown | ConsensusError::Stopped) {
                return Proposed::Unknown;
            }
        }
    }
    Proposed::Certain
}
