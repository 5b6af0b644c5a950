//! Commands against a fake cluster: what is printed, with which exit code, and what the controllers were asked.

#![allow(clippy::unwrap_used)]

mod support;

use pageport_proto::v1;
use pageport_proto::v1::fence_worker_response::Phase;
use serde_json::json;
use support::{Authority, Fake, run, vm, write};
use tonic::Status;

#[tokio::test]
async fn lists_come_as_tables_and_as_json() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();

    let sites = run(&authority, &at, &["site", "list"]).await.succeeded();
    assert_eq!(sites.stdout, "SITE  REACHABLE  VMS RUNNING  WORKERS\na     yes                  1  worker-a\n");
    let vms = run(&authority, &at, &["vm", "list", "--json"]).await.succeeded();
    assert_eq!(vms.lines()[0]["vms"][0]["spec"]["name"], "web");
    assert_eq!(vms.lines()[0]["vms"][0]["state"], "running");
    let one = run(&authority, &at, &["--json", "vm", "get", "web"]).await.succeeded();
    assert_eq!(one.lines()[0]["id"], "id-web");
    let none = run(&authority, &at, &["replica", "list", "web", "--json"]).await.succeeded();
    assert_eq!(none.lines(), [json!({"replicas": []})]);

    let pool = v1::Pool { name: "ssd".into(), path: "/srv/ssd".into(), ..v1::Pool::default() };
    fake.script().workers = vec![v1::Worker { name: "worker-a".into(), pools: vec![pool], ..Default::default() }];
    let pools = run(&authority, &at, &["worker", "pools"]).await.succeeded();
    assert!(pools.stdout.contains("worker-a  ssd"), "{}", pools.stdout);
    let pools = run(&authority, &at, &["worker", "pools", "--json"]).await.succeeded();
    assert_eq!(pools.lines()[0]["workers"][0]["pools"][0]["path"], "/srv/ssd");
}

#[tokio::test]
async fn a_vm_is_defined_from_its_file() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let text = "name: db\nmemory: 1GiB\nvcpus: 1\ndisks: [{name: root, path: /srv/db.img}]\n";
    let good = write(&authority.path(""), "vm.yaml", text);
    let define = ["vm", "define", "-f", good.to_str().unwrap(), "--site", "a"];
    let ended = run(&authority, &at, &define).await.succeeded();
    assert!(ended.stdout.starts_with("db (id-new): stopped at a"), "{}", ended.stdout);
    assert_eq!(fake.script().defined[0].memory_bytes, 1 << 30);

    let bad = write(&authority.path(""), "bad.yaml", &format!("{text}memroy: 2GiB\n"));
    let ended = run(&authority, &at, &["vm", "define", "-f", bad.to_str().unwrap(), "--site", "a"]).await;
    assert!(ended.error().contains("unknown field `memroy`"), "{}", ended.stderr);
    let ended = run(&authority, &at, &["vm", "define", "-f", "/nowhere.yaml", "--site", "a"]).await;
    assert_eq!(ended.error(), "error: read the VM description /nowhere.yaml: No such file or directory (os error 2)");
    assert_eq!(fake.script().defined.len(), 1);
}

#[tokio::test]
async fn refusals_are_shown_as_the_controller_worded_them() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    for (arguments, message) in [
        (&["vm", "start", "ghost"][..], "error: there is no VM \"ghost\""),
        (&["vm", "delete", "web"], "error: web is running: stop it first"),
        (&["migrate", "web", "--to", "nowhere"], "error: there is no site \"nowhere\""),
        (&["migration", "get", "m9"], "error: there is no migration \"m9\""),
    ] {
        assert_eq!(run(&authority, &at, arguments).await.error(), message);
    }
}

