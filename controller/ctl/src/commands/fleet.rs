//! `site list`, `worker list`, `worker pools`, `worker declare-dead`.

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;

use super::confirm::ask_for_name;
use super::{Context, ask, now_unix_ms, request_id};
use crate::error::CtlError;
use crate::render::{lists, pools};
use crate::trace::Traced;

pub async fn sites(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, FleetServiceClient<Traced>, list_sites, v1::ListSitesRequest {}).await?;
    context.output.message(&response, lists::sites)
}

pub async fn workers(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, FleetServiceClient<Traced>, list_workers, v1::ListWorkersRequest {}).await?;
    context.output.message(&response, |response| lists::workers(response, now_unix_ms()))
}

pub async fn pools(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, FleetServiceClient<Traced>, list_workers, v1::ListWorkersRequest {}).await?;
    context.output.message(&response, pools::pools)
}

pub async fn declare_dead(
    context: &mut Context,
    worker: String,
    confirm: Option<String>,
    reason: String,
) -> Result<(), CtlError> {
    let confirm_name = match confirm {
        Some(name) => name,
        None => ask_for_name("worker", &[format!("If {worker} runs a VM all the same, that VM may run twice.")])?,
    };
    let name = worker.clone();
    let request = v1::DeclareWorkerDeadRequest { request_id: request_id(), worker, confirm_name, reason };
    let response = ask!(context, FleetServiceClient<Traced>, declare_worker_dead, request).await?;
    context.output.message(&response, |response| lists::declared_dead(&name, response))
}
