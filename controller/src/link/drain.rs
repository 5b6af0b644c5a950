//! How a site or worker is emptied: who has yet to leave, where each goes, and who cannot. Pure.

use std::collections::BTreeMap;

use pageport_proto::{MigrationId, VmId};
use tokio::time::Instant;

use super::fleet::fleet;
use super::observation::Observations;
use crate::model::migration::Phase;
use crate::model::queue::route;
use crate::model::schedule::{Drain, Spot};
use crate::model::state::{Life, Vm};
use crate::model::{Migration, State};
use crate::scheduler::evacuate::{Evacuation, Leaver, Stay, evacuate};

/// A VM whose move has failed is tried again after this.
const RETRY_MS: i64 = 60_000;

/// How far a drain is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emptying {
    /// Moves that are queued or under way.
    pub migrations: Vec<MigrationId>,
    /// What is to be ordered, and who stays.
    pub plan: Evacuation,
}

/// Looks at every VM of the place.
pub fn emptying(
    state: &State,
    observations: &Observations,
    spot: &Spot,
    drain: &Drain,
    now: Instant,
    unix_ms: i64,
) -> Emptying {
    let mut open: BTreeMap<VmId, MigrationId> = BTreeMap::new();
    let mut last: BTreeMap<VmId, &Migration> = BTreeMap::new();
    // Ids grow with time: the newest comes last.
    for migration in state.migrations.values() {
        if migration.is_over() {
            last.insert(migration.vm, migration);
        } else {
            open.insert(migration.vm, migration.id);
        }
    }
    let mut out = Emptying::default();
    let (mut leavers, mut stay) = (vec![], vec![]);
    for (id, vm) in state.vms.iter().filter(|(_, vm)| is_here(state, vm, spot)) {
        if let Some(migration) = open.get(id) {
            out.migrations.push(*migration);
        } else if let Some(why) = last.get(id).and_then(|last| hindered(last, drain, unix_ms)) {
            stay.push(Stay { vm: *id, why });
        } else {
            leavers.push(leaver(state, *id, vm));
        }
    }
    // A place that is empty stays drained: the whole fleet is not looked at for nobody.
    if !leavers.is_empty() {
        out.plan = evacuate(&fleet(state, observations, now), &leavers, drain.to.as_ref());
    }
    out.plan.stay.extend(stay);
    out.plan.stay.sort_by_key(|stay| stay.vm);
    out
}

fn is_here(state: &State, vm: &Vm, spot: &Spot) -> bool {
    let worker = vm.ownership.owner().0;
    let here = match spot {
        Spot::Site(site) => state.site_of(worker) == Some(site),
        Spot::Worker(name) => worker == name,
    };
    here && vm.life == Life::Defined
}

fn leaver(state: &State, id: VmId, vm: &Vm) -> Leaver {
    let way = |site| route(state, id, site).map(|route| route.to.worker).map_err(|rejection| rejection.to_string());
    Leaver { vm: id, ways: vm.replicas.keys().map(|site| (site.clone(), way(site))).collect() }
}

/// Why a VM is not ordered to leave again, or not yet.
fn hindered(last: &Migration, drain: &Drain, unix_ms: i64) -> Option<String> {
    if last.created_unix_ms < drain.ordered_unix_ms {
        return None;
    }
    match &last.phase {
        Phase::Cancelled { .. } => Some("its migration was cancelled: migrate it by hand, or drain again".to_owned()),
        Phase::Failed { at_unix_ms, reason } if unix_ms.saturating_sub(*at_unix_ms) < RETRY_MS => {
            Some(format!("its migration failed, and is tried again: {reason}"))
        }
        Phase::Failed { .. }
        | Phase::Completed { .. }
        | Phase::Queued
        | Phase::Running { .. }
        | Phase::Released { .. }
        | Phase::Acquired { .. } => None,
    }
}