#[tokio::test]
async fn a_disk_is_resized_and_its_size_is_shown() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let mut web = vm("web");
    web.spec.get_or_insert_default().disks = vec![v1::DiskSpec {
        name: "root".into(),
        path: "/srv/web.img".into(),
        size_bytes: 20 << 30,
        ..Default::default()
    }];
    web.disks = vec![v1::DiskStatus { name: "root".into(), size_bytes: 8 << 30 }];
    fake.script().vms = vec![web];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let resize = ["disk", "resize", "web", "root", "--size", "20GiB"];
    let ended = run(&authority, &at, &resize).await.succeeded();
    assert_eq!(ended.stdout, "web: disk root becomes 20.0 GiB\n");
    let asked = fake.script().resized.remove(0);
    assert_eq!((asked.vm.as_str(), asked.disk.as_str(), asked.size_bytes), ("web", "root", 20 << 30));
    let shown = run(&authority, &at, &["vm", "get", "web"]).await.succeeded();
    assert!(shown.stdout.contains("root /srv/web.img (raw), 8.00 GiB, to become 20.0 GiB"), "{}", shown.stdout);
    let wrong = run(&authority, &at, &["disk", "resize", "web", "root", "--size", "20GB"]).await;
    assert!(wrong.stderr.contains("use KiB, MiB, GiB"), "{}", wrong.stderr);
}

#[tokio::test]
async fn the_terms_of_a_migration_are_changed_and_shown() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let set =
        run(&authority, &at, &["migration", "set", "m1", "--priority", "80", "--rate", "50mbit"]).await.succeeded();
    assert_eq!(set.stdout, "migration m1: web from  to , queued, priority 80, at most 50.0 Mbit/s\n");
    let pause = run(&authority, &at, &["migration", "pause", "m1"]).await.succeeded();
    assert_eq!(pause.stdout, "migration m1: web from  to , queued, paused\n");
    let longer = ["migration", "set", "m1", "--convergence", "longer-pause", "--longest-pause", "2s"];
    let longer = run(&authority, &at, &longer).await.succeeded();
    assert_eq!(
        longer.stdout,
        "migration m1: web from  to , queued, stands still for 2.00 s at most if it does not converge\n"
    );
    let throttled = run(&authority, &at, &["migration", "set", "m1", "--convergence", "throttle"]).await.succeeded();
    assert_eq!(throttled.stdout, "migration m1: web from  to , queued, slows its guest down if it does not converge\n");
    let resume = run(&authority, &at, &["migration", "resume", "m1", "--json"]).await.succeeded();
    assert_eq!(resume.lines()[0]["terms"]["paused"], false);
}

#[tokio::test]
async fn a_disk_is_added_where_it_is_said() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let add = ["disk", "add", "web", "data", "--size", "2GiB"];
    let ended = run(&authority, &at, &add).await.succeeded();
    assert_eq!(ended.stdout, "web: gets disk data of 2.00 GiB\n");
    run(&authority, &at, &[&add[..], &["--path", "/srv/data.img"]].concat()).await.succeeded();
    let asked: Vec<_> = fake.script().added.drain(..).map(|asked| (asked.disk, asked.size_bytes, asked.path)).collect();
    assert_eq!(asked, [("data".into(), 2 << 30, String::new()), ("data".into(), 2 << 30, "/srv/data.img".into())]);
}

#[tokio::test]
async fn vms_that_a_restore_has_left_out_are_adopted_one_by_one_or_all() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let ended = run(&authority, &at, &["vm", "adopt", "--all"]).await.succeeded();
    assert!(ended.stderr.contains("no worker speaks of a VM that the controllers do not know"), "{}", ended.stderr);
    let found = |name: &str| v1::FoundVm { id: format!("id-{name}"), name: name.into(), ..Default::default() };
    fake.script().found = vec![found("late"), found("later")];
    let ended = run(&authority, &at, &["vm", "adopt", "late"]).await.succeeded();
    assert_eq!(ended.stdout, "late (id-late) is known again: running\n");
    let ended = run(&authority, &at, &["--json", "vm", "adopt", "--all"]).await.succeeded();
    let ids: Vec<_> = ended.lines().iter().map(|vm| vm["id"].clone()).collect();
    assert_eq!(ids, ["id-late", "id-later"]);
    // One that fails does not keep the other from it, and the failure is told.
    fake.script().failures.push_back(Status::already_exists("vm \"late\" exists already"));
    let ended = run(&authority, &at, &["vm", "adopt", "--all"]).await;
    assert_eq!(
        (ended.error(), ended.stdout.as_str()),
        ("error: vm \"late\" exists already", "later (id-later) is known again: running\n")
    );
    assert!(
        run(&authority, &at, &["vm", "adopt", "never"]).await.error().contains("no worker speaks of a vm \"never\"")
    );
}

