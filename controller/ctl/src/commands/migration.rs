//! `migrate` and `migration preflight | quote | get | list | watch | set | pause | resume | cancel`.

use pageport_proto::v1;
use pageport_proto::v1::MigrationState;
use pageport_proto::v1::migration_service_client::MigrationServiceClient;
use pageport_proto::v1::quote_service_client::QuoteServiceClient;

use super::{Context, ask, follow, now_unix_ms, request_id, required};
use crate::cli::MigrationCommand;
use crate::error::CtlError;
use crate::render::screen::Screen;
use crate::render::{lists, preflight, progress, quote, record};
use crate::trace::Traced;

type Migrations = MigrationServiceClient<Traced>;

pub async fn run(context: &mut Context, command: MigrationCommand) -> Result<(), CtlError> {
    match command {
        MigrationCommand::Preflight { vm, to } => {
            let request = v1::PreflightMigrationRequest { vm: vm.clone(), to_site: to.clone() };
            let response = ask!(context, QuoteServiceClient<Traced>, preflight_migration, request).await?;
            context.output.message(&response, preflight::page)?;
            match preflight::blocking(&response.findings) {
                0 => Ok(()),
                blocking => Err(CtlError::Preflight { vm, to_site: to, blocking }),
            }
        }
        MigrationCommand::Quote { vm, to } => {
            let request = v1::QuoteMigrationRequest { vm, to_site: to };
            let response = ask!(context, QuoteServiceClient<Traced>, quote_migration, request).await?;
            let quote = required(response.quote, "QuoteMigration", "quote")?;
            context.output.message(&quote, quote::page)
        }
        MigrationCommand::Get { id } => {
            let response = ask!(context, Migrations, get_migration, v1::GetMigrationRequest { id }).await?;
            let migration = required(response.migration, "GetMigration", "migration")?;
            context.output.message(&migration, describe)
        }
        MigrationCommand::List { vm } => {
            let request = v1::ListMigrationsRequest { vm: vm.unwrap_or_default() };
            let response = ask!(context, Migrations, list_migrations, request).await?;
            context.output.message(&response, |response| lists::migrations(response, now_unix_ms()))
        }
        MigrationCommand::Watch { id } => watch(context, id).await,
        MigrationCommand::Set { id, priority, rate, convergence } => {
            let (convergence, longest_pause_ms) = convergence.order();
            let request = v1::ChangeMigrationRequest {
                request_id: request_id(),
                id,
                priority,
                rate_bps: rate.map(|rate| rate.0),
                convergence: convergence.into(),
                longest_pause_ms,
                ..v1::ChangeMigrationRequest::default()
            };
            change(context, request).await
        }
        MigrationCommand::Pause { id } => change(context, hold(id, true)).await,
        MigrationCommand::Resume { id } => change(context, hold(id, false)).await,
        MigrationCommand::Cancel { id } => {
            let request = v1::CancelMigrationRequest { request_id: request_id(), id };
            let response = ask!(context, Migrations, cancel_migration, request).await?;
            let migration = required(response.migration, "CancelMigration", "migration")?;
            context.output.message(&migration, lists::migration_line)
        }
    }
}

async fn change(context: &mut Context, request: v1::ChangeMigrationRequest) -> Result<(), CtlError> {
    let response = ask!(context, Migrations, change_migration, request).await?;
    let migration = required(response.migration, "ChangeMigration", "migration")?;
    context.output.message(&migration, lists::migration_line)
}

pub async fn migrate(context: &mut Context, request: v1::CreateMigrationRequest, follow: bool) -> Result<(), CtlError> {
    let response = ask!(context, Migrations, create_migration, request).await?;
    let migration = required(response.migration, "CreateMigration", "migration")?;
    if follow {
        watch(context, migration.id).await
    } else {
        let line = |migration: &v1::Migration| {
            format!("{}\nfollow it: pageportctl migration watch {}", lists::migration_line(migration), migration.id)
        };
        context.output.message(&migration, line)
    }
}

fn hold(id: String, paused: bool) -> v1::ChangeMigrationRequest {
    let paused = Some(paused);
    v1::ChangeMigrationRequest { request_id: request_id(), id, paused, ..v1::ChangeMigrationRequest::default() }
}

fn describe(migration: &v1::Migration) -> String {
    match end_of(migration) {
        Some(_) => record::summary(migration),
        None => format!("{}\n{}\n", lists::migration_line(migration), progress::migration(migration)),
    }
}

/// Follows a migration to its end; anything but completion is an error.
async fn watch(context: &mut Context, id: String) -> Result<(), CtlError> {
    let migration = follow(context, &id).await?;
    if let Some(End::Otherwise(outcome)) = end_of(&migration) {
        let v1::Migration { id, vm_name: vm, reason, .. } = migration;
        return Err(CtlError::Migration { id, vm, outcome, reason });
    }
    if context.output.is_json() {
        // The last line of the stream has said it.
        return Ok(());
    }
    context.output.text(&record::summary(&migration))
}

async fn follow(context: &mut Context, id: &str) -> Result<v1::Migration, CtlError> {
    let Context { controllers, output } = context;
    let hint = format!(
        "the migration goes on; follow it: pageportctl migration watch {id}; stop it: pageportctl migration cancel {id}"
    );
    let open = |channel: Traced| {
        let request = v1::WatchMigrationRequest { id: id.to_owned() };
        async move { Migrations::new(channel).watch_migration(request).await }
    };
    let take = |screen: &mut Screen, response: v1::WatchMigrationResponse| {
        let migration = required(response.migration, "WatchMigration", "migration")?;
        if output.is_json() {
            output.message(&migration, |_| String::new())?;
        } else {
            screen.show(progress::phase(&migration), &progress::migration(&migration));
        }
        Ok(end_of(&migration).is_some().then_some(migration))
    };
    follow::follow(controllers, &mut Screen::open(), &hint, open, take).await
}

/// How a migration ended.
enum End {
    Completed,
    Otherwise(&'static str),
}

fn end_of(migration: &v1::Migration) -> Option<End> {
    match MigrationState::try_from(migration.state) {
        Ok(MigrationState::Completed) => Some(End::Completed),
        Ok(MigrationState::Failed) => Some(End::Otherwise("failed")),
        Ok(MigrationState::Cancelled) => Some(End::Otherwise("was cancelled")),
        Ok(
            MigrationState::Unspecified
            | MigrationState::Requested
            | MigrationState::Running
            | MigrationState::Cancelling
            | MigrationState::Committed,
        )
        | Err(_) => None,
    }
}
