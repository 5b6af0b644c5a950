//! Disks of protected VMs that are not just raw files which stay as they are.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::Path;
use std::process::Command;

use pageport_lab::lab::guest::SMALL;
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
