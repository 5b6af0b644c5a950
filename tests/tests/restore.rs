//! All controllers are lost, and one goes on from a backup that is older than a move: the guest runs on, is found where it went, never runs twice, and can be
//! moved again. A guest that is newer than the backup runs on, is found, and is adopted.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::demo::loads;
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
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

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_newer_than_the_backup_runs_on_and_is_adopted() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let mut lab = Lab::start(LabConfig { lease_ms: 4_000, ..LabConfig::default() }).await.unwrap();
    let backup = lab.folder().join("controllers.backup");
    ctl(&lab, &["cluster", "backup", backup.to_str().unwrap()]).await.unwrap();
    let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
    lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
    ctl(&lab, &["vm", "start", VM]).await.unwrap();
    ctl(&lab, &["disk", "add", VM, "data", "--size", "16MiB"]).await.unwrap();
    let mut guest = lab.guest("a", GUEST_ADDRESS).await.unwrap();
    let boot_id = guest.uptime().await.unwrap().1;
    let defined = lab.ctl_json(["vm", "get", VM]).await.unwrap();

    let witness = Witness::of(&lab);
    lab.restore_controllers("a", &backup).await.unwrap();
    lab.wait_until_ready().await.unwrap();
    let listed = wait_for("it to be found", || async {
        let listed = lab.ctl_json(["vm", "list"]).await.map_err(|error| error.to_string())?;
        if listed["found"][0]["runs"] == true { Ok(listed) } else { Err(listed.to_string()) }
    })
    .await;
    assert_eq!((&listed["found"][0]["name"], &listed["vms"]), (&VM.into(), &serde_json::json!([])));
    assert!(ctl(&lab, &["vm", "get", VM]).await.is_err());
    ctl(&lab, &["vm", "adopt", VM]).await.unwrap();
    let vm = wait_for("it to be known again", || async {
        let vm = lab.ctl_json(["vm", "get", VM]).await.map_err(|error| error.to_string())?;
        if vm["state"] == "running" { Ok(vm) } else { Err(vm.to_string()) }
    })
    .await;
    assert_eq!((&vm["id"], &vm["owner_site"]), (&defined["id"], &"a".into()));
    assert_eq!(vm["spec"]["disks"].as_array().map(Vec::len), Some(2), "what was added is not forgotten: {vm}");
    witness.assert_never_two().await;
    ctl(&lab, &["replica", "seed", VM, "--to", "b", "--watch"]).await.unwrap();
    ctl(&lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    assert_eq!(guest.uptime().await.unwrap().1, boot_id, "the guest was booted anew");
}
