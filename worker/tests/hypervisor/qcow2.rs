//! A guest whose disk is a qcow2 image over another image.

use std::sync::Arc;

use pageport_worker::hypervisor::{Console, FreezeDisk, Outcome, StartMode, Vm};
use pageport_worker::image::{Format, Image, ImageError};
use pageport_worker::nbd::NbdServer;

use crate::support::{DISK_BYTES, Fixture, SOON, image, text, tool, writes};
use crate::targets::Memory;
use crate::writer::copy;

/// Over the fixture's raw image, with a layer in between; each names the one below it.
async fn chain(fixture: &Fixture) -> Image {
    for (name, below, format) in [("middle.qcow2", "disk.raw", "raw"), ("top.qcow2", "middle.qcow2", "qcow2")] {
        let (ok, said) =
            tool("qemu-img", &["create", "-f", "qcow2", "-F", format, "-b", below, text(&fixture.path(name))]).await;
        assert!(ok, "{said}");
    }
    Image::open(&fixture.path("top.qcow2"), Format::Qcow2).unwrap()
}

#[tokio::test]
async fn a_guest_runs_on_a_chain_and_only_its_own_file_changes() {
    let fixture = Fixture::new();
    let chain = chain(&fixture).await;
    assert_eq!(chain.size_bytes().unwrap(), DISK_BYTES);
    let mut launch = fixture.launch(StartMode::Running);
    launch.images.insert("root".into(), chain);
    let vm = Vm::start(&fixture.host, &launch).await.unwrap();
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 3).await;
    // Bitmaps, frozen points and mirrors work on it as on any disk.
    let copied = Memory::with(vec![0xdd; DISK_BYTES as usize]);
    let disks = [FreezeDisk { name: "root".to_owned(), scratch: fixture.path("root.scratch") }];
    for (since, next) in [(None, "b-1"), (Some("b-1"), "b-2")] {
        let mut frozen = vm.freeze(&disks, since, next).await.unwrap();
        writes(&Console::open(&vm.paths().console()).await.unwrap(), 1).await;
        copy(&frozen.export().await.unwrap(), &frozen, "root", &copied).await.await.unwrap();
        frozen.release(Outcome::Committed, SOON).await.unwrap();
    }
    let target = Memory::with(vec![0xdd; DISK_BYTES as usize]);
    let server = NbdServer::bind(&vm.paths().nbd("root"), "root", Arc::clone(&target)).unwrap();
    let mut mirror = vm.start_mirror("root", &vm.paths().nbd("root"), "root").await.unwrap();
    mirror.wait_ready(SOON, |_| {}).await.unwrap();
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 3).await;
    vm.stop().await.unwrap();
    mirror.finish(SOON).await.unwrap();
    let bitmaps = vm.bitmaps().await.unwrap();
    assert!(bitmaps.iter().any(|bitmap| bitmap.name == "b-2" && bitmap.usable() && bitmap.dirty_bytes > 0));
    server.close().await;
    vm.kill().await.unwrap();

    let flat = fixture.path("flat.raw");
    let (ok, said) = tool("qemu-img", &["convert", "-O", "raw", text(&fixture.path("top.qcow2")), text(&flat)]).await;
    assert!(ok, "{said}");
    let content = std::fs::read(&flat).unwrap();
    let mirrored = target.content();
    let differs = content.iter().zip(&mirrored).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the mirror is not what the chain shows");
    assert!(content != image(), "the guest has written");
    // The guest writes to one sector only.
    let counted = 64 * 512..65 * 512;
    let but_for_the_count = |bytes: &[u8]| [&bytes[..counted.start], &bytes[counted.end..]].concat();
    assert!(but_for_the_count(&content) == but_for_the_count(&copied.content()), "the points are not the chain");
    assert!(std::fs::read(fixture.path("disk.raw")).unwrap() == image(), "the backing file has changed");
}

#[tokio::test]
async fn qemu_follows_no_backing_file_that_it_was_not_told_of() {
    let fixture = Fixture::new();
    let chain = chain(&fixture).await;
    // Between the look and the start somebody points the image elsewhere: the chain that was checked is used.
    let path = fixture.path("top.qcow2");
    let (ok, said) = tool("qemu-img", &["rebase", "-u", "-F", "raw", "-b", "/etc/hostname", text(&path)]).await;
    assert!(ok, "{said}");
    let mut launch = fixture.launch(StartMode::Running);
    launch.images.insert("root".into(), chain);
    let vm = Vm::start(&fixture.host, &launch).await.unwrap();
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 1).await;
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn what_qemu_img_makes_that_a_replica_could_not_hold_is_refused() {
    let fixture = Fixture::new();
    let path = fixture.path("image.qcow2");
    let elsewhere = format!("data_file={}", text(&fixture.path("data.raw")));
    let secret =
        ["--object", "secret,id=key,data=geheim", "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key"];
    for (arguments, after, fix) in [
        (&secret[..], None, "decrypt it"),
        (&["-f", "qcow2"], Some(["snapshot", "-c", "before"]), "snapshot -d"),
        (&["-f", "qcow2", "-o", &elsewhere], None, "one file"),
        (&["-f", "vmdk"], None, "not a qcow2 file"),
    ] {
        let create = [&["create"], arguments, &[text(&path), "1M"]].concat();
        let (ok, said) = tool("qemu-img", &create).await;
        assert!(ok, "{said}");
        if let Some(after) = after {
            let (ok, said) = tool("qemu-img", &[&after[..], &[text(&path)]].concat()).await;
            assert!(ok, "{said}");
        }
        let refused = Image::open(&path, Format::Qcow2);
        let Err(ImageError::Header { source, .. }) = refused else { panic!("{arguments:?}: {refused:?}") };
        assert!(source.to_string().contains(fix), "{arguments:?}: {source}");
        std::fs::remove_file(&path).unwrap();
    }
}
