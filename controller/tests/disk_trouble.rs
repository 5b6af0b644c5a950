//! Controllers whose disk is damaged, lost or full: each says so and what to do, and nothing that was answered is lost.

#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_common::error::with_causes;
use pageport_controller::config::LogLimits;
use pageport_proto::v1;
use pageport_proto::v1::membership_service_client::MembershipServiceClient;
use support::{Cluster, define, eventually, worker};
use tonic::Code;

const SHORT_LOG: LogLimits = LogLimits { snapshot_every: 8, keep_entries: 2 };

async fn define_vms(cluster: &Cluster, node: u64, names: impl IntoIterator<Item = String>) {
    for name in names {
        let request = define(&name, "a");
        eventually("the definition", async || {
            let answer = cluster.fleet(node).define_vm(request.clone()).await;
            answer.inspect_err(|status| assert_ne!(status.code(), Code::InvalidArgument, "{status}")).ok()
        })
        .await;
    }
}

async fn count(cluster: &Cluster, node: u64) -> usize {
    let list = async || cluster.fleet(node).list_vms(v1::ListVmsRequest {}).await.ok();
    eventually("the list", list).await.into_inner().vms.len()
}

/// Everyone knows everyone's store: from then on a lost one is noticed.
async fn settle(cluster: &Cluster) {
    let leader = cluster.leader().await;
    eventually("all to have applied the same", async || {
        let committed = cluster.status(leader).await?.committed_index;
        // The leader's first entry, three that note a store, and the worker.
        let mut all = committed > 4;
        for node in 1..=3 {
            all &= cluster.status(node).await?.applied_index >= committed;
        }
        all.then_some(())
    })
    .await;
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

fn change(path: &Path, how: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    how(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

type Damage = (&'static str, fn(&Path), &'static str);

const DAMAGES: [Damage; 6] = [
    ("a bit of the snapshot", |data| change(&data.join("snapshot"), |bytes| bytes[40] ^= 4), "the snapshot is damaged"),
    (
        "a part of a snapshot",
        |data| change(&data.join("snapshot"), |bytes| bytes.truncate(bytes.len() / 2)),
        "the snapshot is damaged",
    ),
    (
        "no snapshot",
        |data| std::fs::remove_file(data.join("snapshot")).unwrap(),
        "the snapshot reaches only to entry 0",
    ),
    (
        "a log whose newer part was never written",
        |data| change(&data.join("log/db"), |bytes| bytes[4096..].fill(0)),
        "is damaged",
    ),
    ("no log, terms and votes", |data| std::fs::remove_dir_all(data.join("log")).unwrap(), "terms and votes are lost"),
    (
        "no note of what the log had",
        |data| std::fs::write(data.join("log/newest-batch"), [7; 12]).unwrap(),
        "whether the store beside it is whole cannot be told",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_files_are_refused_with_a_way_out_that_works() {
    let mut cluster = Cluster::start(SHORT_LOG).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let node = cluster.leader().await;
    define_vms(&cluster, node, (0..12).map(|number| format!("vm-{number}"))).await;
    let damaged = cluster.a_follower().await;
    cluster.stop(damaged).await;
    let data = cluster.data_dir(damaged);
    let good = cluster.folder().join("good");
    copy(&data, &good);
    for (what, damage, expected) in DAMAGES {
        std::fs::remove_dir_all(&data).unwrap();
        copy(&good, &data);
        damage(&data);
        cluster.restart(damaged).await;
        let end = cluster.end_of(damaged).await;
        let why = with_causes(&end);
        assert!(why.contains(expected), "{what}: {why}");
        assert!(why.contains(&format!("\"pageportctl cluster remove {damaged}\"")), "{what}: {why}");
        assert!(end.is_final(), "{what}: it is not started again and again");
    }
    let node = cluster.leader().await;
    let mut members = MembershipServiceClient::new(cluster.channel(node));
    eventually("the removal", async || {
        members.remove_member(v1::RemoveMemberRequest { id: damaged, force: false }).await.ok()
    })
    .await;
    let (new, address) = cluster.join().await;
    eventually("the addition", async || {
        let request = v1::AddMemberRequest { id: new, site: "d".into(), address: address.clone() };
        let mut updates = members.add_member(request).await.ok()?.into_inner();
        while let Ok(Some(update)) = updates.message().await {
            if update.phase() == v1::add_member_response::Phase::Done {
                return Some(());
            }
        }
        None
    })
    .await;
    assert_eq!(count(&cluster, new).await, 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_lost_everything_does_not_vote_under_its_old_number() {
    let mut cluster = Cluster::start(LogLimits::default()).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let leader = cluster.leader().await;
    settle(&cluster).await;
    let behind = cluster.a_follower().await;
    let lost = (1..=3).find(|id| *id != leader && *id != behind).unwrap();
    cluster.stop(behind).await;
    // Only the leader and the one whose disk is about to be lost have this.
    define_vms(&cluster, leader, ["only-here".to_owned()]).await;
    cluster.stop(lost).await;
    cluster.stop(leader).await;
    std::fs::remove_dir_all(cluster.data_dir(lost)).unwrap();
    cluster.restart(behind).await;
    cluster.restart(lost).await;
    // With its vote the other would lead, and know nothing of the VM.
    let end = cluster.end_of(lost).await;
    let why = with_causes(&end);
    assert!(why.contains(&format!("controller {lost} has lost its data")), "{why}");
    assert!(why.contains(&format!("\"pageportctl cluster remove {lost}\"")) && end.is_final(), "{why}");
    cluster.restart(leader).await;
    assert_eq!(count(&cluster, behind).await, 1);
}

/// A small file system, as long as it lives.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    fn over(path: &Path) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "pageport-test"]).arg(path).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }

    fn fill(&self) -> PathBuf {
        use std::io::Write;
        let filler = self.0.join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        filler
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_a_controller_that_goes_on_once_there_is_room() {
    let mut cluster = Cluster::start(SHORT_LOG).await;
    let board = worker::Shared::default();
    let _worker = worker::start(&cluster, "worker-a", "a", &board);
    let full = cluster.leader().await;
    define_vms(&cluster, full, ["before".to_owned()]).await;
    cluster.stop(full).await;
    let (data, aside) = (cluster.data_dir(full), cluster.folder().join("aside"));
    copy(&data, &aside);
    let Some(disk) = SmallFileSystem::over(&data) else {
        eprintln!("skipped: only root may mount");
        return;
    };
    copy(&aside.join("."), &data);
    cluster.restart(full).await;
    settle(&cluster).await;
    let leader = cluster.leader().await;
    if leader != full {
        let mut members = MembershipServiceClient::new(cluster.channel(leader));
        eventually("the transfer", async || {
            members.transfer_leadership(v1::TransferLeadershipRequest { to: full }).await.ok()
        })
        .await;
    }
    let filler = disk.fill();
    let other = (1..=3).find(|id| *id != full).unwrap();
    define_vms(&cluster, other, (0..24).map(|number| format!("vm-{number}"))).await;
    let why = with_causes(&cluster.end_of(full).await);
    assert!(why.contains("the disk is full") && why.contains("nothing that it acknowledged is lost"), "{why}");
    std::fs::remove_file(filler).unwrap();
    cluster.restart(full).await;
    cluster.stop(other).await;
    assert_eq!(count(&cluster, full).await, 25);
}
