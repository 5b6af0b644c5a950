//! The hypervisor and NBD modules against real QEMU, with software emulation. The guest is a boot sector: it counts in
//! memory, writes the count to its disk and prints a dot (or an `E`, if the write failed), with each tick of its clock.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use pageport_proto::VmId;
use pageport_proto::v1::{DiskSpec, NicSpec, VmSpec};
use pageport_worker::hypervisor::accel::{probe, qemu_version, runs_long_mode};
use pageport_worker::hypervisor::migrate::SourceSettings;
use pageport_worker::hypervisor::{
    Accelerator, Console, ExitCause, Host, HypervisorError, Launch, MigrationStatus, RunState, StartMode, Vm,
    VmEventKind, clean_up, list_running,
};
use pageport_worker::nbd::{BlockTarget, NbdServer};

const QEMU: &str = "qemu-system-x86_64";
const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
const SOON: Duration = Duration::from_secs(30);

#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, //    cli; ax, ds, es, ss = 0
    0xbc, 0x00, 0x7c, 0xfb,                               //    mov sp, 0x7c00; sti
    0xff, 0x06, 0x00, 0x7e,                               // 1: inc word [0x7e00]
    0xbe, 0x28, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80,       //    mov si, packet; mov ax, 0x4300; mov dl, 0x80
    0xcd, 0x13,                                           //    int 0x13                  write a sector
    0xb0, b'.', 0x73, 0x02, 0xb0, b'E',                   //    mov al, '.'; jnc 2f; mov al, 'E'
    0xba, 0xf8, 0x03, 0xee,                               // 2: mov dx, 0x3f8; out dx, al serial port
    0xf4, 0xeb, 0xe5,                                     //    hlt; jmp 1b               until the next tick
    0x10, 0, 1, 0, 0x00, 0x7e, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, // packet: 1 sector from 0:7e00 to sector 64
];
/// Where the guest's count lies on its disk.
const COUNT_OFFSET: usize = 64 * 512;

/// A host with a disk image of 4 KiB blocks: every fourth zeroes, the others each with its own bytes, and the guest.
struct Fixture {
    dir: tempfile::TempDir,
    host: Host,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Host { qemu: QEMU.into(), accelerator: Accelerator::Tcg, runtime_dir: dir.path().join("run") };
        std::fs::write(dir.path().join("disk.raw"), image()).unwrap();
        Self { dir, host }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn launch(&self, mode: StartMode) -> Launch {
        let path = self.path("disk.raw").to_string_lossy().into_owned();
        let spec = VmSpec {
            name: "tiny".into(),
            memory_bytes: 64 * MIB,
            vcpus: 1,
            disks: vec![DiskSpec { name: "root".into(), path, format: "raw".into() }],
            ..VmSpec::default()
        };
        Launch { vm: VmId::generate(), spec, disk_paths: BTreeMap::new(), mode }
    }

    async fn start(&self, mode: StartMode) -> Vm {
        Vm::start(&self.host, &self.launch(mode)).await.expect("QEMU starts")
    }
}

/// A test that fails leaves no QEMU behind.
impl Drop for Fixture {
    fn drop(&mut self) {
        for vm in list_running(&self.host.runtime_dir).unwrap_or_default() {
            let pid = std::fs::read_to_string(self.host.runtime_dir.join(format!("vm/{vm}/pid"))).unwrap_or_default();
            let _ = std::process::Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

fn image() -> Vec<u8> {
    let mut image = vec![0; DISK_BYTES as usize];
    for (number, block) in image.chunks_mut(4096).enumerate() {
        if number % 4 != 0 {
            block.fill((number % 251 + 1) as u8);
        }
    }
    image[..GUEST.len()].copy_from_slice(GUEST);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image
}

fn count_on(disk: &Path) -> u16 {
    let disk = std::fs::read(disk).unwrap();
    u16::from_le_bytes([disk[COUNT_OFFSET], disk[COUNT_OFFSET + 1]])
}

/// Waits until the guest has written to its disk `count` more times; each must have worked.
async fn writes(console: &Console, count: usize) {
    let (mut output, _) = console.attach().await.unwrap();
    // The backlog is of the past.
    let mut seen = 0;
    let past = async { output.recv().await.is_some() };
    assert!(tokio::time::timeout(SOON, past).await.expect("the guest is silent"));
    while seen < count {
        let piece = tokio::time::timeout(SOON, output.recv()).await.expect("the guest is silent").unwrap();
        assert!(!piece.contains(&b'E'), "a guest's write failed");
        seen += piece.iter().filter(|byte| **byte == b'.').count();
    }
}

/// A target in memory that remembers the ranges it was told to zero.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    zeroed: Mutex<Vec<(u64, u32)>>,
}

impl Memory {
    fn with(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), zeroed: Mutex::default() })
    }

    fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl BlockTarget for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    async fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        let range = offset as usize..offset as usize + length as usize;
        Ok(Bytes::copy_from_slice(&self.bytes.lock().unwrap()[range]))
    }
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }
    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        self.zeroed.lock().unwrap().push((offset, length));
        self.bytes.lock().unwrap()[offset as usize..offset as usize + length as usize].fill(0);
        Ok(())
    }
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A target that never answers a write.
struct Stalled;

