//! A disk that is added to a guest that runs.

use pageport_worker::hypervisor::{AddedDisk, FreezeDisk, HypervisorError, Outcome, StartMode};
use pageport_worker::image::Image;

use crate::support::{DISK_BYTES, MIB, SOON};
use crate::targets::Memory;
use crate::writer::{Writer, copy, guest_goes_on};

const ADDED_BYTES: u64 = 8 * MIB;

fn added(name: &str, port: u32) -> AddedDisk {
    AddedDisk { name: name.to_owned(), port, machine: String::new() }
}

#[tokio::test]
async fn an_added_disk_is_part_of_the_increment_that_goes_on_from_before_it_was_there() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let mut disks = writer.freeze_disks();
    let mut first = vm.freeze(&disks, None, "b-1").await.unwrap();
    first.release(Outcome::Committed, SOON).await.unwrap();

    let path = writer.fixture.path("added.raw");
    std::fs::File::create(&path).unwrap().set_len(ADDED_BYTES).unwrap();
    let image = Image::raw(&path);
    assert!(vm.attach_disk(&added("added", 2), &image).await.unwrap());
    assert!(!vm.attach_disk(&added("added", 2), &image).await.unwrap());
    assert!(vm.plugged_disks().await.unwrap().contains("added"));
    let mut side = writer.side().await;
    side.io("added", "write -P 9 1M 64k").await;
    guest_goes_on(&vm).await;

    disks.push(FreezeDisk { name: "added".to_owned(), scratch: writer.fixture.path("added.scratch") });
    let mut second = vm.freeze(&disks, Some("b-1"), "b-2").await.unwrap();
    assert!(second.dirty_bytes() < DISK_BYTES);
    let target = Memory::with(vec![0; ADDED_BYTES as usize]);
    copy(&second.export().await.unwrap(), &second, "added", &target).await.await.unwrap();
    second.release(Outcome::Committed, SOON).await.unwrap();
    assert!(target.content() == std::fs::read(&path).unwrap());
    assert!(target.part(MIB, 65536).iter().all(|byte| *byte == 9));
    let copied: u64 = target.changed().iter().map(|(_, length)| length).sum();
    assert!(copied < MIB, "{copied} bytes were copied");
    vm.grow_disk("added", 2 * ADDED_BYTES).await.unwrap();
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn what_a_broken_attempt_left_is_gone_on_with_and_without_a_place_there_is_none() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let path = writer.fixture.path("added.raw");
    let missing = vm.attach_disk(&added("added", 1), &Image::raw(&path)).await;
    assert!(missing.is_err(), "there is no image");
    std::fs::File::create(&path).unwrap().set_len(ADDED_BYTES).unwrap();
    for (port, machine) in [(9, ""), (0, ""), (1, "microvm")] {
        let disk = AddedDisk { machine: machine.to_owned(), ..added("added", port) };
        let refused = vm.attach_disk(&disk, &Image::raw(&path)).await;
        assert!(matches!(refused, Err(HypervisorError::NoPlace { .. })), "{refused:?}");
    }
    // The worker was killed after the first of the nodes.
    let mut side = writer.side().await;
    let node = serde_json::json!({"driver": "file", "node-name": "file-added", "filename": path.to_str().unwrap()});
    side.execute("blockdev-add", node).await;
    assert!(vm.attach_disk(&added("added", 1), &Image::raw(&path)).await.unwrap());
    side.io("added", "write -P 9 1M 64k").await;
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_open_already_is_not_taken_for_empty() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let path = writer.fixture.path("added.raw");
    std::fs::File::create(&path).unwrap().set_len(ADDED_BYTES).unwrap();
    // As after a guest that switched the port's power off.
    let mut side = writer.side().await;
    let nodes = [
        serde_json::json!({"driver": "file", "node-name": "file-added", "filename": path.to_str().unwrap()}),
        serde_json::json!({"driver": "raw", "node-name": "disk-added", "file": "file-added"}),
        serde_json::json!({"driver": "raw", "node-name": "top-added", "file": "disk-added"}),
    ];
    for node in nodes {
        side.execute("blockdev-add", node).await;
    }
    vm.add_bitmap(&["root".to_owned()], "b-1").await.unwrap();
    assert!(vm.open_disks().await.unwrap().contains("added"));
    assert!(!vm.plugged_disks().await.unwrap().contains("added"));
    assert!(vm.attach_disk(&added("added", 1), &Image::raw(&path)).await.unwrap());
    assert!(vm.plugged_disks().await.unwrap().contains("added"));
    let bitmaps = vm.bitmaps().await.unwrap();
    assert!(bitmaps.iter().all(|bitmap| bitmap.disk == "root"), "{bitmaps:?}");
    vm.kill().await.unwrap();
}
