//! Frozen points of a guest that goes on writing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use pageport_proto::v1::DiskSpec;
use pageport_worker::hypervisor::{FreezeDisk, Frozen, HypervisorError, Outcome, StartMode, Vm};
use pageport_worker::replication::pull::PullError;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::support::{DISK_BYTES, MIB, SOON, text};
use crate::targets::Memory;
use crate::writer::{DISKS, QUIET, Side, Writer, copies, copy, guest_goes_on, names, newest_write, targets};

/// Copies all disks of a point, and says how much was copied.
async fn copy_all(frozen: &Frozen, targets: &[Arc<Memory>]) -> u64 {
    let before: u64 = changed_bytes(targets);
    for copy in copies(frozen, targets).await {
        copy.await.unwrap().unwrap();
    }
    changed_bytes(targets) - before
}

fn changed_bytes(targets: &[Arc<Memory>]) -> u64 {
    targets.iter().flat_map(|target| target.changed()).map(|(_, length)| length).sum()
}

/// The copies are of one moment; which, as the number of the guest's newest write.
fn one_moment(targets: &[Arc<Memory>]) -> u32 {
    let [first, second] = [&targets[0], &targets[1]].map(|target| newest_write(&target.content()));
    assert!(first == second || first == second + 1, "the guest writes to the first disk first: {first}, {second}");
    first
}

/// What lies on the disks where the guest never writes, changed from outside and remembered.
struct Quiet {
    side: Side,
    random: StdRng,
    content: Vec<Vec<u8>>,
}

impl Quiet {
    async fn of(writer: &Writer) -> Self {
        let content = DISKS.iter().map(|disk| writer.on_disk(disk)[QUIET as usize..].to_vec()).collect();
        Self { side: writer.side().await, random: StdRng::seed_from_u64(7), content }
    }

    /// Writes, zeroes and discards.
    async fn change(&mut self) {
        for (number, disk) in DISKS.iter().enumerate() {
            for _ in 0..6 {
                let at = self.random.random_range(0..(DISK_BYTES - QUIET) / 4096) * 4096;
                let length = (self.random.random_range(1..32) * 4096).min(DISK_BYTES - QUIET - at);
                let fill = self.random.random_range(1..=255_u8);
                let (command, fill) = match self.random.random_range(0..4) {
                    0 => ("write -z", 0),
                    1 => ("write -z -u", 0),
                    2 => ("discard", 0),
                    _ => ("write", fill),
                };
                let pattern = if fill == 0 { String::new() } else { format!(" -P {fill}") };
                self.side.io(disk, &format!("{command}{pattern} {} {length}", QUIET + at)).await;
                self.content[number][at as usize..(at + length) as usize].fill(fill);
            }
        }
    }

    fn check(&self, targets: &[Arc<Memory>]) {
        for (content, target) in self.content.iter().zip(targets) {
            assert!(
                target.content()[QUIET as usize..] == content[..],
                "what was written from outside is not as it was"
            );
        }
    }
}

/// Nothing of a point is left: no node, no job, no scratch file.
async fn nothing_is_left(writer: &Writer, side: &mut Side) {
    let nodes = side.execute("query-named-block-nodes", serde_json::json!({"flat": true})).await;
    let mut left: Vec<&str> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    left.retain(|node| !["top-", "disk-", "file-"].iter().any(|prefix| node.starts_with(prefix)));
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(side.execute("query-block-jobs", serde_json::json!({})).await, serde_json::json!([]));
    for disk in writer.freeze_disks() {
        assert!(!disk.scratch.exists());
    }
}

async fn bitmap_names(vm: &Vm) -> Vec<String> {
    let bitmaps = vm.bitmaps().await.unwrap();
    assert!(bitmaps.iter().all(|bitmap| bitmap.usable() && !bitmap.busy), "{bitmaps:?}");
    let mut names: Vec<String> = bitmaps.iter().map(|bitmap| bitmap.name.clone()).collect();
    names.sort();
    let all = names.len();
    names.dedup();
    assert_eq!(all, names.len() * DISKS.len(), "each on each disk: {bitmaps:?}");
    names
}

