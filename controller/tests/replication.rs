//! Protection through the API and the worker link: order, first point, lag, recovery points, caps, and the turn after a move.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_proto::v1::{self, MigrationState, ReplicaState};
use support::lab::{Lab, is_seeded_at, order};
use support::{define, eventually, request_id};
use tonic::Code;

/// A VM runs at `a`.
async fn running() -> Lab {
    let lab = Lab::start().await;
    lab.run(define("web", "a")).await;
    lab
}

impl Lab {
    async fn protect(&self, to_site: &str, rpo_ms: u64) -> Result<v1::Replica, tonic::Status> {
        self.protect_in("", to_site, rpo_ms).await
    }

    async fn protect_in(&self, pool: &str, to_site: &str, rpo_ms: u64) -> Result<v1::Replica, tonic::Status> {
        let request = v1::ProtectVmRequest {
            request_id: request_id(),
            vm: "web".into(),
            to_site: to_site.into(),
            protection: Some(v1::Protection { rpo_ms, ..v1::Protection::default() }),
            places: vec![],
            pool: pool.into(),
        };
        Ok(self.cluster.replication(self.node).protect_vm(request).await?.into_inner().replica.unwrap())
    }

    async fn points(&self, site: &str) -> Result<Vec<v1::RecoveryPoint>, tonic::Status> {
        let request = v1::ListRecoveryPointsRequest { vm: "web".into(), site: site.into() };
        Ok(self.cluster.replication(self.node).list_recovery_points(request).await?.into_inner().points)
    }

