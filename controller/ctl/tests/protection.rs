//! Protection against a fake cluster: what is ordered, what is printed, and when a watch ends.

#![allow(clippy::unwrap_used)]

mod support;

use pageport_proto::v1::{self, ReplicaState, ReplicationPhase};
use support::{Authority, Fake, ended, pageportctl, run, vm};
use tokio::io::{AsyncBufReadExt, BufReader};

fn protected(status: v1::ReplicationStatus, state: ReplicaState) -> v1::Vm {
    let replica = v1::Replica {
        site: "b".into(),
        state: state.into(),
        protection: Some(v1::Protection { rpo_ms: 30_000, keep_points: 10, quiesce: false }),
        problem: status.problem.clone(),
        replication: Some(status),
        ..Default::default()
    };
    v1::Vm { replicas: vec![replica], ..vm("web") }
}

fn point(number: u64) -> v1::RecoveryPoint {
    v1::RecoveryPoint { number, taken_unix_ms: 1_000, changed_bytes: 4096, ..Default::default() }
}

fn idle(number: u64, lag_ms: u64) -> v1::ReplicationStatus {
    let phase = ReplicationPhase::Idle.into();
    v1::ReplicationStatus { phase, newest: Some(point(number)), lag_ms, ..Default::default() }
}

fn copying(done_bytes: u64) -> v1::ReplicationStatus {
    let phase = ReplicationPhase::FullCopy.into();
    v1::ReplicationStatus { phase, done_bytes, total_bytes: 4 << 30, ..Default::default() }
}

fn fleet(vm: v1::Vm) -> v1::WatchFleetResponse {
    v1::WatchFleetResponse { vms: vec![vm, support::vm("db")], ..Default::default() }
}

#[tokio::test]
async fn orders_carry_their_terms_and_are_confirmed_in_words() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![protected(idle(7, 0), ReplicaState::Seeded)];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let done = run(&authority, &at, &["protect", "web", "--to", "b", "--rpo", "1m", "--keep", "24"]).await;
    assert_eq!(
        done.succeeded().stdout,
        "web is protected at b: a recovery point at least every 1m, 24 are kept\n\
         how it stands: pageportctl replication status web\n"
    );
    let asked = fake.script().protected[0].clone();
    let terms = v1::Protection { rpo_ms: 60_000, keep_points: 24, quiesce: false };
    assert_eq!((asked.protection, asked.to_site.as_str()), (Some(terms), "b"));
    let done = run(&authority, &at, &["protect", "web", "--to", "b", "--quiesce"]).await.succeeded();
    assert!(done.stdout.contains("quiesced where the guest's agent answers"), "{}", done.stdout);
    assert!(fake.script().protected[1].protection.is_some_and(|terms| terms.quiesce));
    let placed = ["protect", "web", "--to", "b", "--place", "root=/dev/vg0/web"];
    let done = run(&authority, &at, &placed).await.succeeded();
    assert!(done.stdout.contains("10 are kept, disk root on /dev/vg0/web\n"), "{}", done.stdout);
    let place = v1::DiskPlace { disk: "root".into(), path: "/dev/vg0/web".into() };
    assert_eq!(fake.script().protected[2].places, [place]);
    let done = run(&authority, &at, &["protect", "web", "--to", "b", "--pool", "ssd"]).await.succeeded();
    assert!(done.stdout.starts_with("web is protected at b (pool ssd): "), "{}", done.stdout);
    assert_eq!(fake.script().protected[3].pool, "ssd");
    let done = run(&authority, &at, &["unprotect", "web", "--site", "b"]).await.succeeded();
    assert_eq!(done.stdout, "web is no longer protected at b; its replica there stays as it is\n");
    let refused = run(&authority, &at, &["unprotect", "web", "--site", "c"]).await;
    assert_eq!(refused.error(), "error: vm \"web\" is not protected at site \"c\"");
    assert_eq!(run(&authority, &at, &["protect", "web", "--to", "b", "--rpo", "30"]).await.code, 2);
}

#[tokio::test]
async fn a_status_shows_protected_vms_only_and_a_missed_target_is_no_failure_of_the_command() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let late = v1::ReplicationStatus { rpo_missed: true, ..idle(41, 95_000) };
    fake.script().vms = vec![protected(late, ReplicaState::Seeded), vm("db")];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    for arguments in [&["replication", "status"][..], &["replication", "status", "web"]] {
        let shown = run(&authority, &at, arguments).await.succeeded();
        let rows: Vec<&str> = shown.stdout.lines().collect();
        assert_eq!(rows.len(), 2, "{}", shown.stdout);
        assert!(rows[1].starts_with("web  b     idle      41  1 min 35 s"), "{}", rows[1]);
        assert!(rows[1].ends_with("TARGET MISSED"), "{}", rows[1]);
    }
    let none = run(&authority, &at, &["replication", "status", "db"]).await.succeeded();
    assert!(none.stdout.starts_with("nothing is protected"), "{}", none.stdout);
    let json = run(&authority, &at, &["replication", "status", "--json"]).await.succeeded().lines();
    assert_eq!(json[0]["vms"].as_array().unwrap().len(), 1);
    assert_eq!(json[0]["vms"][0]["replicas"][0]["replication"]["rpo_missed"], true);
    assert_eq!(json[0]["vms"][0]["replicas"][0]["protection"]["rpo_ms"], 30_000);
    assert_eq!(
        run(&authority, &at, &["replication", "status", "ghost"]).await.error(),
        "error: there is no VM \"ghost\""
    );
}

