//! Following migrations and seeds: progress, the end, lost controllers, interruption.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use pageport_proto::v1::{self, MigrationState, ReplicaState};
use support::{Authority, Fake, Step, ended, pageportctl, run, vm};
use tokio::io::{AsyncBufReadExt, BufReader};

fn update(state: MigrationState, phase: &str) -> v1::Migration {
    let progress = v1::MigrationProgress {
        phase: phase.into(),
        memory_bytes: 1 << 30,
        remaining_bytes: 1 << 30,
        rate_bps: 142_000_000,
        ..Default::default()
    };
    v1::Migration {
        id: "m1".into(),
        vm_name: "web".into(),
        from_site: "a".into(),
        to_site: "b".into(),
        state: state.into(),
        progress: Some(progress),
        ..Default::default()
    }
}

fn completed() -> v1::Migration {
    let record = v1::MigrationRecord { total_time_ms: 6_210, downtime_ms: 312, ..Default::default() };
    v1::Migration { record: Some(record), ..update(MigrationState::Completed, "") }
}

fn fleet_with(state: ReplicaState, done_bytes: u64, problem: &str) -> v1::WatchFleetResponse {
    let replica = v1::Replica {
        site: "b".into(),
        state: state.into(),
        done_bytes,
        total_bytes: 4 << 30,
        problem: problem.into(),
        ..Default::default()
    };
    let vm = v1::Vm { replicas: vec![replica], ..vm("web") };
    v1::WatchFleetResponse { vms: vec![vm], ..Default::default() }
}

fn scripted(watches: Vec<Vec<Step>>) -> Fake {
    let fake = Fake::default();
    fake.script().vms = vec![vm("web")];
    fake.script().watches = watches.into();
    fake
}

#[tokio::test]
async fn a_watched_migration_ends_with_its_summary() {
    let steps = [
        update(MigrationState::Running, "disk-sync"),
        update(MigrationState::Running, "memory"),
        update(MigrationState::Committed, ""),
        completed(),
    ];
    let fake = scripted(vec![steps.map(Step::update).to_vec()]);
    let authority = Authority::new();
    let server = fake.serve(&authority, "controller.pageport").await;
    let ended =
        run(&authority, &server.address.to_string(), &["migrate", "web", "--to", "b", "--watch"]).await.succeeded();
    assert!(
        ended.stdout.starts_with("web moved from a to b in 6.21 s; it stood still for 312 ms.\n"),
        "{}",
        ended.stdout
    );
    let phases: Vec<&str> = ended.stderr.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(phases, ["disk-sync", "memory", "committed", "completed"], "{}", ended.stderr);
}

#[tokio::test]
async fn json_lines_end_with_the_whole_migration() {
    let steps = vec![Step::update(update(MigrationState::Running, "memory")), Step::update(completed())];
    let fake = scripted(vec![steps]);
    let authority = Authority::new();
    let server = fake.serve(&authority, "controller.pageport").await;
    let arguments = ["migrate", "web", "--to", "b", "--watch", "--json"];
    let ended = run(&authority, &server.address.to_string(), &arguments).await.succeeded();
    let lines = ended.lines();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["progress"]["phase"], "memory");
    assert_eq!((&lines[1]["state"], &lines[1]["record"]["total_time_ms"]), (&"completed".into(), &6210.into()));
    assert_eq!(ended.stderr, "");
}

#[tokio::test]
async fn a_migration_that_did_not_complete_is_an_error_with_its_reason() {
    for (state, outcome) in [(MigrationState::Failed, "failed"), (MigrationState::Cancelled, "was cancelled")] {
        let end = v1::Migration { reason: "no space at b".into(), ..update(state, "") };
        let fake = scripted(vec![vec![Step::update(end)]]);
        let authority = Authority::new();
        let server = fake.serve(&authority, "controller.pageport").await;
        let ended = run(&authority, &server.address.to_string(), &["migration", "watch", "m1"]).await;
        assert_eq!(ended.error(), format!("error: migration m1 of web {outcome}: no space at b"));
    }
}

