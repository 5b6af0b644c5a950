//! Disks copied to an NBD server, and QEMU's own tools against it.

use std::sync::Arc;
use std::time::Duration;

use pageport_worker::hypervisor::{Console, HypervisorError, RunState, StartMode};
use pageport_worker::nbd::NbdServer;

use crate::support::{DISK_BYTES, Fixture, SOON, image, text, tool, writes};
use crate::targets::Memory;

#[tokio::test]
async fn a_mirror_makes_the_target_equal_and_never_zeroes_what_it_holds() {
    let fixture = Fixture::new();
    let vm = fixture.start(StartMode::Running).await;
    // The target already holds the disk, but for one block.
    let mut held = image();
    held[4096..8192].fill(0xee);
    let target = Memory::with(held);
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Arc::clone(&target)).unwrap();
    let mut mirror = vm.start_mirror("root", &vm.paths().nbd("root"), "root").await.unwrap();
    let mut seen = Vec::new();
    mirror.wait_ready(SOON, |progress| seen.push(progress)).await.unwrap();
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 3).await;
    let last = seen.last().unwrap();
    assert!(last.ready && last.done_bytes == last.total_bytes && last.total_bytes >= DISK_BYTES, "{last:?}");
    vm.stop().await.unwrap();
    mirror.finish(SOON).await.unwrap();
    assert!(target.content() == std::fs::read(fixture.path("disk.raw")).unwrap(), "the target differs from the disk");
    let source = image();
    for (offset, length) in target.zeroed() {
        let range = offset as usize..offset as usize + length as usize;
        assert!(source[range].iter().all(|byte| *byte == 0), "zeroed data at {offset}+{length}");
    }
    server.close().await;
    // Nothing of the mirror is left: the same names can be used again.
    let _server = NbdServer::bind(&vm.paths().nbd("root"), "root", Memory::with(vec![0; DISK_BYTES as usize])).unwrap();
    let mut mirror = vm.start_mirror("root", &vm.paths().nbd("root"), "root").await.unwrap();
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
    let target = Memory::with(vec![0; DISK_BYTES as usize]);
    target.hold_after(0);
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Arc::clone(&target)).unwrap();
    let mut mirror = vm.start_mirror("root", &vm.paths().nbd("root"), "root").await.unwrap();
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
