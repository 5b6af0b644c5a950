//! What may be sent over a link now, by each move and by replication: pure functions of the committed state.
//!
//! Moves share the link's budget ([`crate::scheduler::rates`]); replication gets what they leave, at least its reserve, and never more
//! than its cap. Workers keep replication's part each by itself, so it is divided among those that replicate over the link.

use std::collections::{BTreeMap, BTreeSet};

use pageport_proto::{MigrationId, SiteName, WorkerName};

use crate::model::protection::MIN_CAP_BPS;
use crate::model::state::{Life, Replica, ReplicaPhase};
use crate::model::{Migration, State};
use crate::scheduler::fleet::Line;
use crate::scheduler::rates::{PAUSED_BPS, RESERVE_PERCENT, shares};

/// The link, as the scheduler sees it.
pub fn line(state: &State, from: &SiteName, to: &SiteName) -> Line {
    let limits = state.schedule.link(from, to);
    let wanted_bps = limits.budget_bps / 100 * RESERVE_PERCENT;
    let reserved_bps = match (limits.budget_bps, state.links.cap_bps(from, to)) {
        (0, _) => 0,
        _ if replicators(state, from, to).is_empty() => 0,
        (_, 0) => wanted_bps,
        (_, cap_bps) => wanted_bps.min(cap_bps),
    };
    Line { budget_bps: limits.budget_bps, reserved_bps, migrations: limits.migrations }
}

/// Workers that replicate or seed over the link.
fn replicators<'a>(state: &'a State, from: &SiteName, to: &SiteName) -> BTreeSet<&'a WorkerName> {
    let copied = |replica: &Replica| replica.protection.is_some() || replica.phase == ReplicaPhase::Seeding;
    let of_link = state.vms.values().filter(|vm| {
        vm.life == Life::Defined && vm.replicas.get(to).is_some_and(copied) && state.site_of_vm(vm) == Some(from)
    });
    of_link.map(|vm| vm.ownership.owner().0).collect()
}

fn under_way<'a>(state: &'a State, from: &'a SiteName, to: &'a SiteName) -> impl Iterator<Item = &'a Migration> {
    state.migrations.values().filter(move |it| it.is_under_way() && it.from.site == *from && it.to.site == *to)
}

/// What each move that is under way on the link may send, in bits per second; 0: no bound.
pub fn rates(state: &State, from: &SiteName, to: &SiteName) -> BTreeMap<MigrationId, u64> {
    let (paused, running): (Vec<_>, Vec<_>) = under_way(state, from, to).partition(|it| it.terms.paused);
    let asked = running.into_iter().map(|it| (it.id, it.terms.rate_bps)).collect();
    let mut rates = shares(&line(state, from, to), &asked);
    rates.extend(paused.into_iter().map(|it| (it.id, PAUSED_BPS)));
    rates
}

/// What one move may send now, in bits per second; 0: no bound, or it is not under way.
pub fn rate_bps(state: &State, migration: &Migration) -> u64 {
    if !migration.is_under_way() {
        return 0;
    }
    rates(state, &migration.from.site, &migration.to.site).get(&migration.id).copied().unwrap_or_default()
}

/// What one worker's replication and seeds may send over the link, in bits per second; 0: no cap.
pub fn replication_bps(state: &State, from: &SiteName, to: &SiteName) -> u64 {
    let cap_bps = state.links.cap_bps(from, to);
    let budget_bps = state.schedule.link(from, to).budget_bps;
    if budget_bps == 0 {
        return cap_bps;
    }
    let moves_bps: u64 = rates(state, from, to).values().sum();
    let workers = replicators(state, from, to).len().max(1) as u64;
    let part_bps = (budget_bps.saturating_sub(moves_bps) / workers).max(MIN_CAP_BPS);
    if cap_bps == 0 { part_bps } else { part_bps.min(cap_bps) }
}
