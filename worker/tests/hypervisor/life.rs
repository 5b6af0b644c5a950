//! A VM's life: started, found again, ended.

use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::v1::NicSpec;
use pageport_worker::hypervisor::accel::{probe, qemu_version, runs_long_mode};
use pageport_worker::hypervisor::{
    Accelerator, Console, ExitCause, Host, HypervisorError, RunState, StartMode, Vm, VmEventKind, clean_up,
    list_running,
};
use pageport_worker::image::Image;

use crate::support::{Fixture, QEMU, SOON, tool, writes};

#[tokio::test]
async fn the_accelerator_is_the_one_that_runs_guests() {
    let dir = tempfile::tempdir().unwrap();
    assert!(runs_long_mode(QEMU, Accelerator::Tcg, dir.path()).await.unwrap(), "software emulation always works");
    let kvm = runs_long_mode(QEMU, Accelerator::Kvm, dir.path()).await.unwrap();
    let expected = if kvm { Accelerator::Kvm } else { Accelerator::Tcg };
    assert_eq!(probe(QEMU, dir.path()).await.unwrap(), expected);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    assert!(qemu_version(QEMU).await.unwrap().major >= 7);
    assert!(qemu_version("/nonexistent/qemu").await.is_err());
}

#[tokio::test]
async fn a_vm_starts_pauses_runs_on_and_is_killed_without_a_trace() {
    let fixture = Fixture::new();
    let launch = fixture.launch(StartMode::Running);
    let vm = Vm::start(&fixture.host, &launch).await.unwrap();
    let mut events = vm.events();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    assert_eq!(list_running(&fixture.host.runtime_dir).unwrap(), [vm.id()]);
    let again = Vm::start(&fixture.host, &launch).await;
    assert!(matches!(again, Err(HypervisorError::AlreadyRunning { .. })), "{again:?}");

    vm.stop().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Paused);
    vm.cont().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    let (stopped, resumed) = (events.recv().await.unwrap(), events.recv().await.unwrap());
    assert_eq!((&stopped.kind, &resumed.kind), (&VmEventKind::Stopped, &VmEventKind::Resumed));
    assert!(stopped.at.qemu < resumed.at.qemu && stopped.at.received <= resumed.at.received);

    let report = vm.kill().await.unwrap();
    assert_eq!((report.cause, report.expected()), (ExitCause::Ordered, true));
    assert!(report.status.contains("signal: 9"), "{report:?}");
    assert!(list_running(&fixture.host.runtime_dir).unwrap().is_empty());
    let left: Vec<_> = std::fs::read_dir(vm.paths().dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["qemu.log"]);
    assert!(vm.run_state().await.is_err());
}

#[tokio::test]
async fn a_vm_that_was_asked_to_wait_runs_only_when_told() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Paused).await;
    assert_eq!(vm.run_state().await.unwrap(), RunState::Prelaunch);
    vm.cont().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_qemu_that_does_not_start_is_reported_in_its_own_words() {
    let fixture = Fixture::new();
    let mut launch = fixture.launch(StartMode::Running);
    launch.spec.machine = "pc-q35-1.0".into();
    let error = Vm::start(&fixture.host, &launch).await.unwrap_err().to_string();
    assert!(error.contains("did not start") && error.contains("machine type"), "{error}");
    let mut launch = fixture.launch(StartMode::Running);
    launch.images.insert("root".into(), Image::raw(fixture.path("no-such-disk")));
    let error = Vm::start(&fixture.host, &launch).await.unwrap_err().to_string();
    assert!(error.contains("no-such-disk"), "{error}");
    let missing = Host { qemu: "/nonexistent/qemu".into(), ..fixture.host.clone() };
    let error = Vm::start(&missing, &fixture.launch(StartMode::Running)).await.unwrap_err().to_string();
    assert!(error.contains("did not start"), "{error}");
    assert!(list_running(&fixture.host.runtime_dir).unwrap().is_empty());
}

