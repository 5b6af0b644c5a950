//! A protected VM: its replica is at a recovery point at all times, whoever is killed; a move starts from it and turns the direction
//! round, so that moving back costs only the difference.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::netns;
use support::protected::Protected;
use support::{VM, cut, heal};

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

    eprintln!("there");
    let disk_bytes = std::fs::metadata(&disk).unwrap().len();
    vm.assert_moves_with_little("b", disk_bytes).await;
    vm.assert_same_guest().await;
    vm.write(2).await;
    vm.point_after("a", 1).await;
    vm.written().await;
    eprintln!("and back");
    vm.assert_moves_with_little("a", disk_bytes).await;
    vm.assert_same_guest().await;
    vm.point_after("b", 1).await;
    vm.assert_replica_is_the_disk("b", &disk).await;
}
