//! `protect`, `unprotect`, `replication status | scrub` and `link list | set`.

use pageport_proto::v1;
use pageport_proto::v1::ReplicaState;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::replication_service_client::ReplicationServiceClient;

use super::replica::{self, Told};
use super::{Context, ask, follow, now_unix_ms, point, request_id, required};
use crate::error::CtlError;
use crate::render::screen::Screen;
use crate::render::sheet::Sheet;
use crate::render::{progress, protection};
use crate::trace::Traced;

type Fleet = FleetServiceClient<Traced>;
type Replication = ReplicationServiceClient<Traced>;

pub async fn protect(context: &mut Context, request: v1::ProtectVmRequest, watch: bool) -> Result<(), CtlError> {
    let (vm, site) = (request.vm.clone(), request.to_site.clone());
    let response = ask!(context, Replication, protect_vm, request).await?;
    let replica = required(response.replica, "ProtectVm", "replica")?;
    if !watch {
        let line = |replica: &v1::Replica| {
            format!("{}\nhow it stands: pageportctl replication status {vm}", protection::protect_line(&vm, replica))
        };
        return context.output.message(&replica, line);
    }
    let hint = format!("the copy goes on; `pageportctl replication status {vm} --watch` follows it");
    let told = Told { line: progress::first_copy, has_ended, hint };
    let replica = replica::follow(context, &vm, &site, replica, told).await?;
    if replica.protection.is_none() {
        return Err(CtlError::Protection { vm, site, reason: replica.problem });
    }
    if context.output.is_json() {
        // The last line of the stream has said it.
        return Ok(());
    }
    context.output.text(&protection::protect_line(&vm, &replica))
}

/// It has a recovery point, or nobody makes one.
fn has_ended(replica: &v1::Replica) -> bool {
    let complete = ReplicaState::try_from(replica.state) == Ok(ReplicaState::Seeded);
    complete || replica.protection.is_none()
}

pub async fn unprotect(context: &mut Context, vm: String, site: String) -> Result<(), CtlError> {
    let request = v1::UnprotectVmRequest { request_id: request_id(), vm: vm.clone(), site: site.clone() };
    let response = ask!(context, Replication, unprotect_vm, request).await?;
    let line = format!("{vm} is no longer protected at {site}; its replica there stays as it is");
    context.output.message(&response, |_| line)
}

pub async fn scrub(context: &mut Context, vm: String, site: Option<String>, watch: bool) -> Result<(), CtlError> {
    let site = point::site_of(context, &vm, site).await?;
    let request = v1::ScrubReplicaRequest { request_id: request_id(), vm: vm.clone(), site: site.clone() };
    let response = ask!(context, Replication, scrub_replica, request).await?;
    let replica = required(response.replica, "ScrubReplica", "replica")?;
    if !watch {
        return context.output.message(&replica, |replica| protection::scrub_ordered(&vm, replica));
    }
    let hint = format!("the scrub goes on; `pageportctl replication status {vm} --watch` follows it");
    let told = Told { line: progress::scrub, has_ended: is_scrubbed, hint };
    let replica = replica::follow(context, &vm, &site, replica, told).await?;
    if replica.protection.is_none() {
        let reason = "nobody compares it any more".to_owned();
        return Err(CtlError::Protection { vm, site, reason });
    }
    if context.output.is_json() {
        // The last line of the stream has said it.
        return Ok(());
    }
    context.output.text(&protection::scrubbed(&vm, &replica))
}

/// The newest order is carried out, or nobody does that.
fn is_scrubbed(replica: &v1::Replica) -> bool {
    let last = replica.replication.as_ref().and_then(|status| status.last_scrub.as_ref());
    replica.protection.is_none() || last.is_some_and(|last| last.seq >= replica.scrub_seq)
}

pub async fn status(context: &mut Context, vm: Option<String>) -> Result<(), CtlError> {
    let vms = match vm {
        Some(vm) => {
            let response = ask!(context, Fleet, get_vm, v1::GetVmRequest { vm }).await?;
            vec![required(response.vm, "GetVm", "vm")?]
        }
        None => ask!(context, Fleet, list_vms, v1::ListVmsRequest {}).await?.vms,
    };
    let vms = protection::protected(v1::ListVmsResponse { vms, ..Default::default() });
    context.output.message(&vms, |vms| protection::statuses(vms, now_unix_ms()))
}

/// Shows the status until the user has seen enough, which is no failure.
pub async fn watch_status(context: &mut Context, vm: Option<String>) -> Result<(), CtlError> {
    let Context { controllers, output } = context;
    let mut sheet = Sheet::open(*output);
    let mut told = None;
    let open = |channel: Traced| async move { Fleet::new(channel).watch_fleet(v1::WatchFleetRequest {}).await };
    let take = |_: &mut Screen, mut fleet: v1::WatchFleetResponse| {
        if let Some(vm) = &vm {
            let is_it = |found: &v1::Vm| found.id == *vm || found.spec.as_ref().is_some_and(|spec| spec.name == *vm);
            fleet.vms.retain(is_it);
            if fleet.vms.is_empty() {
                return Err(CtlError::Gone { subject: format!("vm {vm}") });
            }
        }
        let vms = protection::protected(v1::ListVmsResponse { vms: fleet.vms, ..Default::default() });
        if !output.is_json() {
            sheet.show(protection::statuses(&vms, now_unix_ms()))?;
        } else if told.as_ref() != Some(&vms) {
            output.message(&vms, |_| String::new())?;
            told = Some(vms);
        }
        Ok(None::<()>)
    };
    match follow::follow(controllers, &mut Screen::open(), "", open, take).await {
        Ok(()) | Err(CtlError::Interrupted { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

pub async fn links(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, Replication, list_links, v1::ListLinksRequest {}).await?;
    context.output.message(&response, protection::links)
}

/// Caps replication over a link.
pub async fn cap(context: &mut Context, link: v1::Link) -> Result<v1::Link, CtlError> {
    let request = v1::SetLinkCapRequest { request_id: request_id(), link: Some(link) };
    let response = ask!(context, Replication, set_link_cap, request).await?;
    required(response.link, "SetLinkCap", "link")
}
