//! `make bench-replication`: standing replication of a running guest's disk, next to what QEMU and its tools do over the same link.
//!
//! ```text
//! a disk with a real file tree ─┬▶ Pageport, in a lab          ─┐
//!                               ├▶ QEMU's mirror to NBD, twice ─┼▶ first copy, increment, under load (stages) ─▶ table,
//!                               ├▶ QEMU's backup, with a bitmap ┘                                                replication.json
//!                               └▶ qemu-img convert to NBD: the whole image, twice
//! ```
//! | | Pageport | the opponents |
//! |---|---|---|
//! | what else is on the link | the controllers' and workers' own talk, counted as Pageport's | nothing |
//! | protection of what is sent | TLS 1.3 over QUIC | none, over TCP |
//! | the replica when the time ends | committed: on stable storage, at one moment | in the page cache of the replica's host; `convert` flushes |
//!
//! They go one after the other, each with a fresh copy of the disk and a guest that boots from it, over a link of the same
//! shape. Every replica is compared with its disk: a figure without an equal replica counts for nothing. Needs namespaces.
//! Everything ends with it; what stays is the image of the file tree, for the next time.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::baseline::vm::{FreePageHints, PlainSpec, VmError};
use crate::lab::guest::client::{GuestClient, GuestError};
use crate::lab::guest::{BuildError, GUEST_ADDRESS, GuestImages, SMALL, Variant};
use crate::lab::network::{Network, NetworkError};
use crate::lab::{CtlError, Lab, LabConfig, LabError, VmFile};
use crate::paths;
use crate::wan::link::Shape;

pub mod convert;
pub mod copied_vm;
pub mod digest;
pub mod export;
pub mod meter;
pub mod pageport;
pub mod report;
pub mod stages;

use convert::Target;
use copied_vm::{CopiedVm, Way};
use export::Export;
use meter::SOURCE;
use pageport::Protected;
use report::{Compared, DiskFigures, Figures, Report};
use stages::{NEW_BYTES, REWRITTEN_BYTES, Stage, Stages};

const VM: &str = "bench";
const BOOT_DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);
/// The guest only has to write files.
const MEMORY_BYTES: u64 = SMALL.memory_bytes;

/// Tells somebody what happens.
pub type Tell<'a> = &'a dyn Fn(&str);

/// How it is to be.
#[derive(Clone, Copy, Debug)]
pub struct BenchConfig {
    /// Size of the disk; three tenths of it are files.
    pub disk_bytes: u64,
    /// The link.
    pub link: Shape,
}

impl BenchConfig {
    /// The smallest disk that leaves room for the changes.
    pub const LEAST_DISK_BYTES: u64 = 512 << 20;

