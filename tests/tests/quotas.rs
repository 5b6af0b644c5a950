//! Quotas over all VMs of a host: what is refused, what is said, what stays, and that raising them helps.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::netns;
use support::protected::{Protected, newest, number_of};
use support::{VM, ctl, wait_for};

/// A key of `[replication]` at a site, whose worker is started anew.
fn set(vm: &mut Protected, site: &str, key: &str, bytes: i64) {
    let worker = vm.lab.worker(site);
    worker.kill().unwrap();
    let mut config: toml::Table = std::fs::read_to_string(worker.config()).unwrap().parse().unwrap();
    let replication = config.entry("replication").or_insert_with(|| toml::Table::new().into());
    replication.as_table_mut().unwrap().insert(key.to_owned(), bytes.into());
    std::fs::write(worker.config(), config.to_string()).unwrap();
    worker.restart().unwrap();
}

/// What keeps a site from having newer points.
async fn assert_told(vm: &Protected, words: &str) {
    wait_for("the quota to be told", || async {
        let shown = ctl(&vm.lab, &["replication", "status", VM]).await?;
        if shown.contains(words) { Ok(()) } else { Err(shown) }
    })
    .await;
}

async fn newest_at(vm: &Protected, site: &str) -> u64 {
    newest(&vm.lab.ctl_json(["vm", "get", VM]).await.unwrap(), site)
}

#[tokio::test(flavor = "multi_thread")]
async fn at_each_quota_the_newest_point_stays_and_replication_goes_on_once_it_is_raised() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    const AMPLE: i64 = 1 << 40;
    let mut vm = Protected::begin().await;
    let id = vm.vm_id().await;

    eprintln!("replicas");
    set(&mut vm, "c", "replicas_bytes", 1 << 20);
    ctl(&vm.lab, &["protect", VM, "--to", "c", "--rpo", "5s"]).await.unwrap();
    assert_told(&vm, "replicas occupy 0 here and may 1048576 (replication.replicas_bytes)").await;
    assert!(!vm.lab.worker_data("c").join("replicas").join(&id).join("root.raw").exists());
    set(&mut vm, "c", "replicas_bytes", AMPLE);
    vm.point_after("c", 0).await;
    ctl(&vm.lab, &["unprotect", VM, "--site", "c"]).await.unwrap();

    eprintln!("points");
    set(&mut vm, "b", "all_points_bytes", 256 << 10);
    vm.write(1).await;
    assert_told(&vm, "by all vms (replication.all_points_bytes)").await;
    let stays = newest_at(&vm, "b").await;
    let points = vm.lab.ctl_json(["recovery-point", "list", VM, "--site", "b"]).await.unwrap();
    let last = points["points"].as_array().unwrap().last().unwrap();
    assert_eq!(number_of(&last["number"]), Some(stays), "{points}");
    set(&mut vm, "b", "all_points_bytes", AMPLE);
    vm.point_after("b", stays + 1).await;

    eprintln!("scratch");
    ctl(&vm.lab, &["link", "set", "a", "b", "--cap", "1mbit"]).await.unwrap();
    set(&mut vm, "a", "all_scratch_bytes", 4096);
    assert_told(&vm, "of the 4096 bytes of scratch for all vms are used").await;
    let stays = newest_at(&vm, "b").await;
    ctl(&vm.lab, &["link", "set", "a", "b", "--cap", "none"]).await.unwrap();
    set(&mut vm, "a", "all_scratch_bytes", AMPLE);
    vm.point_after("b", stays + 1).await;
    vm.written().await;
    vm.point_from_now("b").await;
    let disk = vm.disk.clone();
    vm.assert_replica_is_the_disk("b", &disk).await;
    vm.assert_same_guest().await;
}
