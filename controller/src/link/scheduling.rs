//! [`schedule`]: which commands the scheduler's decisions call for. Pure, but for the ids of new moves, which are passed in.

use pageport_proto::MigrationId;

use super::drain::emptying;
use super::fleet::decisions;
use super::observation::Observations;
use super::reconcile::Now;
use crate::model::schedule::{DrainMove, MAX_DRAINED_AT_ONCE};
use crate::model::{Order, State};
use crate::scheduler::Decision;

/// Moves that one command lets begin; more would be too large for the log.
const MAX_ADMITTED_AT_ONCE: usize = 256;

/// Orders that the scheduler gives now.
pub fn schedule(
    state: &State,
    observations: &Observations,
    now: Now,
    mut next_id: impl FnMut() -> MigrationId,
) -> Vec<Order> {
    let mut orders = vec![];
    let mut ids = vec![];
    for (id, decision) in decisions(state, observations, now.instant, now.unix_ms) {
        match decision {
            Decision::Admit => ids.push(id),
            Decision::GiveUp(why) => orders.push(Order::GiveUp { id, reason: why.to_string() }),
            Decision::Wait(_) => {}
        }
    }
    if !ids.is_empty() {
        ids.truncate(MAX_ADMITTED_AT_ONCE);
        orders.push(Order::Admit { ids, seq: state.schedule.seq });
    }
    for (spot, drain) in state.schedule.drains() {
        let plan = emptying(state, observations, &spot, drain, now.instant, now.unix_ms).plan;
        let leave = plan.leave.into_iter().take(MAX_DRAINED_AT_ONCE);
        let moves: Vec<_> = leave.map(|leave| DrainMove { id: next_id(), vm: leave.vm, site: leave.to }).collect();
        if !moves.is_empty() {
            orders.push(Order::QueueDrain { spot, moves });
        }
    }
    orders
}
