//! The life of a VM that does not move: stopped through ACPI, started while it still shuts down, used through its console,
//! deleted with its replica.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use pageport_common::store::Store;
use pageport_guest::protocol::Request;
use pageport_lab::lab::guest::client::GuestClient;
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::netns;
use pty::Terminal;
use support::{PATIENCE, VM, ctl, set_rate, wait_for};
use tokio::io::AsyncWriteExt;

/// What Ctrl-] and Ctrl-C type.
const LEAVE: &str = "\x1d";
const INTERRUPT: &str = "\x03";

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_stopped_started_used_and_deleted() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let mut lab = Lab::start(LabConfig::default()).await.unwrap();
    let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
    ctl(&lab, &["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
    ctl(&lab, &["vm", "start", VM]).await.unwrap();
    let mut guest = lab.guest("b", GUEST_ADDRESS).await.unwrap();
    let first = boot_id(&mut guest).await;

    answers_at_its_console(&lab).await;
    let second = stops_cleanly_and_starts_again(&lab, &mut guest, file.disk(), &first).await;
    comes_up_again_when_started_while_it_shuts_down(&lab, &second).await;
    is_deleted_with_its_replica(&mut lab, file.disk()).await;
}

async fn boot_id(guest: &mut GuestClient) -> String {
    guest.uptime().await.unwrap().1
}

async fn vm_state(lab: &Lab) -> Result<String, String> {
    let vm = lab.ctl_json(["vm", "get", VM]).await.map_err(|error| error.to_string())?;
    Ok(vm["state"].as_str().unwrap_or_default().to_owned())
}

async fn wait_for_state(lab: &Lab, wanted: &str) {
    wait_for(&format!("the vm to be {wanted}"), || async {
        let state = vm_state(lab).await?;
        if state == wanted { Ok(()) } else { Err(state) }
    })
    .await;
}

/// A person types into the guest's shell; Ctrl-C is the guest's, Ctrl-] is the console's.
async fn answers_at_its_console(lab: &Lab) {
    let qemu = lab.qemu_pids(VM);
    let mut console = Terminal::ctl(lab, &["vm", "console", VM]);
    console.wait_for("leave with Ctrl-]").await;
    console.type_in("\r");
    console.wait_for("# ").await;
    console.type_in("echo answer-$((6*7))\r");
    console.wait_for("answer-42").await;
    console.type_in("echo asleep-$((1+2)); sleep 1000\r");
    console.wait_for("asleep-3").await;
    console.type_until(&format!("{INTERRUPT}echo awake-$((1+1))\r"), "awake-2").await;
    console.type_in(LEAVE);
    let (status, screen) = console.wait_for_end().await;
    assert!(status.success(), "{status}: {screen}");
    assert!(screen.contains("left"), "{screen}");

    // A script has no terminal: its input is typed, the answer comes out, and it leaves by itself.
    let mut command = lab.ctl_command("c");
    command.args(["vm", "console", VM]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\necho piped-$((4*4))\n").await.unwrap();
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && shown.contains("piped-16"), "{output:?}");
    assert_eq!(lab.qemu_pids(VM), qemu);
}

/// `vm stop` presses the power button: the guest lets go of its disk and switches off, whoever looks on sees it end.
async fn stops_cleanly_and_starts_again(lab: &Lab, guest: &mut GuestClient, disk: &Path, before: &str) -> String {
    guest.call(&Request::WriteStart { records_per_second: 20, seed: 5 }, PATIENCE).await.unwrap();
    let console = Terminal::ctl(lab, &["vm", "console", VM]);
    console.wait_for("leave with Ctrl-]").await;
    assert!(!unmounted(disk), "the guest has not mounted its disk");

    ctl(lab, &["vm", "stop", VM]).await.unwrap();
    console.wait_for("power button was pressed").await;
    wait_for_state(lab, "stopped").await;
    let (_, screen) = console.wait_for_end().await;
    assert!(screen.contains("closed"), "{screen}");
    assert_eq!(lab.qemu_pids(VM), []);
    assert!(unmounted(disk), "the guest did not let go of its disk");
    let vm = lab.ctl_json(["vm", "get", VM]).await.unwrap();
    assert_eq!(vm["problem"].as_str().unwrap_or_default(), "", "{vm}");

    ctl(lab, &["vm", "start", VM]).await.unwrap();
    let mut guest = lab.guest("b", GUEST_ADDRESS).await.unwrap();
    let now = boot_id(&mut guest).await;
    assert_ne!(now, before);
    wait_for_state(lab, "running").await;
    now
}

/// The order to start overtakes the shutdown: the guest ends and comes up again by itself.
async fn comes_up_again_when_started_while_it_shuts_down(lab: &Lab, before: &str) {
    let [(_, old)] = lab.qemu_pids(VM)[..] else { panic!("{:?}", lab.qemu_pids(VM)) };
    let console = Terminal::ctl(lab, &["vm", "console", VM]);
    console.wait_for("leave with Ctrl-]").await;
    ctl(lab, &["vm", "stop", VM]).await.unwrap();
    console.wait_for("power button was pressed").await;
    ctl(lab, &["vm", "start", VM]).await.unwrap();
    wait_for("the hypervisor to be another one", || async {
        let pids = lab.qemu_pids(VM);
        if matches!(pids[..], [("a", pid)] if pid != old) { Ok(()) } else { Err(format!("{pids:?}")) }
    })
    .await;
    let mut guest = lab.guest("b", GUEST_ADDRESS).await.unwrap();
    assert_ne!(boot_id(&mut guest).await, before);
    wait_for_state(lab, "running").await;
}

/// Refused while it runs; then nothing is left but the original disk, and its name is free.
async fn is_deleted_with_its_replica(lab: &mut Lab, disk: &Path) {
    set_rate(lab, 1_000_000_000);
    ctl(lab, &["replica", "seed", VM, "--to", "b", "--watch"]).await.unwrap();
    let vm = lab.ctl_json(["vm", "get", VM]).await.unwrap();
    let id = vm["id"].as_str().unwrap().to_owned();
    let replica = lab.folder().join(format!("data/worker-b/replicas/{id}"));
    assert!(replica.exists());

    let refused = ctl(lab, &["vm", "delete", VM]).await.unwrap_err();
    assert!(refused.lines().count() == 1 && refused.contains(VM) && refused.contains("stop"), "{refused}");
    assert!(replica.exists());

    ctl(lab, &["vm", "stop", VM]).await.unwrap();
    wait_for_state(lab, "stopped").await;
    ctl(lab, &["vm", "delete", VM]).await.unwrap();
    let list = lab.ctl_json(["vm", "list"]).await.unwrap();
    assert!(list["vms"].as_array().is_none_or(Vec::is_empty), "{list}");
    wait_for("the replica's files to be gone", || async {
        let left = paths_with(lab.folder().join("data"), &id).into_iter().chain(paths_with(lab.runtime().into(), &id));
        let left: Vec<_> = left.collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    assert!(disk.exists(), "the original disk is gone");

    // The name is free, and the new VM is another one, on the disk that stayed.
    let file = lab.folder().join(format!("config/{VM}.yaml"));
    ctl(lab, &["vm", "define", "-f", file.to_str().unwrap(), "--site", "a"]).await.unwrap();
    ctl(lab, &["vm", "start", VM]).await.unwrap();
    let mut guest = lab.guest("c", GUEST_ADDRESS).await.unwrap();
    guest.call(&Request::ChecksumFiles { every: 16 }, PATIENCE).await.unwrap();
    let another = lab.ctl_json(["vm", "get", VM]).await.unwrap();
    assert_ne!(another["id"].as_str().unwrap(), id);
    assert!(another["replicas"].as_array().is_none_or(Vec::is_empty), "{another}");

    // Workers have forgotten the first one.
    for site in ["a", "b", "c"] {
        lab.worker(site).stop().unwrap();
        let store = Store::open(&lab.folder().join(format!("data/worker-{site}/store"))).unwrap();
        let keys: Vec<_> =
            store.scan("").unwrap().into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect();
        assert!(!keys.iter().any(|key| key.contains(&id)), "{site}: {keys:?}");
    }
}

/// Everything below a folder whose path names this.
fn paths_with(folder: std::path::PathBuf, name: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.to_string_lossy().contains(name) {
            found.push(path);
        } else if path.is_dir() {
            found.extend(paths_with(path, name));
        }
    }
    found
}

/// Whether the ext4 file system of an image needs no recovery: it was unmounted in good order.
fn unmounted(disk: &Path) -> bool {
    const SUPERBLOCK: u64 = 1024;
    const INCOMPATIBLE_FEATURES: u64 = 0x60;
    const NEEDS_RECOVERY: u32 = 4;
    let mut features = [0; 4];
    File::open(disk).unwrap().read_exact_at(&mut features, SUPERBLOCK + INCOMPATIBLE_FEATURES).unwrap();
    u32::from_le_bytes(features) & NEEDS_RECOVERY == 0
}
