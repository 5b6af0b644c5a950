//! The disks of a VM are one consistent group: what they show at a recovery point is of one moment, whatever kind of images they are,
//! wherever the VM runs.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::{Path, PathBuf};

use pageport_guest::protocol::{Reply, Request};
use pageport_lab::lab::guest::{GUEST_ADDRESS, SMALL};
use pageport_lab::lab::{LabConfig, VmFile};
use pageport_lab::netns;
use pageport_lab::replication_faults::crash::{CrashedReplica, Recovered};
use pageport_lab::replication_faults::image;
use pageport_lab::replication_faults::ledger::Ledger;
use pageport_worker::image::Format;
use support::protected::{Protected, assert_sound, digest, number_of};
use support::{PATIENCE, VM, ctl, set_rate, wait_for};

/// As the VM's file calls them: one with a file system, two without. The guest calls the others vdb and vdc.
const DISKS: [&str; 3] = ["root", "data", "logs"];
const DATA_BYTES: u64 = 32 << 20;
/// A move of so much memory that does not compress, over such a link, takes a while.
const MEMORY_BYTES: u64 = 64 << 20;
const SLOW_BPS: u64 = 20_000_000;

/// A history that the guest writes, of whose blocks a third lies on each disk.
struct Written<'a> {
    vm: &'a mut Protected,
    seed: u64,
    /// Operations that a recovery point is known to hold.
    held: u64,
}

impl<'a> Written<'a> {
    async fn begin(vm: &'a mut Protected, seed: u64) -> Self {
        let disks = vec!["/dev/vdb".to_owned(), "/dev/vdc".to_owned()];
        let start = Request::HistoryStart { operations_per_second: 100, seed, trim_every: 100, disks };
        let started = vm.guest.call(&start, PATIENCE).await.unwrap();
        assert_eq!(started, Reply::Done);
        Self { vm, seed, held: 0 }
    }

    /// Operations that are on the disks.
    async fn done(&mut self, request: Request) -> u64 {
        match self.vm.guest.call(&request, PATIENCE).await.unwrap() {
            Reply::History { done, failure: None, .. } => done,
            reply => panic!("{reply:?}"),
        }
    }

    /// A recovery point that is taken from now on, read while the guest writes, shows one moment of the history: no earlier one than the point
    /// before, nor than what the guest had said before; and no later one than the guest is at.
    async fn assert_point_is_of_one_moment(&mut self, site: &str) {
        let before = self.done(Request::HistoryStatus).await;
        let point = self.vm.point_from_now(site).await;
        let images = read_point(self.vm, site, point).await;
        let found = image::examine(&images[0], &images[1..], self.seed).unwrap();
        let after = self.done(Request::HistoryStatus).await;
        assert_eq!(found.unsound, None, "point {point} at {site}");
        let moment = found.moment.unwrap_or_else(|mixture| panic!("point {point} at {site}: {mixture}"));
        eprintln!("point {point} at {site} holds {moment} operations, of {before} to {after}");
        assert!(moment >= before.max(self.held) && moment <= after, "{moment}: {before} {} {after}", self.held);
        self.assert_disks_of_the_point_before_do_not_fit(&images);
        self.held = moment;
    }

    /// With one disk as it was at the point before, nothing is of one moment: else nothing is shown by these stories.
    fn assert_disks_of_the_point_before_do_not_fit(&self, images: &[PathBuf]) {
        let earlier = |disk: usize| images[disk].with_extension("earlier.raw");
        for disk in (1..images.len()).filter(|_| self.held > 0) {
            let mut mixed = images.to_vec();
            mixed[disk] = earlier(disk);
            let mixture = image::examine(&mixed[0], &mixed[1..], self.seed).unwrap().moment.unwrap_err();
            assert!(mixture.contains("block"), "{}: {mixture}", DISKS[disk]);
        }
        (1..images.len()).for_each(|disk| std::fs::rename(&images[disk], earlier(disk)).unwrap());
    }

