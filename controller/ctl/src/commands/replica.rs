//! `replica seed | list | delete`.
//!
//! A seed is followed in the fleet's stream, where the VM carries its replicas.

use pageport_proto::v1;
use pageport_proto::v1::ReplicaState;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::replication_service_client::ReplicationServiceClient;

use super::{Context, ask, follow, request_id, required};
use crate::cli::ReplicaCommand;
use crate::error::CtlError;
use crate::render::screen::Screen;
use crate::render::{lists, progress, units, words};
use crate::trace::Traced;

type Replication = ReplicationServiceClient<Traced>;

pub async fn run(context: &mut Context, command: ReplicaCommand) -> Result<(), CtlError> {
    match command {
        ReplicaCommand::Seed { vm, to, watch } => seed(context, vm, to, watch).await,
        ReplicaCommand::List { vm } => {
            let response = ask!(context, Replication, list_replicas, v1::ListReplicasRequest { vm }).await?;
            context.output.message(&response, lists::replicas)
        }
        ReplicaCommand::Delete { vm, site } => {
            let request = v1::DeleteReplicaRequest { request_id: request_id(), vm: vm.clone(), site: site.clone() };
            let response = ask!(context, Replication, delete_replica, request).await?;
            context.output.message(&response, |_| format!("the replica of {vm} at {site}: its files are being removed"))
        }
    }
}

async fn seed(context: &mut Context, vm: String, site: String, watch: bool) -> Result<(), CtlError> {
    let request = v1::SeedReplicaRequest { request_id: request_id(), vm: vm.clone(), to_site: site.clone() };
    let response = ask!(context, Replication, seed_replica, request).await?;
    let replica = required(response.replica, "SeedReplica", "replica")?;
    if !watch {
        let line =
            |replica: &v1::Replica| format!("the replica of {vm} at {site}: {}", words::replica_state(replica.state));
        return context.output.message(&replica, line);
    }
    let hint = format!("the copy goes on; `pageportctl replica list {vm}` shows it");
    let told = Told { line: progress::seed, has_ended, hint };
    let replica = follow(context, &vm, &site, replica, told).await?;
    if ReplicaState::try_from(replica.state) == Ok(ReplicaState::Failed) {
        return Err(CtlError::Seed { vm, site, reason: replica.problem });
    }
    if context.output.is_json() {
        // The last line of the stream has said it.
        return Ok(());
    }
    let (looked_at, sent) = (units::bytes(replica.total_bytes), units::bytes(replica.wan_bytes));
    context.output.text(&format!("the replica of {vm} at {site} is seeded: {looked_at} looked at, {sent} sent"))
}

/// How a replica that is followed is told of.
pub struct Told {
    /// The line that says how far it is.
    pub line: fn(&v1::Replica) -> String,
    /// Is there nothing more to wait for?
    pub has_ended: fn(&v1::Replica) -> bool,
    /// What an interrupted user is told.
    pub hint: String,
}

/// Follows a replica until it is done with, and returns it as it then is.
pub async fn follow(
    context: &mut Context,
    vm: &str,
    site: &str,
    first: v1::Replica,
    told: Told,
) -> Result<v1::Replica, CtlError> {
    let Told { line, has_ended, hint } = told;
    let Context { controllers, output } = context;
    let output = *output;
    let mut screen = Screen::open();
    let mut shown = None;
    let mut show = |screen: &mut Screen, replica: &v1::Replica| {
        if !output.is_json() {
            screen.show(words::replica_state(replica.state), &line(replica));
        } else if shown.as_ref() != Some(replica) {
            // The fleet changes for other reasons too.
            output.message(replica, |_| String::new())?;
            shown = Some(replica.clone());
        }
        Ok::<_, CtlError>(())
    };
    show(&mut screen, &first)?;
    if has_ended(&first) {
        return Ok(first);
    }
    let open =
        |channel: Traced| async move { FleetServiceClient::new(channel).watch_fleet(v1::WatchFleetRequest {}).await };
    let take = |screen: &mut Screen, fleet: v1::WatchFleetResponse| {
        let gone = || CtlError::Gone { subject: format!("the replica of {vm} at {site}") };
        let replica = find(&fleet, vm, site).ok_or_else(gone)?;
        show(screen, replica)?;
        Ok(has_ended(replica).then(|| replica.clone()))
    };
    follow::follow(controllers, &mut screen, &hint, open, take).await
}

fn has_ended(replica: &v1::Replica) -> bool {
    match ReplicaState::try_from(replica.state) {
        Ok(ReplicaState::Seeded | ReplicaState::Failed | ReplicaState::Outdated) => true,
        Ok(ReplicaState::Seeding | ReplicaState::Unspecified) | Err(_) => false,
    }
}

fn find<'a>(fleet: &'a v1::WatchFleetResponse, vm: &str, site: &str) -> Option<&'a v1::Replica> {
    let is_it = |found: &&v1::Vm| found.id == vm || found.spec.as_ref().is_some_and(|spec| spec.name == vm);
    fleet.vms.iter().find(is_it)?.replicas.iter().find(|replica| replica.site == site)
}
