//! Live moves.

use pageport_common::telemetry;
use pageport_proto::v1;
use pageport_proto::v1::migration_service_server::MigrationService;
use pageport_proto::{MigrationId, RequestId, SiteName, VmId};
use tonic::{Request, Response, Status};
use tracing::{Instrument, info_span};

use super::changes::Changes;
use super::error::ApiError;
use super::watch::{View, Views, views};
use super::{Api, Moment, request_id, unix_ms};
use crate::model::command::ClientOrder;
use crate::model::convergence::Convergence;
use crate::model::schedule::{Change, MAX_AFTER, ScheduleError, Terms, valid_priority, valid_rate};
use crate::model::{Answer, Rejection};
use crate::scheduler::plan::DEFAULT_PRIORITY;
use crate::scheduler::{Decision, Wait, Window};

/// Ended migrations that a watch of all of them shows, the newest.
const PAST_WATCHED: usize = 100;

type Reply<T> = Result<Response<T>, Status>;

fn migration_id(text: &str) -> Result<MigrationId, ApiError> {
    text.parse().map_err(|source| ApiError::BadId { field: "id", source })
}

fn migration_of(moment: &Moment, id: MigrationId) -> Result<v1::Migration, ApiError> {
    let migration = moment.state.migrations.get(&id);
    let migration = migration.ok_or_else(|| Rejection::MigrationUnknown { id: id.to_string() })?;
    Ok(moment.migration(migration))
}

/// A move that is, or would be, ordered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) migration: MigrationId,
    pub(super) vm: VmId,
    pub(super) site: &'a SiteName,
}

impl Api {
    async fn create(&self, request: v1::CreateMigrationRequest) -> Result<v1::Migration, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (vm_id, _) = moment.vm(&request.vm)?;
        let site = moment.site(&request.to_site)?;
        let migration = MigrationId::generate();
        let terms = Box::new(terms(&request)?);
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        let order = |admitted| ClientOrder::QueueMigration {
            id: migration,
            vm: vm_id,
            site: site.clone(),
            traceparent: traceparent.clone(),
            terms: terms.clone(),
            admitted,
        };
        // Decided before the order is given, so that one that need not wait begins with it.
        let way = Way { migration, vm: vm_id, site: &site };
        let admitted = match self.foresee(&moment, id, way, &order(None))? {
            Some((Decision::Admit, seq)) => Some(seq),
            Some((Decision::Wait(_) | Decision::GiveUp(_), _)) | None => None,
        };
        let (answer, after) = self.order(id, order(admitted)).await?;
        match answer {
            Answer::Migration(migration) => migration_of(&after, migration),
            Answer::Done | Answer::Vm(_) | Answer::Replica(..) => Err(Rejection::RequestReused { request: id }.into()),
        }
    }

    /// What the scheduler would decide now on a move that is ordered, and from which number of its schedule; [`None`]: the request was seen before.
    ///
    /// # Errors
    /// Why it would not be taken.
    pub(super) fn foresee(
        &self,
        moment: &Moment,
        request: RequestId,
        way: Way<'_>,
        order: &ClientOrder,
    ) -> Result<Option<(Decision, u64)>, ApiError> {
        let Some(queued) = self.rehearsed(moment, request, order)? else { return Ok(None) };
        let Some(vm) = moment.state.vms.get(&way.vm) else { return Ok(None) };
        moment.must_run(way.vm, vm)?;
        if let Some(worker) = vm.replicas.get(way.site).map(|replica| &replica.worker) {
            if moment.observations.connected(worker, moment.now).is_none() {
                return Err(ApiError::WorkerLost { worker: worker.clone() });
            }
            moment.must_be_guarded(worker, &vm.spec)?;
        }
        match queued.decisions().get(&way.migration) {
            // It would not pass by waiting.
            Some(Decision::Wait(Wait::SameAddress(same))) => Err(same.clone().into()),
            decision => Ok(decision.cloned().map(|decision| (decision, queued.state.schedule.seq))),
        }
    }

    async fn change(&self, request: v1::ChangeMigrationRequest) -> Result<v1::Migration, ApiError> {
        let request_id = request_id(&request.request_id)?;
        let id = migration_id(&request.id)?;
        let change = Change {
            priority: request.priority.map(valid_priority).transpose()?,
            rate_bps: request.rate_bps.map(|bps| valid_rate("a migration's rate", bps)).transpose()?,
            paused: request.paused,
            convergence: Convergence::ordered(request.convergence, request.longest_pause_ms)?,
        };
        let (_, after) = self.order(request_id, ClientOrder::ChangeMigration { id, change }).await?;
        migration_of(&after, id)
    }
}

