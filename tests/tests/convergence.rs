//! A guest that dirties memory faster than the link carries it: whoever watches is told that it will not converge, and a cancel
//! leaves the guest at its source as if nothing had been.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::process::Stdio;
use std::sync::{Arc, Mutex};

use pageport_guest::protocol::{Reply, Request};
use pageport_lab::demo::loads;
use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use serde_json::Value;
use support::{PATIENCE, Story, VM, ctl, set_rate, wait_for};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;

const SLOW_BPS: u64 = 30_000_000;
const FAST_BPS: u64 = 200_000_000;
/// 16 MB of changes a second, half of it random: twice what the slow link carries even when it is compressed.
const DIRTY: Request = Request::DirtyStart { bytes: 48 << 20, pages_per_second: 4000, seed: 77 };

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dirties_faster_than_the_link_is_said_not_to_converge_and_stays_when_cancelled() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), SLOW_BPS).await;
    let session = story.busy_session().await;
    let boot_id = story.guest.uptime().await.unwrap().1;
    story.guest.call(&Request::DirtyStop, PATIENCE).await.unwrap();
    story.guest.call(&DIRTY, PATIENCE).await.unwrap();

    let (mut person, seen) = watch(&story, &["migrate", VM, "--to", "b", "--watch"], Stream::Errors);
    let id = wait_for("the migration", || async {
        let list = story.lab.ctl_json(["migration", "list", "--vm", VM]).await.map_err(|error| error.to_string())?;
        let running = list["migrations"].as_array().into_iter().flatten().find(|one| one["state"] == "running");
        running.and_then(|one| one["id"].as_str()).map(str::to_owned).ok_or_else(|| list.to_string())
    })
    .await;
    let (mut script, lines) = watch(&story, &["--json", "migration", "watch", &id], Stream::Output);

    let line = wait_for_line(&seen, "will not converge").await;
    assert!(line.contains("the guest dirties") && line.contains("the link takes"), "{line}");
    assert!(!line.contains("ETA"), "{line}");
    let line = wait_for_line(&lines, "\"not_converging\":true").await;
    let told: Value = serde_json::from_str(&line).unwrap();
    let progress = &told["progress"];
    assert_eq!(progress["phase"], "memory", "{told}");
    assert!(progress["dirty_rate_bps"].as_u64().unwrap() > progress["rate_bps"].as_u64().unwrap(), "{told}");
    assert_eq!(progress["eta_ms"], Value::Null, "{told}");

    let cancelled = ctl(&story.lab, &["migration", "cancel", &id]).await.unwrap();
    assert!(cancelled.contains("cancel"), "{cancelled}");
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    for watcher in [&mut person, &mut script] {
        let status = tokio::time::timeout(PATIENCE, watcher.wait()).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(1));
    }
    wait_for_line(&seen, "was cancelled").await;
    story.assert_nothing_left("a").await;
    story.assert_guest_lives(&boot_id).await;
    assert_eq!(story.wait_for_vm("running").await["owner_site"], "a");

    // Its memory is what it must be, and with a load that the link bears it moves.
    let dirty = story.guest.call(&Request::DirtyStop, PATIENCE).await.unwrap();
    assert!(matches!(dirty, Reply::Dirty { corrupt_pages: 0, writes: 1.. }), "{dirty:?}");
    let bearable = Request::DirtyStart { bytes: 8 << 20, pages_per_second: 300, seed: 78 };
    story.guest.call(&bearable, PATIENCE).await.unwrap();
    set_rate(&story.lab, FAST_BPS);
    ctl(&story.lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    story.assert_nothing_left("b").await;
    session.finish().await.unwrap();
    let checks = loads::compare(&mut story.guest, &story.before, true).await.unwrap();
    assert!(checks.all(), "{checks:?}");
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