#[tokio::test]
async fn a_chain_of_points_has_every_write_before_each_moment_and_none_after() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let mut quiet = Quiet::of(&writer).await;
    let (disks, targets) = (writer.freeze_disks(), targets());
    let mut frozen = vm.freeze(&disks, None, "b-1").await.unwrap();
    assert_eq!(frozen.dirty_bytes(), 2 * DISK_BYTES);
    let second = vm.freeze(&disks, None, "b-2").await;
    assert!(matches!(second, Err(HypervisorError::AlreadyFrozen { .. })), "{second:?}");
    guest_goes_on(&vm).await;
    assert!(frozen.scratch_bytes().await.unwrap() > 0);
    copy_all(&frozen, &targets).await;
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    nothing_is_left(&writer, &mut quiet.side).await;
    let mut moment = one_moment(&targets);
    quiet.check(&targets);

    for round in 1..=10 {
        let (since, next) = (format!("b-{round}"), format!("b-{}", round + 1));
        quiet.change().await;
        let mut frozen = vm.freeze(&disks, Some(&since), &next).await.unwrap();
        let model = quiet.content.clone();
        if round % 2 == 0 {
            // Old bytes are saved from overwriting, zeroing and discarding alike.
            quiet.change().await;
        }
        guest_goes_on(&vm).await;
        let copied = copy_all(&frozen, &targets).await;
        assert_eq!(copied, frozen.dirty_bytes());
        frozen.release(Outcome::Committed, SOON).await.unwrap();
        assert_eq!(bitmap_names(&vm).await, [next]);
        let newer = one_moment(&targets);
        assert!(newer > moment, "{newer} after {moment}");
        moment = newer;
        let now = std::mem::replace(&mut quiet.content, model);
        quiet.check(&targets);
        quiet.content = now;
    }
    nothing_is_left(&writer, &mut quiet.side).await;
    guest_goes_on(&vm).await;
    vm.stop().await.unwrap();
    let mut frozen = vm.freeze(&disks, Some("b-11"), "b-12").await.unwrap();
    copy_all(&frozen, &targets).await;
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    for (disk, target) in DISKS.iter().zip(&targets) {
        assert!(target.content() == writer.on_disk(disk), "{disk} differs");
    }
    vm.kill().await.unwrap();
}

/// How an increment fails.
#[derive(Debug, Clone, Copy)]
enum Failure {
    ReaderDies,
    ReaderHangs,
    AnswerLost,
    Dropped,
    WorkerDies,
}

/// Asks for all of a disk, and takes nothing of it.
async fn reader_that_hangs(socket: &Path, disk: &str) -> UnixStream {
    const PIECE: u32 = 1 << 20;
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    // Fixed newstyle without zeroes; EXPORT_NAME, which answers with size and flags.
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    hello.extend(1u32.to_be_bytes());
    hello.extend((disk.len() as u32).to_be_bytes());
    hello.extend(disk.as_bytes());
    stream.write_all(&hello).await.unwrap();
    stream.read_exact(&mut [0; 10]).await.unwrap();
    for piece in 0..(DISK_BYTES as u32 / PIECE) {
        let mut read = 0x2560_9513_u32.to_be_bytes().to_vec();
        read.extend([0; 4]);
        read.extend(u64::from(piece).to_be_bytes());
        read.extend(u64::from(piece * PIECE).to_be_bytes());
        read.extend(PIECE.to_be_bytes());
        stream.write_all(&read).await.unwrap();
    }
    stream
}