/// The terms of an order, as they may be.
fn terms(request: &v1::CreateMigrationRequest) -> Result<Terms, ApiError> {
    let deadline = Some(request.deadline_unix_ms).filter(|deadline| *deadline != 0);
    if deadline.is_some_and(|deadline| deadline <= unix_ms()) {
        return Err(ScheduleError::Deadline.into());
    }
    if request.after_ids.len() > MAX_AFTER {
        return Err(ScheduleError::After { count: request.after_ids.len() }.into());
    }
    let after = request.after_ids.iter().map(|id| migration_id(id)).collect::<Result<_, _>>()?;
    let window = Some(&request.window).filter(|window| !window.is_empty());
    Ok(Terms {
        priority: valid_priority(request.priority.unwrap_or(DEFAULT_PRIORITY.into()))?,
        rate_bps: valid_rate("a migration's rate", request.rate_bps)?,
        deadline_unix_ms: deadline,
        window: window.map(|window| window.parse::<Window>()).transpose().map_err(ScheduleError::from)?,
        after,
        paused: false,
        drains: false,
        convergence: Convergence::ordered(request.convergence, request.longest_pause_ms)?.unwrap_or_default(),
    })
}

#[tonic::async_trait]
impl MigrationService for Api {
    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Reply<v1::CreateMigrationResponse> {
        let traceparent = telemetry::extract(request.metadata());
        let request = request.into_inner();
        let span =
            info_span!("create_migration", vm = %super::echo(&request.vm), to_site = %super::echo(&request.to_site));
        telemetry::adopt_traceparent(&span, &traceparent);
        let migration = self.create(request).instrument(span).await?;
        Ok(Response::new(v1::CreateMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration(&self, request: Request<v1::GetMigrationRequest>) -> Reply<v1::GetMigrationResponse> {
        let id = migration_id(&request.into_inner().id)?;
        let migration = migration_of(&self.read().await?, id)?;
        Ok(Response::new(v1::GetMigrationResponse { migration: Some(migration) }))
    }

    async fn list_migrations(&self, request: Request<v1::ListMigrationsRequest>) -> Reply<v1::ListMigrationsResponse> {
        let moment = self.read().await?;
        let name = request.into_inner().vm;
        let only = if name.is_empty() { None } else { Some(moment.vm(&name)?.0) };
        let chosen = moment.state.migrations.values().filter(|migration| only.is_none_or(|vm| migration.vm == vm));
        let migrations = chosen.map(|migration| moment.migration(migration)).collect();
        Ok(Response::new(v1::ListMigrationsResponse { migrations }))
    }

    type WatchMigrationStream = Views<v1::WatchMigrationResponse>;

    async fn watch_migration(&self, request: Request<v1::WatchMigrationRequest>) -> Reply<Self::WatchMigrationStream> {
        let id = migration_id(&request.into_inner().id)?;
        migration_of(&self.read().await?, id)?;
        let mut last = None;
        let render = move |moment: &Moment| {
            let Some(migration) = moment.state.migrations.get(&id) else { return View::End };
            let shown = Some(moment.migration(migration));
            let response = v1::WatchMigrationResponse { migration: shown.clone() };
            if migration.is_over() {
                return View::Last(response);
            }
            if last == shown {
                return View::Nothing;
            }
            last = shown;
            View::Show(response)
        };
        Ok(Response::new(views(self.clone(), render)))
    }

    type WatchMigrationsStream = Views<v1::WatchMigrationsResponse>;

    async fn watch_migrations(&self, _: Request<v1::WatchMigrationsRequest>) -> Reply<Self::WatchMigrationsStream> {
        self.read().await?;
        let mut changes = Changes::default();
        let render = move |moment: &Moment| {
            let mut past = 0;
            // Ids grow with time: the newest come first.
            let shown = moment.state.migrations.values().rev().filter(|migration| {
                past += usize::from(migration.is_over());
                !migration.is_over() || past <= PAST_WATCHED
            });
            changes.next(shown.map(|migration| (migration.id.to_string(), moment.migration(migration))))
        };
        Ok(Response::new(views(self.clone(), render)))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Reply<v1::CancelMigrationResponse> {
        let request = request.into_inner();
        let request_id = request_id(&request.request_id)?;
        let id = migration_id(&request.id)?;
        let (_, after) = self.order(request_id, ClientOrder::CancelMigration { id }).await?;
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(migration_of(&after, id)?) }))
    }

    async fn change_migration(
        &self,
        request: Request<v1::ChangeMigrationRequest>,
    ) -> Reply<v1::ChangeMigrationResponse> {
        let migration = self.change(request.into_inner()).await?;
        Ok(Response::new(v1::ChangeMigrationResponse { migration: Some(migration) }))
    }
}
