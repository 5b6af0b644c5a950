//! More than one pool of storage per host: a guest's replica and recovery points in a pool that is a file system of its own, what happens when that is full,
//! at its quota, or not what it was, and that what lies in another pool goes on meanwhile.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use pageport_lab::lab::guest::{GuestImages, SMALL};
use pageport_lab::lab::{LabConfig, POOL, VmFile};
use pageport_lab::netns;
use serde_json::Value;
use support::protected::{Protected, digest, newest, number_of};
use support::{VM, ctl, wait_for};

/// Another VM, whose replica lies in the default pool of the same host.
const OTHER: &str = "other";
const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 640 * MIB;
const AMPLE: i64 = 1 << 40;

/// A key of the second pool at b, whose worker is started anew.
fn set(vm: &mut Protected, key: &str, bytes: i64) {
    let worker = vm.lab.worker("b");
    worker.kill().unwrap();
    let mut config: toml::Table = std::fs::read_to_string(worker.config()).unwrap().parse().unwrap();
    let pool = config["pools"].as_array_mut().unwrap()[0].as_table_mut().unwrap();
    pool.insert(key.to_owned(), bytes.into());
    std::fs::write(worker.config(), config.to_string()).unwrap();
    worker.restart().unwrap();
}

async fn assert_told(vm: &Protected, words: &[&str]) {
    wait_for("the problem to be told", || async {
        let shown = ctl(&vm.lab, &["replication", "status", VM]).await?;
        if words.iter().all(|words| shown.contains(words)) { Ok(()) } else { Err(shown) }
    })
    .await;
}

async fn newest_of(vm: &Protected, name: &str) -> u64 {
    newest(&vm.lab.ctl_json(["vm", "get", name]).await.unwrap(), "b")
}

