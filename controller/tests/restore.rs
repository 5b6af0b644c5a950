//! All controllers are lost, and others go on from a backup: no VM runs twice, and each is found where it went since.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use pageport_common::error::with_causes;
use pageport_common::tls::Identity;
use pageport_controller::backup::{Backup, RestoreError, restore};
use pageport_controller::config::{Config, LogLimits};
use pageport_controller::server::{Listeners, await_restore};
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::membership_service_client::MembershipServiceClient;
use pageport_proto::v1::restore_service_client::RestoreServiceClient;
use pageport_proto::v1::{self, VmState};
use support::{Cluster, define, eventually, request_id, within, worker};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Code;

async fn vm(cluster: &Cluster, node: u64, name: &str) -> Option<v1::Vm> {
    let request = v1::GetVmRequest { vm: name.to_owned() };
    cluster.fleet(node).get_vm(request).await.ok()?.into_inner().vm
}

/// The VM, once it is in this state at this worker.
async fn at(cluster: &Cluster, node: u64, name: &str, worker: &str, state: VmState) -> v1::Vm {
    eventually(&format!("{name} to be {state:?} at {worker}"), async || {
        vm(cluster, node, name).await.filter(|vm| vm.owner_worker == worker && vm.state() == state)
    })
    .await
}

async fn backup(cluster: &Cluster, node: u64) -> PathBuf {
    let bytes = eventually("a backup", async || {
        let mut client = MembershipServiceClient::new(cluster.channel(node));
        let mut parts = client.backup(v1::BackupRequest {}).await.ok()?.into_inner();
        let mut bytes = vec![];
        while let Some(part) = parts.message().await.ok()? {
            assert_eq!(part.offset, bytes.len() as u64);
            bytes.extend_from_slice(&part.chunk);
            if bytes.len() as u64 == part.total_bytes {
                return Some(bytes);
            }
        }
        None
    })
    .await;
    let path = cluster.folder().join("backup");
    pageport_common::backup::write(&path, &bytes, true).unwrap();
    path
}

async fn define_and_start(cluster: &Cluster, node: u64, name: &str) {
    let definition = define(name, "a");
    let start = v1::StartVmRequest { request_id: request_id(), vm: name.to_owned() };
    eventually("the definition", async || cluster.fleet(node).define_vm(definition.clone()).await.ok()).await;
    eventually("the start", async || cluster.fleet(node).start_vm(start.clone()).await.ok()).await;
    at(cluster, node, name, "worker-a", VmState::Running).await;
}

async fn move_to(cluster: &Cluster, node: u64, name: &str, site: &str) {
    let order = v1::CreateMigrationRequest {
        request_id: request_id(),
        vm: name.to_owned(),
        to_site: site.to_owned(),
        ..Default::default()
    };
    eventually("the move to be taken", async || cluster.migration(node).create_migration(order.clone()).await.ok())
        .await;
    at(cluster, node, name, &format!("worker-{site}"), VmState::Running).await;
}

async fn seed(cluster: &Cluster, node: u64, name: &str, site: &str) {
    let seed = v1::SeedReplicaRequest { request_id: request_id(), vm: name.to_owned(), to_site: site.to_owned() };
    eventually("the seed", async || cluster.replication(node).seed_replica(seed.clone()).await.ok()).await;
    eventually("the copy", async || {
        let replicas = vm(cluster, node, name).await?.replicas;
        let seeded = |replica: &v1::Replica| replica.site == site && replica.state() == v1::ReplicaState::Seeded;
        replicas.iter().any(seeded).then_some(())
    })
    .await;
}

/// Two VMs run at a, with copies at b. A backup is taken, and one of them moves to b.
async fn story(cluster: &Cluster, board: &worker::Shared) -> (PathBuf, u64) {
    for name in ["worker-a", "worker-b"] {
        drop(worker::start(cluster, name, &name[7..], board));
    }
    let node = cluster.leader().await;
    for name in ["stays", "moves"] {
        define_and_start(cluster, node, name).await;
    }
    seed(cluster, node, "moves", "b").await;
    let file = backup(cluster, node).await;
    move_to(cluster, node, "moves", "b").await;
    (file, node)
}

fn runs(board: &worker::Shared) -> usize {
    board.lock().unwrap().runs.len()
}

