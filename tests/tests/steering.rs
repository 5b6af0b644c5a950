//! A move that runs is made slower, held, and let go on; its guest runs all the time.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::time::Duration;

use pageport_lab::demo::loads;
use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use support::{Story, VM, ctl, set_rate, wait_for};

const LINK_BPS: u64 = 40_000_000;
const FAST_BPS: u64 = 1_000_000_000;
/// What the move is held to, and half as much for what it had ahead.
const RATE_BPS: u64 = 4_000_000;
/// Far longer than the fast link needs for the guest.
const HELD: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_slowed_held_and_let_go_on_while_its_guest_runs() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), LINK_BPS).await;
    let session = story.busy_session().await;
    let id = story.order().await;
    story.wait_for_memory(&id).await;

    ctl(&story.lab, &["migration", "set", &id, "--rate", "4mbit", "--priority", "70"]).await.unwrap();
    let slowed = wait_for("the move to be slow", || async {
        let migration = story.migration(&id).await;
        let rate_bps = migration["progress"]["rate_bps"].as_u64().unwrap_or(u64::MAX);
        if rate_bps < RATE_BPS * 3 / 2 { Ok(migration) } else { Err(migration.to_string()) }
    })
    .await;
    assert_eq!(
        (slowed["rate_bps"].as_u64(), slowed["terms"]["priority"].as_u64()),
        (Some(RATE_BPS), Some(70)),
        "{slowed}"
    );

    ctl(&story.lab, &["migration", "pause", &id]).await.unwrap();
    ctl(&story.lab, &["migration", "set", &id, "--rate", "none"]).await.unwrap();
    set_rate(&story.lab, FAST_BPS);
    tokio::time::sleep(HELD).await;
    let held = story.migration(&id).await;
    assert_eq!((&held["state"], &held["progress"]["phase"]), (&"running".into(), &"memory".into()), "{held}");
    assert_eq!(held["terms"]["paused"], true, "{held}");
    let listed = ctl(&story.lab, &["migration", "list", "--vm", VM]).await.unwrap();
    assert!(listed.contains("paused"), "{listed}");

    ctl(&story.lab, &["migration", "resume", &id]).await.unwrap();
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "completed", "{ended}");
    story.assert_nothing_left("b").await;
    session.finish().await.unwrap();
    let checks = loads::compare(&mut story.guest, &story.before, true).await.unwrap();
    assert!(checks.all(), "{checks:?}");
}
