//! Runs [`reconcile`](super::reconcile::reconcile), [`schedule`](super::scheduling::schedule) and [`Failovers`] at the leader whenever state or reports change, and
//! proposes what they find.
//!
//! What one look finds is proposed together. An order that fails to commit is simply found again. A look at a large fleet takes long and
//! reports come all the time, so it rests in between, in proportion. Does nothing on other nodes.

use std::sync::Arc;
use std::time::Duration;

use pageport_proto::MigrationId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::failover::{Failovers, Proposed};
use super::leases::Leases;
use super::observation::{Hub, Observations};
use super::reconcile::{Now, reconcile};
use super::scheduling::schedule;
use crate::api::unix_ms;
use crate::consensus::{Consensus, ConsensusError};
use crate::model::{Command, Order, Outcome, State};

/// Some gaps open by time alone.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For each moment of looking, so many of rest: a fleet of any size costs at most a fifth of a processor, and a small one waits for nothing.
const REST: u32 = 4;
/// Orders that are on their way at a time. What clients order comes in between.
const MAX_AT_ONCE: usize = 128;

/// Reconciles until told to stop.
pub async fn drive(consensus: Consensus, hub: Hub, leases: Arc<Leases>, stop: CancellationToken) {
    let mut state = consensus.watch_state();
    let mut status = consensus.watch_status();
    let mut observations = hub.watch();
    let mut takeovers = Failovers::default();
    loop {
        // Before looking: what changes meanwhile wakes the loop again.
        state.mark_unchanged();
        observations.mark_unchanged();
        if status.borrow_and_update().serving {
            let older_leases_out = leases.surely_out_after();
            let mut looked = Duration::ZERO;
            let mut look = |find: &dyn Fn(&State, &Observations, Now) -> Vec<Order>| {
                let now = Now { instant: Instant::now(), unix_ms: unix_ms(), older_leases_out };
                let orders = find(&consensus.applied(), &hub.now(), now);
                looked += now.instant.elapsed();
                orders
            };
            let gaps = look(&reconcile);
            propose(&consensus, gaps).await;
            let decided = look(&|state, observations, now| schedule(state, observations, now, MigrationId::generate));
            propose(&consensus, decided).await;
            take_over(&mut takeovers, &leases, &consensus, &hub).await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep((looked * REST).min(LOOK_EVERY)) => {}
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

async fn take_over(takeovers: &mut Failovers, leases: &Leases, consensus: &Consensus, hub: &Hub) {
    let term = consensus.status().term;
    for order in takeovers.due(leases, term, &consensus.applied(), &hub.now(), Instant::now()) {
        let command = Command { now_unix_ms: unix_ms(), order: Order::TakeOver(order.clone()) };
        let proposed = tell(&command, consensus.propose_in_term(&command, term).await);
        takeovers.settled(leases, order, proposed, Instant::now());
    }
}

async fn propose(consensus: &Consensus, orders: Vec<Order>) {
    let commands: Vec<_> = orders.into_iter().map(|order| Command { now_unix_ms: unix_ms(), order }).collect();
    for some in commands.chunks(MAX_AT_ONCE) {
        for (command, outcome) in some.iter().zip(consensus.propose_all(some).await) {
            tell(command, outcome);
        }
    }
}

fn tell(command: &Command, outcome: Result<Outcome, ConsensusError>) -> Proposed {
    match outcome {
        Ok(Ok(_)) => tracing::info!(order = ?command.order, "recorded"),
        Ok(Err(rejection)) => tracing::warn!(%rejection, order = ?command.order, "not recorded"),
        Err(error) => {
            tracing::info!(%error, "could not be recorded yet");
            if matches!(error, ConsensusError::Unknown | ConsensusError::Stopped) {
                return Proposed::Unknown;
            }
        }
    }
    Proposed::Certain
}
