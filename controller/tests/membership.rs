//! Changes of the controllers themselves, with real controllers: who they are, and who leads.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_common::error::with_causes;
use pageport_controller::config::LogLimits;
use pageport_proto::v1;
use pageport_proto::v1::add_member_response::Phase;
use pageport_proto::v1::membership_service_client::MembershipServiceClient;
use support::{Cluster, define, eventually, within, worker};
use tonic::{Code, Status, Streaming};

async fn transfer(cluster: &Cluster, node: u64, to: u64) -> Result<v1::TransferLeadershipResponse, Status> {
    let mut client = MembershipServiceClient::new(cluster.channel(node));
    let request = v1::TransferLeadershipRequest { to };
    within("the transfer", client.transfer_leadership(request)).await.map(tonic::Response::into_inner)
}

async fn list(cluster: &Cluster, node: u64) -> Result<v1::ListVmsResponse, Status> {
    within("the list", cluster.fleet(node).list_vms(v1::ListVmsRequest {})).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_to_whoever_is_named_and_any_node_takes_the_order() {
    let cluster = Cluster::start(LogLimits::default()).await;
    for _ in 0..3 {
        let leader = cluster.leader().await;
        let heir = cluster.a_follower().await;
        let term = cluster.status(leader).await.unwrap().term;
        let asked = if heir == 1 { heir } else { leader };
        let answer = transfer(&cluster, asked, heir).await.unwrap();
        assert_eq!(answer.leader, heir);
        assert!(answer.term > term, "{} after {term}", answer.term);
        assert_eq!(cluster.leader().await, heir);
        list(&cluster, leader).await.unwrap();
        let again = transfer(&cluster, leader, heir).await.unwrap();
        assert_eq!((again.leader, again.term), (heir, answer.term), "a repeated order finds it done");
    }
    let leader = cluster.leader().await;
    let answer = transfer(&cluster, leader, 0).await.unwrap();
    assert_ne!(answer.leader, leader, "unless someone is named it goes to another");
    assert_eq!(cluster.leader().await, answer.leader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_answer_or_vote_does_not_get_to_lead() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await;
    let refused = transfer(&cluster, leader, 9).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.message(), "controller 9 is not a voting member: those are 1, 2, 3");
    let silent = cluster.a_follower().await;
    cluster.stop(silent).await;
    let message = eventually("the refusal", async || {
        let refused = transfer(&cluster, leader, silent).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        refused.message().contains("does not answer").then(|| refused.message().to_owned())
    })
    .await;
    assert!(message.contains(&format!("controller {leader} leads on")), "{message}");
    assert_eq!(cluster.leader().await, leader);
    list(&cluster, leader).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_operators_change_who_leads() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await;
    for node in [leader, cluster.a_follower().await] {
        let channel = support::dial(&cluster.worker_identity("worker-x"), &cluster.addresses()[node as usize - 1]);
        let request = v1::TransferLeadershipRequest { to: 0 };
        let refused = MembershipServiceClient::new(channel).transfer_leadership(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
    assert_eq!(cluster.leader().await, leader);
}

const SHORT_LOG: LogLimits = LogLimits { snapshot_every: 8, keep_entries: 2 };

fn members(cluster: &Cluster, node: u64) -> MembershipServiceClient<tonic::transport::Channel> {
    MembershipServiceClient::new(cluster.channel(node))
}

fn request(id: u64, address: &str) -> v1::AddMemberRequest {
    v1::AddMemberRequest { id, site: "d".into(), address: address.to_owned() }
}

async fn next(updates: &mut Streaming<v1::AddMemberResponse>) -> v1::AddMemberResponse {
    within("an update", updates.message()).await.unwrap().expect("the stream goes on until it is done")
}

/// Asks for an addition, with as many requests as a client makes.
async fn begin(cluster: &Cluster, node: u64, request: v1::AddMemberRequest) -> Streaming<v1::AddMemberResponse> {
    eventually("the addition to begin", async || match members(cluster, node).add_member(request.clone()).await {
        Err(status) if status.code() == Code::Unavailable => None,
        answer => Some(answer.unwrap().into_inner()),
    })
    .await
}

/// Adds a member, and follows it until it votes.
async fn add(cluster: &Cluster, node: u64, id: u64, address: &str) -> Vec<v1::ClusterMember> {
    let mut updates = begin(cluster, node, request(id, address)).await;
    loop {
        let update = next(&mut updates).await;
        if update.phase() == Phase::Done {
            return update.members;
        }
        assert_eq!(update.phase(), Phase::CatchingUp);
    }
}

/// Removes a member, with as many requests as a client makes.
async fn remove(cluster: &Cluster, node: u64, id: u64, force: bool) -> Result<Vec<u64>, Status> {
    eventually("the removal", async || {
        match members(cluster, node).remove_member(v1::RemoveMemberRequest { id, force }).await {
            Err(status) if status.code() == Code::Unavailable => None,
            answer => Some(answer.map(|answer| answer.into_inner().members.iter().map(|it| it.id).collect())),
        }
    })
    .await
}

async fn define_vm(cluster: &Cluster, node: u64, name: &str) {
    let request = define(name, "a");
    eventually("the definition", async || {
        let answer = cluster.fleet(node).define_vm(request.clone()).await;
        answer.inspect_err(|status| assert_ne!(status.code(), Code::InvalidArgument, "{status}")).ok()
    })
    .await;
}

async fn names(cluster: &Cluster, node: u64) -> Vec<String> {
    let vms = eventually("the list", async || list(cluster, node).await.ok()).await.vms;
    vms.into_iter().map(|vm| vm.spec.unwrap().name).collect()
}

/// What a node itself holds for the members.
async fn knows(cluster: &Cluster, node: u64, expected: &[u64]) {
    eventually(&format!("node {node} to know the members"), async || {
        let status = cluster.status(node).await?;
        let all = status.members.iter().map(|member| member.id).eq(expected.iter().copied());
        (all && status.members.iter().all(|member| !member.learner)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_controller_takes_the_place_of_a_lost_one_while_work_goes_on() {
    let mut cluster = Cluster::start(SHORT_LOG).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let node = cluster.leader().await;
    for number in 0..12 {
        define_vm(&cluster, node, &format!("vm-{number}")).await;
    }
    let lost = cluster.a_follower().await;
    cluster.stop(lost).await;
    let (new, address) = cluster.join().await;
    let all = add(&cluster, node, new, &address).await;
    assert_eq!(
        all.iter().map(|member| (member.id, member.learner)).collect::<Vec<_>>(),
        [1, 2, 3, 4].map(|id| (id, false))
    );
    assert_eq!(add(&cluster, node, new, &address).await.len(), 4, "repeated it is found done");

    let left: Vec<u64> = [1, 2, 3, 4].into_iter().filter(|id| *id != lost).collect();
    assert_eq!(remove(&cluster, new, lost, false).await.unwrap(), left);
    assert_eq!(remove(&cluster, new, lost, false).await.unwrap(), left, "repeated it is found done");
    for id in &left {
        knows(&cluster, *id, &left).await;
    }
    assert_eq!(names(&cluster, new).await.len(), 12);

    let other = *left.iter().find(|id| **id != node && **id != new).unwrap();
    cluster.stop(other).await;
    define_vm(&cluster, new, "with-the-new-ones-vote").await;
    cluster.stop(node).await;
    cluster.stop(new).await;
    for id in &left {
        cluster.restart(*id).await;
    }
    assert_eq!(names(&cluster, new).await.len(), 13);
    for id in &left {
        knows(&cluster, *id, &left).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_learns_the_others_from_the_snapshot() {
    let mut cluster = Cluster::start(SHORT_LOG).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let late = cluster.a_follower().await;
    cluster.stop(late).await;
    let (new, address) = cluster.join().await;
    let node = cluster.leader().await;
    add(&cluster, node, new, &address).await;
    for number in 0..12 {
        define_vm(&cluster, node, &format!("vm-{number}")).await;
    }
    cluster.restart(late).await;
    knows(&cluster, late, &[1, 2, 3, 4]).await;
    assert_eq!(transfer(&cluster, node, late).await.unwrap().leader, late);
    assert_eq!(names(&cluster, new).await.len(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_removed_stops_and_says_why_also_when_it_led() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let (new, address) = cluster.join().await;
    let leader = cluster.leader().await;
    add(&cluster, leader, new, &address).await;
    for number in 0..2 {
        let gone = if number == 0 { cluster.leader().await } else { cluster.a_follower().await };
        let asked = if number == 0 { cluster.a_follower().await } else { cluster.leader().await };
        assert!(!remove(&cluster, asked, gone, false).await.unwrap().contains(&gone));
        let why = with_causes(&cluster.end_of(gone).await);
        assert!(why.contains(&format!("controller {gone} was removed from the cluster")), "{why}");
        let address = cluster.addresses()[gone as usize - 1].clone();
        let again = members(&cluster, asked).add_member(request(gone, &address)).await.unwrap_err();
        assert!(again.message().contains("its number is not given again"), "{again}");
        cluster.restart(gone).await;
        let why = with_causes(&cluster.end_of(gone).await);
        assert!(why.contains("was removed from the cluster"), "after a restart: {why}");
    }
    let leader = cluster.leader().await;
    list(&cluster, leader).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_would_leave_no_majority_needs_force() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await;
    let silent = cluster.a_follower().await;
    cluster.stop(silent).await;
    eventually("the leader to miss it", async || {
        let status = cluster.status(leader).await?;
        status.members.iter().find(|member| member.id == silent)?.silent_ms.filter(|silent_ms| *silent_ms > 1500)
    })
    .await;
    let other = (1..=3).find(|id| *id != leader && *id != silent).unwrap();
    let refused = remove(&cluster, leader, other, false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&format!("only {leader} of 2 voting controllers would answer")), "{refused}");
    knows(&cluster, leader, &[1, 2, 3]).await;

    remove(&cluster, leader, other, true).await.unwrap();
    assert!(with_causes(&cluster.end_of(other).await).contains("was removed"));
    cluster.restart(silent).await;
    names(&cluster, leader).await;
    let rest: Vec<u64> = (1..=3).filter(|id| *id != other).collect();
    knows(&cluster, silent, &rest).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_is_not_started_does_not_vote_and_may_be_given_another_address() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await;
    let nowhere = "127.0.0.1:1";
    let mut updates = begin(&cluster, leader, request(4, nowhere)).await;
    let update = next(&mut updates).await;
    assert_eq!((update.phase(), update.answers), (Phase::CatchingUp, false));
    drop(updates);
    let status = cluster.status(leader).await.unwrap();
    let learner = status.members.iter().find(|member| member.id == 4).unwrap();
    assert!(learner.learner && learner.silent_ms.is_none() && learner.address == nowhere, "{learner:?}");
    let refused = transfer(&cluster, leader, 4).await.unwrap_err();
    assert!(refused.message().contains("not a voting member"), "{refused}");

    let (new, address) = cluster.join().await;
    add(&cluster, leader, new, &address).await;
    knows(&cluster, new, &[1, 2, 3, 4]).await;
}
