//! A VM is taken over when its site is lost: by itself once its lease has surely run out, on a fence agent's word, or on an
//! operator's. It never runs twice, and what comes back finds that it is no longer the owner.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::netns;
use pageport_lab::wan::control::Request;
use serde_json::Value;
use support::witness::Witness;
use support::{PATIENCE, VM, wait_for};

/// A lab with a running guest at site a and a complete replica at site b, seen from site b.
async fn begin(on_isolation: &str) -> Lab {
    let images = GuestImages::build(SMALL).unwrap();
    let lab = Lab::start(LabConfig { lease_ms: 4_000, ..LabConfig::default() }).await.unwrap();
    let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
    let text = std::fs::read_to_string(file.path()).unwrap();
    std::fs::write(file.path(), format!("{text}on_isolation: {on_isolation}\n")).unwrap();
    lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
    lab.ctl(["vm", "start", VM]).await.unwrap();
    lab.guest("a", GUEST_ADDRESS).await.unwrap();
    support::set_rate(&lab, 1_000_000_000);
    support::ctl(&lab, &["replica", "seed", VM, "--to", "b", "--watch"]).await.unwrap();
    lab
}

async fn ctl(lab: &Lab, arguments: &[&str]) -> Result<String, String> {
    let mut command = lab.ctl_command("b");
    let output = tokio::time::timeout(PATIENCE, command.args(arguments).output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

async fn vm(lab: &Lab) -> Value {
    let shown = ctl(lab, &["--json", "vm", "get", VM]).await.unwrap_or_default();
    serde_json::from_str(&shown).unwrap_or_default()
}

async fn wait_for_vm(lab: &Lab, what: &str, so: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, || async {
        let vm = vm(lab).await;
        if so(&vm) { Ok(vm) } else { Err(vm.to_string()) }
    })
    .await
}

/// Site a hears nobody and nobody hears site a.
fn isolate(lab: &Lab, request: fn(String, String) -> Request) {
    let mut wan = lab.network().wan().unwrap();
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")] {
        wan.call(&request(from.to_owned(), to.to_owned())).unwrap();
    }
}

/// What was left behind is kept as an outdated replica, and becomes a complete one by a new seed.
async fn assert_left_behind_and_of_use(lab: &Lab) {
    let replica_at_a = |vm: &Value| vm["replicas"].as_array()?.iter().find(|replica| replica["site"] == "a").cloned();
    let seen = wait_for_vm(lab, "an outdated replica at a", |vm| replica_at_a(vm).is_some()).await;
    assert_eq!(replica_at_a(&seen).unwrap()["state"], "outdated", "{seen}");
    wait_for("no hypervisor at a", || async {
        let pids = lab.qemu_pids(VM);
        if matches!(pids[..], [("b", _)]) { Ok(()) } else { Err(format!("{pids:?}")) }
    })
    .await;
    ctl(lab, &["replica", "seed", VM, "--to", "a", "--watch"]).await.unwrap();
    ctl(lab, &["migrate", VM, "--to", "a", "--watch"]).await.unwrap();
    assert_eq!(vm(lab).await["owner_site"], "a");
}

/// Nobody can say that it may run: it is ended where it is, and booted there again when somebody can.
async fn ends_without_a_majority_and_comes_back_with_it(lab: &mut Lab) {
    let [(_, before)] = lab.qemu_pids(VM)[..] else { panic!("{:?}", lab.qemu_pids(VM)) };
    let others = ["b", "c"].map(|site| nix::unistd::Pid::from_raw(lab.controller(site).pid().unwrap().cast_signed()));
    for controller in others {
        nix::sys::signal::kill(controller, nix::sys::signal::Signal::SIGSTOP).unwrap();
    }
    wait_for("the keeper to end the guest", || async {
        let pids = lab.qemu_pids(VM);
        if pids.is_empty() { Ok(()) } else { Err(format!("{pids:?}")) }
    })
    .await;
    for controller in others {
        nix::sys::signal::kill(controller, nix::sys::signal::Signal::SIGCONT).unwrap();
    }
    let back = wait_for_vm(lab, "the guest back at a", |vm| vm["state"] == "running").await;
    assert_eq!(back["owner_site"], "a", "{back}");
    assert!(back["takeovers"].as_array().is_none_or(Vec::is_empty), "{back}");
    assert!(matches!(lab.qemu_pids(VM)[..], [("a", pid)] if pid != before));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_fences_itself_ends_with_its_lease_and_then_starts_elsewhere() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut lab = begin("self-fence").await;
    // The leader's word keeps it alive for longer than any lease.
    tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    assert!(matches!(lab.qemu_pids(VM)[..], [("a", _)]));
    ends_without_a_majority_and_comes_back_with_it(&mut lab).await;

    let witness = Witness::of(&lab);
    // The worker hangs as well, so that nobody but the keeper can end the guest.
    let worker = nix::unistd::Pid::from_raw(lab.worker("a").pid().unwrap().cast_signed());
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGSTOP).unwrap();
    isolate(&lab, |from, to| Request::Cut { from, to });
    let taken = wait_for_vm(&lab, "the guest at b", |vm| vm["state"] == "running" && vm["owner_site"] == "b").await;
    witness.assert_never_two().await;
    lab.guest("b", GUEST_ADDRESS).await.unwrap();
    let takeover = &taken["takeovers"][0];
    assert_eq!(
        (&takeover["ground"], &takeover["from_worker"], &takeover["to_worker"]),
        (&"lease_expired".into(), &"worker-a".into(), &"worker-b".into()),
        "{taken}"
    );
    assert!(taken["problem"].as_str().unwrap().contains("lost"), "{taken}");

    let witness = Witness::of(&lab);
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGCONT).unwrap();
    isolate(&lab, |from, to| Request::Heal { from, to });
    lab.wait_until_ready().await.unwrap();
    witness.assert_never_two().await;
    assert_left_behind_and_of_use(&lab).await;
}

