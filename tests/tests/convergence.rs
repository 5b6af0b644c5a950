//! A guest that dirties memory faster than the link carries it: whoever watches is told that it will not converge and what helps. It is
//! given up as soon as that is ordered, and the guest stays at its source as if nothing had been; ordered anew, the guest is slowed down, and
//! the move ends.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::process::Stdio;
use std::sync::{Arc, Mutex};

use pageport_guest::protocol::Request;
use pageport_lab::demo::loads;
use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use serde_json::Value;
use support::{PATIENCE, Story, VM, ctl, wait_for};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;

const SLOW_BPS: u64 = 30_000_000;
/// 16 MB of changes a second, half of it random: twice what the link carries even when it is compressed.
const DIRTY: Request = Request::DirtyStart { bytes: 24 << 20, pages_per_second: 4000, seed: 77 };
/// What is left then takes a quarter of it.
const LONGEST_PAUSE: &str = "20s";
const LONGEST_PAUSE_MS: u64 = 20_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dirties_faster_than_the_link_is_waited_for_given_up_or_slowed_down_as_ordered() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), SLOW_BPS).await;
    let session = story.busy_session().await;
    let boot_id = story.guest.uptime().await.unwrap().1;
    story.guest.call(&Request::DirtyStop, PATIENCE).await.unwrap();
    story.guest.call(&DIRTY, PATIENCE).await.unwrap();

    it_is_waited_for_and_then_given_up(&story).await;
    story.assert_nothing_left("a").await;
    story.assert_guest_lives(&boot_id).await;
    assert_eq!(story.wait_for_vm("running").await["owner_site"], "a");

    it_is_slowed_down_and_stands_still_for_longer(&story).await;
    story.assert_nothing_left("b").await;
    session.finish().await.unwrap();
    let checks = loads::compare(&mut story.guest, &story.before, true).await.unwrap();
    assert!(checks.all(), "{checks:?}");
}

/// Nothing is done unasked but to say that it will not converge, why, and what helps.
async fn it_is_waited_for_and_then_given_up(story: &Story) {
    let (mut person, seen) = watch(story, &["migrate", VM, "--to", "b", "--watch"], Stream::Errors);
    let id = running(story).await;
    let (mut script, lines) = watch(story, &["--json", "migration", "watch", &id], Stream::Output);

    let line = wait_for_line(&seen, "will not converge").await;
    assert!(line.contains("the guest dirties") && line.contains("the link carries"), "{line}");
    assert!(line.contains(&format!("pageportctl migration set {id} --convergence longer-pause")), "{line}");
    assert!(!line.contains("ETA"), "{line}");
    let line = wait_for_line(&lines, "\"not_converging\":true").await;
    let told: Value = serde_json::from_str(&line).unwrap();
    let (progress, convergence) = (&told["progress"], &told["progress"]["convergence"]);
    assert_eq!((&progress["phase"], &progress["eta_ms"]), (&Value::from("memory"), &Value::Null), "{told}");
    assert_eq!((&convergence["outlook"], &told["terms"]["convergence"]), (&"no".into(), &"wait".into()), "{told}");
    assert_eq!(
        (&convergence["throttle_percent"], &convergence["permitted_pause_ms"]),
        (&0.into(), &300.into()),
        "{told}"
    );
    let list = ctl(&story.lab, &["migration", "list"]).await.unwrap();
    assert!(list.contains("will not converge"), "{list}");

    let refused = ctl(&story.lab, &["migration", "set", &id, "--convergence", "throttle"]).await.unwrap_err();
    assert!(refused.contains("order it again with that"), "{refused}");
    let set = ctl(&story.lab, &["migration", "set", &id, "--convergence", "give-up"]).await.unwrap();
    assert!(set.contains("gives up if it does not converge"), "{set}");
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    let reason = ended["reason"].as_str().unwrap();
    assert!(reason.contains("given up as was ordered") && reason.contains("the link carries"), "{reason}");
    for watcher in [&mut person, &mut script] {
        let status = tokio::time::timeout(PATIENCE, watcher.wait()).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(1));
    }
}

async fn it_is_slowed_down_and_stands_still_for_longer(story: &Story) {
    let order = ["--json", "migrate", VM, "--to", "b", "--convergence", "throttle", "--watch"];
    let (mut script, _) = watch(story, &order, Stream::Output);
    let id = running(story).await;
    wait_for("the guest to be slowed down", || async {
        let migration = story.migration(&id).await;
        let percent = migration["progress"]["convergence"]["throttle_percent"].as_u64().unwrap_or_default();
        if percent >= 50 { Ok(()) } else { Err(migration.to_string()) }
    })
    .await;
    let longer = ["--convergence", "longer-pause", "--longest-pause", LONGEST_PAUSE];
    let set = ctl(&story.lab, &[&["migration", "set", &id], &longer[..]].concat()).await.unwrap();
    assert!(set.contains("stands still for 20.0 s at most"), "{set}");
    let status = tokio::time::timeout(PATIENCE, script.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    let ended = story.migration(&id).await;
    let (record, took) = (&ended["record"], &ended["record"]["convergence"]);
    assert_eq!(ended["state"], "completed", "{ended}");
    assert_eq!(took["acted"][0], "throttle", "{ended}");
    assert!(
        took["rounds"].as_u64().unwrap() >= 3 && took["greatest_throttle_percent"].as_u64().unwrap() >= 50,
        "{ended}"
    );
    assert!(took["permitted_pause_ms"].as_u64().unwrap() < LONGEST_PAUSE_MS, "{ended}");
    assert!(record["downtime_ms"].as_u64().unwrap() < LONGEST_PAUSE_MS, "{ended}");
}

/// The id of the migration that runs.
async fn running(story: &Story) -> String {
    wait_for("the migration", || async {
        let list = story.lab.ctl_json(["migration", "list", "--vm", VM]).await.map_err(|error| error.to_string())?;
        let running = list["migrations"].as_array().into_iter().flatten().find(|one| one["state"] == "running");
        running.and_then(|one| one["id"].as_str()).map(str::to_owned).ok_or_else(|| list.to_string())
    })
    .await
}

/// Which of a program's streams is read.
enum Stream {
    Output,
    Errors,
}

type Lines = Arc<Mutex<Vec<String>>>;

/// Runs `pageportctl`; its lines come in as it says them.
fn watch(story: &Story, arguments: &[&str], stream: Stream) -> (Child, Lines) {
    let mut command = story.lab.ctl_command("a");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = Lines::default();
    match stream {
        Stream::Output => collect(child.stdout.take().unwrap(), Arc::clone(&lines)),
        Stream::Errors => collect(child.stderr.take().unwrap(), Arc::clone(&lines)),
    }
    (child, lines)
}

fn collect(stream: impl AsyncRead + Unpin + Send + 'static, into: Lines) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            into.lock().unwrap().push(line);
        }
    });
}

async fn wait_for_line(lines: &Lines, text: &str) -> String {
    wait_for(&format!("a line with {text:?}"), || async {
        let lines = lines.lock().unwrap();
        let found = lines.iter().find(|line| line.contains(text)).cloned();
        found.ok_or_else(|| lines.last().cloned().unwrap_or_default())
    })
    .await
}