impl BlockTarget for Stalled {
    fn size(&self) -> u64 {
        DISK_BYTES
    }
    async fn read(&self, _offset: u64, length: u32) -> io::Result<Bytes> {
        Ok(vec![0; length as usize].into())
    }
    async fn write(&self, _offset: u64, _data: Bytes) -> io::Result<()> {
        std::future::pending().await
    }
    async fn zero(&self, _offset: u64, _length: u32) -> io::Result<()> {
        std::future::pending().await
    }
    async fn flush(&self) -> io::Result<()> {
        std::future::pending().await
    }
}

async fn tool(program: &str, arguments: &[&str]) -> (bool, String) {
    let run = tokio::process::Command::new(program).args(arguments).kill_on_drop(true).output();
    let output = tokio::time::timeout(SOON, run).await.expect("the tool hangs").unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

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
    launch.disk_paths.insert("root".into(), fixture.path("no-such-disk"));
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

#[tokio::test]
async fn a_mirror_makes_the_target_equal_and_never_zeroes_what_it_holds() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    // The target already holds the disk, but for one block.
    let mut held = image();
    held[4096..8192].fill(0xee);
    let target = Memory::with(held);
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Arc::clone(&target)).unwrap();
    let mut mirror = vm.start_mirror("root", server.socket(), "root").await.unwrap();
    let mut seen = Vec::new();
    mirror.wait_ready(SOON, |progress| seen.push(progress)).await.unwrap();
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 3).await;
    let last = seen.last().unwrap();
    assert!(last.ready && last.done_bytes == last.total_bytes && last.total_bytes >= DISK_BYTES, "{last:?}");
    vm.stop().await.unwrap();
    mirror.finish(SOON).await.unwrap();
    assert!(target.content() == std::fs::read(fixture.path("disk.raw")).unwrap(), "the target differs from the disk");
    let source = image();
    for (offset, length) in target.zeroed.lock().unwrap().iter() {
        let range = *offset as usize..*offset as usize + *length as usize;
        assert!(source[range].iter().all(|byte| *byte == 0), "zeroed data at {offset}+{length}");
    }
    server.close().await;
    // Nothing of the mirror is left: the same names can be used again.
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Memory::with(vec![0; DISK_BYTES as usize])).unwrap();
    let mut mirror = vm.start_mirror("root", server.socket(), "root").await.unwrap();
    mirror.cancel(SOON).await.unwrap();
    vm.cont().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_target_that_hangs_is_reported_and_freed_by_closing_its_server() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    let console = Console::open(&vm.paths().console()).await.unwrap();
    writes(&console, 1).await;
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Arc::new(Stalled)).unwrap();
    let mut mirror = vm.start_mirror("root", server.socket(), "root").await.unwrap();
    let late = mirror.wait_ready(Duration::from_millis(600), |_| {}).await;
    assert!(matches!(late, Err(HypervisorError::Deadline { .. })), "{late:?}");
    // The guest, once it has booted, notices nothing.
    writes(&console, 10).await;
    server.close().await;
    let failed = mirror.wait_ready(SOON, |_| {}).await;
    assert!(matches!(failed, Err(HypervisorError::Mirror { .. })), "{failed:?}");
    mirror.cancel(SOON).await.unwrap();
    writes(&console, 3).await;
    vm.kill().await.unwrap();
}

/// Starts a migration between two VMs over the destination's own socket, up to the pause.
async fn migrate_to_the_pause(fixture: &Fixture) -> (Vm, Vm) {
    let source = fixture.start(StartMode::Running).await;
    writes(&Console::open(&source.paths().console()).await.unwrap(), 3).await;
    let mut arriving = fixture.launch(StartMode::Incoming);
    let replica = fixture.path("replica.raw");
    std::fs::copy(fixture.path("disk.raw"), &replica).unwrap();
    arriving.disk_paths.insert("root".into(), replica);
    let destination = Vm::start(&fixture.host, &arriving).await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Inmigrate);
    let socket = destination.paths().incoming();
    destination.listen_incoming(&socket).await.unwrap();
    let settings = SourceSettings { downtime_limit: Duration::from_millis(300), switchover_bandwidth: 25_000_000 };
    source.migrate_to(&socket, settings).await.unwrap();
    source.set_switchover_bandwidth(50_000_000).await.unwrap();
    source.wait_migration(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    (source, destination)
}

