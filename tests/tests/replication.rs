//! A protected VM: its replica is at a recovery point at all times, whoever is killed; a move starts from it and turns the direction
//! round, so that moving back costs only the difference.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pageport_lab::netns;
use serde_json::Value;
use support::protected::{Protected, assert_sound, digest, number_of};
use support::{VM, ctl, cut, heal, wait_for};

/// Changes bytes of a file by hand.
fn damage(path: &Path, offsets: &[u64]) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for offset in offsets {
        let mut byte = [0];
        file.read_exact_at(&mut byte, *offset).unwrap();
        file.write_all_at(&[!byte[0]], *offset).unwrap();
    }
}

impl Protected {
    /// Three blocks are damaged, one of them twice; the guest must be quiet.
    async fn assert_scrub_repairs(&mut self, disk: &Path) {
        let replica = self.replica("b").await;
        damage(&replica, &[5_000_000, 5_000_001, 5_004_097, 60_000_000]);
        assert_ne!(digest(&replica), digest(disk));
        let ordered = self.lab.ctl_json(["replication", "scrub", VM]).await.unwrap();
        self.lab.worker("a").kill().unwrap();
        self.lab.worker("a").restart().unwrap();
        let scrub = self.scrubbed("b", number_of(&ordered["scrub_seq"]).unwrap()).await;
        let count = |name: &str| number_of(&scrub[name]).unwrap();
        assert_eq!((count("different_blocks"), count("repaired_blocks")), (3, 3), "{scrub}");
        assert_eq!(count("done_bytes"), std::fs::metadata(disk).unwrap().len(), "{scrub}");
        assert!(count("compared_bytes") <= count("done_bytes") && count("compared_bytes") > 0, "{scrub}");
        self.assert_replica_is_the_disk("b", disk).await;
    }

    /// While the guest writes: what it writes is no damage.
    async fn assert_scrub_finds(&self, site: &str, different_blocks: u64) {
        let watched = ctl(&self.lab, &["replication", "scrub", VM, "--site", site, "--watch", "--json"]).await.unwrap();
        let last: Value = serde_json::from_str(watched.lines().last().unwrap()).unwrap();
        let scrub = &last["replication"]["last_scrub"];
        assert_eq!(number_of(&scrub["different_blocks"]), Some(different_blocks), "{last}");
    }

    /// Waits for the end of a scrub.
    async fn scrubbed(&self, site: &str, seq: u64) -> Value {
        wait_for("the end of the scrub", || async {
            let vm = self.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
            let replicas = vm["replicas"].as_array().into_iter().flatten();
            let mut last = replicas.filter(|it| it["site"] == site).map(|it| it["replication"]["last_scrub"].clone());
            last.find(|last| number_of(&last["seq"]) == Some(seq)).ok_or(vm.to_string())
        })
        .await
    }
}

/// A recovery point that is open for reading.
struct Drill {
    point: u64,
    /// Where its disk is read: at a socket, and at a port of the loopback.
    urls: Vec<String>,
    /// Of the disk as the guest had it then.
    digest: String,
}

impl Protected {
    /// Opens the newest point; the guest must be quiet.
    async fn open_newest(&self) -> Drill {
        let point = self.point_from_now("b").await;
        let digest = digest(&self.disk);
        let number = point.to_string();
        let open = ["recovery-point", "open", VM, &number, "--for", "1h", "--listen", "127.0.0.1:0"];
        let export = self.lab.ctl_json(open).await.unwrap();
        let urls = export["disks"][0]["urls"].as_array().unwrap().iter().map(|url| url.as_str().unwrap().to_owned());
        Drill { point, urls: urls.collect(), digest }
    }