#[tokio::test]
async fn a_watched_protection_ends_with_the_first_recovery_point() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    let steps = |last: v1::Vm| {
        let first = fleet(protected(copying(1 << 30), ReplicaState::Seeding));
        // A replica that was left behind by a takeover counts as outdated until its first new point.
        let second = fleet(protected(copying(2 << 30), ReplicaState::Outdated));
        vec![first, second, fleet(last)]
    };
    let watch = ["protect", "web", "--to", "b", "--watch"];
    fake.script().fleets = [steps(protected(idle(1, 0), ReplicaState::Seeded))].into();
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let done = run(&authority, &at, &watch).await.succeeded();
    assert_eq!(done.stdout, "web is protected at b: a recovery point at least every 30s, 10 are kept\n");
    assert!(done.stderr.contains("full copy") || done.stderr.contains("seeding"), "{}", done.stderr);

    let mut ended_by_another = protected(v1::ReplicationStatus::default(), ReplicaState::Failed);
    ended_by_another.replicas[0].protection = None;
    ended_by_another.replicas[0].problem = "the protection was ended".into();
    fake.script().fleets = [steps(ended_by_another)].into();
    let failed = run(&authority, &at, &[&watch[..], &["--json"]].concat()).await;
    assert_eq!(failed.error(), "error: web is not protected at b: the protection was ended");
    assert_eq!(failed.lines().last().unwrap()["state"], "failed");
}

#[tokio::test]
async fn a_watched_scrub_ends_with_the_result_of_the_order_and_not_with_an_older_one() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let scrub = |seq, different_blocks| v1::ScrubStatus {
        seq,
        started_unix_ms: 1_000,
        ended_unix_ms: 61_000,
        compared_bytes: 1 << 30,
        different_blocks,
        repaired_blocks: different_blocks,
        ..Default::default()
    };
    let at_seq = |status| {
        let mut vm = protected(status, ReplicaState::Seeded);
        vm.replicas[0].scrub_seq = 9;
        vm
    };
    let older = || v1::ReplicationStatus { last_scrub: Some(scrub(4, 1)), ..idle(7, 0) };
    let running = v1::ReplicationStatus { scrub: Some(scrub(9, 3)), ..older() };
    let done = v1::ReplicationStatus { last_scrub: Some(scrub(9, 3)), ..idle(8, 0) };
    fake.script().vms = vec![at_seq(older())];
    fake.script().fleets = [vec![fleet(at_seq(running)), fleet(at_seq(done))]].into();
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let ended = run(&authority, &at, &["replication", "scrub", "web", "--watch"]).await.succeeded();
    assert_eq!(
        ended.stdout,
        "the replica of web at b: 1.00 GiB compared in 1 min 0 s, 3 blocks of 4 KiB differed, 3 repaired\n"
    );
    assert!(ended.stderr.contains("scrub"), "{}", ended.stderr);
    let ordered = run(&authority, &at, &["replication", "scrub", "web", "--site", "b"]).await.succeeded();
    assert!(ordered.stdout.starts_with("the replica of web at b is compared"), "{}", ordered.stdout);
    let refused = run(&authority, &at, &["replication", "scrub", "web", "--site", "c"]).await;
    assert!(refused.error().contains("is not protected there"), "{}", refused.stderr);
}

#[tokio::test]
async fn a_watched_status_goes_on_until_it_is_interrupted_which_is_no_failure() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let steps = [1, 1, 2].map(|number| fleet(protected(idle(number, 0), ReplicaState::Seeded)));
    fake.script().fleets = [steps.to_vec(), vec![fleet(protected(idle(3, 0), ReplicaState::Seeded))]].into();
    let server = fake.serve(&authority, "controller.pageport").await;
    let arguments = ["replication", "status", "web", "--watch", "--json"];
    let mut child = pageportctl(&authority, &server.address.to_string(), &arguments).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
    for number in 1..=3 {
        let line = stdout.next_line().await.unwrap().unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["vms"].as_array().unwrap().len(), 1, "{line}");
        assert_eq!(value["vms"][0]["replicas"][0]["replication"]["newest"]["number"], number, "{line}");
    }
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(ended(child.wait_with_output().await.unwrap()).code, 0);
}

#[tokio::test]
async fn recovery_points_and_links_are_listed_and_links_are_capped() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    fake.script().points = vec![point(3), point(4)];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let points = run(&authority, &at, &["recovery-point", "list", "web", "--site", "b"]).await.succeeded();
    assert_eq!(points.stdout.lines().count(), 3, "{}", points.stdout);
    let points = run(&authority, &at, &["recovery-point", "list", "web", "--site", "b", "--json"]).await.succeeded();
    assert_eq!(points.lines()[0]["points"][1]["number"], 4);

    let set = run(&authority, &at, &["link", "set", "a", "b", "--cap", "100mbit"]).await.succeeded();
    assert_eq!(
        set.stdout,
        "from a to b: budget of all none, cap of replication 100 Mbit/s, migrations at a time default\n"
    );
    let list = run(&authority, &at, &["link", "list"]).await.succeeded();
    assert_eq!(list.stdout, "FROM  TO  BUDGET         CAP  MIGRATIONS\na     b     none  100 Mbit/s     default\n");
    let none = run(&authority, &at, &["link", "set", "a", "b", "--cap", "none", "--json"]).await.succeeded();
    assert_eq!(none.lines()[0]["cap_bps"], 0);
}
