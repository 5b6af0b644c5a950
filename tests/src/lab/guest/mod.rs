//! The lab's guests: built from Debian packages, cached, talked to over the stretched segment or a serial port.
//!
//! ```text
//! kernel (apt-get download, dpkg -x) ─▶ vmlinuz ──────────────┐
//!                                    └▶ modules ─┐            ├─▶ GuestImages ─▶ a VM's own copy of the disk
//! busybox-static, pageport-guest (static), init.sh ─▶ initrd ─┤
//!                      qemu-ga (apt-get download), its libraries ─▶ initrd of a guest with an agent
//! /usr of this machine, generated files ─▶ mkfs.ext4 -d ─▶ disk┘
//! ```
//! Everything lies below `target/lab/guest`; images are made once per set of inputs, under a lock, so tests may run side by
//! side. Templates are never written: each VM gets a sparse copy.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

mod agent;
mod disk;
mod error;
mod initramfs;
mod kernel;

pub mod client;
pub mod line;

pub use error::BuildError;
use error::{Named, run};

use crate::paths;

/// A guest's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Memory.
    pub memory_bytes: u64,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Bytes of files on the disk.
    pub file_bytes: u64,
    /// Bytes to read so that the page cache is full but nothing is pushed out.
    pub warm_bytes: u64,
}

/// Whether a guest runs an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agent {
    None,
    Qemu,
}

/// The demo's guest: 2 GiB, of which about 1.6 GiB become page cache.
pub const DEMO: Variant =
    Variant { memory_bytes: 2 << 30, disk_bytes: 4 << 30, file_bytes: 2 << 30, warm_bytes: 1600 << 20 };
/// For tests: boots and moves in seconds.
pub const SMALL: Variant =
    Variant { memory_bytes: 256 << 20, disk_bytes: 512 << 20, file_bytes: 128 << 20, warm_bytes: 100 << 20 };

/// The address that guests have on the stretched segment.
pub const GUEST_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 88, 0, 10);

/// What a guest boots from.
#[derive(Clone, Debug)]
pub struct GuestImages {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The disk's template.
    pub disk: PathBuf,
}

impl GuestImages {
    /// Builds what is not there yet; takes a minute or two the first time.
    ///
    /// # Errors
    /// When a package cannot be had, a tool fails, or there is no room.
    pub fn build(variant: Variant) -> Result<Self, BuildError> {
        Self::build_with(variant, disk::Content::Mixed, Agent::None)
    }

    /// As [`GuestImages::build`], with a disk that holds nothing but files of this machine.
    ///
    /// # Errors
    /// As [`GuestImages::build`], and when this machine has too few files.
    pub fn build_with_tree(variant: Variant) -> Result<Self, BuildError> {
        Self::build_with(variant, disk::Content::Tree, Agent::None)
    }

    /// As [`GuestImages::build`], and the guest runs Debian's QEMU guest agent.
    ///
    /// # Errors
    /// As [`GuestImages::build`], and when this machine lacks a library that the agent needs.
    pub fn build_with_agent(variant: Variant) -> Result<Self, BuildError> {
        Self::build_with(variant, disk::Content::Mixed, Agent::Qemu)
    }

    fn build_with(variant: Variant, content: disk::Content, agent: Agent) -> Result<Self, BuildError> {
        let folder = paths::lab().join("guest");
        fs::create_dir_all(&folder).named("make", &folder)?;
        let lock = folder.join("lock");
        let lock_file = File::create(&lock).named("make", &lock)?;
        lock_file.lock().named("lock", &lock)?;

        let kernel = kernel::fetch(&folder)?;
        let busybox = Path::new("/bin/busybox");
        let (mut modules, mut programs) = (kernel.modules, Vec::new());
        if agent == Agent::Qemu {
            programs = agent::fetch(&folder)?;
            let wanted: Vec<&str> = kernel::MODULES.into_iter().chain(agent::MODULES).collect();
            modules = kernel::modules(&folder, &wanted)?;
        }
        let archive = initramfs::build(busybox, &build_helper()?, &modules, &programs)?;
        let key = blake3::hash(&archive).to_hex();
        let initrd = folder.join(format!("initrd-{}", &key[..16]));
        if !initrd.exists() {
            let unfinished = initrd.with_extension("unfinished");
            fs::write(&unfinished, archive).named("write", &unfinished)?;
            fs::rename(&unfinished, &initrd).named("move into place", &initrd)?;
        }

        let plan = disk::Plan { disk_bytes: variant.disk_bytes, file_bytes: variant.file_bytes, seed: 2013 };
        let key = blake3::hash(format!("{} {plan:?}", disk::LAYOUT).as_bytes()).to_hex();
        let name = match content {
            disk::Content::Mixed => "disk",
            disk::Content::Tree => "tree",
        };
        let image = folder.join(format!("{name}-{}.raw", &key[..16]));
        if !image.exists() {
            disk::make(plan, content, &image, &folder)?;
        }
        Ok(Self { kernel: kernel.image, initrd, disk: image })
    }

    /// Makes a VM's own disk: a sparse copy of the template.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn copy_disk(&self, to: &Path) -> Result<(), BuildError> {
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(&self.disk).arg(to)).map(drop)
    }
}

/// How a guest is talked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Over the stretched segment, at this address; its serial port is its console.
    Segment(std::net::Ipv4Addr),
    /// Over its serial port; it has no network card.
    Serial,
}

impl From<std::net::Ipv4Addr> for Attachment {
    fn from(address: std::net::Ipv4Addr) -> Self {
        Self::Segment(address)
    }
}

/// What the kernel is told; the guest takes the address or the port.
#[must_use]
pub fn command_line(attachment: impl Into<Attachment>) -> String {
    const COMMON: &str = "quiet loglevel=3 mitigations=off nowatchdog panic=-1";
    match attachment.into() {
        Attachment::Segment(address) => format!("console=ttyS0 {COMMON} pageport.ip={address}/16"),
        // The kernel's own words would get between the answers.
        Attachment::Serial => format!("console=tty0 {COMMON} pageport.control=ttyS0"),
    }
}

/// Builds the guest's helper as a static program.
fn build_helper() -> Result<PathBuf, BuildError> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo)
        .args(["build", "-q", "-p", "pageport-guest", "--target", TARGET])
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(paths::root()))?;
    Ok(paths::target().join(TARGET).join("debug/pageport-guest"))
}