    /// While the VM moves to b and what it writes goes into the replicas in place, the worker there is killed. What it leaves is recovered to the
    /// newest point, of all disks, and replication goes on from there.
    async fn assert_broken_off_move_leaves_the_newest_point(&mut self) {
        let id = self.vm.vm_id().await;
        let ledger = Ledger::start(self.vm.lab.guest("c", GUEST_ADDRESS).await.unwrap());
        let memory = Request::StaticStart { bytes: MEMORY_BYTES, seed: self.seed };
        assert_eq!(self.vm.guest.call(&memory, PATIENCE).await.unwrap(), Reply::Done);
        let known = self.vm.point_from_now("b").await;
        set_rate(&self.vm.lab, SLOW_BPS);
        let migration = self.vm.order("b").await;
        let (data, folder) = (self.vm.lab.worker_data("b"), self.vm.lab.folder().join("disks"));
        let replicas = data.join("replicas").join(&id);
        let layer = replicas.join("points/layer.undo");
        wait_for("the replicas to be written in place", || async {
            let seen = self.vm.lab.ctl_json(["migration", "get", &migration]).await.unwrap_or_default();
            if layer.exists() { Ok(()) } else { Err(seen.to_string()) }
        })
        .await;
        let enough = self.done(Request::HistoryStatus).await + 400;
        while self.done(Request::HistoryStatus).await < enough {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        self.vm.lab.worker("b").kill().unwrap();
        assert!(layer.exists(), "the move was over before");
        let images = DISKS.map(|name| (name, replicas.join(format!("{name}.raw"))));
        let crashed = CrashedReplica::copy(&data, &id, &images, &folder).unwrap();
        self.vm.lab.worker("b").restart().unwrap();

        let Recovered { newest, images, .. } = crashed.recover().unwrap();
        let found = image::examine(&images[0], &images[1..], self.seed).unwrap();
        assert_eq!(found.unsound, None);
        let moment = found.moment.unwrap();
        let (least, most) = (ledger.at_least(newest.taken_unix_ms), ledger.at_most(newest.taken_unix_ms).unwrap());
        eprintln!(
            "point {} was left, with {moment} operations, of {least} to {most}; {enough} were done",
            newest.number
        );
        assert!(newest.number >= known && newest.disks == 3, "{newest:?}");
        assert!(moment >= least && moment <= most && most < enough, "{moment}: {least} {most} {enough}");
        let migration = self.vm.ended(&migration).await;
        assert_eq!(migration["state"], "failed", "{migration}");
        set_rate(&self.vm.lab, LabConfig::default().link.rate_bps);
        self.assert_point_is_of_one_moment("b").await;
    }

    /// Stops; the replica becomes what the disks are, and holds everything.
    async fn assert_ends_with_equal_disks(mut self, replica: [PathBuf; 3], disks: [PathBuf; 3], site: &str) {
        let done = self.done(Request::HistoryStop).await;
        assert!(done > self.held);
        self.vm.guest.call(&Request::Sync, PATIENCE).await.unwrap();
        self.vm.point_from_now(site).await;
        for (replica, disk) in replica.iter().zip(&disks) {
            wait_for("the replica to be the disk", || async {
                let same = digest(replica) == digest(disk);
                if same { Ok(()) } else { Err(format!("{} differs from {}", replica.display(), disk.display())) }
            })
            .await;
        }
        let copy = self.vm.lab.folder().join("root.copy.raw");
        assert_sound(&replica[0], &copy);
        std::fs::copy(&replica[0], &copy).unwrap();
        assert_eq!(image::examine(&copy, &replica[1..], self.seed).unwrap().moment, Ok(done));
    }
}

/// Copies what the exports of a recovery point show, disk by disk.
async fn read_point(vm: &Protected, site: &str, point: u64) -> Vec<PathBuf> {
    let (lab, number) = (&vm.lab, point.to_string());
    let export = lab.ctl_json(["recovery-point", "open", VM, &number, "--site", site, "--for", "1h"]).await.unwrap();
    let exported = export["disks"].as_array().unwrap();
    assert_eq!(exported.len(), DISKS.len(), "{export}");
    let images = DISKS.map(|name| {
        let disk = exported.iter().find(|disk| disk["name"] == name).unwrap();
        let image = lab.folder().join(format!("{name}.point.raw"));
        let mut convert = lab.network().place(site).command("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "raw", disk["urls"][0].as_str().unwrap()]).arg(&image);
        let converted = convert.output().unwrap();
        assert!(converted.status.success(), "{converted:?}");
        image
    });
    ctl(lab, &["recovery-point", "close", VM, &number, "--site", site]).await.unwrap();
    images.to_vec()
}

async fn assert_points_have_all_disks(vm: &Protected, site: &str) {
    let list = ["recovery-point", "list", VM, "--site", site];
    let points = vm.lab.ctl_json(list).await.unwrap();
    let points = points["points"].as_array().unwrap();
    assert!(!points.is_empty() && points.iter().all(|point| number_of(&point["disks"]) == Some(3)), "{points:?}");
    let table = ctl(&vm.lab, &list).await.unwrap();
    let column = |line: &str| line.split_whitespace().last().map(str::to_owned);
    let mut lines = table.lines();
    assert_eq!(lines.next().and_then(column).as_deref(), Some("DISKS"), "{table}");
    assert_eq!(lines.next().and_then(column).as_deref(), Some("3"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disks_of_a_vm_are_of_one_moment_at_every_point_there_and_back() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut given = Vec::new();
    let mut vm = Protected::begin_with(LabConfig::default(), |lab, images| {
        let file = VmFile::new(lab, VM, images, SMALL)?;
        let data = file.add_disk(DISKS[1], Format::Raw, DATA_BYTES)?;
        given = vec![file.disk().to_owned(), data, file.add_disk(DISKS[2], Format::Qcow2, DATA_BYTES)?];
        Ok(file)
    })
    .await;
    let folder = vm.lab.worker_data("b").join("replicas").join(vm.vm_id().await);
    let at_b = DISKS.map(|name| folder.join(format!("{name}.raw")));
    // Once the VM has moved away, its qcow2 image becomes a raw one.
    let flat = |qcow2: &Path| qcow2.with_extension("qcow2.raw");
    let at_a = [given[0].clone(), given[1].clone(), flat(&given[2])];

    let mut history = Written::begin(&mut vm, 1).await;
    history.assert_point_is_of_one_moment("b").await;
    assert_points_have_all_disks(history.vm, "b").await;
    eprintln!("the worker that holds the replicas is killed");
    history.vm.lab.worker("b").kill().unwrap();
    history.vm.lab.worker("b").restart().unwrap();
    history.assert_point_is_of_one_moment("b").await;
    eprintln!("the worker that holds the vm is killed");
    history.vm.lab.worker("a").kill().unwrap();
    history.vm.lab.worker("a").restart().unwrap();
    history.assert_point_is_of_one_moment("b").await;

    eprintln!("a move is broken off");
    history.assert_broken_off_move_leaves_the_newest_point().await;

    eprintln!("there");
    history.vm.moves("b").await;
    history.vm.assert_same_guest().await;
    history.assert_point_is_of_one_moment("a").await;
    assert_points_have_all_disks(history.vm, "a").await;
    assert!(!given[2].exists() && at_a[2].exists());
    history.assert_ends_with_equal_disks(at_a.clone(), at_b.clone(), "a").await;

    eprintln!("and back");
    let mut history = Written::begin(&mut vm, 2).await;
    history.assert_point_is_of_one_moment("a").await;
    history.vm.moves("a").await;
    history.vm.assert_same_guest().await;
    history.assert_point_is_of_one_moment("b").await;
    history.assert_ends_with_equal_disks(at_b, at_a, "b").await;
}
