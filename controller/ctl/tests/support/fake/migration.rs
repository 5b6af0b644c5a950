//! The fake of the migration service: moves.

use pageport_proto::v1;
use pageport_proto::v1::migration_service_server::MigrationService;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Boxed, Fake, Reply, Step};

#[tonic::async_trait]
impl MigrationService for Fake {
    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Reply<v1::CreateMigrationResponse> {
        let v1::CreateMigrationRequest { request_id, vm, to_site, .. } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        if to_site == "nowhere" {
            return Err(Status::not_found("there is no site \"nowhere\""));
        }
        let state = v1::MigrationState::Requested.into();
        let migration = v1::Migration { id: "m1".into(), vm_name: vm, to_site, state, ..Default::default() };
        Ok(Response::new(v1::CreateMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration(&self, request: Request<v1::GetMigrationRequest>) -> Reply<v1::GetMigrationResponse> {
        Err(Status::not_found(format!("there is no migration \"{}\"", request.into_inner().id)))
    }

    async fn list_migrations(&self, _: Request<v1::ListMigrationsRequest>) -> Reply<v1::ListMigrationsResponse> {
        Ok(Response::new(v1::ListMigrationsResponse::default()))
    }

    type WatchMigrationsStream = Boxed<v1::WatchMigrationsResponse>;

    async fn watch_migrations(&self, _: Request<v1::WatchMigrationsRequest>) -> Reply<Self::WatchMigrationsStream> {
        Err(Status::unimplemented("commands follow one migration"))
    }

    type WatchMigrationStream = Boxed<v1::WatchMigrationResponse>;

    async fn watch_migration(&self, _: Request<v1::WatchMigrationRequest>) -> Reply<Self::WatchMigrationStream> {
        let steps = self.script().watches.pop_front();
        let steps = steps.ok_or_else(|| Status::unavailable("there is no leader"))?;
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            for step in steps {
                let item = match step {
                    Step::Update(migration) => Ok(v1::WatchMigrationResponse { migration: Some(*migration) }),
                    Step::Lose => Err(Status::unavailable("the leader went away")),
                    Step::Hang => {
                        sender.closed().await;
                        return;
                    }
                };
                if sender.send(item).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Reply<v1::CancelMigrationResponse> {
        let v1::CancelMigrationRequest { request_id, id } = request.into_inner();
        self.command(&request_id)?;
        let state = v1::MigrationState::Cancelling.into();
        let migration = v1::Migration { id, vm_name: "web".into(), state, ..Default::default() };
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(migration) }))
    }

    async fn change_migration(
        &self,
        request: Request<v1::ChangeMigrationRequest>,
    ) -> Reply<v1::ChangeMigrationResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let (id, vm_name) = (request.id.clone(), "web".into());
        let terms = v1::MigrationTerms {
            priority: request.priority.unwrap_or(50),
            rate_bps: request.rate_bps.unwrap_or_default(),
            paused: request.paused.unwrap_or_default(),
            convergence: request.convergence,
            longest_pause_ms: request.longest_pause_ms,
            ..Default::default()
        };
        let state = v1::MigrationState::Requested.into();
        let migration = v1::Migration { id, vm_name, state, terms: Some(terms), ..Default::default() };
        Ok(Response::new(v1::ChangeMigrationResponse { migration: Some(migration) }))
    }
}
