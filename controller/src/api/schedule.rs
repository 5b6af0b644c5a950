//! What the scheduler is told: limits, links, and what is to be emptied; and how that stands.

use pageport_proto::v1;
use pageport_proto::v1::schedule_service_server::ScheduleService;
use pageport_proto::v1::spot::Place;
use tonic::{Request, Response, Status};

use super::error::ApiError;
use super::replication::link;
use super::watch::{View, Views, views};
use super::{Api, Moment, echo, request_id, unix_ms};
use crate::link::drain::emptying;
use crate::model::command::ClientOrder;
use crate::model::schedule::{
    Drain, Limits, LinkLimits, Spot, valid_memory_percent, valid_priority, valid_rate, valid_slots,
};
use crate::model::{Rejection, State};
use crate::scheduler::plan::DEFAULT_PRIORITY;

type Reply<T> = Result<Response<T>, Status>;

fn limits(state: &State) -> Option<v1::Limits> {
    let Limits { per_worker, per_link, memory_percent } = state.schedule.limits;
    Some(v1::Limits { migrations_per_worker: per_worker, migrations_per_link: per_link, memory_percent })
}

fn told(spot: &Spot) -> v1::Spot {
    let place = match spot {
        Spot::Site(site) => Place::Site(site.to_string()),
        Spot::Worker(worker) => Place::Worker(worker.to_string()),
    };
    v1::Spot { place: Some(place) }
}

impl Moment {
    fn spot(&self, asked: Option<v1::Spot>) -> Result<Spot, ApiError> {
        let missing = ApiError::Missing { field: "spot", fix: "name a site or a worker" };
        match asked.and_then(|spot| spot.place).ok_or(missing)? {
            Place::Site(site) => Ok(Spot::Site(self.site(&site)?)),
            Place::Worker(name) => {
                let known = self.state.workers.keys().find(|worker| worker.as_str() == name).cloned();
                // An echo that is no name could not be a worker's either.
                let unknown = || match echo(&name).parse() {
                    Ok(worker) => ApiError::from(Rejection::WorkerUnknown { worker }),
                    Err(source) => ApiError::BadId { field: "worker", source },
                };
                known.map(Spot::Worker).ok_or_else(unknown)
            }
        }
    }

    /// How a drain stands, or would.
    fn drain_status(&self, spot: &Spot, drain: &Drain, ordered: bool) -> v1::DrainStatus {
        let standing = emptying(&self.state, &self.observations, spot, drain, self.now, unix_ms());
        let vm = |id| self.state.vms.get(id);
        let name = |id| vm(id).map(|vm| vm.spec.name.clone()).unwrap_or_default();
        let planned = standing.plan.leave.iter().map(|leave| v1::DrainMove {
            vm_id: leave.vm.to_string(),
            vm_name: name(&leave.vm),
            to_site: leave.to.to_string(),
            to_worker: leave.worker.to_string(),
            memory_bytes: vm(&leave.vm).map_or(0, |vm| vm.spec.memory_bytes()),
        });
        let stays = standing.plan.stay.iter().map(|stay| v1::DrainStay {
            vm_id: stay.vm.to_string(),
            vm_name: name(&stay.vm),
            reason: stay.why.clone(),
        });
        let migrations = standing.migrations.iter().filter_map(|id| self.state.migrations.get(id));
        v1::DrainStatus {
            spot: Some(told(spot)),
            to_site: drain.to.as_ref().map(ToString::to_string).unwrap_or_default(),
            priority: drain.priority.into(),
            ordered_unix_ms: if ordered { drain.ordered_unix_ms } else { 0 },
            moved: drain.moved,
            migrations: migrations.map(|migration| self.migration(migration)).collect(),
            planned: planned.collect(),
            stays: stays.collect(),
            done: standing.migrations.is_empty() && standing.plan.leave.is_empty(),
        }
    }
}

impl Api {
    async fn set_limits(&self, request: v1::SetLimitsRequest) -> Result<Option<v1::Limits>, ApiError> {
        let id = request_id(&request.request_id)?;
        let held = self.read().await?.state.schedule.limits;
        let limits_asked = Limits {
            per_worker: request.migrations_per_worker.map_or(Ok(held.per_worker), valid_slots)?,
            per_link: request.migrations_per_link.map_or(Ok(held.per_link), valid_slots)?,
            memory_percent: request.memory_percent.map_or(Ok(held.memory_percent), valid_memory_percent)?,
        };
        let (_, after) = self.order(id, ClientOrder::SetLimits { limits: limits_asked }).await?;
        Ok(limits(&after.state))
    }

