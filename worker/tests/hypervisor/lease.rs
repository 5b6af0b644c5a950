//! The lease of a VM: enforced by its keeper whatever becomes of the worker and of QEMU.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageport_worker::hypervisor::{
    BootTime, ExitCause, ExitReport, HypervisorError, Lease, RunState, StartMode, Vm, clean_up, list_running,
};

use crate::support::{Fixture, SOON};

const AN_HOUR: Duration = Duration::from_secs(3600);

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

async fn gone(pid: u32) {
    let wait = async {
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("the process stays");
}

fn only_the_log_is_left(dir: &Path) {
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["qemu.log"]);
}

async fn expires(vm: &Vm) -> ExitReport {
    let report = vm.wait_exit(SOON).await.unwrap();
    assert_eq!((report.cause, report.expected()), (ExitCause::LeaseExpired, false), "{report:?}");
    assert!(report.log_tail.contains("the lease ran out"), "{report:?}");
    assert!(!alive(vm.pid()) && !alive(vm.keeper_pid()));
    only_the_log_is_left(vm.paths().dir());
    report
}

#[tokio::test]
async fn a_vm_is_killed_at_its_deadline_running_paused_or_hanging() {
    // Each has a host of its own: they would not share a disk.
    let hosts = [Fixture::new(), Fixture::new(), Fixture::new()];
    let running = hosts[0].start(StartMode::Running).await;
    let (paused, hanging) = (hosts[1].start(StartMode::Paused).await, hosts[2].start(StartMode::Running).await);
    assert_eq!(running.lease().unwrap(), Lease::Disarmed);
    // QMP answers nothing any more.
    signal(hanging.pid(), Signal::SIGSTOP);
    let deadline = BootTime::now() + Duration::from_millis(600);
    for vm in [&running, &paused, &hanging] {
        vm.arm(deadline).unwrap();
    }
    for vm in [&running, &paused, &hanging] {
        let report = expires(vm).await;
        assert!(report.status.contains("signal: 9"), "{report:?}");
    }
    assert!(BootTime::now() >= deadline);
}

#[tokio::test]
async fn a_vm_is_armed_from_its_start_extended_never_shortened_by_arming_and_disarmed() {
    let fixture = Fixture::new();
    let mut launch = fixture.launch(StartMode::Paused);
    let first = BootTime::now() + AN_HOUR;
    launch.deadline = Some(first);
    let vm = Vm::start(&fixture.host, &launch).await.unwrap();
    assert_eq!(vm.lease().unwrap(), Lease::Until(first));
    vm.arm(first + AN_HOUR).unwrap();
    vm.arm(first).unwrap();
    assert_eq!(vm.lease().unwrap(), Lease::Until(first + AN_HOUR));
    vm.arm_exactly(first).unwrap();
    assert_eq!(vm.lease().unwrap(), Lease::Until(first));
    vm.disarm().unwrap();
    assert_eq!(vm.lease().unwrap(), Lease::Disarmed);
    vm.arm(BootTime::now()).unwrap();
    expires(&vm).await;
    assert!(matches!(vm.arm(first), Err(HypervisorError::Lease { .. })), "nothing is left to arm");
}

#[tokio::test]
async fn a_vm_that_is_to_start_under_a_lease_that_is_over_does_not() {
    let fixture = Fixture::new();
    let mut launch = fixture.launch(StartMode::Running);
    launch.deadline = Some(BootTime::now());
    let error = Vm::start(&fixture.host, &launch).await.unwrap_err().to_string();
    assert!(error.contains("ran out before the start"), "{error}");
    assert!(list_running(&fixture.host.runtime_dir).unwrap().is_empty());
}

#[tokio::test]
async fn a_lease_runs_out_without_a_worker_and_an_adopted_vm_is_extended() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let (id, pid, keeper) = (vm.id(), vm.pid(), vm.keeper_pid());
    vm.arm(BootTime::now() + AN_HOUR).unwrap();
    drop(vm);
    let adopted = Vm::adopt(&fixture.host.runtime_dir, id).await.unwrap();
    assert_eq!((adopted.pid(), adopted.keeper_pid()), (pid, keeper));
    let later = BootTime::now() + AN_HOUR + AN_HOUR;
    adopted.arm(later).unwrap();
    assert_eq!(adopted.lease().unwrap(), Lease::Until(later));
    adopted.arm_exactly(BootTime::now() + Duration::from_millis(300)).unwrap();
    let dir = adopted.paths().dir().to_owned();
    drop(adopted);
    gone(pid).await;
    let none = Vm::adopt(&fixture.host.runtime_dir, id).await;
    assert!(matches!(none, Err(HypervisorError::NotRunning { .. })), "{none:?}");
    clean_up(&fixture.host.runtime_dir, id).await.unwrap();
    assert!(!alive(keeper));
    only_the_log_is_left(&dir);
}