    async fn cap(&self, from: &str, to: &str, cap_bps: u64) -> Result<v1::Link, tonic::Status> {
        let link = v1::Link { from_site: from.into(), to_site: to.into(), cap_bps, ..Default::default() };
        let request = v1::SetLinkCapRequest { request_id: request_id(), link: Some(link) };
        Ok(self.cluster.replication(self.node).set_link_cap(request).await?.into_inner().link.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protected_vm_has_points_at_its_site_and_at_the_one_it_left_after_a_move() {
    let lab = running().await;
    lab.board.lock().unwrap().no_points = Some("the first copy is slow".into());
    let replica = lab.protect("b", 0).await.unwrap();
    let terms = replica.protection.unwrap();
    assert_eq!((replica.state(), terms.rpo_ms, terms.keep_points), (ReplicaState::Seeding, 30_000, 10));
    let slow =
        lab.vm_until("web", |vm| vm.replicas.iter().any(|replica| replica.problem == "the first copy is slow")).await;
    assert_eq!(slow.replicas[0].state(), ReplicaState::Seeding);
    assert_eq!(lab.points("b").await.unwrap(), []);

    lab.board.lock().unwrap().no_points = None;
    let vm = lab.vm_until("web", |vm| is_seeded_at(vm, "b")).await;
    let status = vm.replicas[0].replication.as_ref().unwrap();
    assert!(status.newest.is_some() && !status.rpo_missed, "{status:?}");
    assert_eq!(vm.replicas[0].wan_bytes, 4096);
    eventually("the holder's points", async || (!lab.points("b").await.ok()?.is_empty()).then_some(())).await;

    let migration = lab.migrate(order("web", "b")).await.unwrap();
    lab.migration_until(&migration.id, |migration| migration.state() == MigrationState::Completed).await;
    let turned = lab
        .vm_until("web", |vm| {
            vm.replicas.iter().any(|replica| {
                replica.replication.as_ref().is_some_and(|status| status.newest.is_some() && replica.site == "a")
            })
        })
        .await;
    assert_eq!(turned.replicas.iter().map(|replica| replica.site.as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(turned.replicas[0].protection.unwrap().rpo_ms, 30_000);
    eventually("points at the old place", async || (!lab.points("a").await.ok()?.is_empty()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missed_target_is_the_vms_problem_until_it_is_met_or_ended() {
    let lab = running().await;
    lab.protect("b", 60_000).await.unwrap();
    lab.vm_until("web", |vm| is_seeded_at(vm, "b")).await;
    lab.board.lock().unwrap().lag_ms = 95_000;
    let late = lab.vm_until("web", |vm| !vm.problem.is_empty()).await;
    assert!(late.problem.starts_with("replication to site \"b\" is 9"), "{}", late.problem);
    assert!(late.problem.ends_with("s behind (target 60 s)"), "{}", late.problem);
    assert!(late.replicas[0].replication.as_ref().unwrap().rpo_missed);
    lab.board.lock().unwrap().lag_ms = 0;
    lab.vm_until("web", |vm| vm.problem.is_empty()).await;

    let seed = v1::SeedReplicaRequest { request_id: request_id(), vm: "web".into(), to_site: "b".into() };
    let refused = lab.cluster.replication(lab.node).seed_replica(seed).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("is kept up to date already"), "{refused}");
    let end = v1::UnprotectVmRequest { request_id: request_id(), vm: "web".into(), site: "b".into() };
    lab.cluster.replication(lab.node).unprotect_vm(end).await.unwrap();
    let left = lab.vm_until("web", |vm| vm.replicas[0].protection.is_none()).await;
    assert_eq!((left.replicas[0].state(), &left.replicas[0].replication), (ReplicaState::Seeded, &None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_is_one_that_the_sites_worker_has_and_reaches_the_owner() {
    let lab = running().await;
    let old = lab.protect_in("ssd", "b", 0).await.unwrap_err();
    assert_eq!(old.code(), Code::NotFound);
    assert!(old.message().contains("it is of a version without pools"), "{old}");
    let pool = |name: &str| v1::Pool { name: name.into(), free_bytes: 4096, ..v1::Pool::default() };
    lab.board.lock().unwrap().pools = vec![pool("default"), pool("ssd")];
    eventually("the workers' pools", async || {
        let answer = lab.cluster.fleet(lab.node).list_workers(v1::ListWorkersRequest {}).await.ok()?.into_inner();
        answer.workers.iter().all(|worker| worker.pools == [pool("default"), pool("ssd")]).then_some(())
    })
    .await;
    let unknown = lab.protect_in("hdd", "b", 0).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("worker \"worker-b\" has no pool \"hdd\"; it has: default, ssd"), "{unknown}");
    let bad = lab.protect_in("Fast One", "b", 0).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    assert_eq!(lab.protect_in("ssd", "b", 0).await.unwrap().pool, "ssd");
    eventually("the pool at the owner", async || {
        let board = lab.board.lock().unwrap();
        (board.replications.get("worker-a")?.first()?.pool == "ssd").then_some(())
    })
    .await;
    let vm = lab.vm_until("web", |vm| is_seeded_at(vm, "b")).await;
    assert_eq!(vm.replicas[0].pool, "ssd");
    let moved = lab.protect_in("default", "b", 0).await.unwrap_err();
    assert_eq!(moved.code(), Code::FailedPrecondition);
    assert!(moved.message().contains("lies in pool \"ssd\"") && moved.message().contains("replica delete"), "{moved}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_terms_and_sites_are_refused_with_the_fix_and_caps_reach_the_worker() {
    let lab = running().await;
    for (site, rpo_ms, code, part) in [
        ("b", 1_000, Code::InvalidArgument, "give 5 s to 24 h"),
        ("a", 0, Code::FailedPrecondition, "already runs at site \"a\""),
        ("z", 0, Code::NotFound, "known sites: a, b"),
    ] {
        let refused = lab.protect(site, rpo_ms).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(part), "{refused}");
    }
    let none = lab.points("b").await.unwrap_err();
    assert!(none.message().starts_with("no replica of vm \"web\" at site \"b\""), "{none}");
    assert_eq!(lab.cap("a", "b", 5).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(lab.cap("a", "a", 0).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(lab.cap("a", "z", 0).await.unwrap_err().code(), Code::NotFound);

    lab.protect("b", 0).await.unwrap();
    assert_eq!(lab.cap("a", "b", 100_000_000).await.unwrap().cap_bps, 100_000_000);
    eventually("the cap at the worker", async || {
        let board = lab.board.lock().unwrap();
        let told = board.replications.get("worker-a")?;
        (told.first()?.cap_bps == 100_000_000).then_some(())
    })
    .await;
    let links = lab.cluster.replication(lab.node).list_links(v1::ListLinksRequest {}).await.unwrap().into_inner().links;
    let shown: Vec<_> = links.iter().map(|link| (&*link.from_site, &*link.to_site, link.cap_bps)).collect();
    assert_eq!(shown, [("a", "b", 100_000_000), ("b", "a", 0)]);
}
