//! Moves that wait for their turn, and sites that are emptied, with real controllers and workers over the worker link.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_proto::v1::schedule_service_client::ScheduleServiceClient;
use pageport_proto::v1::spot::Place;
use pageport_proto::v1::{self, MigrationState, VmState};
use support::lab::{Lab, order};
use support::{define, request_id, within};
use tonic::Code;
use tonic::transport::Channel;

/// These VMs run at `a` and are seeded to `b`.
async fn seeded(names: &[&str]) -> Lab {
    let lab = Lab::start().await;
    for name in names {
        lab.run(define(name, "a")).await;
        lab.seed(name, "b").await;
    }
    lab
}

impl Lab {
    fn schedule(&self) -> ScheduleServiceClient<Channel> {
        ScheduleServiceClient::new(self.cluster.channel(self.node))
    }

    async fn change(&self, change: v1::ChangeMigrationRequest) -> Result<v1::Migration, tonic::Status> {
        let change = v1::ChangeMigrationRequest { request_id: request_id(), ..change };
        let answer = self.cluster.migration(self.node).change_migration(change).await?;
        Ok(answer.into_inner().migration.unwrap())
    }
}

fn site(name: &str) -> Option<v1::Spot> {
    Some(v1::Spot { place: Some(Place::Site(name.into())) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_waits_for_its_turn_says_why_and_then_goes_on_by_itself() {
    let lab = seeded(&["web", "db"]).await;
    let limits = v1::SetLimitsRequest { request_id: request_id(), migrations_per_link: Some(1), ..Default::default() };
    let limits = lab.schedule().set_limits(limits).await.unwrap().into_inner().limits.unwrap();
    assert_eq!((limits.migrations_per_worker, limits.migrations_per_link, limits.memory_percent), (4, 1, 100));
    lab.board.lock().unwrap().hold = true;
    let first = lab.migrate(order("web", "b")).await.unwrap();
    assert_eq!(first.state(), MigrationState::Running, "it begins with the order");
    let second = lab.migrate(v1::CreateMigrationRequest { priority: Some(60), ..order("db", "b") }).await.unwrap();
    assert_eq!((second.state(), second.epoch, second.started_unix_ms), (MigrationState::Requested, 0, 0));
    assert_eq!(second.reason, "waits for the link from \"a\" to \"b\", which carries 1 migrations, as many as it may");
    let id = || second.id.clone();
    let held = lab.change(v1::ChangeMigrationRequest { id: id(), paused: Some(true), ..Default::default() }).await;
    assert!(held.unwrap().reason.starts_with("paused: "));
    lab.board.lock().unwrap().hold = false;
    lab.migration_until(&first.id, |migration| migration.state() == MigrationState::Completed).await;
    let still = lab.migration_until(&second.id, |_| true).await;
    assert_eq!(still.state(), MigrationState::Requested, "it is held although the link is free");
    lab.change(v1::ChangeMigrationRequest { id: id(), paused: Some(false), ..Default::default() }).await.unwrap();
    let moved = lab.migration_until(&second.id, |migration| migration.state() == MigrationState::Completed).await;
    assert!(moved.started_unix_ms >= moved.created_unix_ms && moved.terms.unwrap().priority == 60);
    let late = lab.change(v1::ChangeMigrationRequest { id: id(), priority: Some(1), ..Default::default() }).await;
    assert_eq!(late.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_keep_their_terms_and_those_that_cannot_be_are_refused() {
    let lab = seeded(&["web", "db"]).await;
    let refused = async |order, words: &str| {
        let refusal = lab.migrate(order).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{words}");
        assert!(refusal.message().contains(words), "{}", refusal.message());
    };
    refused(v1::CreateMigrationRequest { priority: Some(101), ..order("web", "b") }, "give 0 to 100").await;
    refused(v1::CreateMigrationRequest { window: "22-6".into(), ..order("web", "b") }, "like 22:00-06:00").await;
    refused(v1::CreateMigrationRequest { deadline_unix_ms: 1, ..order("web", "b") }, "has passed already").await;
    refused(v1::CreateMigrationRequest { rate_bps: 1, ..order("web", "b") }, "at least 100 kbit/s").await;
    let longer = v1::ConvergencePolicy::LongerPause.into();
    refused(v1::CreateMigrationRequest { convergence: longer, ..order("web", "b") }, "from 500 ms to 20000 ms").await;
    refused(v1::CreateMigrationRequest { longest_pause_ms: 2_000, ..order("web", "b") }, "longer-pause alone").await;
    // A window that is never open now: of one minute, half a day away.
    let minute = (pageport_controller::api::unix_ms() / 60_000 + 720) % 1440;
    let clock = |minute: i64| format!("{:02}:{:02}", minute / 60, minute % 60);
    let window = format!("{}-{}", clock(minute), clock((minute + 1) % 1440));
    let kept = v1::CreateMigrationRequest {
        window: window.clone(),
        convergence: longer,
        longest_pause_ms: 2_000,
        ..order("web", "b")
    };
    let first = lab.migrate(kept).await.unwrap();
    let terms = first.terms.as_ref().unwrap();
    assert_eq!((terms.convergence, terms.longest_pause_ms), (longer, 2_000));
    assert_eq!(first.reason, format!("waits for its window, {window} UTC"));
    let after = v1::CreateMigrationRequest { after_ids: vec![first.id.clone()], ..order("db", "b") };
    let second = lab.migrate(after).await.unwrap();
    assert_eq!(second.reason, format!("waits for migration {} of vm \"web\", after which it is to run", first.id));
    let cancelled = lab.cancel(&first.id).await.unwrap();
    assert_eq!(cancelled.state(), MigrationState::Cancelled, "at once");
    let given_up = lab.migration_until(&second.id, |migration| migration.state() == MigrationState::Failed).await;
    assert!(given_up.reason.ends_with("after which it was to run, did not complete"), "{}", given_up.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_is_drained_of_all_that_can_move_and_the_rest_is_named() {
    let lab = seeded(&["web", "db"]).await;
    lab.cluster.fleet(lab.node).define_vm(define("cold", "a")).await.unwrap();
    let drain = v1::DrainRequest { request_id: request_id(), spot: site("a"), dry_run: true, ..Default::default() };
    let plan = lab.schedule().drain(drain.clone()).await.unwrap().into_inner().status.unwrap();
    assert_eq!((plan.planned.len(), plan.stays.len(), plan.ordered_unix_ms), (2, 1, 0));
    assert_eq!(plan.stays[0].vm_name, "cold");
    assert!(plan.stays[0].reason.starts_with("it does not run"), "{}", plan.stays[0].reason);
    let watched = lab.schedule().watch_drain(v1::WatchDrainRequest { spot: site("a") }).await;
    assert_eq!(watched.unwrap_err().code(), Code::FailedPrecondition, "nothing was ordered");
    let order_it = v1::DrainRequest { request_id: request_id(), dry_run: false, ..drain };
    lab.schedule().drain(order_it).await.unwrap();
    let watch = lab.schedule().watch_drain(v1::WatchDrainRequest { spot: site("a") }).await.unwrap();
    let mut stream = watch.into_inner();
    let done = within("the drain", async {
        loop {
            let status = stream.message().await.unwrap().unwrap().status.unwrap();
            if status.done {
                return status;
            }
        }
    })
    .await;
    assert_eq!((done.moved, done.stays.len()), (2, 1));
    lab.vm_until("web", |vm| vm.owner_site == "b" && vm.state() == VmState::Running && vm.migration_id.is_empty())
        .await;
    let back = lab.migrate(order("web", "a")).await.unwrap();
    assert_eq!(back.reason, "waits because worker \"worker-a\" is being drained: undrain it, or cancel the move");
    let workers =
        lab.cluster.fleet(lab.node).list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    assert_eq!(workers.iter().map(|worker| worker.drained).collect::<Vec<_>>(), [true, false]);
    let undrain = v1::UndrainRequest { request_id: request_id(), spot: site("a") };
    lab.schedule().undrain(undrain).await.unwrap();
    lab.migration_until(&back.id, |migration| migration.state() == MigrationState::Completed).await;
}