#[tokio::test]
async fn a_watch_goes_on_at_another_controller() {
    let authority = Authority::new();
    let first = scripted(vec![vec![Step::update(update(MigrationState::Running, "memory")), Step::Lose]]);
    let second = scripted(vec![vec![Step::update(completed())]]);
    let (one, two) =
        (first.serve(&authority, "controller.pageport").await, second.serve(&authority, "controller.pageport").await);
    let controllers = format!("{},{}", one.address, two.address);
    let ended = run(&authority, &controllers, &["migration", "watch", "m1"]).await.succeeded();
    assert!(ended.stderr.contains("lost the controller (the leader went away); watching again"), "{}", ended.stderr);
    assert!(ended.stdout.contains("web moved from a to b"), "{}", ended.stdout);
}

#[tokio::test]
async fn a_watch_survives_the_restart_of_the_only_controller() {
    let authority = Authority::new();
    let fake = scripted(vec![
        vec![Step::update(update(MigrationState::Running, "memory")), Step::Hang],
        vec![Step::update(completed())],
    ]);
    let server = fake.serve(&authority, "controller.pageport").await;
    let address = server.address;
    let mut child = pageportctl(&authority, &address.to_string(), &["migration", "watch", "m1"]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(stderr.next_line().await.unwrap().unwrap().starts_with("memory"));
    drop(server);
    loop {
        let line = stderr.next_line().await.unwrap().expect("the watch ended");
        if line.contains("connection refused") {
            break;
        }
    }
    let _again = fake.serve_at(&authority, "controller.pageport", address).await;
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    assert!(ended(output).succeeded().stdout.contains("web moved from a to b"));
}

#[tokio::test]
async fn a_watch_that_is_lost_again_and_again_gives_up() {
    let fake = scripted((0..20).map(|_| vec![Step::Lose]).collect());
    let authority = Authority::new();
    let server = fake.serve(&authority, "controller.pageport").await;
    let ended = run(&authority, &server.address.to_string(), &["migration", "watch", "m1"]).await;
    assert!(ended.error().contains("lost 8 times in a row, last because: the leader went away"), "{}", ended.stderr);
}

#[tokio::test]
async fn an_interrupted_watch_says_that_the_migration_goes_on() {
    let fake = scripted(vec![vec![Step::update(update(MigrationState::Running, "memory")), Step::Hang]]);
    let authority = Authority::new();
    let server = fake.serve(&authority, "controller.pageport").await;
    let mut child =
        pageportctl(&authority, &server.address.to_string(), &["migration", "watch", "m1"]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = stderr.next_line().await.unwrap().unwrap();
    assert!(first.starts_with("memory"), "{first}");
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let hint = stderr.next_line().await.unwrap().unwrap();
    assert!(hint.contains("pageportctl migration cancel m1"), "{hint}");
    let output = tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(ended(output).code, 130);
}

#[tokio::test]
async fn a_watched_seed_ends_when_the_replica_is_seeded() {
    let fake = scripted(Vec::new());
    fake.script().fleets = [
        vec![fleet_with(ReplicaState::Seeding, 1 << 30, "")],
        vec![fleet_with(ReplicaState::Seeding, 2 << 30, ""), fleet_with(ReplicaState::Seeded, 4 << 30, "")],
    ]
    .into();
    let authority = Authority::new();
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let ended = run(&authority, &at, &["replica", "seed", "web", "--to", "b", "--watch"]).await.succeeded();
    assert_eq!(ended.stdout, "the replica of web at b is seeded: 4.00 GiB looked at, 0 B sent\n");
    assert!(ended.stderr.contains("watching again"), "{}", ended.stderr);

    fake.script().fleets = [vec![fleet_with(ReplicaState::Failed, 0, "no space")]].into();
    let ended = run(&authority, &at, &["replica", "seed", "web", "--to", "b", "--watch", "--json"]).await;
    assert_eq!(ended.error(), "error: the replica of web at b failed: no space");
    assert_eq!(ended.lines().last().unwrap()["state"], "failed");
}