async fn lose_all(cluster: &mut Cluster) {
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_every_vm_is_unknown_until_all_workers_have_reported() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (file, _) = story(&cluster, &board).await;
    lose_all(&mut cluster).await;
    board.lock().unwrap().cut.insert("worker-b".into());
    let before = runs(&board);
    let new = cluster.restore(&file).await.unwrap();
    board.lock().unwrap().controllers.push(cluster.addresses()[new as usize - 1].clone());

    let waiting = eventually("only worker-b to be missing", async || {
        let status = cluster.status(new).await?;
        (status.awaited_workers == ["worker-b"]).then_some(status)
    })
    .await;
    assert_eq!((waiting.generation, waiting.vms_unknown), (1, 2));
    for name in ["stays", "moves"] {
        let vm = vm(&cluster, new, name).await.unwrap();
        assert_eq!((vm.state(), vm.owner_worker.as_str()), (VmState::Unknown, ""), "{vm:?}");
        assert!(vm.problem.contains("until these workers have reported: \"worker-b\""), "{}", vm.problem);
        let stop = v1::StopVmRequest { request_id: request_id(), vm: name.into(), force: false };
        let refused = cluster.fleet(new).stop_vm(stop).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    assert_eq!(cluster.fleet(new).list_vms(v1::ListVmsRequest {}).await.unwrap().into_inner().vms.len(), 2);

    board.lock().unwrap().cut.clear();
    let stays = at(&cluster, new, "stays", "worker-a", VmState::Running).await;
    // The backup says a; it has gone to b since.
    let moved = at(&cluster, new, "moves", "worker-b", VmState::Running).await;
    assert_eq!((stays.owner_epoch, moved.owner_epoch), (1, 2), "what they run under still counts");
    assert_eq!(runs(&board), before, "nothing was started");
    assert_eq!(cluster.status(new).await.unwrap().vms_unknown, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_was_defined_since_the_backup_is_found_and_adopted() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (file, node) = story(&cluster, &board).await;
    define_and_start(&cluster, node, "late").await;
    seed(&cluster, node, "late", "b").await;
    move_to(&cluster, node, "late", "b").await;
    lose_all(&mut cluster).await;
    let before = runs(&board);
    let new = cluster.restore(&file).await.unwrap();
    board.lock().unwrap().controllers.push(cluster.addresses()[new as usize - 1].clone());
    at(&cluster, new, "moves", "worker-b", VmState::Running).await;

    assert!(vm(&cluster, new, "late").await.is_none());
    let found = eventually("it to be found", async || {
        let found = cluster.fleet(new).list_vms(v1::ListVmsRequest {}).await.ok()?.into_inner().found;
        found.first().cloned()
    })
    .await;
    assert_eq!((found.name.as_str(), found.runs), ("late", true));
    assert_eq!(found.workers, ["worker-b"]);
    let adopt = async |vm: &str| {
        let request = v1::AdoptVmRequest { request_id: request_id(), vm: vm.to_owned() };
        cluster.fleet(new).adopt_vm(request).await
    };
    assert_eq!(adopt("never").await.unwrap_err().code(), Code::NotFound);
    cluster.fleet(new).define_vm(define("late", "a")).await.unwrap();
    assert_eq!(adopt(&found.id).await.unwrap_err().code(), Code::AlreadyExists);
    let delete = v1::DeleteVmRequest { request_id: request_id(), vm: "late".into() };
    eventually("the other to be deleted", async || cluster.fleet(new).delete_vm(delete.clone()).await.ok()).await;
    let adopted = adopt(&found.id).await.unwrap().into_inner().vm.unwrap();
    assert_eq!(adopted.spec.map(|spec| spec.name).as_deref(), Some("late"));
    let late = at(&cluster, new, "late", "worker-b", VmState::Running).await;
    assert_eq!((&late.id, late.owner_epoch), (&found.id, 2), "what it runs under still counts");
    assert_eq!(adopt("late").await.unwrap().into_inner().vm.unwrap().id, late.id, "once more changes nothing");
    assert_eq!(runs(&board), before, "nothing was started");
    let listed = cluster.fleet(new).list_vms(v1::ListVmsRequest {}).await.unwrap().into_inner();
    assert_eq!((listed.vms.len(), listed.found.len()), (3, 0));
    seed(&cluster, new, "late", "a").await;
    move_to(&cluster, new, "late", "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_restores_from_one_backup_only_one_ever_learns_who_owns_the_vms() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (file, _) = story(&cluster, &board).await;
    lose_all(&mut cluster).await;
    let before = runs(&board);
    let [one, other] = [cluster.restore(&file).await.unwrap(), cluster.restore(&file).await.unwrap()];
    let began = Instant::now();
    board.lock().unwrap().controllers.push(cluster.addresses()[one as usize - 1].clone());
    at(&cluster, one, "stays", "worker-a", VmState::Running).await;
    let took = began.elapsed();

    // The other is found when the first one is not.
    board.lock().unwrap().controllers.push(cluster.addresses()[other as usize - 1].clone());
    cluster.stop(one).await;
    eventually("both workers to turn the other away", async || (board.lock().unwrap().turned_away >= 20).then_some(()))
        .await;
    // For longer than the first one needed.
    tokio::time::sleep(took * 3 / 2).await;
    let status = cluster.status(other).await.unwrap();
    assert_eq!((status.generation, status.vms_unknown), (1, 2));
    assert_eq!(status.awaited_workers, ["worker-a", "worker-b"]);
    cluster.restart(one).await;
    at(&cluster, one, "moves", "worker-b", VmState::Running).await;
    assert_eq!(runs(&board), before, "nothing was started");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_declared_dead_is_not_waited_for_and_one_that_answers_cannot_be() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (file, _) = story(&cluster, &board).await;
    lose_all(&mut cluster).await;
    board.lock().unwrap().cut.insert("worker-b".into());
    let new = cluster.restore(&file).await.unwrap();
    board.lock().unwrap().controllers.push(cluster.addresses()[new as usize - 1].clone());
    eventually("worker-a to have joined", async || {
        (cluster.status(new).await?.awaited_workers == ["worker-b"]).then_some(())
    })
    .await;
    let declare = async |worker: &str, confirm: &str, reason: &str| {
        let request = v1::DeclareWorkerDeadRequest {
            request_id: request_id(),
            worker: worker.to_owned(),
            confirm_name: confirm.to_owned(),
            reason: reason.to_owned(),
        };
        FleetServiceClient::new(cluster.channel(new)).declare_worker_dead(request).await
    };
    assert_eq!(declare("worker-b", "worker-a", "burnt").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(declare("worker-b", "worker-b", " ").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(declare("worker-a", "worker-a", "burnt").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(cluster.status(new).await.unwrap().vms_unknown, 2);
    let answer = declare("worker-b", "worker-b", "burnt").await.unwrap().into_inner();
    assert_eq!((answer.vms_unknown, answer.awaited_workers.len()), (0, 0));
    at(&cluster, new, "stays", "worker-a", VmState::Running).await;
    // a knows that b had it: an operator has said that b has not.
    let lost = eventually("the other to be known", async || vm(&cluster, new, "moves").await).await;
    assert!(!lost.owner_worker.is_empty() && lost.owner_epoch >> 48 == 1, "{lost:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_cluster_grows_and_moves_vms_and_the_lost_one_is_not_heard_any_more() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (file, _) = story(&cluster, &board).await;
    lose_all(&mut cluster).await;
    let new = cluster.restore(&file).await.unwrap();
    board.lock().unwrap().controllers.push(cluster.addresses()[new as usize - 1].clone());
    at(&cluster, new, "moves", "worker-b", VmState::Running).await;
    let (another, address) = cluster.join().await;
    let request = v1::AddMemberRequest { id: another, site: "d".into(), address };
    let mut client = MembershipServiceClient::new(cluster.channel(new));
    let mut updates =
        eventually("the addition", async || client.add_member(request.clone()).await.ok()).await.into_inner();
    while let Some(update) = within("an update", updates.message()).await.unwrap() {
        if update.phase() == v1::add_member_response::Phase::Done {
            break;
        }
    }
    eventually("the new member to know the generation", async || {
        (cluster.status(another).await?.generation == 1).then_some(())
    })
    .await;
    // The lost ones were not lost, and come back with workers that they used to have.
    for id in 1..=3 {
        cluster.restart(id).await;
    }
    // How complete the copy is that it left since the backup is not known.
    seed(&cluster, new, "moves", "a").await;
    move_to(&cluster, new, "moves", "a").await;
    let home = at(&cluster, new, "moves", "worker-a", VmState::Running).await;
    assert_eq!(home.owner_epoch >> 48, 1, "an epoch of the new generation");
    let old = eventually("the old controllers to lead", async || {
        let status = cluster.status(1).await?;
        status.members.iter().find(|member| member.leader).map(|member| member.id)
    })
    .await;
    let stale = eventually("the old list", async || vm(&cluster, old, "moves").await).await;
    assert_eq!(stale.owner_worker, "worker-b", "they have not heard of the move");
    let moves = board.lock().unwrap().runs.iter().filter(|(id, _)| *id == home.id).count();
    assert_eq!(moves, 3, "at a, at b, and at a again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_is_refused_where_it_would_do_harm() {
    let cluster = Cluster::start(LogLimits::default()).await;
    let node = cluster.leader().await;
    let file = backup(&cluster, node).await;
    let restored = |id: u64, data_dir: &Path| {
        let config = cluster.config(1).clone();
        restore(&Config { id, data_dir: data_dir.to_owned(), ..config }, Backup::read(&file)?)
    };
    let fresh = cluster.folder().join("fresh");
    let taken = restored(2, &fresh).unwrap_err();
    assert!(taken.to_string().contains("that none of them had (1, 2, 3)"), "{taken}");
    assert!(matches!(restored(9, cluster.folder()), Err(RestoreError::NotEmpty { .. })));
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() - 1]).unwrap();
    assert!(with_causes(&restored(9, &fresh).unwrap_err()).contains("its end is missing"));
    assert!(!fresh.join("snapshot").exists());
    std::fs::write(&file, &good).unwrap();
    assert_eq!(restored(9, &fresh).unwrap().generation.0, 1);
    let channel = support::dial(&cluster.worker_identity("worker-x"), &cluster.addresses()[node as usize - 1]);
    let refused = MembershipServiceClient::new(channel).backup(v1::BackupRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

/// Sends a file in parts of so many bytes.
async fn send(
    cluster: &Cluster,
    address: &str,
    file: &[u8],
    part: usize,
) -> Result<v1::RestoreResponse, tonic::Status> {
    let parts = file.chunks(part).enumerate().map(|(number, chunk)| v1::RestoreRequest {
        chunk: chunk.to_vec().into(),
        total_bytes: file.len() as u64,
        offset: (number * part) as u64,
    });
    let mut client = RestoreServiceClient::new(support::dial(&cluster.operator(), address));
    Ok(client.restore(tokio_stream::iter(parts.collect::<Vec<_>>())).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_without_data_is_sent_a_backup_and_goes_on_with_it() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let (path, node) = story(&cluster, &board).await;
    let file = std::fs::read(&path).unwrap();
    let leader = cluster.addresses()[node as usize - 1].clone();
    let refused = send(&cluster, &leader, &file, 1 << 16).await.unwrap_err();
    assert!(refused.message().contains("--await-restore"), "{refused}");
    lose_all(&mut cluster).await;

    let (config, Listeners { api, web }) = cluster.blank().await;
    let address = config.listen_api.to_string();
    let waits = tokio::spawn({
        let (config, identity) = (config.clone(), Identity::load(&config.tls).unwrap());
        async move { await_restore(&config, &identity, api, CancellationToken::new()).await }
    });
    let cut = send(&cluster, &address, &file[..file.len() - 1], 1 << 16).await.unwrap_err();
    assert!(cut.message().contains("its end is missing"), "{cut}");
    assert!(!config.data_dir.join("snapshot").exists());
    let answer = send(&cluster, &address, &file, 1000).await.unwrap();
    assert_eq!((answer.generation, answer.vms_unknown), (1, 2));
    assert_eq!(answer.awaited_workers, ["worker-a", "worker-b"]);
    assert!(within("the wait to end", waits).await.unwrap().unwrap(), "it goes on");

    let api = TcpListener::bind(config.listen_api).await.unwrap();
    let new = cluster.begin(config, Listeners { api, web });
    board.lock().unwrap().controllers.push(address.clone());
    at(&cluster, new, "moves", "worker-b", VmState::Running).await;
    let again = send(&cluster, &address, &file, 1 << 16).await.unwrap_err();
    assert!(again.message().contains("has data"), "{again}");
}