    fn variant(&self) -> Variant {
        let file_bytes = self.disk_bytes / 10 * 3;
        Variant { memory_bytes: MEMORY_BYTES, disk_bytes: self.disk_bytes, file_bytes, warm_bytes: 0 }
    }
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The guest cannot be built.
    #[error("build the guest of the benchmark")]
    Build(#[from] BuildError),
    /// The lab does not start.
    #[error("start the lab of the benchmark")]
    Lab(#[from] LabError),
    /// The sites cannot be connected.
    #[error("connect the sites of the benchmark")]
    Network(#[from] NetworkError),
    /// The WAN does not answer.
    #[error("read the wan's counters")]
    Counters(#[source] std::io::Error),
    /// A command failed.
    #[error("run the benchmark's commands")]
    Ctl(#[from] CtlError),
    /// An opponent's QEMU went wrong.
    #[error("run an opponent's guest")]
    Vm(#[from] VmError),
    /// The guest does not answer.
    #[error("talk to the benchmark's guest")]
    Guest(#[from] GuestError),
    /// There is nothing to copy to.
    #[error("export {file} over nbd")]
    Export {
        /// The replica.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `qemu-img` failed.
    #[error("run qemu-img convert")]
    Convert(#[source] std::io::Error),
    /// QEMU's copy ended otherwise.
    #[error("copy by qemu's {way:?}: it says {said}")]
    Job {
        /// Which way.
        way: Way,
        /// What it said.
        said: String,
    },
    /// Pageport made no recovery point.
    #[error("wait for a recovery point; last seen: {seen}")]
    NoPoint {
        /// The VM's replicas.
        seen: String,
    },
    /// The guest's records are not what they must be.
    #[error("check the guest's records: it says {reply}")]
    Records {
        /// What it said.
        reply: String,
    },
    /// An image cannot be read.
    #[error("read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A folder for the disks cannot be made.
    #[error("make a folder for the benchmark's disks")]
    Folder(#[source] std::io::Error),
}

/// Measures everything.
///
/// # Errors
/// When a step fails; everything is taken down.
pub async fn run(config: BenchConfig, tell: Tell<'_>) -> Result<Report, BenchError> {
    let variant = config.variant();
    tell("building the guest and a disk with a part of /usr; cached after the first time");
    let images = GuestImages::build_with_tree(variant)?;
    tell("Pageport: three sites, a guest at a, protected to b");
    let (pageport, accelerator, data_bytes) = measure_pageport(config, &images, variant, tell).await?;
    let arena = Arena::create(config, images, accelerator)?;
    tell("QEMU's mirror to an NBD export at b");
    let (mirror, _) = arena.measure(Way::Mirror, tell).await?;
    tell("QEMU's mirror again, following blocks of 4 KiB");
    let (fine_mirror, _) = arena.measure(Way::FineMirror, tell).await?;
    tell("QEMU's backup, with a bitmap, to an NBD export at b");
    let (backup, changed_disk) = arena.measure(Way::Backup, tell).await?;
    tell("qemu-img convert to an NBD export at b");
    let (whole, again) = arena.measure_convert(&changed_disk, tell).await?;

    let changed = REWRITTEN_BYTES + NEW_BYTES;
    let copies = |stage: fn(&Stages) -> Stage, convert: Stage, bytes: u64| Compared {
        pageport: Figures::new(stage(&pageport), bytes),
        opponents: [
            ("qemu_mirror", stage(&mirror)),
            ("qemu_mirror_4k", stage(&fine_mirror)),
            ("qemu_backup", stage(&backup)),
            ("qemu_img_convert", convert),
        ]
        .map(|(name, stage)| (name.to_owned(), Figures::new(stage, bytes)))
        .into(),
    };
    Ok(Report::new(
        DiskFigures {
            disk_bytes: config.disk_bytes,
            data_bytes,
            rewritten_bytes: REWRITTEN_BYTES,
            new_bytes: NEW_BYTES,
        },
        config.link.into(),
        copies(|stages| stages.first_copy, whole, data_bytes),
        copies(|stages| stages.increment, again, changed),
        Compared {
            pageport: pageport.load.into(),
            opponents: [
                ("qemu_mirror", mirror.load),
                ("qemu_mirror_4k", fine_mirror.load),
                ("qemu_backup", backup.load),
            ]
            .map(|(name, load)| (name.to_owned(), load.into()))
            .into(),
        },
    ))
}

/// Also what guests run with, and how much the disk holds.
async fn measure_pageport(
    config: BenchConfig,
    images: &GuestImages,
    variant: Variant,
    tell: Tell<'_>,
) -> Result<(Stages, String, u64), BenchError> {
    let lab = Lab::start(LabConfig { link: config.link, ..LabConfig::default() }).await?;
    let file = VmFile::new(&lab, VM, images, variant)?;
    let data_bytes = allocated_bytes(file.disk())?;
    lab.ctl(["vm", "define", "-f", file.path(), "--site", SOURCE]).await?;
    lab.ctl(["vm", "start", VM]).await?;
    let mut guest = lab.guest(SOURCE, GUEST_ADDRESS).await?;
    let mut vm = Protected::new(&lab, VM, file.disk().to_owned());
    let stages = stages::run(&mut vm, lab.network(), &mut guest, tell).await?;
    Ok((stages, lab.accelerator().await?, data_bytes))
}

/// Where the opponents are measured.
#[derive(Debug)]
struct Arena {
    // Dropped in this order: what runs in the network before the folders.
    network: Network,
    config: BenchConfig,
    images: GuestImages,
    accelerator: String,
    sockets: TempDir,
    disks: TempDir,
}

impl Arena {
    fn create(config: BenchConfig, images: GuestImages, accelerator: String) -> Result<Self, BenchError> {
        let sockets = tempfile::tempdir().map_err(BenchError::Folder)?;
        let disks = tempfile::tempdir_in(paths::lab()).map_err(BenchError::Folder)?;
        let network = Network::create(sockets.path(), config.link)?;
        Ok(Self { network, config, images, accelerator, sockets, disks })
    }

    async fn export(&self) -> Result<Export, BenchError> {
        let file = self.disks.path().join("replica.raw");
        Export::start(&self.network, &file, self.config.disk_bytes, self.sockets.path()).await
    }

    /// Also hands back the guest's disk as it was left.
    async fn measure(&self, way: Way, tell: Tell<'_>) -> Result<(Stages, PathBuf), BenchError> {
        let disk = self.disks.path().join("disk.raw");
        self.images.copy_disk(&disk)?;
        let spec = PlainSpec {
            name: VM.into(),
            images: self.images.clone(),
            disk,
            memory_bytes: MEMORY_BYTES,
            address: GUEST_ADDRESS,
            mac_suffix: 10,
            accelerator: self.accelerator.clone(),
            hints: FreePageHints::Off,
        };
        let export = self.export().await?;
        let mut vm = CopiedVm::boot(&self.network, SOURCE, &spec, way, export, self.sockets.path()).await?;
        let mut guest = GuestClient::connect(self.network.namespace(SOURCE), GUEST_ADDRESS, BOOT_DEADLINE).await?;
        let stages = stages::run(&mut vm, &self.network, &mut guest, tell).await?;
        Ok((stages, vm.into_disk()))
    }

    /// The disk before any change to a new target, then a changed disk to the same.
    async fn measure_convert(&self, changed: &Path, tell: Tell<'_>) -> Result<(Stage, Stage), BenchError> {
        let export = self.export().await?;
        let disk = self.disks.path().join("untouched.raw");
        self.images.copy_disk(&disk)?;
        let mut stages = [(disk.as_path(), Target::Zero), (changed, Target::Used)].map(|it| (it, Stage::default()));
        for ((disk, target), stage) in &mut stages {
            let cost = convert::convert(&self.network, disk, &export, *target).await?;
            *stage = Stage { cost, equal: digest::same(disk, export.file()).await? };
            tell(&format!("  the whole image: {}", stages::said(stage)));
        }
        let [(_, whole), (_, again)] = stages;
        Ok((whole, again))
    }
}

fn allocated_bytes(path: &Path) -> Result<u64, BenchError> {
    const UNIT: u64 = 512;
    let about = std::fs::metadata(path).map_err(|source| BenchError::Read { path: path.to_owned(), source })?;
    Ok(about.blocks() * UNIT)
}
