//! One function per command: ask, then show.
//!
//! A command that changes something carries one fresh request id, built before the first attempt and kept over all.

mod cluster;
mod confirm;
mod disk;
mod fence;
mod fleet;
mod follow;
mod migration;
mod point;
mod protection;
mod replica;
pub mod restore;
mod schedule;
mod vm;

use std::time::{SystemTime, UNIX_EPOCH};

use pageport_proto::v1;

use crate::cli::{Command, LinkCommand, ReplicationCommand, SiteCommand, WorkerCommand};
use crate::client::Controllers;
use crate::error::CtlError;
use crate::render::Output;
use crate::terms;

/// Where commands ask and where they show.
struct Context {
    controllers: Controllers,
    output: Output,
}

/// Runs a command to its end.
///
/// # Errors
/// Whatever keeps it from doing what it was asked to.
pub async fn run(command: Command, controllers: Controllers, output: Output) -> Result<(), CtlError> {
    let mut context = Context { controllers, output };
    match command {
        Command::Site(SiteCommand::List) => fleet::sites(&mut context).await,
        Command::Site(SiteCommand::Drain { site, drain }) => {
            schedule::drain(&mut context, terms::site(site), drain).await
        }
        Command::Site(SiteCommand::Undrain { site }) => schedule::undrain(&mut context, terms::site(site)).await,
        Command::Worker(WorkerCommand::Drain { worker, drain }) => {
            schedule::drain(&mut context, terms::worker(worker), drain).await
        }
        Command::Worker(WorkerCommand::Undrain { worker }) => {
            schedule::undrain(&mut context, terms::worker(worker)).await
        }
        Command::Scheduler(command) => schedule::run(&mut context, command).await,
        Command::Worker(WorkerCommand::List) => fleet::workers(&mut context).await,
        Command::Worker(WorkerCommand::Pools) => fleet::pools(&mut context).await,
        Command::Worker(WorkerCommand::Fence { worker, confirm: _, reason: _, check: true }) => {
            fence::check(&mut context, worker).await
        }
        Command::Worker(WorkerCommand::Fence { worker, confirm, reason, check: false }) => {
            fence::off(&mut context, worker, confirm, reason.unwrap_or_default()).await
        }
        Command::Worker(WorkerCommand::DeclareDead { worker, confirm, reason }) => {
            fleet::declare_dead(&mut context, worker, confirm, reason).await
        }
        Command::Cluster(command) => cluster::run(&mut context, command).await,
        Command::Vm(command) => vm::run(&mut context, command).await,
        Command::Disk(command) => disk::run(&mut context, command).await,
        Command::Replica(command) => replica::run(&mut context, command).await,
        Command::Protect { vm, to, rpo, keep, quiesce, place, pool, watch } => {
            let request = v1::ProtectVmRequest {
                request_id: request_id(),
                vm,
                to_site: to,
                protection: Some(v1::Protection { rpo_ms: rpo.0, keep_points: keep, quiesce }),
                places: place.into_iter().map(v1::DiskPlace::from).collect(),
                pool: pool.unwrap_or_default(),
            };
            protection::protect(&mut context, request, watch).await
        }
        Command::Unprotect { vm, site } => protection::unprotect(&mut context, vm, site).await,
        Command::Replication(ReplicationCommand::Status { vm, watch: false }) => {
            protection::status(&mut context, vm).await
        }
        Command::Replication(ReplicationCommand::Status { vm, watch: true }) => {
            protection::watch_status(&mut context, vm).await
        }
        Command::Replication(ReplicationCommand::Scrub { vm, site, watch }) => {
            protection::scrub(&mut context, vm, site, watch).await
        }
        Command::RecoveryPoint(command) => point::run(&mut context, command).await,
        Command::Link(LinkCommand::List) => protection::links(&mut context).await,
        Command::Link(LinkCommand::Set { from, to, cap, budget, migrations }) => {
            schedule::set_link(&mut context, (from, to), cap, budget, migrations).await
        }
        Command::Migrate { vm, to, terms, watch } => {
            let request = terms.order(request_id(), vm, to, now_unix_ms());
            migration::migrate(&mut context, request, watch).await
        }
        Command::Migration(command) => migration::run(&mut context, command).await,
    }
}

/// Asks a controller; the request is cloned for each attempt.
macro_rules! ask {
    ($context:expr, $client:ty, $method:ident, $request:expr) => {{
        let request = $request;
        $context.controllers.call(move |channel| {
            let request = request.clone();
            async move { <$client>::new(channel).$method(request).await }
        })
    }};
}
use ask;

fn request_id() -> String {
    pageport_proto::RequestId::generate().to_string()
}

fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// What an answer must hold.
fn required<T>(value: Option<T>, operation: &'static str, field: &'static str) -> Result<T, CtlError> {
    value.ok_or(CtlError::Incomplete { operation, field })
}