#[tokio::test]
async fn a_restarted_worker_finds_its_vm_again() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let (id, pid) = (vm.id(), vm.pid());
    drop(vm);
    let adopted = Vm::adopt(&fixture.host.runtime_dir, id).await.unwrap();
    assert_eq!((adopted.pid(), adopted.run_state().await.unwrap()), (pid, RunState::Running));
    let mut events = adopted.events();
    adopted.stop().await.unwrap();
    assert_eq!(events.recv().await.unwrap().kind, VmEventKind::Stopped);
    adopted.kill().await.unwrap();
    let gone = Vm::adopt(&fixture.host.runtime_dir, id).await;
    assert!(matches!(gone, Err(HypervisorError::NotRunning { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_pid_file_that_names_another_process_is_not_believed() {
    let fixture = Fixture::new();
    let vm = VmId::generate();
    let dir = fixture.host.runtime_dir.join("vm").join(vm.to_string());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("pid"), std::process::id().to_string()).unwrap();
    assert!(list_running(&fixture.host.runtime_dir).unwrap().is_empty());
    let adopted = Vm::adopt(&fixture.host.runtime_dir, vm).await;
    assert!(matches!(adopted, Err(HypervisorError::NotRunning { .. })), "{adopted:?}");
    clean_up(&fixture.host.runtime_dir, vm).await.unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_killed_qemu_is_noticed_and_told_apart_from_an_ordered_end() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let mut events = vm.events();
    let pid = vm.pid().to_string();
    assert!(tool("kill", &["-KILL", &pid]).await.0);
    let report = vm.wait_exit(SOON).await.unwrap();
    assert_eq!((report.cause, report.expected()), (ExitCause::Unexpected, false));
    assert!(matches!(events.recv().await.unwrap().kind, VmEventKind::Exited(told) if told == report));
    assert_eq!(vm.exited(), Some(report));
}

#[tokio::test]
async fn a_guest_that_ignores_the_power_button_keeps_running() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    vm.powerdown().await.unwrap();
    let ended = vm.wait_exit(Duration::from_millis(500)).await;
    assert!(matches!(ended, Err(HypervisorError::Deadline { operation: "end", .. })), "{ended:?}");
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn the_console_connects_and_ends_with_the_vm() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let console = Console::open(&vm.paths().console()).await.unwrap();
    writes(&console, 2).await;
    let (mut output, _input) = console.attach().await.unwrap();
    vm.kill().await.unwrap();
    let ended = async { while output.recv().await.is_some() {} };
    tokio::time::timeout(SOON, ended).await.expect("the console outlives its VM");
}

/// Runs itself again in a network namespace of its own: tap devices need one.
#[test]
fn a_vms_nics_are_taps_on_its_bridge_and_go_with_it() {
    const INSIDE: &str = "PAGEPORT_TEST_IN_NAMESPACE";
    const NAME: &str = "life::a_vms_nics_are_taps_on_its_bridge_and_go_with_it";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(nics());
    }
    let mut unshare = std::process::Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    unshare.args(["--net", "--"]).arg(std::env::current_exe().unwrap()).args(["--exact", NAME, "--nocapture"]);
    assert!(unshare.env(INSIDE, "1").status().unwrap().success());
}

async fn nics() {
    let fixture = Fixture::new();
    let mut launch = fixture.launch(StartMode::Running);
    launch.spec.nics = vec![NicSpec { mac: "52:54:00:12:34:56".into(), bridge: "br0".into() }];
    let error = Vm::start(&fixture.host, &launch).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Tap { .. }), "without its bridge: {error}");
    let (_, links) = tool("ip", &["-o", "link", "show", "type", "tun"]).await;
    assert_eq!(links.trim(), "", "a tap is left of a VM that did not start");

    assert!(tool("ip", &["link", "add", "br0", "type", "bridge"]).await.0);
    let vm = Vm::start(&fixture.host, &launch).await.unwrap();
    let (_, links) = tool("ip", &["-o", "link", "show", "master", "br0"]).await;
    assert!(links.lines().count() == 1 && links.contains(": pp") && links.contains(",UP"), "{links}");
    vm.kill().await.unwrap();
    let (_, links) = tool("ip", &["-o", "link", "show", "master", "br0"]).await;
    assert_eq!(links.trim(), "", "the tap outlives its VM");
}
