//! All controllers are lost, and one goes on from a backup that is older than a move: the guest runs on, is found where it went, never runs twice, and can be
//! moved again.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::demo::loads;
use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use support::witness::Witness;
use support::{Story, VM, ctl, wait_for};

const RATE_BPS: u64 = 1_000_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_moved_since_the_backup_is_found_where_it_went() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig { lease_ms: 4_000, ..LabConfig::default() }, RATE_BPS).await;
    let boot_id = story.guest.uptime().await.unwrap().1;
    let backup = story.lab.folder().join("controllers.backup");
    ctl(&story.lab, &["cluster", "backup", backup.to_str().unwrap()]).await.unwrap();
    ctl(&story.lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    story.assert_nothing_left("b").await;

    let witness = Witness::of(&story.lab);
    story.lab.restore_controllers("a", &backup).await.unwrap();
    let shown =
        wait_for("the restored controller", || async { ctl(&story.lab, &["--json", "vm", "get", VM]).await }).await;
    let vm: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert!(vm["state"] == "unknown" || vm["owner_site"] == "b", "{vm}");
    story.lab.wait_until_ready().await.unwrap();
    let vm = story.wait_for_vm("running").await;
    assert_eq!(vm["owner_site"], "b", "{vm}");
    witness.assert_never_two().await;
    story.assert_nothing_left("b").await;
    story.assert_guest_lives(&boot_id).await;

    let status = ctl(&story.lab, &["cluster", "status"]).await.unwrap();
    assert!(!status.contains("worker-a"), "nobody is waited for: {status}");
    ctl(&story.lab, &["replica", "seed", VM, "--to", "a", "--watch"]).await.unwrap();
    ctl(&story.lab, &["migrate", VM, "--to", "a", "--watch"]).await.unwrap();
    story.assert_nothing_left("a").await;
    let checks = loads::compare(&mut story.guest, &story.before, true).await.unwrap();
    assert!(checks.all(), "{checks:?}");
}
