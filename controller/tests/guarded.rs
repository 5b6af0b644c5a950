//! A VM that fences itself is brought only to workers whose keepers are guarded.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_controller::config::LogLimits;
use pageport_proto::v1;
use support::{Cluster, define, eventually, request_id, worker};
use tonic::Code;

struct Fleet {
    cluster: Cluster,
    board: worker::Shared,
    node: u64,
}

impl Fleet {
    async fn guarded(&self, guarded: bool) {
        self.board.lock().unwrap().guarded = guarded;
        eventually("the worker's word", async || {
            let answer = self.cluster.fleet(self.node).list_workers(v1::ListWorkersRequest {}).await.ok()?;
            let workers = answer.into_inner().workers;
            workers.iter().any(|worker| worker.connected && worker.guarded == guarded).then_some(())
        })
        .await;
    }

    async fn define(&self, request: &v1::DefineVmRequest) -> Result<v1::Vm, tonic::Status> {
        let answer = self.cluster.fleet(self.node).define_vm(request.clone()).await?;
        Ok(answer.into_inner().vm.unwrap())
    }
}

fn refused(answer: &tonic::Status) {
    assert_eq!(answer.code(), Code::FailedPrecondition, "{answer}");
    let named = ["web", "worker-a", "pageport-guard.service"].iter().all(|name| answer.message().contains(name));
    assert!(named, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_fences_itself_is_neither_defined_nor_started_where_nobody_guards_and_any_other_is() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    worker::start(&cluster, "worker-a", "a", &board);
    let node = cluster.a_follower().await;
    let fleet = Fleet { cluster, board, node };
    fleet.guarded(false).await;
    fleet.define(&define("other", "a")).await.unwrap();

    let mut request = define("web", "a");
    request.spec.as_mut().unwrap().on_isolation = v1::IsolationPolicy::SelfFence.into();
    refused(&fleet.define(&request).await.unwrap_err());
    fleet.guarded(true).await;
    let defined = fleet.define(&request).await.unwrap();
    assert_eq!(defined.problem, "");

    fleet.guarded(false).await;
    // The same request once more gets its answer, whatever has changed since.
    let again = fleet.define(&request).await.unwrap();
    assert_eq!(again.id, defined.id);
    assert!(again.problem.contains("no guard"), "{again:?}");
    let start = v1::StartVmRequest { request_id: request_id(), vm: "web".into() };
    refused(&fleet.cluster.fleet(node).start_vm(start).await.unwrap_err());
    let stop = v1::StopVmRequest { request_id: request_id(), vm: "web".into(), force: true };
    fleet.cluster.fleet(node).stop_vm(stop).await.unwrap();
}