#[tokio::test]
async fn whatever_ends_an_increment_no_written_block_is_lost_and_the_guest_goes_on() {
    use Failure as F;
    let writer = Writer::new(StartMode::Running);
    let mut vm = writer.start().await;
    guest_goes_on(&vm).await;
    let mut quiet = Quiet::of(&writer).await;
    let (disks, targets) = (writer.freeze_disks(), targets());
    let mut frozen = vm.freeze(&disks, None, "cur").await.unwrap();
    copy_all(&frozen, &targets).await;
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    // It holds the VM's monitor, which the next worker is to get.
    drop(frozen);

    for failure in [F::ReaderDies, F::ReaderHangs, F::AnswerLost, F::Dropped, F::WorkerDies] {
        quiet.change().await;
        guest_goes_on(&vm).await;
        let mut frozen = vm.freeze(&disks, Some("cur"), "next").await.unwrap();
        targets[0].hold_after(1);
        let mut copies = copies(&frozen, &targets).await;
        tokio::time::timeout(SOON, targets[0].held()).await.expect("the copy gets there");
        quiet.change().await;
        // It goes nowhere, and the guest does not notice.
        guest_goes_on(&vm).await;
        vm.run_state().await.unwrap();
        match failure {
            F::ReaderDies => {
                copies.clear();
                guest_goes_on(&vm).await;
                frozen.release(Outcome::Failed, SOON).await.unwrap();
            }
            F::ReaderHangs => {
                let hangs = reader_that_hangs(&vm.paths().points(), DISKS[0]).await;
                quiet.change().await;
                guest_goes_on(&vm).await;
                vm.run_state().await.unwrap();
                drop(hangs);
                copies.clear();
                frozen.release(Outcome::Failed, SOON).await.unwrap();
            }
            F::AnswerLost => {
                targets[0].go_on();
                for copy in copies.drain(..) {
                    copy.await.unwrap().unwrap();
                }
                frozen.release(Outcome::Unknown, SOON).await.unwrap();
                assert_eq!(bitmap_names(&vm).await, ["cur", "next"]);
                vm.merge_bitmap(&names(), "next", "cur").await.unwrap();
                vm.remove_bitmap(&names(), "next").await.unwrap();
                vm.remove_bitmap(&names(), "next").await.unwrap();
            }
            F::Dropped => {}
            F::WorkerDies => {
                let id = vm.id();
                drop((frozen, copies, vm));
                vm = Vm::adopt(&writer.fixture.host.runtime_dir, id).await.unwrap();
                guest_goes_on(&vm).await;
                vm.end_orphaned_freezes(SOON).await.unwrap();
                vm.end_orphaned_freezes(SOON).await.unwrap();
                nothing_is_left(&writer, &mut quiet.side).await;
                assert_eq!(bitmap_names(&vm).await, ["cur", "next"]);
                (frozen, copies) = (vm.freeze(&disks, Some("cur"), "other").await.unwrap(), Vec::new());
                frozen.release(Outcome::Failed, SOON).await.unwrap();
            }
        }
        drop((frozen, copies));
        targets[0].go_on();
        guest_goes_on(&vm).await;
        let mut frozen = vm.freeze(&disks, Some("cur"), "after").await.unwrap();
        copy_all(&frozen, &targets).await;
        frozen.release(Outcome::Committed, SOON).await.unwrap();
        one_moment(&targets);
        quiet.check(&targets);
        vm.add_bitmap(&names(), "cur").await.unwrap();
        vm.merge_bitmap(&names(), "after", "cur").await.unwrap();
        for name in ["after", "next"] {
            vm.remove_bitmap(&names(), name).await.unwrap();
        }
        assert_eq!(bitmap_names(&vm).await, ["cur"], "after {failure:?}");
        nothing_is_left(&writer, &mut quiet.side).await;
    }
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_frozen_leaves_nothing_behind() {
    let writer = Writer::new(StartMode::Running);
    let vm = writer.start().await;
    let mut side = writer.side().await;
    let disks = writer.freeze_disks();
    let no_bitmap = vm.freeze(&disks, Some("none"), "next").await;
    assert!(matches!(no_bitmap, Err(HypervisorError::NoBitmap { .. })), "{no_bitmap:?}");
    let mut unknown = disks.clone();
    unknown[1].name = "nope".into();
    let no_disk = vm.freeze(&unknown, None, "next").await;
    assert!(matches!(no_disk, Err(HypervisorError::NoDisk { .. })), "{no_disk:?}");
    let mut nowhere = disks.clone();
    nowhere[1].scratch = writer.fixture.path("nowhere/scratch");
    let no_folder = vm.freeze(&nowhere, None, "next").await;
    assert!(matches!(no_folder, Err(HypervisorError::File { .. })), "{no_folder:?}");
    vm.add_bitmap(&["root".into(), "nope".into()], "half").await.unwrap_err();
    assert_eq!(vm.bitmaps().await.unwrap(), []);
    nothing_is_left(&writer, &mut side).await;
    guest_goes_on(&vm).await;
    vm.kill().await.unwrap();
}

/// A file system of one MiB, as long as it lives.
struct SmallFileSystem(std::path::PathBuf);

impl SmallFileSystem {
    fn at(path: std::path::PathBuf) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", text(&path)])
            .status()
            .is_ok_and(|status| status.success());
        mounted.then_some(Self(path))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_scratch_breaks_the_point_and_not_the_guest() {
    let writer = Writer::new(StartMode::Running);
    let Some(small) = SmallFileSystem::at(writer.fixture.path("small")) else {
        eprintln!("skipped: only root may mount");
        return;
    };
    let vm = writer.start().await;
    guest_goes_on(&vm).await;
    let targets = targets();
    let mut disks = writer.freeze_disks();
    for disk in &mut disks {
        disk.scratch = small.0.join(&disk.name);
    }
    let mut frozen = vm.freeze(&disks, None, "b-1").await.unwrap();
    for _ in 0..5 {
        guest_goes_on(&vm).await;
    }
    let mut side = writer.side().await;
    side.io("root", "write -P 5 12M 4M").await;
    let broken = copies(&frozen, &targets).await.remove(0).await.unwrap();
    assert!(matches!(&broken, Err(PullError::Read(error)) if error.is_refusal()), "{broken:?}");
    guest_goes_on(&vm).await;
    frozen.release(Outcome::Failed, SOON).await.unwrap();
    assert_eq!(vm.bitmaps().await.unwrap(), []);
    nothing_is_left(&writer, &mut side).await;
    // It can be tried again, with more room.
    let mut frozen = vm.freeze(&writer.freeze_disks(), None, "b-1").await.unwrap();
    copy_all(&frozen, &targets).await;
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    one_moment(&targets);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_bitmap_that_begins_before_the_first_instruction_has_the_first_write() {
    let writer = Writer::new(StartMode::Paused);
    let vm = writer.start().await;
    vm.add_bitmap(&names(), "b-1").await.unwrap();
    vm.add_bitmap(&names(), "b-1").await.unwrap();
    let targets: Vec<Arc<Memory>> = DISKS.iter().map(|disk| Memory::with(writer.on_disk(disk))).collect();
    vm.cont().await.unwrap();
    guest_goes_on(&vm).await;
    vm.stop().await.unwrap();
    let mut frozen = vm.freeze(&writer.freeze_disks(), Some("b-1"), "b-2").await.unwrap();
    assert!(frozen.dirty_bytes() < 2 * DISK_BYTES);
    copy_all(&frozen, &targets).await;
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    for (disk, target) in DISKS.iter().zip(&targets) {
        assert!(target.content() == writer.on_disk(disk), "{disk} differs");
    }
    assert!(one_moment(&targets) > 0);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn random_writes_cost_themselves_and_discards_become_holes() {
    let mut writer = Writer::new(StartMode::Paused);
    let path = writer.fixture.path("big.raw");
    let size = 1024 * MIB;
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let big = DiskSpec { name: "big".into(), path: text(&path).to_owned(), format: "raw".into(), ..Default::default() };
    writer.launch.spec.disks = vec![big];
    let vm = writer.start().await;
    let mut side = writer.side().await;
    vm.add_bitmap(&["big".into()], "b-1").await.unwrap();
    let mut random = StdRng::seed_from_u64(1);
    let mut blocks = std::collections::BTreeSet::new();
    for _ in 0..800 {
        let block = random.random_range(0..size / 4096);
        blocks.insert(block);
        side.io("big", &format!("write -P 9 {} 4096", block * 4096)).await;
    }
    assert_eq!(vm.bitmaps().await.unwrap()[0].dirty_bytes, blocks.len() as u64 * 4096);
    let disks = [FreezeDisk { name: "big".into(), scratch: writer.fixture.path("scratch") }];
    let mut frozen = vm.freeze(&disks, Some("b-1"), "b-2").await.unwrap();
    assert_eq!(frozen.dirty_bytes(), blocks.len() as u64 * 4096);
    let target = Memory::with(vec![0; size as usize]);
    // While it is frozen, everything is discarded: the point keeps what was there.
    for piece in 0..32 {
        side.io("big", &format!("discard {} {}", piece * size / 32, size / 32)).await;
    }
    let socket = frozen.export().await.unwrap();
    copy(&socket, &frozen, "big", &target).await.await.unwrap();
    let copied = changed_bytes(std::slice::from_ref(&target));
    assert_eq!(copied, blocks.len() as u64 * 4096);
    let mut found = std::collections::BTreeSet::new();
    for (offset, length) in target.changed() {
        for (block, content) in (offset / 4096..).zip(target.part(offset, length).chunks(4096)) {
            assert!(content.iter().all(|byte| *byte == 9), "block {block}");
            found.insert(block);
        }
    }
    assert_eq!(found, blocks);
    frozen.release(Outcome::Committed, SOON).await.unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() < 64, "the guest's discards made holes");
    assert_eq!(vm.bitmaps().await.unwrap()[0].dirty_bytes, size, "and was noticed");
    vm.kill().await.unwrap();
}