    async fn set_link_limits(&self, request: v1::SetLinkLimitsRequest) -> Result<v1::Link, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (from, to) = (moment.site(&request.from_site)?, moment.site(&request.to_site)?);
        let held = moment.state.schedule.link(&from, &to);
        let migrations = match request.migrations {
            None => held.migrations,
            Some(0) => 0,
            Some(count) => valid_slots(count)?,
        };
        let budget_bps = request.budget_bps.map_or(Ok(held.budget_bps), |bps| valid_rate("a link's budget", bps))?;
        let limits = LinkLimits { budget_bps, migrations };
        let order = ClientOrder::SetLinkLimits { from: from.clone(), to: to.clone(), limits };
        let (_, after) = self.order(id, order).await?;
        Ok(link(&after.state, &from, &to))
    }

    async fn drain_spot(&self, request: v1::DrainRequest) -> Result<v1::DrainStatus, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let spot = moment.spot(request.spot)?;
        let to = Some(&request.to_site).filter(|to| !to.is_empty()).map(|to| moment.site(to)).transpose()?;
        let priority = valid_priority(request.priority.unwrap_or(DEFAULT_PRIORITY.into()))?;
        let order = ClientOrder::Drain { spot: spot.clone(), to, priority };
        let after = if request.dry_run {
            self.rehearsed(&moment, id, &order)?.unwrap_or(moment)
        } else {
            self.order(id, order).await?.1
        };
        let drain = after.state.schedule.drain(&spot).ok_or_else(|| Rejection::NotDrained { spot: spot.clone() })?;
        Ok(after.drain_status(&spot, drain, !request.dry_run))
    }
}

#[tonic::async_trait]
impl ScheduleService for Api {
    async fn get_limits(&self, _: Request<v1::GetLimitsRequest>) -> Reply<v1::GetLimitsResponse> {
        Ok(Response::new(v1::GetLimitsResponse { limits: limits(&self.read().await?.state) }))
    }

    async fn set_limits(&self, request: Request<v1::SetLimitsRequest>) -> Reply<v1::SetLimitsResponse> {
        let limits = Api::set_limits(self, request.into_inner()).await?;
        Ok(Response::new(v1::SetLimitsResponse { limits }))
    }

    async fn set_link_limits(&self, request: Request<v1::SetLinkLimitsRequest>) -> Reply<v1::SetLinkLimitsResponse> {
        let link = Api::set_link_limits(self, request.into_inner()).await?;
        Ok(Response::new(v1::SetLinkLimitsResponse { link: Some(link) }))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Reply<v1::DrainResponse> {
        let status = self.drain_spot(request.into_inner()).await?;
        Ok(Response::new(v1::DrainResponse { status: Some(status) }))
    }

    async fn undrain(&self, request: Request<v1::UndrainRequest>) -> Reply<v1::UndrainResponse> {
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let spot = self.read().await?.spot(request.spot)?;
        self.order(id, ClientOrder::Undrain { spot }).await?;
        Ok(Response::new(v1::UndrainResponse {}))
    }

    type WatchDrainStream = Views<v1::WatchDrainResponse>;

    async fn watch_drain(&self, request: Request<v1::WatchDrainRequest>) -> Reply<Self::WatchDrainStream> {
        let moment = self.read().await?;
        let spot = moment.spot(request.into_inner().spot)?;
        if moment.state.schedule.drain(&spot).is_none() {
            return Err(ApiError::from(Rejection::NotDrained { spot }).into());
        }
        let mut last = None;
        let render = move |moment: &Moment| {
            let Some(drain) = moment.state.schedule.drain(&spot) else { return View::End };
            let shown = Some(moment.drain_status(&spot, drain, true));
            if last == shown {
                return View::Nothing;
            }
            last.clone_from(&shown);
            View::Show(v1::WatchDrainResponse { status: shown })
        };
        Ok(Response::new(views(self.clone(), render)))
    }
}
