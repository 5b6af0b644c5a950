//! Faults on real processes: a few pairs of the matrix that `make faults` runs, the proof that its witness sees two running
//! copies, and what is refused before it begins: a wrong certificate, a full disk. After each exactly one guest goes on, one
//! error says why, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::baseline::qmp::Qmp;
use pageport_lab::faults::arena::{Arena, VM};
use pageport_lab::faults::witness::contradictions;
use pageport_lab::faults::{self, FaultsConfig, Isolation, Outcome, Pair, Passed};
use pageport_lab::lab::LabConfig;
use pageport_lab::lab::guest::{GuestImages, SMALL};
use pageport_lab::lab::tls::Authority;
use pageport_lab::netns;
use serde_json::Value;
use support::{Story, ctl, wait_for};

const FAST_BPS: u64 = 200_000_000;

/// Runs these cases, of which none may fail.
async fn all_pass(pairs: Vec<Pair>) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let config = FaultsConfig {
        pairs,
        passed: Passed::Again,
        lease: faults::LEASE,
        lanes: 1,
        seed: 0,
        folder: folder.path().to_owned(),
    };
    let outcome = faults::run(&config, |news| eprintln!("{news:?}")).await.unwrap();
    assert!(outcome.failed.is_empty(), "{:#?}", outcome.failed);
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn struck_at_its_worst_points_exactly_one_guest_goes_on_and_nothing_is_left() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let pairs = faults::short_set();
    let cases = pairs.len();
    let matrix = all_pass(pairs).await.matrix;
    assert_eq!((matrix.cases, matrix.passed), (cases, cases));
    assert_eq!((matrix.double_running, matrix.lost_vms, matrix.orphans), (0, 0, 0));
}

/// A move that can go on does: a restarted source calls again and finds no trace of its first call, and a destination asks
/// until the controllers have a leader.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_struck_at_its_first_call_completes_all_the_same() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let names = ["admit/kill-source-worker", "admit/kill-leader"].map(str::to_owned);
    let outcome = all_pass(faults::select(&names).unwrap()).await;
    for name in names {
        let result = &outcome.newest[&name];
        assert_eq!(result.outcome, "completed", "{result:?}");
    }
}

/// Waits until the worker at b has the record that permits it to run the guest, and hardly longer.
async fn acquired(arena: &Arena) {
    let log = arena.lab.logs().join("worker-b.log");
    let deadline = tokio::time::Instant::now() + support::PATIENCE;
    loop {
        let text = std::fs::read_to_string(&log).unwrap();
        if text.lines().any(|line| line.contains("event=Release") && line.contains("record=Own")) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "the destination never acquired");
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

/// The matrix is worth as much as its witness: here a guest is made to run twice, behind the back of its dead worker.
#[tokio::test(flavor = "multi_thread")]
async fn two_copies_that_execute_are_seen() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut arena = Arena::open(&GuestImages::build(SMALL).unwrap(), Isolation::KeepRunning).await.unwrap();
    arena.seed("b").await.unwrap();
    let hold = arena.lab.failpoints().join("destination.resume.hold");
    std::fs::write(&hold, b"").unwrap();
    arena.lab.ctl_json(["migrate", VM, "--to", "b"]).await.unwrap();
    // The source's stopped copy outlives its worker if that is killed before it hears that the destination has acquired: the
    // news has to go through the controllers, since the destination's own word is held back.
    acquired(&arena).await;
    arena.lab.worker("a").kill().unwrap();
    std::fs::remove_file(&hold).unwrap();
    wait_for("the guest to run at b", || async {
        match arena.sniffer.last() {
            Ok(Some(last)) if last.site == "b" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // One guest has moved, and that is all.
    assert_eq!(contradictions(&arena.sniffer.seen().unwrap(), "a"), Vec::<String>::new());

    let vm = arena.vm().await.unwrap()["id"].as_str().unwrap().to_owned();
    let socket = arena.lab.runtime().join("a/vm").join(vm).join("qmp.sock");
    let mut qmp = Qmp::connect(&socket, support::PATIENCE).await.unwrap();
    qmp.execute("cont", serde_json::json!({})).await.unwrap();
    wait_for("the copy at a to be seen", || async {
        let found = contradictions(&arena.sniffer.seen().unwrap(), "a");
        if found.is_empty() { Err("no contradiction".to_owned()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_before_it_begins_leaves_the_guest_at_its_source() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), FAST_BPS).await;
    let boot_id = story.guest.uptime().await.unwrap().1;

    wrong_certificate(&mut story).await;
    story.assert_guest_lives(&boot_id).await;
    disk_full(&mut story).await;
    story.assert_guest_lives(&boot_id).await;

    // And after all that it moves.
    ctl(&story.lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    story.assert_nothing_left("b").await;
    story.assert_guest_lives(&boot_id).await;
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
