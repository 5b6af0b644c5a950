//! Real images and the real tool, on a host whose worker ends at any step.

use std::process::Command;

use pageport_common::store::Store;

use super::*;
use crate::generation::Joined;
use crate::hypervisor::{self, Accelerator, HugePages};
use crate::replica::groups::Groups;
use crate::replica::points::Limits;
use crate::replica::store::flattening::Adoption;
use crate::vms::{Vms, managed::Shared};

const SIZE: u64 = 4 << 20;

struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    vm: VmId,
    tool: &'static str,
    reserve_bytes: u64,
}

/// A worker's life on it.
struct Life {
    groups: Arc<Groups>,
    vm: Arc<ManagedVm>,
}

impl Host {
    /// With a VM that has left a qcow2 image over a raw one.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let host = Self { folder, store, vm: VmId::generate(), tool: "qemu-img", reserve_bytes: 0 };
        std::fs::write(host.path("base.raw"), base()).unwrap();
        let (image, create) = (host.path("web.qcow2"), ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"]);
        run(Command::new("qemu-img").args(create).arg(&image).arg(SIZE.to_string()));
        run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 7 1M 64k"]).arg(&image));
        let replicas = ReplicaStore::new(host.store.clone(), host.folder.path());
        replicas.locate_or_adopt(host.vm, "root", &image, Some(Format::Qcow2)).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(name)
    }

    fn begin(&self) -> Life {
        let (store, folder, changed) = (self.store.clone(), self.folder.path(), Arc::new(Notify::new()));
        let limits = Limits { points_bytes: 1 << 30, held_bytes: 0, reserve_bytes: 0 };
        let groups = Arc::new(Groups::new(store.clone(), folder, limits));
        let vms = Vms::new(Shared {
            hypervisor: hypervisor::Host {
                qemu: String::new(),
                keeper: PathBuf::new(),
                accelerator: Accelerator::Tcg,
                huge_pages: HugePages::Never,
                runtime_dir: folder.join("run"),
            },
            replicas: Arc::new(ReplicaStore::new(store.clone(), folder)),
            groups: groups.clone(),
            flattenings: Arc::new(Flattenings::new(self.tool.to_owned(), self.reserve_bytes, changed.clone())),
            joined: Arc::new(Joined::of(store.clone()).unwrap()),
            store,
            changed,
        });
        Life { groups, vm: vms.get_or_create(self.vm).unwrap() }
    }

    /// Files beside the base.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap());
        let mut names: Vec<String> = entries
            .filter(|entry| entry.path().is_file())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn assert_flat(&self, life: &Life) {
        assert_eq!(self.files(), ["base.raw", "web.qcow2.raw"]);
        let location = life.vm.replicas().locate(self.vm, "root").unwrap().unwrap();
        assert_eq!((location.format, location.path), (Format::Raw, self.path("web.qcow2.raw")));
        let mut expected = base();
        expected.resize(SIZE as usize, 0);
        expected[1 << 20..][..64 << 10].fill(7);
        assert!(std::fs::read(self.path("web.qcow2.raw")).unwrap() == expected);
        assert!(std::fs::read(self.path("base.raw")).unwrap() == base(), "what backs the image is never touched");
        assert!(life.vm.replicas().must_be_flat(self.vm).is_ok());
    }
}

impl Life {
    /// Waits for the end of the attempt that is begun with this.
    async fn flatten(&self) {
        let all = self.vm.flattenings();
        all.follow(&self.vm);
        while all.lock().get(&self.vm.id()).is_some_and(|job| !job.task.is_finished()) {
            tokio::task::yield_now().await;
        }
    }

    fn problem(&self) -> String {
        self.vm.flattenings().report(self.vm.id()).unwrap_or_default().problem
    }
}