#[tokio::test]
async fn a_repeated_command_keeps_its_request_id() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().vms = vec![vm("web")];
    fake.script().failures = [Status::unavailable("no leader"), Status::unavailable("no leader")].into();
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    run(&authority, &at, &["vm", "stop", "web", "--force"]).await.succeeded();
    run(&authority, &at, &["vm", "start", "web"]).await.succeeded();
    let ids = fake.script().request_ids.clone();
    assert_eq!(ids.len(), 4, "{ids:?}");
    assert!(ids[0] == ids[1] && ids[1] == ids[2], "{ids:?}");
    assert_ne!(ids[2], ids[3]);
    assert!(ids.iter().all(|id| id.parse::<pageport_proto::RequestId>().is_ok()), "{ids:?}");
}

fn fence(phase: Phase) -> v1::FenceWorkerResponse {
    let vm = v1::FencedVm {
        name: "web".into(),
        to_site: "b".into(),
        to_worker: "worker-b".into(),
        taken_over: phase == Phase::Done,
        ..Default::default()
    };
    v1::FenceWorkerResponse {
        phase: phase.into(),
        worker: "worker-a".into(),
        agent: "ipmi".into(),
        problem: if phase == Phase::Failed { "fence agent \"ipmi\" could not".into() } else { String::new() },
        vms: vec![vm],
        ..Default::default()
    }
}

#[tokio::test]
async fn a_fence_is_followed_to_its_end_and_joined_again_when_its_stream_breaks() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    // The first stream ends too early.
    fake.script().fences =
        [vec![fence(Phase::Agent)], vec![fence(Phase::Agent), fence(Phase::Takeover), fence(Phase::Done)]].into();
    let off = ["worker", "fence", "worker-a", "--confirm", "worker-a", "--reason", "smoke"];
    let ended = run(&authority, &at, &off).await.succeeded();
    assert!(ended.stdout.contains("worker-a is off (fence agent ipmi)\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("web  b           worker-b"), "{}", ended.stdout);
    let asked = fake.script().fenced.clone();
    assert!(asked.len() == 2 && asked[0] == asked[1], "{asked:?}");
    assert_eq!((asked[0].confirm_name.as_str(), asked[0].reason.as_str()), ("worker-a", "smoke"));

    fake.script().fences = [vec![fence(Phase::Failed)]].into();
    let failed = run(&authority, &at, &off).await;
    assert_eq!(
        failed.error(),
        "error: worker worker-a was not fenced, and nothing was taken over: fence agent \"ipmi\" could not"
    );
    let unconfirmed = run(&authority, &at, &["worker", "fence", "worker-a", "--reason", "smoke"]).await;
    assert!(unconfirmed.error().contains("--confirm NAME"), "{}", unconfirmed.stderr);

    fake.script().fences = [vec![fence(Phase::Done)]].into();
    let checked = run(&authority, &at, &["worker", "fence", "worker-a", "--check", "--json"]).await.succeeded();
    assert_eq!(checked.lines()[0]["phase"], "done");
    assert_eq!(fake.script().fenced.last().unwrap().action(), v1::fence_worker_request::Action::Check);
    assert_eq!(run(&authority, &at, &["worker", "fence", "worker-a"]).await.code, 2, "a reason is needed");
}

#[tokio::test]
async fn a_wrong_command_line_exits_with_2() {
    let authority = Authority::new();
    for arguments in [&["migrate", "web"][..], &["vm", "frobnicate"], &["--no-such-option"]] {
        let ended = run(&authority, "127.0.0.1:1", arguments).await;
        assert_eq!(ended.code, 2, "{arguments:?}: {}", ended.stderr);
    }
}
