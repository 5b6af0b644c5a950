//! `site list`, `worker list`.

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;

use super::{Context, ask, now_unix_ms};
use crate::error::CtlError;
use crate::render::lists;
use crate::trace::Traced;

pub async fn sites(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, FleetServiceClient<Traced>, list_sites, v1::ListSitesRequest {}).await?;
    context.output.message(&response, lists::sites)
}

pub async fn workers(context: &mut Context) -> Result<(), CtlError> {
    let response = ask!(context, FleetServiceClient<Traced>, list_workers, v1::ListWorkersRequest {}).await?;
    context.output.message(&response, |response| lists::workers(response, now_unix_ms()))
}
