//! Before the commit point any failure leaves the source running: real processes are killed, a link is cut, a certificate is
//! wrong, a disk is full. After each the guest goes on at its source, one error says why, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::lab::LabConfig;
use pageport_lab::lab::tls::Authority;
use pageport_lab::netns;
use serde_json::Value;
use support::{Story, VM, ctl, cut, heal, set_rate, wait_for};

/// Slow enough that a move can be struck in the middle.
const SLOW_BPS: u64 = 20_000_000;
const FAST_BPS: u64 = 200_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_struck_before_the_commit_point_leaves_the_guest_at_its_source() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), SLOW_BPS).await;
    let boot_id = story.guest.uptime().await.unwrap().1;

    destination_hypervisor_killed(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    destination_worker_killed(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    source_worker_killed(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    link_cut(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    wrong_certificate(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    disk_full(&mut story).await;
    story.assert_guest_lives(&boot_id).await;

    // And after all that it moves.
    set_rate(&story.lab, FAST_BPS);
    ctl(&story.lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    story.assert_nothing_left("b").await;
    story.assert_guest_lives(&boot_id).await;
}

async fn assert_failed(story: &Story, id: &str) -> String {
    let ended = story.wait_for_end(id).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    let reason = ended["reason"].as_str().unwrap().to_owned();
    assert!(!reason.is_empty() && reason.lines().count() == 1, "{reason:?}");
    story.assert_nothing_left("a").await;
    assert_eq!(story.wait_for_vm("running").await["owner_site"], "a");
    reason
}

async fn destination_hypervisor_killed(story: &mut Story) {
    let id = story.order().await;
    story.wait_for_memory(&id).await;
    let pids = story.lab.qemu_pids(VM);
    let (_, pid) = *pids.iter().find(|(site, _)| *site == "b").unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_failed(story, &id).await;
}

async fn destination_worker_killed(story: &mut Story) {
    let id = story.order().await;
    story.wait_for_memory(&id).await;
    story.lab.worker("b").kill().unwrap();
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    story.lab.worker("b").restart().unwrap();
    story.lab.wait_until_ready().await.unwrap();
    assert_failed(story, &id).await;
}

async fn source_worker_killed(story: &mut Story) {
    let id = story.order().await;
    story.wait_for_memory(&id).await;
    story.lab.worker("a").kill().unwrap();
    story.lab.worker("a").restart().unwrap();
    story.lab.wait_until_ready().await.unwrap();
    assert_failed(story, &id).await;
}

async fn link_cut(story: &mut Story) {
    let id = story.order().await;
    story.wait_for_memory(&id).await;
    cut(&story.lab);
    // The leader may be beyond the cut, so the source's own log is asked, not the controllers.
    let log = story.lab.worker("a").log().to_owned();
    wait_for("the source to give the move up", || async {
        let text = std::fs::read_to_string(&log).unwrap();
        let given_up = text.lines().any(|line| line.contains(&id) && line.contains("migration given up"));
        if given_up { Ok(()) } else { Err(text.lines().last().unwrap_or_default().to_owned()) }
    })
    .await;
    heal(&story.lab);
    story.lab.wait_until_ready().await.unwrap();
    assert_failed(story, &id).await;
}

/// A worker whose certificate another authority signed gets nowhere, and is told from one that is unreachable.
async fn wrong_certificate(story: &mut Story) {
    let config = story.lab.worker("b").config().to_owned();
    let right = std::fs::read_to_string(&config).unwrap();
    let stranger = Authority::create(&story.lab.folder().join("other-authority")).unwrap();
    let identity = stranger.issue("worker-b", "worker-b.worker.pageport").unwrap();
    let mut settings: toml::Table = right.parse().unwrap();
    // It trusts, and is trusted by, the controllers no more; the address that they know of it still stands.
    for (key, path) in [("ca", &identity.ca), ("cert", &identity.cert), ("key", &identity.key)] {
        settings["tls"][key] = path.to_string_lossy().into_owned().into();
    }
    std::fs::write(&config, settings.to_string()).unwrap();
    story.lab.worker("b").kill().unwrap();
    let refused: Value;
    {
        let ordered = story.lab.ctl_json(["migrate", VM, "--to", "b"]).await;
        story.lab.worker("b").restart().unwrap();
        refused = match ordered {
            // The controllers had not noticed yet that the worker is gone: the source finds out.
            Ok(created) => story.wait_for_end(created["id"].as_str().unwrap()).await,
            Err(error) => serde_json::json!({"state": "failed", "reason": error.to_string()}),
        };
    }
    assert_eq!(refused["state"], "failed", "{refused}");
    assert!(!refused["reason"].as_str().unwrap().is_empty());
    std::fs::write(&config, right).unwrap();
    story.lab.worker("b").kill().unwrap();
    story.lab.worker("b").restart().unwrap();
    story.lab.wait_until_ready().await.unwrap();
    story.assert_nothing_left("a").await;
}

/// Site c has almost no room: the seed is refused before any byte moves, and says how much is needed.
async fn disk_full(story: &mut Story) {
    let replicas = story.lab.folder().join("data/worker-c/replicas");
    std::fs::create_dir_all(&replicas).unwrap();
    // Daemons run in mount namespaces of their own.
    let worker = story.lab.worker("c").pid().unwrap().to_string();
    let inside = |arguments: &[&str]| {
        let status = std::process::Command::new("nsenter").args(["-t", &worker, "-m"]).args(arguments).status();
        assert!(status.unwrap().success(), "{arguments:?}");
    };
    let folder = replicas.to_str().unwrap();
    inside(&["mount", "-t", "tmpfs", "-o", "size=16m", "pageport-test", folder]);
    let refused = ctl(&story.lab, &["replica", "seed", VM, "--to", "c", "--watch"]).await;
    inside(&["umount", folder]);
    let line = refused.unwrap_err();
    assert!(line.contains("no space") && line.contains("free"), "{line}");
    story.assert_nothing_left("a").await;
}
