//! A frozen point and a mirror of the same disks at the same time, as a migration from a standing replica has them.

use std::sync::Arc;
use std::time::Duration;

use pageport_worker::hypervisor::{HypervisorError, MirrorHandle, MirrorSync, Outcome, StartMode, Vm};
use pageport_worker::nbd::NbdServer;

use crate::support::{DISK_BYTES, SOON};
use crate::targets::Memory;
use crate::writer::{DISKS, Writer, copies, guest_goes_on, newest_write, targets};

/// Mirrors of all disks, with their servers.
async fn mirrors(vm: &Vm, sync: MirrorSync, targets: &[Arc<Memory>]) -> Vec<(MirrorHandle, NbdServer)> {
    let mut mirrors = Vec::new();
    for (disk, target) in DISKS.iter().zip(targets) {
        let server = NbdServer::bind(&vm.paths().nbd(disk), disk, Arc::clone(target)).unwrap();
        let mut mirror = vm.start_mirror_of(sync, disk, &vm.paths().nbd(disk), disk).await.unwrap();
        if sync == MirrorSync::None {
            mirror.wait_ready(SOON, |_| {}).await.unwrap();
        }
        mirrors.push((mirror, server));
    }
    mirrors
}

/// A point, with what a mirror has sent since over it.
fn merged(point: &Memory, mirror: &Memory) -> Vec<u8> {
    let (mut content, newer) = (point.content(), mirror.content());
    for (offset, length) in mirror.changed() {
        let range = offset as usize..(offset + length) as usize;
        content[range.clone()].copy_from_slice(&newer[range]);
    }
    content
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EndsFirst {
    Point,
    Mirror,
}

async fn a_mirror_and_a_last_point_make_the_disk(first: EndsFirst) {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let (points, newer) = (targets(), targets());
    let mut mirrors = mirrors(&vm, MirrorSync::None, &newer).await;
    guest_goes_on(&vm).await;
    let mut frozen = vm.freeze(&writer.freeze_disks(), None, "b-1").await.unwrap();
    points[0].hold_after(1);
    let mut copies = copies(&frozen, &points).await;
    tokio::time::timeout(SOON, points[0].held()).await.expect("the copy gets there");
    guest_goes_on(&vm).await;
    if first == EndsFirst::Mirror {
        // The guest stands still, or the mirrors would miss what it writes after them.
        vm.stop().await.unwrap();
        points[0].go_on();
    } else {
        points[0].go_on();
        for copy in copies.drain(..) {
            copy.await.unwrap().unwrap();
        }
        frozen.release(Outcome::Committed, SOON).await.unwrap();
        guest_goes_on(&vm).await;
        vm.stop().await.unwrap();
    }
    for (mirror, _) in &mut mirrors {
        mirror.finish(SOON).await.unwrap();
    }
    if first == EndsFirst::Mirror {
        for copy in copies {
            copy.await.unwrap().unwrap();
        }
        frozen.release(Outcome::Committed, SOON).await.unwrap();
    }
    for ((disk, point), newer) in DISKS.iter().zip(&points).zip(&newer) {
        assert!(newest_write(&point.content()) > 0);
        assert!(merged(point, newer) == writer.on_disk(disk), "{disk}: point and mirror do not make the disk");
    }
    vm.cont().await.unwrap();
    guest_goes_on(&vm).await;
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_mirror_and_a_last_point_make_the_disk_when_the_point_ends_first() {
    a_mirror_and_a_last_point_make_the_disk(EndsFirst::Point).await;
}

#[tokio::test]
async fn a_mirror_and_a_last_point_make_the_disk_when_the_mirror_ends_first() {
    a_mirror_and_a_last_point_make_the_disk(EndsFirst::Mirror).await;
}

#[tokio::test]
async fn a_mirror_that_is_cancelled_leaves_the_point_as_it_is() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let points = targets();
    let mut frozen = vm.freeze(&writer.freeze_disks(), None, "b-1").await.unwrap();
    // It may begin while the disks are frozen, too.
    let newer: Vec<Arc<Memory>> = DISKS.iter().map(|_| Memory::with(vec![0; DISK_BYTES as usize])).collect();
    let mut mirrors = mirrors(&vm, MirrorSync::Full, &newer).await;
    guest_goes_on(&vm).await;
    for (mirror, _) in &mut mirrors {
        mirror.cancel(SOON).await.unwrap();
    }
    let mut moments = Vec::new();
    for (copy, point) in copies(&frozen, &points).await.into_iter().zip(&points) {
        copy.await.unwrap().unwrap();
        moments.push(newest_write(&point.content()));
    }
    assert!(moments[0] == moments[1] || moments[0] == moments[1] + 1, "{moments:?}");
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    guest_goes_on(&vm).await;
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_mirror_whose_server_hangs_holds_back_the_freeze_and_not_the_guest() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let newer = targets();
    let mut mirrors = mirrors(&vm, MirrorSync::None, &newer).await;
    newer[0].hold_after(1);
    tokio::time::timeout(SOON, newer[0].held()).await.expect("the mirror gets there");
    guest_goes_on(&vm).await;
    let disks = writer.freeze_disks();
    let freezes = vm.freeze(&disks, None, "b-1");
    let (late, ()) = tokio::join!(freezes, guest_goes_on(&vm));
    assert!(matches!(late, Err(HypervisorError::Deadline { .. })), "{late:?}");
    guest_goes_on(&vm).await;
    assert_eq!(vm.bitmaps().await.unwrap(), []);
    newer[0].go_on();
    let mut frozen = vm.freeze(&writer.freeze_disks(), None, "b-1").await.unwrap();
    // The mirrors go on behind the freeze.
    let seen = newer[0].changed().len();
    guest_goes_on(&vm).await;
    let goes_on = async {
        while newer[0].changed().len() == seen {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, goes_on).await.expect("the mirror goes on");
    frozen.release(Outcome::Failed, SOON).await.unwrap();
    for (mirror, _) in &mut mirrors {
        mirror.cancel(SOON).await.unwrap();
    }
    guest_goes_on(&vm).await;
    vm.kill().await.unwrap();
}
