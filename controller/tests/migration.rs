//! A VM's life over the worker link: start, seed, move, cancel, failure, crash of the leader, deletion.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_proto::v1::{self, MigrationState, VmState};
use support::lab::{Lab, order};
use support::{define, eventually, request_id, within};
use tonic::Code;

/// A VM runs at `a` and is seeded to `b`.
async fn seeded() -> Lab {
    let lab = Lab::start().await;
    lab.run(define("web", "a")).await;
    lab.seed("web", "b").await;
    lab
}

impl Lab {
    /// Watches until the end; gives all that was seen.
    async fn watch(&self, id: &str) -> Vec<v1::Migration> {
        within("the end of the migration", async {
            let mut seen = vec![];
            loop {
                let request = v1::WatchMigrationRequest { id: id.to_owned() };
                let Ok(answer) = self.cluster.migration(self.node).watch_migration(request).await else { continue };
                let mut stream = answer.into_inner();
                while let Ok(Some(next)) = stream.message().await {
                    seen.extend(next.migration);
                }
                if seen.last().is_some_and(|migration| migration.ended_unix_ms != 0) {
                    return seen;
                }
            }
        })
        .await
    }

    fn runs(&self) -> Vec<String> {
        self.board.lock().unwrap().runs.iter().map(|(_, worker)| worker.clone()).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_moves_there_and_back_and_each_owner_is_recorded_once() {
    let lab = seeded().await;
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    let seen = lab.watch(&migration.id).await;
    let last = seen.last().unwrap();
    assert_eq!(last.state(), MigrationState::Completed, "{last:?}");
    assert_eq!(last.record.as_ref().unwrap().total_time_ms, 1234);
    let vm = lab.vm_until("web", |vm| vm.state() == VmState::Running).await;
    assert_eq!((vm.owner_site.as_str(), vm.owner_epoch, vm.migration_id.as_str()), ("b", 2, ""));
    assert_eq!(vm.replicas.iter().map(|replica| replica.site.as_str()).collect::<Vec<_>>(), ["a"]);

    let back = lab.migrate(order("web", "a")).await.unwrap();
    assert_eq!(lab.watch(&back.id).await.last().unwrap().state(), MigrationState::Completed);
    let vm = lab.vm_until("web", |vm| vm.state() == VmState::Running).await;
    assert_eq!((vm.owner_site.as_str(), vm.owner_epoch), ("a", 3));
    assert_eq!(lab.runs(), ["worker-a", "worker-b", "worker-a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_move_leaves_the_vm_where_it_is() {
    let lab = seeded().await;
    lab.board.lock().unwrap().hold = true;
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    let second = lab.migrate(order("web", "b")).await.unwrap_err();
    let expected = format!("vm \"web\" is already migrating (migration {})", migration.id);
    assert!(second.code() == Code::FailedPrecondition && second.message().starts_with(&expected), "{second}");
    let stop = v1::StopVmRequest { request_id: request_id(), vm: "web".into(), force: true };
    assert_eq!(lab.cluster.fleet(lab.node).stop_vm(stop).await.unwrap_err().code(), Code::FailedPrecondition);
    lab.cancel(&migration.id).await.unwrap();
    assert_eq!(lab.watch(&migration.id).await.last().unwrap().state(), MigrationState::Cancelled);
    let vm = lab.vm_until("web", |vm| vm.state() == VmState::Running).await;
    assert_eq!((vm.owner_site.as_str(), vm.owner_epoch), ("a", 1));
    assert_eq!(lab.cancel(&migration.id).await.unwrap_err().code(), Code::FailedPrecondition);

    // The next move takes a new epoch: the cancelled one is spent.
    lab.board.lock().unwrap().hold = false;
    let next = lab.migrate(order("web", "b")).await.unwrap();
    assert_eq!(lab.watch(&next.id).await.last().unwrap().state(), MigrationState::Completed);
    assert_eq!(lab.vm_until("web", |vm| vm.owner_site == "b").await.owner_epoch, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_gives_up_fails_the_move_with_its_reason() {
    let lab = seeded().await;
    lab.board.lock().unwrap().refuse = Some("no space left for the image".into());
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    assert_eq!(lab.watch(&migration.id).await.last().unwrap().state(), MigrationState::Failed);
    // The source may be heard first, which has no reason of its own.
    lab.migration_until(&migration.id, |migration| migration.reason == "no space left for the image").await;
    lab.vm_until("web", |vm| vm.state() == VmState::Running && vm.problem.contains("no space left")).await;
    assert!(lab.runs().iter().all(|worker| worker == "worker-a"), "{:?}", lab.runs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_is_not_authorised_to_a_store_that_is_younger_than_it() {
    let lab = seeded().await;
    lab.board.lock().unwrap().mute = true;
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    // The destination may have refused the move and forgotten it.
    lab.board.lock().unwrap().stores.insert("worker-b".into(), pageport_proto::StoreId::generate());
    lab.board.lock().unwrap().mute = false;
    eventually("a refused question", async || {
        lab.board.lock().unwrap().denials.iter().any(|reason| reason.contains("lost its store")).then_some(())
    })
    .await;
    lab.cancel(&migration.id).await.unwrap();
    assert_eq!(lab.watch(&migration.id).await.last().unwrap().state(), MigrationState::Cancelled);
    assert_eq!(lab.vm_until("web", |vm| vm.state() == VmState::Running).await.owner_site, "a");
    // The next one is ordered for the new store.
    let next = lab.migrate(order("web", "b")).await.unwrap();
    assert_eq!(lab.watch(&next.id).await.last().unwrap().state(), MigrationState::Completed);
    // At the source it was stopped for the first move, and went on.
    assert_eq!(lab.runs(), ["worker-a", "worker-a", "worker-b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_carries_a_move_through() {
    let mut lab = seeded().await;
    lab.board.lock().unwrap().hold = true;
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    let leader = lab.cluster.leader().await;
    lab.cluster.stop(leader).await;
    lab.node = lab.cluster.leader().await;
    lab.board.lock().unwrap().hold = false;
    assert_eq!(lab.watch(&migration.id).await.last().unwrap().state(), MigrationState::Completed);
    assert_eq!(lab.vm_until("web", |vm| vm.state() == VmState::Running).await.owner_site, "b");
    assert_eq!(lab.runs(), ["worker-a", "worker-b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_without_figures_completes_all_the_same() {
    let lab = seeded().await;
    lab.board.lock().unwrap().no_record = true;
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    let seen = lab.watch(&migration.id).await;
    let last = seen.last().unwrap();
    assert_eq!((last.state(), last.record.is_none()), (MigrationState::Completed, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_vm_is_shown_and_stays_down_until_it_is_started_again() {
    let lab = seeded().await;
    lab.board.lock().unwrap().crash = Some("qemu ended by signal 9".into());
    let vm = lab.vm_until("web", |vm| vm.state() == VmState::Crashed).await;
    assert_eq!(vm.problem, "qemu ended by signal 9");
    let down = lab.vm_until("web", |vm| !vm.desired_running).await;
    assert_eq!((down.state(), down.problem), (VmState::Crashed, vm.problem));
    let start = v1::StartVmRequest { request_id: request_id(), vm: "web".into() };
    lab.cluster.fleet(lab.node).start_vm(start).await.unwrap();
    let vm = lab.vm_until("web", |vm| vm.state() == VmState::Running).await;
    assert_eq!(vm.problem, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_deleted_only_when_stopped_and_then_without_a_trace() {
    let lab = seeded().await;
    let refused = lab.migrate(order("web", "a")).await.unwrap_err();
    assert_eq!(refused.message(), "vm \"web\" already runs at site \"a\"");
    let delete = v1::DeleteVmRequest { request_id: request_id(), vm: "web".into() };
    let refused = lab.cluster.fleet(lab.node).delete_vm(delete.clone()).await.unwrap_err();
    assert_eq!(refused.message(), "vm \"web\" runs: stop it first");
    let stop = v1::StopVmRequest { request_id: request_id(), vm: "web".into(), force: false };
    lab.cluster.fleet(lab.node).stop_vm(stop).await.unwrap();
    lab.vm_until("web", |vm| vm.state() == VmState::Stopped).await;
    assert_eq!(lab.migrate(order("web", "b")).await.unwrap_err().message(), "vm \"web\" does not run: start it first");
    lab.cluster.fleet(lab.node).delete_vm(delete.clone()).await.unwrap();
    lab.cluster.fleet(lab.node).delete_vm(delete).await.unwrap();
    let gone = lab.cluster.fleet(lab.node).get_vm(v1::GetVmRequest { vm: "web".into() }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    lab.cluster.fleet(lab.node).define_vm(define("web", "b")).await.unwrap();
}
