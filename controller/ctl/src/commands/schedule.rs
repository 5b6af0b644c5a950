//! `scheduler get | set`, `link set`, `site drain | undrain` and `worker drain | undrain`.

use pageport_proto::v1;
use pageport_proto::v1::schedule_service_client::ScheduleServiceClient;

use super::{Context, ask, follow, protection, request_id, required};
use crate::error::CtlError;
use crate::quantity::Cap;
use crate::render::schedule;
use crate::render::screen::Screen;
use crate::terms::{DrainArgs, SchedulerCommand};
use crate::trace::Traced;

type Schedules = ScheduleServiceClient<Traced>;

pub async fn run(context: &mut Context, command: SchedulerCommand) -> Result<(), CtlError> {
    let (limits, operation) = match command {
        SchedulerCommand::Get => {
            (ask!(context, Schedules, get_limits, v1::GetLimitsRequest {}).await?.limits, "GetLimits")
        }
        SchedulerCommand::Set { per_worker, per_link, memory_percent } => {
            let request = v1::SetLimitsRequest {
                request_id: request_id(),
                migrations_per_worker: per_worker,
                migrations_per_link: per_link,
                memory_percent,
            };
            (ask!(context, Schedules, set_limits, request).await?.limits, "SetLimits")
        }
    };
    context.output.message(&required(limits, operation, "limits")?, schedule::limits)
}

/// Sets what was named of a link, and shows it.
pub async fn set_link(
    context: &mut Context,
    (from, to): (String, String),
    cap: Option<Cap>,
    budget: Option<Cap>,
    migrations: Option<u32>,
) -> Result<(), CtlError> {
    let mut link = None;
    if budget.is_some() || migrations.is_some() {
        let request = v1::SetLinkLimitsRequest {
            request_id: request_id(),
            from_site: from.clone(),
            to_site: to.clone(),
            budget_bps: budget.map(|budget| budget.0),
            migrations,
        };
        link = ask!(context, Schedules, set_link_limits, request).await?.link;
    }
    if let Some(cap) = cap {
        let asked = v1::Link { from_site: from, to_site: to, cap_bps: cap.0, ..v1::Link::default() };
        link = Some(protection::cap(context, asked).await?);
    }
    context.output.message(&required(link, "SetLinkLimits", "link")?, schedule::link_line)
}

/// Begins to empty a place, or shows how it would be.
pub async fn drain(context: &mut Context, spot: v1::Spot, args: DrainArgs) -> Result<(), CtlError> {
    let DrainArgs { to, priority, dry_run, watch } = args;
    let request = v1::DrainRequest {
        request_id: request_id(),
        spot: Some(spot.clone()),
        to_site: to.unwrap_or_default(),
        priority,
        dry_run,
    };
    let status = ask!(context, Schedules, drain, request).await?.status;
    let status = required(status, "Drain", "status")?;
    if watch {
        return self::watch(context, spot).await;
    }
    context.output.message(&status, schedule::drain)
}

/// Follows a drain until nothing more can leave.
async fn watch(context: &mut Context, spot: v1::Spot) -> Result<(), CtlError> {
    let Context { controllers, output } = context;
    let hint = format!("the drain goes on; end it: pageportctl {}", schedule::undrain_command(&spot));
    let open = |channel: Traced| {
        let request = v1::WatchDrainRequest { spot: Some(spot.clone()) };
        async move { Schedules::new(channel).watch_drain(request).await }
    };
    let take = |screen: &mut Screen, response: v1::WatchDrainResponse| {
        let status = required(response.status, "WatchDrain", "status")?;
        if output.is_json() {
            output.message(&status, |_| String::new())?;
        } else {
            screen.show("drain", &schedule::drain_line(&status));
        }
        Ok(status.done.then_some(status))
    };
    let status = follow::follow(controllers, &mut Screen::open(), &hint, open, take).await?;
    if output.is_json() {
        // The last line of the stream has said it.
        return Ok(());
    }
    output.text(&schedule::drain(&status))
}

/// Ends that a place is emptied.
pub async fn undrain(context: &mut Context, spot: v1::Spot) -> Result<(), CtlError> {
    let request = v1::UndrainRequest { request_id: request_id(), spot: Some(spot.clone()) };
    let response = ask!(context, Schedules, undrain, request).await?;
    let line = format!("{} is no longer being drained; migrations that are under way go on", schedule::spot(&spot));
    context.output.message(&response, |_| line)
}