#[tokio::test]
async fn a_vm_moves_to_another_qemu_and_runs_there() {
    let fixture = Fixture::new();
    let (source, destination) = migrate_to_the_pause(&fixture).await;
    assert!(source.marks().borrow().stopped.is_some(), "the guest is paused before the switchover");
    let info = source.migration_info().await.unwrap();
    let ram = info.ram.unwrap();
    assert!(ram.total >= 64 * MIB && ram.transferred > 0 && ram.page_size == 4096, "{ram:?}");

    source.continue_switchover().await.unwrap();
    source.wait_migration(MigrationStatus::Completed, SOON).await.unwrap();
    destination.wait_migration(MigrationStatus::Completed, SOON).await.unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Postmigrate);
    assert_eq!(destination.run_state().await.unwrap(), RunState::Paused);
    source.kill().await.unwrap();
    destination.cont().await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Running);
    let mut marks = destination.marks();
    let resumed = tokio::time::timeout(SOON, marks.wait_for(|marks| marks.resumed.is_some())).await.unwrap().unwrap();
    let stopped = source.marks().borrow().stopped.unwrap();
    assert!(stopped.qemu < resumed.resumed.unwrap().qemu);
    drop(resumed);
    // It goes on counting from where it was, on its new disk.
    let left_at = count_on(&fixture.path("disk.raw"));
    writes(&Console::open(&destination.paths().console()).await.unwrap(), 2).await;
    let arrived_at = count_on(&fixture.path("replica.raw"));
    assert!(left_at >= 3 && arrived_at > left_at, "left at {left_at}, now at {arrived_at}");
    assert_eq!(count_on(&fixture.path("disk.raw")), left_at);
    destination.kill().await.unwrap();
}

#[tokio::test]
async fn a_cancelled_move_leaves_the_guest_running_and_can_be_tried_again() {
    let fixture = Fixture::new();
    let (source, destination) = migrate_to_the_pause(&fixture).await;
    source.cancel_migration().await.unwrap();
    source.wait_migration(MigrationStatus::Cancelled, SOON).await.unwrap();
    let mut marks = source.marks();
    let runs = |resumed: &pageport_worker::hypervisor::Marks| {
        resumed.resumed.zip(resumed.stopped).is_some_and(|(resumed, stopped)| resumed.qemu > stopped.qemu)
    };
    tokio::time::timeout(SOON, marks.wait_for(runs)).await.expect("the guest stays paused").unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
    destination.kill().await.unwrap();

    // A destination that is not there: an error, and the guest runs on.
    let settings = SourceSettings { downtime_limit: Duration::from_millis(300), switchover_bandwidth: 25_000_000 };
    let nowhere = fixture.path("nowhere.sock");
    let failed = match source.migrate_to(&nowhere, settings).await {
        Ok(()) => source.wait_migration(MigrationStatus::PreSwitchover, SOON).await,
        refused => refused,
    };
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
    source.kill().await.unwrap();
}

/// Runs itself again in a network namespace of its own: tap devices need one.
#[test]
fn a_vms_nics_are_taps_on_its_bridge_and_go_with_it() {
    const INSIDE: &str = "PAGEPORT_TEST_IN_NAMESPACE";
    const NAME: &str = "a_vms_nics_are_taps_on_its_bridge_and_go_with_it";
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

#[tokio::test]
async fn qemus_own_tools_accept_the_nbd_server() {
    let fixture = Fixture::new();
    let target = Memory::with(vec![0; DISK_BYTES as usize]);
    let socket = fixture.path("nbd.sock");
    let server = NbdServer::bind(&socket, "disk", Arc::clone(&target)).unwrap();
    let url = |export: &str| format!("nbd+unix:///{export}?socket={}", text(&socket));
    let disk = fixture.path("disk.raw");

    let (ok, said) = tool("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&disk), &url("disk")]).await;
    assert!(ok, "{said}");
    assert!(target.content() == image(), "what was written differs");
    let (ok, said) = tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), &url("disk")]).await;
    assert!(ok && said.contains("identical"), "{said}");
    let commands =
        ["-f", "raw", "-c", "write -f -P 7 4k 8k", "-c", "write -z 64k 64k", "-c", "flush", "-c", "read -P 7 4k 8k"];
    let (ok, said) = tool("qemu-io", &[&commands[..], &[&url("disk")]].concat()).await;
    assert!(ok && !said.contains("failed"), "{said}");
    let content = target.content();
    assert!(content[4096..12288].iter().all(|byte| *byte == 7));
    assert!(content[64 << 10..128 << 10].iter().all(|byte| *byte == 0));

    let (ok, said) = tool("qemu-img", &["info", "-f", "raw", &url("nope")]).await;
    assert!(!ok && said.contains("nope"), "{said}");
    server.close().await;
    assert!(!socket.exists());
}