#[tokio::test]
async fn an_adopted_vm_that_expires_says_so() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let id = vm.id();
    drop(vm);
    let adopted = Vm::adopt(&fixture.host.runtime_dir, id).await.unwrap();
    adopted.arm(BootTime::now()).unwrap();
    expires(&adopted).await;
}

#[tokio::test]
async fn qemu_does_not_outlive_its_keeper() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    signal(vm.keeper_pid(), Signal::SIGKILL);
    let report = vm.wait_exit(SOON).await.unwrap();
    assert_eq!(report.cause, ExitCause::Unexpected);
    assert!(!alive(vm.pid()));
    only_the_log_is_left(vm.paths().dir());
}

#[tokio::test]
async fn a_kill_gets_past_a_stopped_keeper_and_leaves_nothing() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    signal(vm.keeper_pid(), Signal::SIGSTOP);
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    let report = vm.kill().await.unwrap();
    assert_eq!(report.cause, ExitCause::Ordered);
    assert!(!alive(vm.pid()) && !alive(vm.keeper_pid()));
    only_the_log_is_left(vm.paths().dir());
}

#[tokio::test]
async fn a_deadline_file_that_is_gone_is_an_error_and_the_old_deadline_stands() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    std::fs::remove_file(vm.paths().deadline()).unwrap();
    let error = vm.arm(BootTime::now()).unwrap_err().to_string();
    assert!(error.contains("extend the lease of VM"), "{error}");
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_vm_that_was_being_started_when_its_worker_died_is_not_overlooked() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let (id, pid) = (vm.id(), vm.pid());
    let pid_file = vm.paths().pid();
    drop(vm);
    // As if QEMU had not come far enough to write it.
    std::fs::remove_file(&pid_file).unwrap();
    let none = Vm::adopt(&fixture.host.runtime_dir, id).await;
    assert!(matches!(none, Err(HypervisorError::NotRunning { .. })), "{none:?}");
    assert!(!alive(pid), "a QEMU that nobody knows of");
}

/// Where the helper says what it has started.
const TOLD: &str = "PAGEPORT_TEST_TOLD";

#[tokio::test]
#[ignore = "a helper: the test below runs it as a process of its own, and kills it"]
async fn helper_that_starts_a_vm_and_never_ends() {
    let told = std::env::var(TOLD).expect("run by the test that needs it");
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let deadline = BootTime::now() + Duration::from_secs(4);
    vm.arm(deadline).unwrap();
    let words = format!("{} {} {}", vm.pid(), deadline.as_nanos(), vm.paths().log().display());
    std::fs::write(format!("{told}.new"), words).unwrap();
    std::fs::rename(format!("{told}.new"), told).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_deadline_holds_though_the_process_that_started_the_vm_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    let mut helper = tokio::process::Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "lease::helper_that_starts_a_vm_and_never_ends", "--ignored", "--nocapture"]);
    // What it leaves lies in this test's folder.
    helper.env(TOLD, &told).env("TMPDIR", folder.path()).kill_on_drop(true);
    let mut helper = helper.spawn().unwrap();
    let words = async {
        loop {
            if let Ok(words) = tokio::fs::read_to_string(&told).await {
                return words;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let words = tokio::time::timeout(SOON, words).await.expect("the helper starts a VM");
    let mut words = words.splitn(3, ' ');
    let mut next = || words.next().unwrap();
    let (pid, deadline, log) = (next().parse().unwrap(), next().parse().unwrap(), next());
    helper.kill().await.unwrap();
    assert!(alive(pid), "it does not hang on who started it");
    gone(pid).await;
    assert!(BootTime::now() >= BootTime::from_nanos(deadline));
    let said = async {
        while !std::fs::read_to_string(log).unwrap().contains("the lease ran out") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, said).await.expect("the keeper says why");
}
