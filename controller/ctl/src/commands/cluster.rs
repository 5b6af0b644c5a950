//! `cluster status | backup | add | remove | transfer-leader`. For `cluster restore` see [`super::restore`].
//!
//! None needs a request id: an order that is given again finds what is done already.

use std::path::Path;

use pageport_common::backup::{self, Assembly};
use pageport_proto::v1;
use pageport_proto::v1::add_member_response::Phase;
use pageport_proto::v1::cluster_service_client::ClusterServiceClient;
use pageport_proto::v1::membership_service_client::MembershipServiceClient;

use super::{Context, ask, follow, restore};
use crate::cli::ClusterCommand;
use crate::error::CtlError;
use crate::render::cluster;
use crate::render::screen::Screen;
use crate::trace::Traced;

/// A part of a backup has one MiB.
const MAX_PART_BYTES: usize = 4 << 20;

pub async fn run(context: &mut Context, command: ClusterCommand) -> Result<(), CtlError> {
    match command {
        ClusterCommand::Status => status(context).await,
        ClusterCommand::Backup { file, replace } => backup(context, &file, replace).await,
        // Without an address it asks nobody, and never comes here.
        ClusterCommand::Restore { file, .. } => restore::there(context, &file).await,
        ClusterCommand::Add { id, site, address } => add(context, v1::AddMemberRequest { id, site, address }).await,
        ClusterCommand::Remove { id, force } => remove(context, v1::RemoveMemberRequest { id, force }).await,
        ClusterCommand::TransferLeader { member } => transfer_leader(context, member).await,
    }
}

async fn status(context: &mut Context) -> Result<(), CtlError> {
    let request = v1::GetClusterStatusRequest {};
    let response = ask!(context, ClusterServiceClient<Traced>, get_cluster_status, request).await?;
    context.output.message(&response, cluster::status)
}

async fn add(context: &mut Context, request: v1::AddMemberRequest) -> Result<(), CtlError> {
    let Context { controllers, output } = context;
    let output = *output;
    let id = request.id;
    let hint =
        format!("controller {id} does not vote yet: the same command goes on, `cluster remove {id}` takes it back");
    let mut screen = Screen::open();
    let open = |channel: Traced| {
        let request = request.clone();
        async move { MembershipServiceClient::new(channel).add_member(request).await }
    };
    let take = |screen: &mut Screen, now: v1::AddMemberResponse| {
        if output.is_json() {
            output.message(&now, |_| String::new())?;
        } else if now.phase() == Phase::CatchingUp {
            screen.show("catching up", &cluster::catching_up(id, &now));
        }
        Ok((now.phase() == Phase::Done).then_some(now))
    };
    let done = follow::follow(controllers, &mut screen, &hint, open, take).await?;
    if output.is_json() { Ok(()) } else { output.text(&cluster::added(id, &done.members)) }
}

async fn backup(context: &mut Context, file: &Path, replace: bool) -> Result<(), CtlError> {
    let failed = |source| CtlError::Backup { path: file.to_owned(), source };
    if !replace && file.try_exists().map_err(failed)? {
        return Err(CtlError::BackupThere { path: file.to_owned() });
    }
    let Context { controllers, output } = context;
    let mut screen = Screen::open();
    let open = |channel: Traced| async move {
        let client = MembershipServiceClient::new(channel);
        client.max_decoding_message_size(MAX_PART_BYTES).backup(v1::BackupRequest {}).await
    };
    let mut assembly = Assembly::default();
    let take = |_: &mut Screen, part: v1::BackupResponse| {
        if part.offset == 0 {
            // The stream was opened again.
            assembly = Assembly::default();
        }
        let taken = assembly.take(part.offset, &part.chunk, part.total_bytes);
        taken.map_err(|_| CtlError::Incomplete { operation: "cluster backup", field: "next part" })?;
        Ok(if assembly.is_whole() { std::mem::take(&mut assembly).into_file() } else { None })
    };
    let bytes = follow::follow(controllers, &mut screen, "nothing was written", open, take).await?;
    backup::open(&bytes).map_err(CtlError::BackupDamaged)?;
    backup::write(file, &bytes, replace).map_err(failed)?;
    let size_bytes = bytes.len() as u64;
    if output.is_json() {
        let line = serde_json::json!({ "file": file.display().to_string(), "size_bytes": size_bytes });
        return output.text(&format!("{line}\n"));
    }
    output.text(&cluster::backed_up(file, size_bytes))
}

async fn remove(context: &mut Context, request: v1::RemoveMemberRequest) -> Result<(), CtlError> {
    let id = request.id;
    let response = ask!(context, MembershipServiceClient<Traced>, remove_member, request).await?;
    context.output.message(&response, |response| cluster::removed(id, &response.members))
}

async fn transfer_leader(context: &mut Context, member: Option<u64>) -> Result<(), CtlError> {
    let request = v1::TransferLeadershipRequest { to: member.unwrap_or_default() };
    let response = ask!(context, MembershipServiceClient<Traced>, transfer_leadership, request).await?;
    context.output.message(&response, cluster::transferred)
}
