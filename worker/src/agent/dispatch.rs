//! From an assignment to tasks: one per VM, one per migration of which this worker is the source, one per seed, one per
//! replication.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_ownership::{Epoch, Event, Record};
use pageport_proto::v1::{MigrationAssignment, MigrationRole, VmAssignment, VmSpec, WorkerAssignment};
use pageport_proto::{MigrationId, VmId};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::generation::Generation;
use crate::migration::convergence::policy::Policy;
use crate::migration::pace::Pace;
use crate::migration::source;
use crate::node::Node;
use crate::preflight;
use crate::replica::points::LeaseEnd;
use crate::replica::seed;
use crate::replication::replicators::Replicators;
use crate::vms::VmError;
use crate::vms::converge::{Converged, converge};
use crate::vms::disks::DisksInLine;

/// What did not work is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Follows the assignments for ever.
pub async fn run(node: Arc<Node>, mut assigned: watch::Receiver<Option<WorkerAssignment>>) {
    let mut keepers: HashMap<VmId, Keeper> = HashMap::new();
    let mut replications = Replicators::default();
    loop {
        let assignment = assigned.borrow_and_update().clone();
        if let Some(assignment) = &assignment
            && join(&node, Generation::said(assignment.generation, &assignment.restoration_id)).await
        {
            keep_vms(&node, &mut keepers, assignment);
            for migration in &assignment.migrations {
                drive_migration(&node, assignment, migration).await;
            }
            let named = |id: MigrationId| assignment.migrations.iter().any(|it| it.migration_id == id.to_string());
            node.registry.retain_migrations(named);
            start_seeds(&node, assignment).await;
            replications.follow(&node, assignment);
            node.quotes.follow(&node, &assignment.quotes, |vm| spec_of(assignment, vm));
            for order in node.preflights.take(&assignment.preflights, |order| order.seq) {
                tokio::spawn(preflight::report(node.clone(), order.clone(), spec_of(assignment, &order.vm_id)));
            }
            for removal in &assignment.replica_removals {
                remove_replica(&node, &removal.vm_id).await;
            }
        }
        // What could not be done yet is looked at again, even without news.
        let news = tokio::time::timeout(RETRY_PAUSE, assigned.changed()).await;
        if matches!(news, Ok(Err(_))) {
            return;
        }
    }
}

/// Has every VM join the controllers that this assignment comes from, if they are of a newer generation. `false`: not all have, and
/// what is assigned waits.
async fn join(node: &Node, generation: Generation) -> bool {
    if !node.joined.hears(generation) {
        return false;
    }
    if generation == node.joined.reported() {
        return true;
    }
    tracing::warn!(
        generation = generation.number,
        "the controllers were restored from a backup: older ones are not heard any more"
    );
    if let Err(error) = node.joined.hear(generation) {
        tracing::error!(error = %crate::error::with_causes(&error), "the controllers are not joined");
        return false;
    }
    for vm in node.vms.list() {
        if let Err(error) = vm.join().await {
            tracing::error!(vm_id = %vm.id(), error = %crate::error::with_causes(&error), "the vm does not join yet");
            return false;
        }
    }
    node.joined.settle(generation);
    node.changed.notify_one();
    true
}

/// The task that keeps one VM in line.
struct Keeper {
    wanted: watch::Sender<VmAssignment>,
    _task: AbortOnDropHandle<()>,
}

fn keep_vms(node: &Arc<Node>, keepers: &mut HashMap<VmId, Keeper>, assignment: &WorkerAssignment) {
    let mut named = HashMap::new();
    for wanted in &assignment.vms {
        match wanted.vm_id.parse::<VmId>() {
            Ok(id) => drop(named.insert(id, wanted)),
            Err(error) => tracing::error!(%error, "the controllers name a vm without an id"),
        }
    }
    keepers.retain(|id, _| named.contains_key(id));
    for (id, wanted) in named {
        match keepers.get(&id) {
            Some(keeper) => {
                keeper.wanted.send_if_modified(|held| {
                    let news = held != wanted;
                    *held = wanted.clone();
                    news
                });
            }
            None => {
                let (sender, receiver) = watch::channel(wanted.clone());
                let task = AbortOnDropHandle::new(tokio::spawn(keep(node.clone(), id, receiver)));
                keepers.insert(id, Keeper { wanted: sender, _task: task });
            }
        }
    }
}

