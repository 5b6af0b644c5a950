//! Disks that become larger under a guest that writes.

use pageport_worker::hypervisor::{HypervisorError, Outcome, StartMode};
use pageport_worker::nbd::NbdServer;

use crate::support::{DISK_BYTES, SOON};
use crate::targets::Memory;
use crate::writer::{Writer, copy, guest_goes_on, newest_write};

const LARGER: u64 = DISK_BYTES * 2;

#[tokio::test]
async fn a_grown_disk_is_zeros_behind_and_its_next_increment_is_what_was_written() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let (mut side, disks) = (writer.side().await, writer.freeze_disks());
    let mut first = vm.freeze(&disks, None, "b-1").await.unwrap();
    first.release(Outcome::Committed, SOON).await.unwrap();

    vm.grow_disk("root", LARGER).await.unwrap();
    vm.grow_disk("root", LARGER).await.unwrap();
    assert_eq!(vm.disk_bytes("root").await.unwrap(), LARGER);
    vm.grow_disk("root", DISK_BYTES / 2).await.unwrap();
    assert_eq!(vm.disk_bytes("root").await.unwrap(), LARGER, "a disk is never cut");
    assert_eq!(std::fs::metadata(writer.fixture.path("root.raw")).unwrap().len(), LARGER);
    assert!(matches!(vm.grow_disk("none", LARGER).await, Err(HypervisorError::NoDisk { .. })));
    side.io("root", &format!("write -P 7 {} 65536", LARGER - 65536)).await;
    guest_goes_on(&vm).await;

    let mut second = vm.freeze(&disks, Some("b-1"), "b-2").await.unwrap();
    assert!(second.dirty_bytes() < 2 * DISK_BYTES, "what is new and was not written is not copied");
    let mut before = writer.on_disk("root");
    before[..DISK_BYTES as usize].fill(0xdd);
    let target = Memory::with(before);
    copy(&second.export().await.unwrap(), &second, "root", &target).await.await.unwrap();
    second.release(Outcome::Committed, SOON).await.unwrap();
    let tail = target.part(LARGER - 65536, 65536);
    assert!(tail.iter().all(|byte| *byte == 7));
    assert!(target.part(DISK_BYTES, DISK_BYTES - 65536).iter().all(|byte| *byte == 0));
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_mirrored_grows_when_that_has_ended() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let target = Memory::with(vec![0; DISK_BYTES as usize]);
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", target).unwrap();
    let mut mirror = vm.start_mirror("root", &vm.paths().nbd("root"), "root").await.unwrap();
    mirror.wait_ready(SOON, |_| {}).await.unwrap();
    let busy = vm.grow_disk("root", LARGER).await;
    assert!(matches!(busy, Err(HypervisorError::DiskBusy { .. })), "{busy:?}");
    mirror.cancel(SOON).await.unwrap();
    server.close().await;
    vm.grow_disk("root", LARGER).await.unwrap();
    guest_goes_on(&vm).await;
    vm.kill().await.unwrap();
    assert!(newest_write(&writer.on_disk("root")) > 0);
}