/// Shorter than the image over it.
fn base() -> Vec<u8> {
    (0..SIZE / 2).map(|at| (at / 4096 % 5) as u8).collect()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_vm_has_left_becomes_raw_and_then_the_recovery_point_that_it_is() {
    let host = Host::new();
    let life = host.begin();
    let adoption = Adoption { lineage: 7, taken_unix_ms: 5 };
    life.vm.replicas().adopt_when_flat(host.vm, adoption).unwrap();
    assert!(matches!(life.vm.replicas().must_be_flat(host.vm), Err(ReplicaError::NotFlat { .. })));
    life.flatten().await;
    host.assert_flat(&life);
    let points = life.groups.points(host.vm);
    assert_eq!(points.iter().map(|point| (point.number, point.taken_unix_ms)).collect::<Vec<_>>(), [(1, 5)]);
    life.vm.flattenings().follow(&life.vm);
    assert_eq!(life.vm.flattenings().report(host.vm), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_at_any_step_is_followed_by_one_that_ends_it() {
    for step in ["claimed", "partly written", "renamed", "recorded", "flat but no point"] {
        let host = Host::new();
        let (from, to) = (host.path("web.qcow2"), host.path("web.qcow2.raw"));
        let replicas = ReplicaStore::new(host.store.clone(), host.folder.path());
        replicas.adopt_when_flat(host.vm, Adoption { lineage: 7, taken_unix_ms: 5 }).unwrap();
        replicas.begin_flattening(host.vm, "root", &from).unwrap();
        if step == "partly written" {
            std::fs::write(written(&to), vec![9; 2 * SIZE as usize]).unwrap();
        } else if step != "claimed" {
            run(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&from).arg(&to));
        }
        if step == "recorded" || step == "flat but no point" {
            replicas.record_flat(host.vm, "root", &from, &to).unwrap();
        }
        if step == "flat but no point" {
            replicas.end_flattening(host.vm, "root", &from).unwrap();
        }
        let life = host.begin();
        life.flatten().await;
        assert_eq!(life.problem(), "", "{step}");
        host.assert_flat(&life);
        assert_eq!(life.groups.points(host.vm).len(), 1, "{step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_or_with_a_file_in_the_way_the_image_stays_and_the_problem_is_told() {
    let mut host = Host::new();
    host.reserve_bytes = u64::MAX / 2;
    let life = host.begin();
    life.flatten().await;
    assert!(life.problem().contains("no space to flatten"), "{}", life.problem());
    assert_eq!(host.files(), ["base.raw", "web.qcow2"]);
    life.vm.replicas().forget_flattening(host.vm).unwrap();
    host.reserve_bytes = 0;
    std::fs::write(host.path("web.qcow2.raw"), b"somebody's").unwrap();
    let life = host.begin();
    life.flatten().await;
    assert!(life.problem().contains("move it away"), "{}", life.problem());
    assert_eq!(std::fs::read(host.path("web.qcow2.raw")).unwrap(), b"somebody's");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_wanted_back_is_let_go_of_as_it_was() {
    let mut host = Host::new();
    // A tool that never ends by itself.
    host.tool = "yes";
    let life = host.begin();
    let all = life.vm.flattenings();
    all.follow(&life.vm);
    while life.vm.replicas().flattening_step(host.vm, "root").unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    std::fs::write(host.path("web.qcow2.raw.partial"), b"begun").unwrap();
    all.end(host.vm).await;
    life.vm.replicas().forget_flattening(host.vm).unwrap();
    assert_eq!(host.files(), ["base.raw", "web.qcow2"]);
    assert_eq!(life.vm.replicas().locate(host.vm, "root").unwrap().unwrap().format, Format::Qcow2);
    assert_eq!(life.vm.replicas().flattening_step(host.vm, "root").unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_outlived_its_worker_is_ended_first() {
    let host = Host::new();
    let replicas = ReplicaStore::new(host.store.clone(), host.folder.path());
    replicas.begin_flattening(host.vm, "root", &host.path("web.qcow2")).unwrap();
    let partial = host.path("web.qcow2.raw.partial");
    let mut orphan =
        Command::new("tail").args(["-F", "-q"]).arg(&partial).stderr(std::process::Stdio::null()).spawn().unwrap();
    // The kernel lets a parent go on before it has put the arguments of its child in place.
    let command_line = format!("/proc/{}/cmdline", orphan.id());
    while std::fs::read(&command_line).unwrap().is_empty() {
        std::thread::yield_now();
    }
    let life = host.begin();
    life.flatten().await;
    assert!(!orphan.wait().unwrap().success());
    host.assert_flat(&life);
}
