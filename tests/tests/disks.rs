//! Disks of protected VMs that are not just raw files which stay as they are.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::Path;
use std::process::Command;

use pageport_lab::lab::guest::{GUEST_ADDRESS, SMALL};
use pageport_lab::lab::{Failpoints, LabConfig, VmFile};
use pageport_lab::netns;
use support::protected::{Protected, assert_sound, digest};
use support::{VM, ctl, wait_for};

/// What a qcow2 image that a hypervisor may have open shows, as a raw file.
fn flattened(image: &Path, to: &Path) {
    let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img").args(convert).args([image, to]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_on_qcow2_with_a_backing_file_is_protected_and_moves_there_and_back() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let config = LabConfig { failpoints: Failpoints::On, ..LabConfig::default() };
    let mut vm = Protected::begin_with(config, |lab, images| VmFile::qcow2(lab, VM, images, SMALL)).await;
    let (image, base) = (vm.disk.clone(), vm.disk.with_extension("raw"));
    let (raw, copy) = (vm.disk.with_extension("qcow2.raw"), vm.lab.folder().join("flat.raw"));
    let (base_before, disk_bytes) = (digest(&base), std::fs::metadata(&base).unwrap().len());
    vm.write(1).await;
    vm.point_from_now("b").await;
    vm.written().await;
    vm.point_from_now("b").await;
    flattened(&image, &copy);
    vm.assert_replica_is_the_disk("b", &copy).await;

    eprintln!("there");
    let hold = vm.lab.failpoints().join("replica.flattened.hold");
    std::fs::write(&hold, b"").unwrap();
    vm.assert_moves_with_little("b", disk_bytes).await;
    vm.assert_same_guest().await;
    let partial = raw.with_extension("raw.partial");
    wait_for("the old image to be converted, and that to be told", || async {
        let shown = ctl(&vm.lab, &["replica", "list", VM]).await?;
        if partial.exists() && shown.contains("flattening") { Ok(()) } else { Err(shown) }
    })
    .await;
    vm.write(2).await;
    let refused = ctl(&vm.lab, &["migrate", VM, "--to", "a", "--watch"]).await.unwrap_err();
    assert!(refused.contains("flattened"), "{refused}");
    eprintln!("its worker is killed before the raw file is in place");
    vm.lab.worker("a").kill().unwrap();
    assert!(image.exists() && !raw.exists());
    std::fs::remove_file(&hold).unwrap();
    vm.lab.worker("a").restart().unwrap();
    vm.point_after("a", 1).await;
    assert!(raw.exists() && !image.exists() && !partial.exists());
    assert_eq!(digest(&base), base_before, "a user's backing file is never touched");
    // Replication back has gone on from what the old image became: the point that it was is number 1.
    let log = vm.log("b");
    let first = log.lines().find(|line| line.contains("recovery point committed")).unwrap();
    assert!(first.contains("point=2"), "{first}");
    vm.written().await;
    vm.point_from_now("a").await;
    let there = vm.replica("b").await;
    wait_for("the raw file to be the disk", || async {
        if digest(&raw) == digest(&there) { Ok(()) } else { Err(String::from("they differ")) }
    })
    .await;
    assert_sound(&raw, &copy);

    eprintln!("and back");
    vm.assert_moves_with_little("a", disk_bytes).await;
    vm.assert_same_guest().await;
    vm.point_after("b", 1).await;
    vm.assert_replica_is_the_disk("b", &raw).await;
}

/// The guest sees its first disk with this size.
async fn assert_guest_sees(vm: &Protected, disk_bytes: u64) {
    wait_for("the guest to see the larger disk", || async {
        let sectors = vm.shell("cat /sys/block/vda/size").await?;
        if sectors.parse() == Ok(disk_bytes / 512) { Ok(()) } else { Err(sectors) }
    })
    .await;
}

async fn resize(vm: &Protected, disk_bytes: u64) -> Result<String, String> {
    ctl(&vm.lab, &["disk", "resize", VM, "root", "--size", &disk_bytes.to_string()]).await
}

/// Writes random blocks where a disk of so many bytes ended.
async fn write_behind(vm: &Protected, disk_bytes: u64) {
    let seek = disk_bytes / 4096 + 7;
    let write = format!("dd if=/dev/urandom of=/dev/vda bs=4096 seek={seek} count=100 conv=fsync 2>/dev/null");
    vm.shell(&write).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_under_a_protected_guest_and_replicas_and_moves_follow() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut vm = Protected::begin().await;
    let disk = vm.disk.clone();
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    let first = bytes(&disk);
    let [second, third, fourth] = [1, 2, 3].map(|times| first + times * (64 << 20));
    let refused = resize(&vm, first - 4096).await.unwrap_err();
    assert!(refused.contains("cannot be made smaller") && refused.lines().count() == 1, "{refused}");

    resize(&vm, second).await.unwrap();
    assert_guest_sees(&vm, second).await;
    write_behind(&vm, first).await;
    vm.point_from_now("b").await;
    vm.assert_replica_is_the_disk("b", &disk).await;
    assert_eq!(bytes(&vm.replica("b").await), second);
    let log = vm.log("a");
    let session = log.lines().rfind(|line| line.contains("disk session open")).unwrap();
    assert!(session.contains("digests_sent=false"), "what is known of the replica grows too: {session}");

    eprintln!("its worker is killed as the disk is to grow");
    resize(&vm, third).await.unwrap();
    vm.lab.worker("a").kill().unwrap();
    vm.lab.worker("a").restart().unwrap();
    assert_guest_sees(&vm, third).await;

    eprintln!("there");
    vm.assert_moves_with_little("b", third).await;
    vm.assert_same_guest().await;
    assert_guest_sees(&vm, third).await;
    write_behind(&vm, second).await;
    resize(&vm, fourth).await.unwrap();
    assert_guest_sees(&vm, fourth).await;
    write_behind(&vm, third).await;
    vm.point_after("a", 1).await;

    eprintln!("and back");
    vm.assert_moves_with_little("a", fourth).await;
    vm.assert_same_guest().await;
    assert_guest_sees(&vm, fourth).await;
    assert_eq!(bytes(&disk), fourth);
    vm.point_after("b", 1).await;
    vm.assert_replica_is_the_disk("b", &disk).await;

    eprintln!("stopped");
    ctl(&vm.lab, &["vm", "stop", VM, "--force"]).await.unwrap();
    wait_for("the vm to be stopped", || async {
        let shown = vm.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
        if shown["state"] == "stopped" { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    let fifth = fourth + (64 << 20);
    resize(&vm, fifth).await.unwrap();
    ctl(&vm.lab, &["vm", "start", VM]).await.unwrap();
    vm.lab.guest("c", GUEST_ADDRESS).await.unwrap();
    assert_guest_sees(&vm, fifth).await;
}
