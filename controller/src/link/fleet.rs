//! [`fleet`]: the scheduler's view of state and reports. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use pageport_ownership::Policy;
use pageport_proto::{MigrationId, VmId, WorkerName};
use tokio::time::Instant;

use super::budget;
use super::observation::{self, Observations};
use crate::model::migration::Phase;
use crate::model::queue::route;
use crate::model::state::{Life, Power, Vm, Worker};
use crate::model::{Migration, State};
use crate::scheduler::fleet::{Guest, Host, Limits, Nic, Predecessor, Queued, Running};
use crate::scheduler::{Decision, Fleet, plan};

/// All that the scheduler needs to know.
pub fn fleet(state: &State, observations: &Observations, now: Instant) -> Fleet {
    let limits = state.schedule.limits;
    let defined = || state.vms.iter().filter(|(_, vm)| vm.life == Life::Defined);
    let running = || defined().filter(|(_, vm)| vm.power == Power::Run);
    let addresses = addresses(running().map(|(_, vm)| vm));
    let lines = state.schedule.links().map(|(from, to, _)| ((from.clone(), to.clone()), budget::line(state, from, to)));
    let of_phase = |wanted: fn(&Migration) -> bool| state.migrations.values().filter(move |it| wanted(it));
    Fleet {
        limits: Limits {
            per_worker: limits.per_worker,
            per_link: limits.per_link,
            memory_percent: limits.memory_percent,
        },
        hosts: hosts(state, observations, now),
        lines: lines.collect(),
        guests: running().map(|(id, vm)| (*id, guest(vm, &addresses))).collect(),
        resting: defined().filter(|(_, vm)| vm.power != Power::Run).map(|(id, _)| *id).collect::<BTreeSet<_>>(),
        running: of_phase(Migration::is_under_way).map(|it| (it.id, under_way(it))).collect(),
        queued: of_phase(|it| it.phase == Phase::Queued)
            .map(|it| (it.id, queued(state, observations, now, it)))
            .collect(),
    }
}

/// What becomes of each queued move. Looks at nothing when none is queued.
pub fn decisions(
    state: &State,
    observations: &Observations,
    now: Instant,
    unix_ms: i64,
) -> BTreeMap<MigrationId, Decision> {
    if state.migrations.values().all(|it| it.phase != Phase::Queued) {
        return BTreeMap::new();
    }
    plan(&fleet(state, observations, now), unix_ms)
}

fn hosts(state: &State, observations: &Observations, now: Instant) -> BTreeMap<WorkerName, Host> {
    let host = |(name, worker): (&WorkerName, &Worker)| {
        let host = Host {
            site: worker.site.clone(),
            memory_bytes: worker.memory_total_bytes,
            connected: observations.connected(name, now).is_some(),
            guarded: observations.guarded(name, now),
            drained: state.schedule.is_drained(name, &worker.site),
        };
        (name.clone(), host)
    };
    state.workers.iter().map(host).collect()
}

/// How many have each MAC address.
fn addresses<'a>(vms: impl Iterator<Item = &'a Vm>) -> HashMap<&'a str, usize> {
    let mut counts = HashMap::new();
    for (_, mac) in vms.flat_map(|vm| vm.spec.nics()) {
        *counts.entry(mac).or_default() += 1;
    }
    counts
}

fn guest(vm: &Vm, addresses: &HashMap<&str, usize>) -> Guest {
    let shared = vm.spec.nics().filter(|(_, mac)| addresses.get(mac).is_some_and(|count| *count > 1));
    Guest {
        name: vm.spec.name.clone(),
        worker: vm.ownership.owner().0.clone(),
        memory_bytes: vm.spec.memory_bytes(),
        apart: vm.spec.anti_affinity().clone(),
        fences_itself: vm.spec.on_isolation == Policy::SelfFence,
        shared: shared.map(|(bridge, mac)| Nic { bridge: bridge.to_owned(), mac: mac.to_owned() }).collect(),
    }
}

fn under_way(migration: &Migration) -> Running {
    Running { vm: migration.vm, from: migration.from.worker.clone(), to: migration.to.worker.clone() }
}

fn queued(state: &State, observations: &Observations, now: Instant, migration: &Migration) -> Queued {
    let terms = &migration.terms;
    let way = route(state, migration.vm, &migration.to.site).map_err(|rejection| rejection.to_string());
    let to = way.and_then(|route| {
        if is_up(observations, now, &route.from.worker, migration.vm) {
            Ok(route.to.worker)
        } else {
            Err("it does not run yet".to_owned())
        }
    });
    let predecessor = |id: &MigrationId| match state.migrations.get(id) {
        Some(earlier) => match &earlier.phase {
            Phase::Completed { .. } | Phase::Acquired { .. } => Predecessor::Completed,
            Phase::Failed { .. } | Phase::Cancelled { .. } => Predecessor::Failed,
            Phase::Queued | Phase::Running { .. } | Phase::Released { .. } => {
                Predecessor::Pending { vm: earlier.vm_name.clone() }
            }
        },
        None => Predecessor::Failed,
    };
    Queued {
        vm: migration.vm,
        to,
        ordered_unix_ms: migration.created_unix_ms,
        priority: terms.priority,
        deadline_unix_ms: terms.deadline_unix_ms,
        window: terms.window,
        after: terms.after.iter().map(|id| (*id, predecessor(id))).collect(),
        paused: terms.paused,
    }
}

/// Was its guest last seen up? Nobody says otherwise of a worker that is away: that is another reason to wait.
fn is_up(observations: &Observations, now: Instant, worker: &WorkerName, vm: VmId) -> bool {
    let Some(observed) = observations.connected(worker, now) else { return true };
    observed.vm(vm).is_some_and(observation::is_up)
}
