//! A protected VM: its replica is at a recovery point at all times, whoever is killed; a move starts from it and turns the direction
//! round, so that moving back costs only the difference.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::netns;
use support::protected::{Protected, assert_sound, digest, number_of};
use support::{VM, cut, heal, wait_for};

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

    eprintln!("a point is read while newer ones come");
    let drill = vm.open_newest().await;
    vm.write(3).await;
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
