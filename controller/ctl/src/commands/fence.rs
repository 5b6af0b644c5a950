//! `worker fence`: followed to its end, since what becomes of each VM is what matters.
//!
//! The request keeps its id when the stream breaks, so that the fence that is under way is joined. After a change of leader
//! the same request makes the new leader run the agent again.

use pageport_proto::v1;
use pageport_proto::v1::fence_worker_request::Action;
use pageport_proto::v1::fence_worker_response::Phase;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;

use super::confirm::ask_for_name;
use super::{Context, follow, request_id};
use crate::error::CtlError;
use crate::render::fence;
use crate::render::screen::Screen;
use crate::trace::Traced;

/// Has the host turned off, and shows what became of its VMs.
pub async fn off(
    context: &mut Context,
    worker: String,
    confirm: Option<String>,
    reason: String,
) -> Result<(), CtlError> {
    let confirm_name = match confirm {
        Some(name) => name,
        None => {
            let warning = format!(
                "The host of {worker} will be turned off. What its VMs wrote since their replicas were last\nsynchronised will be lost."
            );
            ask_for_name("worker", &[warning])?
        }
    };
    let request_id = request_id();
    let action = Action::Off.into();
    let request = v1::FenceWorkerRequest { request_id, worker: worker.clone(), action, confirm_name, reason };
    let hint = format!("the fence of {worker} goes on; `pageportctl vm list` shows what runs where");
    let last = watch(context, request, &hint).await?;
    if last.phase() == Phase::Failed {
        return Err(CtlError::Fence { worker, reason: last.problem });
    }
    if context.output.is_json() { Ok(()) } else { context.output.text(&fence::ended(&last)) }
}

/// Asks the agent whether it could.
pub async fn check(context: &mut Context, worker: String) -> Result<(), CtlError> {
    let request = v1::FenceWorkerRequest {
        request_id: request_id(),
        worker: worker.clone(),
        action: Action::Check.into(),
        ..v1::FenceWorkerRequest::default()
    };
    let last = watch(context, request, "nothing was changed").await?;
    if last.phase() == Phase::Failed {
        return Err(CtlError::FenceCheck { worker, reason: last.problem });
    }
    if context.output.is_json() { Ok(()) } else { context.output.text(&fence::checked(&last)) }
}

async fn watch(
    context: &mut Context,
    request: v1::FenceWorkerRequest,
    hint: &str,
) -> Result<v1::FenceWorkerResponse, CtlError> {
    let Context { controllers, output } = context;
    let output = *output;
    let mut screen = Screen::open();
    let open = |channel: Traced| {
        let request = request.clone();
        async move { FleetServiceClient::new(channel).fence_worker(request).await }
    };
    let take = |screen: &mut Screen, now: v1::FenceWorkerResponse| {
        if output.is_json() {
            output.message(&now, |_| String::new())?;
        } else {
            screen.show(fence::phase(&now), &fence::line(&now));
        }
        Ok(matches!(now.phase(), Phase::Done | Phase::Failed).then_some(now))
    };
    follow::follow(controllers, &mut screen, hint, open, take).await
}
