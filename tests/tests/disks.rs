//! Disks of protected VMs that are not just raw files which stay as they are.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::Path;
use std::process::Command;

use pageport_lab::lab::guest::{GUEST_ADDRESS, SMALL};
use pageport_lab::lab::{Failpoints, LabConfig, VmFile};
use pageport_lab::netns;
use support::protected::{Protected, assert_sound, digest, number_of};
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

/// The guest's shell says the size of one of its disks, in bytes; 0: it has no such disk.
async fn seen_bytes(vm: &Protected, device: &str) -> u64 {
    let sectors = vm.shell(&format!("cat /sys/block/{device}/size 2>/dev/null || echo 0")).await;
    sectors.ok().and_then(|sectors| sectors.parse::<u64>().ok()).unwrap_or_default() * 512
}

async fn assert_appears(vm: &Protected, device: &str, disk_bytes: u64) {
    wait_for("the guest to see the disk that was added", || async {
        let seen = seen_bytes(vm, device).await;
        if seen == disk_bytes { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

async fn write_randomly(vm: &Protected, device: &str, seek: u64) {
    let write = format!("dd if=/dev/urandom of=/dev/{device} bs=4096 seek={seek} count=500 conv=fsync 2>/dev/null");
    vm.shell(&write).await.unwrap();
}

async fn assert_equal(what: &str, one: &Path, other: &Path) {
    wait_for(what, || async {
        if digest(one) == digest(other) { Ok(()) } else { Err(format!("{} differs", one.display())) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_added_to_a_protected_guest_and_replicas_and_moves_have_them() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    const LOGS_BYTES: u64 = 64 << 20;
    const MAIL_BYTES: u64 = 96 << 20;
    let mut vm = Protected::begin().await;
    let (id, root_bytes) = (vm.vm_id().await, std::fs::metadata(&vm.disk).unwrap().len());
    let at = |vm: &Protected, site: &str, folder: &str, disk: &str| {
        vm.lab.worker_data(site).join(folder).join(&id).join(format!("{disk}.raw"))
    };
    vm.write(1).await;
    let before = vm.point_from_now("b").await;
    let refused = ctl(&vm.lab, &["disk", "add", VM, "root", "--size", "64MiB"]).await.unwrap_err();
    assert!(refused.contains("another disk") && refused.lines().count() == 1, "{refused}");
    ctl(&vm.lab, &["disk", "add", VM, "logs", "--size", "64MiB"]).await.unwrap();
    assert_appears(&vm, "vdb", LOGS_BYTES).await;
    write_randomly(&vm, "vdb", 100).await;
    vm.point_from_now("b").await;
    let points = vm.lab.ctl_json(["recovery-point", "list", VM, "--site", "b"]).await.unwrap();
    for point in points["points"].as_array().unwrap() {
        let disks = if number_of(&point["number"]) <= Some(before) { 1 } else { 2 };
        assert!(point["disks"] == disks || number_of(&point["number"]) == Some(before + 1), "{points}");
    }
    vm.written().await;
    vm.point_from_now("b").await;
    let (logs, replica) = (at(&vm, "a", "disks", "logs"), at(&vm, "b", "replicas", "logs"));
    assert_equal("the replica to hold the disk that was added", &replica, &logs).await;

    eprintln!("there");
    vm.assert_moves_with_little("b", root_bytes).await;
    vm.assert_same_guest().await;
    assert_eq!(seen_bytes(&vm, "vdb").await, LOGS_BYTES);
    // So that no recovery point is taken before the disk is there, nor soon afterwards.
    ctl(&vm.lab, &["link", "set", "b", "a", "--cap", "100kbit"]).await.unwrap();
    write_randomly(&vm, "vdb", 2000).await;
    write_randomly(&vm, "vdb", 3000).await;
    eprintln!("its worker is killed as one more disk is to be added");
    let mail = vm.lab.folder().join("disks").join("mail.img");
    let add = ["disk", "add", VM, "mail", "--size", "96MiB", "--path", mail.to_str().unwrap()];
    ctl(&vm.lab, &add).await.unwrap();
    vm.lab.worker("b").kill().unwrap();
    vm.lab.worker("b").restart().unwrap();
    assert_appears(&vm, "vdc", MAIL_BYTES).await;
    write_randomly(&vm, "vdc", 7).await;
    let refused = ctl(&vm.lab, &["migrate", VM, "--to", "a"]).await.unwrap_err();
    assert!(refused.contains("does not hold disk") && refused.lines().count() == 1, "{refused}");
    ctl(&vm.lab, &["link", "set", "b", "a", "--cap", "none"]).await.unwrap();
    wait_for("the replica to hold the disk", || async {
        let shown = vm.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
        let lacks = shown["replicas"][0]["lacks"].as_array().is_none_or(Vec::is_empty);
        if lacks { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    eprintln!("and back");
    vm.assert_moves_with_little("a", root_bytes).await;
    vm.assert_same_guest().await;
    assert_eq!((seen_bytes(&vm, "vdb").await, seen_bytes(&vm, "vdc").await), (LOGS_BYTES, MAIL_BYTES));
    write_randomly(&vm, "vdc", 3000).await;
    vm.point_after("b", 1).await;
    vm.point_from_now("b").await;
    assert_equal("b to hold what was added at a", &at(&vm, "b", "replicas", "logs"), &logs).await;
    assert_equal("b to hold what was added there", &mail, &at(&vm, "a", "replicas", "mail")).await;

    eprintln!("started anew");
    ctl(&vm.lab, &["vm", "stop", VM, "--force"]).await.unwrap();
    wait_for("the vm to be stopped", || async {
        let shown = vm.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
        if shown["state"] == "stopped" { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    ctl(&vm.lab, &["vm", "start", VM]).await.unwrap();
    vm.lab.guest("c", GUEST_ADDRESS).await.unwrap();
    assert_eq!((seen_bytes(&vm, "vdb").await, seen_bytes(&vm, "vdc").await), (LOGS_BYTES, MAIL_BYTES));
}
