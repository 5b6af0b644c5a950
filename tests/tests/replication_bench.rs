//! The opponents of the replication benchmark work and are measured, on a tiny disk. Needs root; says so and passes when there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pageport_lab::baseline::vm::{FreePageHints, PlainSpec};
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::network::Network;
use pageport_lab::netns;
use pageport_lab::replication_bench::convert::{Target, convert};
use pageport_lab::replication_bench::copied_vm::{CopiedVm, Way};
use pageport_lab::replication_bench::digest::same;
use pageport_lab::replication_bench::export::Export;
use pageport_lab::replication_bench::meter::{Reading, SOURCE};
use pageport_lab::replication_bench::stages::Replication;
use pageport_lab::wan::link::Shape;
use serde_json::json;
use tempfile::TempDir;

const SHAPE: Shape = Shape { rate_bps: 500_000_000, one_way_delay_ms: 2, loss: 0.0, queue_bytes: None };
const DISK_BYTES: u64 = 64 << 20;
const DATA_BYTES: u64 = 4 << 20;

struct Arena {
    network: Network,
    folder: TempDir,
}

impl Arena {
    fn create() -> Option<Self> {
        if !netns::available() {
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let network = Network::create(folder.path(), SHAPE).unwrap();
        Some(Self { network, folder })
    }

    /// Mostly a hole.
    fn disk(&self) -> PathBuf {
        let path = self.folder.path().join("disk.raw");
        let file = File::create(&path).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let data: Vec<u8> = (0..DATA_BYTES).map(|n| u8::try_from(n * n % 251).unwrap()).collect();
        file.write_all_at(&data, 8 << 20).unwrap();
        path
    }

    async fn export(&self) -> Export {
        let file = self.folder.path().join("replica.raw");
        Export::start(&self.network, &file, DISK_BYTES, self.folder.path()).await.unwrap()
    }

    /// A guest without a file system to boot from: its disk changes only when told to.
    async fn vm(&self, disk: &Path, way: Way) -> CopiedVm {
        let spec = PlainSpec {
            name: "tiny".into(),
            images: GuestImages::build(SMALL).unwrap(),
            disk: disk.to_owned(),
            memory_bytes: SMALL.memory_bytes,
            address: GUEST_ADDRESS,
            mac_suffix: 10,
            accelerator: "tcg".into(),
            hints: FreePageHints::Off,
        };
        let export = self.export().await;
        CopiedVm::boot(&self.network, SOURCE, &spec, way, export, self.folder.path()).await.unwrap()
    }

    /// The whole disk, then a change of 1 MiB; both must arrive and be counted.
    async fn copies(&self, way: Way) {
        let mut vm = self.vm(&self.disk(), way).await;
        let begin = Reading::take(&self.network).unwrap();
        vm.first_copy().await.unwrap();
        let first = begin.until_now(&self.network).unwrap();
        assert!((DATA_BYTES..DATA_BYTES * 3 / 2).contains(&first.to_replica), "{first:?}");
        assert!(first.to_source > 0 && first.to_source < DATA_BYTES / 4, "{first:?}");
        assert!(vm.is_equal().await.unwrap());

        let begin = Reading::take(&self.network).unwrap();
        let write = "qemu-io -d /machine/peripheral/blk-root/virtio-backend \"write -P 7 32M 1M\"";
        vm.vm().execute("human-monitor-command", json!({"command-line": write})).await.unwrap();
        vm.catch_up().await.unwrap();
        let change = begin.until_now(&self.network).unwrap();
        assert!((1 << 20..2 << 20).contains(&change.to_replica), "{change:?}");
        assert!(vm.is_equal().await.unwrap());
        eprintln!("{way:?} {first:?} {change:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemus_mirrors_and_backup_carry_a_disk_and_then_only_what_changed() {
    let Some(arena) = Arena::create() else { return };
    arena.copies(Way::Mirror).await;
    arena.copies(Way::FineMirror).await;
    arena.copies(Way::Backup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn convert_carries_the_data_each_time_and_its_processor_time_is_known() {
    let Some(arena) = Arena::create() else { return };
    let (disk, export) = (arena.disk(), arena.export().await);
    for target in [Target::Zero, Target::Used] {
        let cost = convert(&arena.network, &disk, &export, target).await.unwrap();
        assert!((DATA_BYTES..DATA_BYTES * 3 / 2).contains(&cost.to_replica), "{cost:?}");
        assert!(same(&disk, export.file()).await.unwrap());
    }
}
