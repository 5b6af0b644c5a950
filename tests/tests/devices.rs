//! Replicas on block devices.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_lab::lab::guest::SMALL;
use pageport_lab::lab::{LabConfig, VmFile};
use pageport_lab::netns;
use support::protected::{Protected, digest};
use support::{VM, ctl, wait_for};

/// Freed when it is dropped.
struct LoopDevice {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    fn new(size_bytes: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size_bytes).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        Self { path: String::from_utf8(made.stdout).unwrap().trim().into(), _file: file }
    }

    /// Of its first so many bytes.
    fn digest(&self, size_bytes: u64) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(&self.path).unwrap().take(size_bytes)).unwrap();
        hasher.finalize().to_hex().to_string()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let freed = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(freed.is_ok_and(|status| status.success()), "free {}", self.path.display());
    }
}

/// The beginning of the device becomes the disk.
async fn assert_holds(device: &LoopDevice, disk: &Path) {
    wait_for("the device to hold the disk", || async {
        let same = device.digest(std::fs::metadata(disk).unwrap().len()) == digest(disk);
        if same { Ok(()) } else { Err(format!("{} differs", disk.display())) }
    })
    .await;
}

async fn assert_guest_sees(vm: &Protected, disk_bytes: u64) {
    wait_for("the guest to see the disk's size", || async {
        let sectors = vm.shell("cat /sys/block/vda/size").await?;
        if sectors.parse() == Ok(disk_bytes / 512) { Ok(()) } else { Err(sectors) }
    })
    .await;
}

/// A reason that is shown in the VM's page.
async fn assert_told(vm: &Protected, words: &str) {
    wait_for("the problem to be told", || async {
        let shown = ctl(&vm.lab, &["vm", "get", VM]).await?;
        if shown.contains(words) { Ok(()) } else { Err(shown) }
    })
    .await;
}

async fn resize(vm: &Protected, disk_bytes: u64) {
    ctl(&vm.lab, &["disk", "resize", VM, "root", "--size", &disk_bytes.to_string()]).await.unwrap();
}