/// Waits until the controllers know whether the worker at `site` is guarded.
async fn wait_for_guarded(lab: &Lab, site: &str, guarded: bool) {
    wait_for("the worker's word", || async {
        let listed = ctl(lab, &["--json", "worker", "list"]).await.unwrap_or_default();
        let listed: Value = serde_json::from_str(&listed).unwrap_or_default();
        let is_so = |worker: &Value| worker["site"] == site && worker["guarded"] == guarded;
        if listed["workers"].as_array().is_some_and(|workers| workers.iter().any(is_so)) {
            Ok(())
        } else {
            Err(listed.to_string())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_worker_and_keeper_stand_still_is_ended_by_the_guard_and_starts_elsewhere() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut lab = begin("self-fence").await;
    // Where nobody guards it is not brought, and where it runs it goes on.
    lab.guard("b").kill().unwrap();
    wait_for_guarded(&lab, "b", false).await;
    let refused = ctl(&lab, &["migrate", VM, "--to", "b"]).await.unwrap_err();
    assert!(refused.contains("pageport-guard.service") && refused.lines().count() == 1, "{refused}");
    lab.guard("b").restart().unwrap();
    wait_for_guarded(&lab, "b", true).await;
    let [("a", qemu)] = lab.qemu_pids(VM)[..] else { panic!("{:?}", lab.qemu_pids(VM)) };

    let witness = Witness::of(&lab);
    let stop =
        |pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP).unwrap();
    stop(lab.keeper_of(qemu).unwrap());
    lab.worker("a").freeze().unwrap();
    isolate(&lab, |from, to| Request::Cut { from, to });
    let taken = wait_for_vm(&lab, "the guest at b", |vm| vm["state"] == "running" && vm["owner_site"] == "b").await;
    witness.assert_never_two().await;
    lab.guest("b", GUEST_ADDRESS).await.unwrap();
    assert_eq!(taken["takeovers"][0]["ground"], "lease_expired", "{taken}");
    let said = std::fs::read_to_string(lab.guard("a").log()).unwrap();
    assert!(said.contains("the keeper did nothing") && said.contains(&qemu.to_string()), "{said}");

    let witness = Witness::of(&lab);
    lab.worker("a").thaw().unwrap();
    isolate(&lab, |from, to| Request::Heal { from, to });
    lab.wait_until_ready().await.unwrap();
    witness.assert_never_two().await;
    assert_left_behind_and_of_use(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_keeps_running_is_taken_over_on_an_operators_word_alone() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut lab = begin("keep-running").await;
    let resolve = |confirm: &'static str, reason: &'static str| {
        ["vm", "resolve", VM, "--force-owner", "b", "--confirm", confirm, "--reason", reason]
    };
    for (confirm, reason, named) in [
        ("web2", "burnt", "web2"),
        (VM, " ", "reason"),
        (VM, "burnt", "connected"),
        ("", "burnt", "nothing was changed"),
    ] {
        let refused = ctl(&lab, &resolve(confirm, reason)).await.unwrap_err();
        assert!(refused.contains(named) && refused.lines().count() == 1, "{refused}");
    }

    // The host is lost: its worker, and the hypervisor with it.
    lab.worker("a").kill().unwrap();
    for (_, pid) in lab.qemu_pids(VM) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    let lost = wait_for_vm(&lab, "a doubt", |vm| vm["doubt"].as_str().is_some_and(|doubt| !doubt.is_empty())).await;
    assert_eq!((&lost["state"], &lost["owner_site"]), (&"unknown".into(), &"a".into()), "{lost}");
    assert!(ctl(&lab, &["vm", "delete", VM]).await.is_err());
    ctl(&lab, &resolve(VM, "the host burnt down")).await.unwrap();
    let taken = wait_for_vm(&lab, "the guest at b", |vm| vm["state"] == "running" && vm["owner_site"] == "b").await;
    let takeover = &taken["takeovers"][0];
    assert_eq!(
        (&takeover["ground"], &takeover["reason"]),
        (&"override".into(), &"the host burnt down".into()),
        "{taken}"
    );
    assert_eq!(takeover["operator"], "operator.pageport");

    let witness = Witness::of(&lab);
    lab.worker("a").restart().unwrap();
    lab.wait_until_ready().await.unwrap();
    witness.assert_never_two().await;
    assert_left_behind_and_of_use(&lab).await;
}

/// "Turns a host off": kills its worker and its keepers, which take their guests along, and waits until all are gone.
const AGENT: &str = r#"#!/bin/sh
[ "$1 $2 $3" = "off worker-a a" ] || { echo "asked $*" >&2; exit 1; }
if [ -e "$0.broken" ]; then echo "the switch is stuck" >&2; exit 1; fi
kill -KILL $(cat "$0.kill")
for pid in $(cat "$0.kill" "$0.gone"); do
    while [ -e "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status"; do sleep 0.05; done
done
echo "power is off"
"#;

/// Gives every controller an agent for site a's host.
async fn configure_agent(lab: &mut Lab) -> PathBuf {
    let agent = lab.folder().join("fence-agent");
    std::fs::write(&agent, AGENT).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    let table = format!("\n[[fence.agent]]\nname = \"switch\"\nworkers = [\"worker-a\"]\ncommand = [{agent:?}]\n");
    for site in ["a", "b", "c"] {
        let controller = lab.controller(site);
        let text = std::fs::read_to_string(controller.config()).unwrap();
        std::fs::write(controller.config(), text + &table).unwrap();
        controller.restart().unwrap();
    }
    lab.wait_until_ready().await.unwrap();
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_keeps_running_is_taken_over_when_an_agent_has_turned_its_host_off() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut lab = begin("keep-running").await;
    let agent = configure_agent(&mut lab).await;
    let flag = |name: &str| PathBuf::from(format!("{}.{name}", agent.display()));
    let pids_of = |lab: &Lab, is_one: fn(&str) -> bool| {
        let found = lab.programs("a").into_iter().filter(|(_, name)| is_one(name));
        found.map(|(pid, _)| format!("{pid}\n")).collect::<String>()
    };
    let of_the_host = pids_of(&lab, |name| name == "pageport-worker" || name == "pageport-keeper");
    // The worker, the guard, and the VM's keeper, whose guest ends with it.
    assert_eq!(of_the_host.lines().count(), 3, "{of_the_host}");
    std::fs::write(flag("kill"), of_the_host).unwrap();
    std::fs::write(flag("gone"), pids_of(&lab, |name| name.contains("qemu"))).unwrap();
    std::fs::write(flag("broken"), "").unwrap();
    let fence = ["worker", "fence", "worker-a", "--confirm", "worker-a", "--reason", "no heartbeat"];
    let refused = ctl(&lab, &fence).await.unwrap_err();
    assert!(refused.contains("is connected"), "{refused}");

    // Cut off, the guest goes on; an agent that fails changes nothing.
    let witness = Witness::of(&lab);
    isolate(&lab, |from, to| Request::Cut { from, to });
    let lost = wait_for_vm(&lab, "a doubt", |vm| vm["state"] == "unknown").await;
    let before = lab.qemu_pids(VM);
    assert!(
        matches!(before[..], [("a", _)]) && lost["doubt"].as_str().unwrap().contains("fenced"),
        "{before:?} {lost}"
    );
    let failed = ctl(&lab, &fence).await.unwrap_err();
    assert!(failed.contains("\"switch\"") && failed.contains("the switch is stuck"), "{failed}");
    let still = vm(&lab).await;
    assert_eq!((&still["owner_site"], still["takeovers"].as_array().map(Vec::len)), (&"a".into(), Some(0)), "{still}");
    assert_eq!(lab.qemu_pids(VM), before);

    std::fs::remove_file(flag("broken")).unwrap();
    let told = ctl(&lab, &fence).await.unwrap();
    assert!(told.contains("worker-a is off (fence agent switch: power is off)") && told.contains("worker-b"), "{told}");
    let taken = wait_for_vm(&lab, "the guest at b", |vm| vm["state"] == "running" && vm["owner_site"] == "b").await;
    lab.guest("b", GUEST_ADDRESS).await.unwrap();
    let takeover = &taken["takeovers"][0];
    assert_eq!(
        (&takeover["ground"], &takeover["agent"], &takeover["operator"]),
        (&"fenced".into(), &"switch".into(), &"operator.pageport".into()),
        "{taken}"
    );
    let shown = ctl(&lab, &["vm", "get", VM]).await.unwrap();
    assert!(shown.contains("its host was fenced by switch on the order of operator.pageport: no heartbeat"), "{shown}");

    isolate(&lab, |from, to| Request::Heal { from, to });
    lab.guard("a").restart().unwrap();
    lab.worker("a").restart().unwrap();
    lab.wait_until_ready().await.unwrap();
    witness.assert_never_two().await;
    assert_left_behind_and_of_use(&lab).await;
}