/// The other VM's replica has newer points all the while.
async fn assert_other_goes_on(vm: &Protected) {
    let before = newest_of(vm, OTHER).await;
    wait_for("the other vm's next points", || async {
        let now = newest_of(vm, OTHER).await;
        if now > before + 1 { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
}

/// A pool of b, once it is told that this holds of it.
async fn pool_until(vm: &Protected, name: &str, holds: impl Fn(&Value) -> bool) -> Value {
    wait_for("what b says of its pool", || async {
        let told = vm.lab.ctl_json(["worker", "pools"]).await.map_err(|error| error.to_string())?;
        let workers = told["workers"].as_array().unwrap();
        let worker = workers.iter().find(|worker| worker["name"] == "worker-b").unwrap();
        let pool = worker["pools"].as_array().unwrap().iter().find(|pool| pool["name"] == name).cloned();
        pool.filter(|pool| holds(pool)).ok_or_else(|| told.to_string())
    })
    .await
}

fn used(pool: &Value, what: &str) -> u64 {
    number_of(&pool[what]["used_bytes"]).unwrap()
}

/// Takes all but so many bytes of a file system.
fn fill_but(folder: &Path, left_bytes: u64) -> PathBuf {
    let stat = nix::sys::statvfs::statvfs(folder).unwrap();
    let free_bytes = stat.blocks_available() * stat.fragment_size();
    let path = folder.join("somebody's");
    let file = File::create(&path).unwrap();
    fallocate(file.as_fd(), FallocateFlags::empty(), 0, (free_bytes - left_bytes) as i64).unwrap();
    path
}

async fn assert_equal(replica: &Path, disk: &Path) {
    wait_for("the replica to be the disk", || async {
        if digest(replica) == digest(disk) { Ok(()) } else { Err(replica.display().to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_full_or_gone_holds_up_only_what_lies_in_it() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let config = LabConfig { worker_pool_bytes: Some(POOL_BYTES), ..LabConfig::default() };
    let file = |lab: &_, images: &_| VmFile::new(lab, VM, images, SMALL);
    let mut vm = Protected::begin_on(config, file, &["--pool", POOL]).await;
    let (id, pool, disk) = (vm.vm_id().await, vm.lab.worker_pool("b"), vm.disk.clone());
    let replica = pool.join("replicas").join(&id).join("root.raw");
    assert!(replica.exists() && !vm.replica("b").await.exists());

    eprintln!("another vm, in the default pool");
    let images = GuestImages::build(SMALL).unwrap();
    let other = VmFile::with_address(&vm.lab, OTHER, &images, SMALL, [10, 88, 0, 77].into()).unwrap();
    ctl(&vm.lab, &["vm", "define", "-f", other.path(), "--site", "a"]).await.unwrap();
    ctl(&vm.lab, &["vm", "start", OTHER]).await.unwrap();
    let refused = ctl(&vm.lab, &["protect", OTHER, "--to", "b", "--pool", "tape"]).await.unwrap_err();
    assert!(refused.contains("no pool \"tape\"; it has: default, extra") && refused.lines().count() == 1, "{refused}");
    ctl(&vm.lab, &["protect", OTHER, "--to", "b", "--rpo", "5s"]).await.unwrap();
    assert_other_goes_on(&vm).await;
    let refused = ctl(&vm.lab, &["protect", OTHER, "--to", "b", "--pool", POOL]).await.unwrap_err();
    assert!(refused.contains("lies in pool \"default\"") && refused.contains("replica delete"), "{refused}");

    eprintln!("what is shown");
    let shown = ctl(&vm.lab, &["replica", "list", VM]).await.unwrap();
    assert!(shown.contains("b (pool extra)"), "{shown}");
    let of_pool = pool_until(&vm, POOL, |pool| used(pool, "replicas") > MIB && used(pool, "points") > 0).await;
    let of_default = pool_until(&vm, "default", |pool| used(pool, "replicas") > MIB).await;
    assert!(number_of(&of_pool["free_bytes"]).unwrap() < POOL_BYTES, "{of_pool}");
    assert!(of_default["takes_scratch"] == true && of_pool["takes_scratch"] == false, "{of_default} {of_pool}");

    eprintln!("full");
    let filled = fill_but(&pool, 8 * MIB);
    vm.write(1).await;
    assert_told(&vm, &["no space for", "are free in pool \"extra\""]).await;
    let stays = newest_of(&vm, VM).await;
    assert_other_goes_on(&vm).await;
    assert_eq!(newest_of(&vm, VM).await, stays);
    std::fs::remove_file(filled).unwrap();
    vm.point_after("b", stays + 1).await;

    eprintln!("at its quota");
    set(&mut vm, "all_points_bytes", 256 << 10);
    assert_told(&vm, &["by all vms (all_points_bytes of pool \"extra\")"]).await;
    let stays = newest_of(&vm, VM).await;
    assert_other_goes_on(&vm).await;
    set(&mut vm, "all_points_bytes", AMPLE);
    vm.point_after("b", stays + 1).await;

    eprintln!("not what it was");
    vm.lab.worker("b").kill().unwrap();
    let (marker, away) = (pool.join("pageport-pool"), pool.join("away"));
    std::fs::rename(&marker, &away).unwrap();
    vm.lab.worker("b").restart().unwrap();
    assert_told(&vm, &["pool \"extra\" at", "is its file system mounted?"]).await;
    pool_until(&vm, POOL, |pool| pool["problem"].as_str().unwrap().contains("mounted?")).await;
    assert_other_goes_on(&vm).await;
    assert!(!marker.exists(), "it is not made anew");
    let stays = newest_of(&vm, VM).await;
    std::fs::rename(&away, &marker).unwrap();
    vm.point_after("b", stays + 1).await;

    eprintln!("there and back");
    vm.written().await;
    vm.point_from_now("b").await;
    assert_equal(&replica, &disk).await;
    vm.assert_moves_with_little("b", SMALL.disk_bytes).await;
    vm.assert_same_guest().await;
    vm.write(2).await;
    vm.point_after("a", 1).await;
    vm.written().await;
    vm.point_from_now("a").await;
    vm.assert_moves_with_little("a", SMALL.disk_bytes).await;
    vm.assert_same_guest().await;
    vm.point_after("b", 1).await;
    vm.point_from_now("b").await;
    assert_equal(&replica, &disk).await;

    eprintln!("removed");
    ctl(&vm.lab, &["unprotect", VM, "--site", "b"]).await.unwrap();
    ctl(&vm.lab, &["replica", "delete", VM, "--site", "b"]).await.unwrap();
    let gone = |pool: &Value| used(pool, "replicas") == 0 && used(pool, "points") == 0;
    pool_until(&vm, POOL, gone).await;
    assert!(std::fs::read_dir(pool.join("replicas")).unwrap().next().is_none(), "something is left");
    assert_other_goes_on(&vm).await;
}