/// The guest writes 100 blocks, so many behind this place.
async fn write_behind(vm: &Protected, offset_bytes: u64, blocks: u64) {
    let seek = offset_bytes / 4096 + blocks;
    let write = format!("dd if=/dev/urandom of=/dev/vda bs=4096 seek={seek} count=100 conv=fsync 2>/dev/null");
    vm.shell(&write).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_on_a_block_device_has_points_grows_and_becomes_the_disk_and_a_replica_again() {
    if !netns::available() {
        eprintln!("skipped: network namespaces and loop devices need root");
        return;
    }
    const MIB: u64 = 1 << 20;
    let disk_bytes = SMALL.disk_bytes;
    let device = LoopDevice::new(disk_bytes + 64 * MIB);
    let place = format!("root={}", device.path.display());
    let config = LabConfig { devices: vec![device.path.clone()], ..LabConfig::default() };
    let file = |lab: &_, images: &_| VmFile::new(lab, VM, images, SMALL);
    let mut vm = Protected::begin_on(config, file, &["--place", &place]).await;
    let disk = vm.disk.clone();
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), disk_bytes);

    eprintln!("what cannot be is refused");
    let other = ["protect", VM, "--to", "b", "--place", "root=/dev/sdz"];
    let refused = ctl(&vm.lab, &other).await.unwrap_err();
    assert!(refused.contains("replica delete") && refused.lines().count() == 1, "{refused}");
    ctl(&vm.lab, &["protect", VM, "--to", "c", "--place", &place]).await.unwrap();
    assert_told(&vm, "in use by something else").await;
    ctl(&vm.lab, &["protect", VM, "--to", "c", "--place", "root=/dev/sdz"]).await.unwrap();
    assert_told(&vm, "replication.devices").await;
    ctl(&vm.lab, &["unprotect", VM, "--site", "c"]).await.unwrap();

    eprintln!("points");
    vm.write(1).await;
    vm.point_from_now("b").await;
    vm.written().await;
    let point = vm.point_from_now("b").await;
    assert_holds(&device, &disk).await;
    assert!(!vm.replica("b").await.exists());
    let shown = ctl(&vm.lab, &["replica", "list", VM]).await.unwrap();
    assert!(shown.contains(&format!("disk root at b lies on {}", device.path.display())), "{shown}");

    eprintln!("what somebody has done to the device is repaired");
    let raw = std::fs::OpenOptions::new().write(true).open(&device.path).unwrap();
    raw.write_all_at(&[0x5a; 8192], 3 * MIB).unwrap();
    raw.sync_all().unwrap();
    let scrubbed = ctl(&vm.lab, &["replication", "scrub", VM, "--site", "b", "--watch"]).await.unwrap();
    assert!(scrubbed.contains("2 blocks of 4 KiB differed, 2 repaired"), "{scrubbed}");
    let point = vm.point_after("b", point).await;
    assert_holds(&device, &disk).await;

    eprintln!("its worker is killed");
    vm.write(2).await;
    vm.lab.worker("b").kill().unwrap();
    vm.lab.worker("b").restart().unwrap();
    vm.point_after("b", point + 1).await;
    vm.written().await;
    vm.point_from_now("b").await;
    assert_holds(&device, &disk).await;

    eprintln!("there");
    vm.assert_moves_with_little("b", disk_bytes).await;
    vm.assert_same_guest().await;
    assert_guest_sees(&vm, disk_bytes).await;
    vm.write(3).await;
    vm.point_after("a", 1).await;
    resize(&vm, disk_bytes + 32 * MIB).await;
    assert_told(&vm, "can only get all").await;
    vm.written().await;
    vm.point_from_now("a").await;
    assert_holds(&device, &disk).await;

    eprintln!("grows to all of its device");
    raw.write_all_at(&vec![0x5a; 64 * MIB as usize], disk_bytes).unwrap();
    let grown = disk_bytes + 64 * MIB;
    resize(&vm, grown).await;
    assert_guest_sees(&vm, grown).await;
    write_behind(&vm, disk_bytes, 7).await;
    write_behind(&vm, grown - MIB, 0).await;
    vm.point_from_now("a").await;
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), grown);
    assert_holds(&device, &disk).await;

    eprintln!("and back");
    vm.assert_moves_with_little("a", grown).await;
    vm.assert_same_guest().await;
    assert_guest_sees(&vm, grown).await;
    write_behind(&vm, disk_bytes, 200).await;
    vm.point_after("b", 1).await;
    vm.point_from_now("b").await;
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), grown);
    assert_holds(&device, &disk).await;
    resize(&vm, disk_bytes + 128 * MIB).await;
    assert_told(&vm, "lvextend").await;
    assert_guest_sees(&vm, disk_bytes + 128 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_defined_on_a_block_device_is_protected_and_moves_there_and_back() {
    if !netns::available() {
        eprintln!("skipped: network namespaces and loop devices need root");
        return;
    }
    let device_bytes = SMALL.disk_bytes + (32 << 20);
    let device = LoopDevice::new(device_bytes);
    // Under another name, as it is with `/dev/disk/by-id`.
    let on_device = |lab: &_, images: &_| {
        let file = VmFile::new(lab, VM, images, SMALL)?;
        std::fs::write(&device.path, std::fs::read(file.disk()).unwrap()).unwrap();
        std::fs::remove_file(file.disk()).unwrap();
        std::os::unix::fs::symlink(&device.path, file.disk()).unwrap();
        Ok(file)
    };
    let mut vm = Protected::begin_with(LabConfig::default(), on_device).await;
    assert_guest_sees(&vm, device_bytes).await;
    vm.write(1).await;
    vm.point_from_now("b").await;
    vm.written().await;
    vm.point_from_now("b").await;
    let replica = vm.replica("b").await;
    assert_eq!(std::fs::metadata(&replica).unwrap().len(), device_bytes);
    assert_holds(&device, &replica).await;

    eprintln!("there");
    vm.assert_moves_with_little("b", device_bytes).await;
    vm.assert_same_guest().await;
    vm.write(2).await;
    vm.point_after("a", 1).await;
    vm.written().await;
    vm.point_from_now("a").await;
    assert_holds(&device, &replica).await;

    eprintln!("and back");
    vm.assert_moves_with_little("a", device_bytes).await;
    vm.assert_same_guest().await;
    assert_guest_sees(&vm, device_bytes).await;
    vm.write(3).await;
    vm.point_after("b", 1).await;
    vm.written().await;
    vm.point_from_now("b").await;
    assert_holds(&device, &replica).await;
}
