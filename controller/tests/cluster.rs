//! Three controllers: any node answers, a lost leader loses nothing, a repeated request takes effect once.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_controller::config::LogLimits;
use pageport_proto::v1;
use support::{Cluster, define, eventually, within, worker};
use tonic::Code;

async fn list(cluster: &Cluster, node: u64) -> Vec<String> {
    eventually("the list of VMs", async || {
        let answer = cluster.fleet(node).list_vms(v1::ListVmsRequest {}).await.ok()?;
        Some(answer.into_inner().vms.into_iter().map(|vm| vm.spec.unwrap().name).collect())
    })
    .await
}

async fn defined(cluster: &Cluster, node: u64, request: &v1::DefineVmRequest) -> v1::Vm {
    eventually("the definition", async || match cluster.fleet(node).define_vm(request.clone()).await {
        Ok(answer) => Some(answer.into_inner().vm.unwrap()),
        Err(status) if [Code::Unavailable, Code::NotFound, Code::FailedPrecondition].contains(&status.code()) => None,
        Err(status) => panic!("{status}"),
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_survives_its_leader_and_a_repeated_request_takes_effect_once() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let follower = cluster.a_follower().await;
    let request = define("web", "a");
    let vm = defined(&cluster, follower, &request).await;
    assert_eq!(list(&cluster, follower).await, ["web"]);

    let leader = cluster.leader().await;
    cluster.stop(leader).await;
    let survivor = cluster.a_follower().await;
    assert_eq!(list(&cluster, survivor).await, ["web"]);
    let again = defined(&cluster, survivor, &request).await;
    assert_eq!(again.id, vm.id, "the same request gets the same answer from another leader");
    let other = cluster.fleet(survivor).define_vm(define("web", "a")).await;
    let refused = other.unwrap_err();
    assert_eq!((refused.code(), refused.message().contains("\"web\" exists already")), (Code::AlreadyExists, true));

    cluster.restart(leader).await;
    eventually("the restarted node to catch up", async || {
        let there = cluster.status(leader).await?;
        let here = cluster.status(survivor).await?;
        (there.applied_index >= here.applied_index && here.applied_index > 0).then_some(())
    })
    .await;
    assert_eq!(list(&cluster, leader).await, ["web"]);
}

/// The VMs that a late node knows once it has all that another one has applied.
async fn caught_up(cluster: &Cluster, late: u64, node: u64) -> Vec<String> {
    eventually("the late node to catch up", async || {
        let (there, here) = (cluster.status(late).await?, cluster.status(node).await?);
        if there.applied_index < here.applied_index {
            return None;
        }
        Some(list(cluster, late).await)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_restarted_from_disk_know_everything_also_past_a_snapshot() {
    let mut cluster = Cluster::start(LogLimits { snapshot_every: 8, keep_entries: 2 }).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let late = cluster.a_follower().await;
    defined(&cluster, late, &define("vm-0", "a")).await;
    cluster.stop(late).await;
    let node = cluster.leader().await;
    for number in 1..20 {
        defined(&cluster, node, &define(&format!("vm-{number}"), "a")).await;
    }
    // The log that the late node needs is gone: it can only be served a snapshot.
    cluster.restart(late).await;
    let names = caught_up(&cluster, late, node).await;
    assert_eq!(names.len(), 20);
    for id in 1..=3 {
        cluster.stop(id).await;
        assert!(cluster.folder().join(format!("controller-{id}/snapshot")).exists(), "node {id} made no snapshot");
    }
    for id in 1..=3 {
        cluster.restart(id).await;
    }
    assert_eq!(list(&cluster, late).await.len(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_node_gets_a_snapshot_of_many_parts() {
    use pageport_controller::consensus::shipping::PART_BYTES;
    let mut cluster = Cluster::start(LogLimits { snapshot_every: 8, keep_entries: 2 }).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let late = cluster.a_follower().await;
    defined(&cluster, late, &define("vm-0", "a")).await;
    cluster.stop(late).await;
    let node = cluster.leader().await;
    let snapshot = cluster.data_dir(node).join("snapshot");
    let mut vms = 1;
    while std::fs::metadata(&snapshot).map_or(0, |file| file.len()) < 3 * PART_BYTES as u64 {
        defined(&cluster, node, &define(&format!("vm-{vms}"), "a")).await;
        vms += 1;
    }
    cluster.restart(late).await;
    let names = caught_up(&cluster, late, node).await;
    assert_eq!(names.len(), vms);
    assert!(!cluster.data_dir(late).join("snapshot.part").exists(), "nothing is left of its parts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_requests_are_refused_in_time() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await;
    for id in (1..=3).filter(|id| *id != leader) {
        cluster.stop(id).await;
    }
    let answer = within("a refusal", cluster.fleet(leader).list_vms(v1::ListVmsRequest {})).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_names_are_answered_with_what_would_be_right() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let node = cluster.a_follower().await;
    let vm = defined(&cluster, node, &define("web", "a")).await;
    assert_eq!(vm.owner_site, "a");
    let seed = v1::SeedReplicaRequest { request_id: String::new(), vm: "web".into(), to_site: "x".into() };
    let refused = cluster.replication(node).seed_replica(seed).await.unwrap_err();
    assert_eq!(refused.message(), "site \"x\" is unknown; known sites: a");
    let order = v1::CreateMigrationRequest {
        request_id: String::new(),
        vm: "nix".into(),
        to_site: "a".into(),
        ..Default::default()
    };
    let refused = cluster.migration(node).create_migration(order).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let order = v1::CreateMigrationRequest {
        request_id: String::new(),
        vm: "web".into(),
        to_site: "a".into(),
        ..Default::default()
    };
    let refused = cluster.migration(node).create_migration(order).await.unwrap_err();
    assert_eq!(refused.message(), "vm \"web\" already runs at site \"a\"");
    let mut bad = define("db", "a");
    bad.spec.as_mut().unwrap().vcpus = 65;
    let refused = cluster.fleet(node).define_vm(bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("vcpus"), "{}", refused.message());
}

/// One HTTP/1.1 exchange, as a browser makes it.
async fn http(address: std::net::SocketAddr, request: &[u8]) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = vec![];
    within("the answer", stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_reaches_the_leader_through_any_node() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let node = cluster.a_follower().await;
    defined(&cluster, node, &define("from-afar", "a")).await;
    let mut request = b"POST /pageport.v1.FleetService/ListVms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
        Content-Type: application/grpc-web+proto\r\nX-Grpc-Web: 1\r\nContent-Length: 5\r\n\r\n"
        .to_vec();
    request.extend([0; 5]);
    for id in 1..=3 {
        let answer = http(cluster.web(id), &request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("from-afar") && answer.contains("grpc-status:0"), "{answer}");
        let page = http(cluster.web(id), b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("Pageport"), "{page}");
        let raft = b"POST /pageport.v1.RaftTransportService/Send HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
            Content-Type: application/grpc-web+proto\r\nContent-Length: 0\r\n\r\n";
        let refused = http(cluster.web(id), raft).await;
        assert!(!refused.contains("grpc-status:0"), "the web port must not carry raft: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_a_certificate_of_another_authority_gets_nothing() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let stranger = Cluster::start(LogLimits::default()).await;
    let channel = support::dial(&stranger.worker_identity("worker-x"), &cluster.addresses()[0]);
    let mut client = pageport_proto::v1::cluster_service_client::ClusterServiceClient::new(channel);
    assert!(within("a refusal", client.get_cluster_status(v1::GetClusterStatusRequest {})).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_speaks_for_itself_alone_and_raft_is_for_controllers() {
    use pageport_proto::v1::raft_transport_service_client::RaftTransportServiceClient;
    use pageport_proto::v1::worker_link_service_client::WorkerLinkServiceClient;
    let cluster = Cluster::start(LogLimits::default()).await;
    let leader = cluster.leader().await as usize - 1;
    let channel = support::dial(&cluster.worker_identity("worker-x"), &cluster.addresses()[leader]);
    let ask = |worker: &str| v1::AskGrantRequest {
        worker: worker.to_owned(),
        vm_id: pageport_proto::VmId::generate().to_string(),
        nonce: 1,
    };
    let mut link = WorkerLinkServiceClient::new(channel.clone());
    let own = within("the answer", link.ask_grant(ask("worker-x"))).await.unwrap().into_inner();
    assert!(!own.granted, "a VM that nobody knows is granted to nobody");
    let forged = within("the answer", link.ask_grant(ask("worker-a"))).await.unwrap_err();
    assert_eq!(forged.code(), Code::PermissionDenied);
    let report = v1::WorkerReport { worker: "worker-a".into(), site: "a".into(), ..v1::WorkerReport::default() };
    let mut assignments = link.link(tokio_stream::iter([report])).await.unwrap().into_inner();
    let forged = within("the answer", assignments.message()).await.unwrap_err();
    assert_eq!(forged.code(), Code::PermissionDenied);
    let mut raft = RaftTransportServiceClient::new(channel);
    let forged = within("the answer", raft.send(tokio_stream::iter([v1::RaftEnvelope::default()]))).await;
    assert_eq!(forged.unwrap_err().code(), Code::PermissionDenied);
}