async fn keep(node: Arc<Node>, id: VmId, mut assigned: watch::Receiver<VmAssignment>) {
    let (mut was_owned, mut disks) = (true, DisksInLine::default());
    loop {
        let wanted = assigned.borrow_and_update().clone();
        let gone = async {
            // A deleted VM of which nothing is here needs no record to be made for it.
            if wanted.deleted && node.vms.get(id).is_none() {
                return Ok(Converged::Gone);
            }
            let vm = node.vms.get_or_create(id)?;
            converge(&vm, &wanted, node.config.name.as_str(), &node.controllers).await
        };
        match gone.await {
            Ok(Converged::Gone) => {
                node.vms.forget(id);
                node.memory.delete(id);
                node.changed.notify_one();
            }
            Ok(Converged::Kept) => {}
            Err(error) => {
                let problem = crate::error::with_causes(&error);
                tracing::warn!(vm_id = %id, problem, "vm is not as it should be");
                if let Some(vm) = node.vms.get(id) {
                    vm.set_problem(problem);
                }
            }
        }
        let owned = node.vms.get(id).is_some_and(|vm| vm.status().record.owned().is_some());
        if was_owned && !owned {
            // However it left: what was known of its replicas, and of its memory elsewhere, is of no use any more.
            node.views.forget(id).await;
            node.memory.forget_arrived(id);
            node.quotes.forget(id);
        }
        if !was_owned && owned {
            // However it came: what was kept of its memory has been used, or will not be.
            node.memory.delete(id);
        }
        was_owned = owned;
        if let Some(vm) = node.vms.get(id).filter(|_| !wanted.deleted) {
            vm.flatten_what_was_left();
            if let Some(spec) = &wanted.spec {
                disks.follow(&node, &vm, spec).await;
            }
        }
        let mut status = node.vms.get(id).map(|vm| vm.watch());
        let changed = async {
            match &mut status {
                Some(status) => drop(status.changed().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            news = assigned.changed() => if news.is_err() { return },
            () = changed => {}
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

async fn drive_migration(node: &Arc<Node>, assignment: &WorkerAssignment, migration: &MigrationAssignment) {
    let (Ok(id), Ok(vm_id)) = (migration.migration_id.parse::<MigrationId>(), migration.vm_id.parse::<VmId>()) else {
        tracing::error!("the controllers name a migration without ids");
        return;
    };
    let epoch = Epoch::from_raw(migration.epoch);
    let Ok(vm) = node.vms.get_or_create(vm_id) else { return };
    vm.note_whose(epoch, &migration.peer_worker);
    match migration.role() {
        MigrationRole::Source => {
            if let Some(entry) = node.registry.migration(id) {
                set_pace(&entry.pace, migration);
                if migration.cancel || migration.over {
                    entry.cancel.cancel();
                }
                return;
            }
            let Some(spec) = spec_of(assignment, &migration.vm_id) else { return };
            let Some(entry) = node.registry.begin_migration(id, MigrationRole::Source) else { return };
            set_pace(&entry.pace, migration);
            if migration.cancel || migration.over || !vm.may_prepare(epoch) {
                let failure = give_up(&vm, epoch).await;
                entry.end(Err(failure));
                return;
            }
            let order =
                source::Order { node: node.clone(), vm, spec, assignment: migration.clone(), entry: entry.clone() };
            tokio::spawn(async move {
                let outcome = source::run(order).await;
                entry.end(outcome.map_err(|error| crate::error::with_causes(&error)));
            });
        }
        // The destination's work begins when the source calls; here only what is left is cleaned up.
        MigrationRole::Destination if migration.over => {
            if matches!(vm.status().record, Record::Replica { .. })
                && let Err(error) = vm.step(Event::Revoked(epoch)).await
            {
                tracing::warn!(%error, "the image of a migration that is over could not be dropped");
                return;
            }
            if let Some(entry) = node.registry.begin_migration(id, MigrationRole::Destination) {
                entry.end(Ok(None));
            }
        }
        MigrationRole::Destination | MigrationRole::Unspecified => {}
    }
}

fn set_pace(pace: &Pace, told: &MigrationAssignment) {
    // A hypervisor that can slow its guest down is held back at its own rate: held up at its socket, it would hold up the guest.
    let rate_bps = if told.paused && told.can_throttle { 0 } else { told.rate_bps };
    pace.set(rate_bps, told.paused);
    pace.set_policy(Policy::told(told.convergence(), told.longest_pause_ms));
}

/// A move that this worker does not (or, after a restart, no longer) carry out as its source.
async fn give_up(vm: &Arc<crate::vms::ManagedVm>, epoch: Epoch) -> String {
    let before = vm.status();
    match vm.step(Event::Cancel(epoch)).await {
        Err(error) => crate::error::with_causes(&error),
        Ok(Record::Own { .. }) if before.volatile.guest == pageport_ownership::Guest::Running => {
            "the source worker restarted or was told to cancel before the migration began".to_owned()
        }
        Ok(_) => "the vm does not run at its source".to_owned(),
    }
}

fn spec_of(assignment: &WorkerAssignment, vm_id: &str) -> Option<VmSpec> {
    assignment.vms.iter().find(|vm| vm.vm_id == vm_id)?.spec.clone()
}

async fn start_seeds(node: &Arc<Node>, assignment: &WorkerAssignment) {
    node.registry.retain_seeds(|vm, site| {
        assignment.seeds.iter().any(|seed| seed.vm_id == vm.to_string() && seed.to_site == site)
    });
    for order in &assignment.seeds {
        let Ok(vm_id) = order.vm_id.parse::<VmId>() else { continue };
        let (Some(vm), Some(spec)) = (node.vms.get(vm_id), spec_of(assignment, &order.vm_id)) else { continue };
        node.caps.towards(&order.to_site).set(order.cap_bps);
        let Some(entry) = node.registry.begin_seed(vm_id, &order.to_site, order.seed_seq) else { continue };
        tokio::spawn(seed::run(node.clone(), vm, spec, order.clone(), entry));
    }
}

async fn remove_replica(node: &Arc<Node>, vm_id: &str) {
    let Ok(id) = vm_id.parse::<VmId>() else { return };
    let replica = node.vms.get(id).is_none_or(|vm| matches!(vm.status().record, Record::Replica { .. }));
    if !replica {
        tracing::error!(vm_id, "told to remove the replica of a vm that this worker may run; it stays");
        return;
    }
    node.flattenings.end(id).await;
    node.memory.delete(id);
    let removed = tokio::task::block_in_place(|| -> Result<(), VmError> {
        node.groups.forget(id, &LeaseEnd::Removed)?;
        Ok(node.replicas.remove(id)?)
    });
    if let Err(error) = removed {
        tracing::warn!(vm_id, error = %crate::error::with_causes(&error), "replica not removed");
    }
    node.changed.notify_one();
}