    /// As any reader at its host finds it, though it is no longer listed.
    async fn assert_reads_as_it_was(&self, drill: &Drill) {
        let list = self.lab.ctl_json(["recovery-point", "list", VM]).await.unwrap();
        let listed = list["points"].as_array().unwrap().iter().map(|point| number_of(&point["number"]).unwrap());
        assert!(listed.min().unwrap() > drill.point, "{list}");
        let export = wait_for("the point to be open", || async {
            let list = self.lab.ctl_json(["recovery-point", "list", VM]).await.unwrap();
            let export = list["exports"][0].clone();
            if export["state"] == "open" { Ok(export) } else { Err(list.to_string()) }
        })
        .await;
        assert!(number_of(&export["held_bytes"]).unwrap() > 0, "{export}");
        assert_eq!(drill.urls.len(), 2);
        let copy = self.lab.folder().join("drill.raw");
        for url in &drill.urls {
            let mut command = self.lab.network().place("b").command("qemu-img");
            let converted = command.args(["convert", "-O", "raw", url]).arg(&copy).output().unwrap();
            assert!(converted.status.success(), "{url}: {converted:?}");
            assert_eq!(digest(&copy), drill.digest, "{url}");
            assert_sound(&copy, &self.lab.folder().join("check.raw"));
        }
        std::fs::remove_file(copy).unwrap();
    }

    /// The VM runs where the point was read.
    async fn assert_drill_ended(&self, drill: &Drill) {
        let list = self.lab.ctl_json(["recovery-point", "list", VM, "--site", "b"]).await.unwrap();
        let export = &list["exports"][0];
        assert_eq!(number_of(&export["number"]), Some(drill.point), "{list}");
        assert_eq!(export["state"], "ended", "{list}");
        assert!(export["reason"].as_str().unwrap().contains("given to this site"), "{list}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protected_vm_keeps_its_points_through_kills_and_cuts_and_moves_there_and_back() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut vm = Protected::begin().await;
    vm.write(1).await;
    let first = vm.point_from_now("b").await;

    eprintln!("the worker that holds the replica is killed");
    vm.lab.worker("b").kill().unwrap();
    vm.lab.worker("b").restart().unwrap();
    let second = vm.point_after("b", first + 1).await;
    eprintln!("the worker that holds the vm is killed");
    let between = vm.point_after("b", second).await;
    let logged = vm.log("a").len();
    vm.lab.worker("a").kill().unwrap();
    vm.lab.worker("a").restart().unwrap();
    let third = vm.point_after("b", between + 1).await;
    let log = vm.log("a").split_off(logged);
    let session = log.lines().find(|line| line.contains("disk session open")).unwrap();
    assert!(session.contains("digests_sent=false"), "the index file is of use: {session}");
    eprintln!("the link is cut");
    cut(&vm.lab);
    tokio::time::sleep(std::time::Duration::from_secs(12)).await;
    heal(&vm.lab);
    vm.point_after("b", third + 1).await;
    vm.written().await;
    vm.point_from_now("b").await;
    let disk = vm.disk.clone();
    vm.assert_replica_is_the_disk("b", &disk).await;
    vm.assert_same_guest().await;

    let points = vm.lab.ctl_json(["recovery-point", "list", VM, "--site", "b"]).await.unwrap();
    let points = points["points"].as_array().unwrap().len();
    assert!((1..=4).contains(&points), "{points} points are kept");

    eprintln!("the replica is damaged by hand, and scrubbed while the worker of the vm is killed");
    vm.assert_scrub_repairs(&disk).await;

    eprintln!("a point is read while newer ones come");
    let drill = vm.open_newest().await;
    vm.write(3).await;
    vm.assert_scrub_finds("b", 0).await;
    vm.point_after("b", drill.point + 5).await;
    vm.assert_reads_as_it_was(&drill).await;
    eprintln!("... also after a restart of the worker that holds it");
    vm.lab.worker("b").kill().unwrap();
    vm.lab.worker("b").restart().unwrap();
    vm.point_from_now("b").await;
    vm.assert_reads_as_it_was(&drill).await;
    vm.written().await;

    eprintln!("there");
    let disk_bytes = std::fs::metadata(&disk).unwrap().len();
    vm.assert_moves_with_little("b", disk_bytes).await;
    vm.assert_same_guest().await;
    vm.assert_drill_ended(&drill).await;
    vm.write(2).await;
    vm.point_after("a", 1).await;
    vm.written().await;
    eprintln!("and back");
    vm.assert_moves_with_little("a", disk_bytes).await;
    vm.assert_same_guest().await;
    vm.point_after("b", 1).await;
    vm.assert_replica_is_the_disk("b", &disk).await;
}
