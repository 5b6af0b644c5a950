//! Sites, workers, VMs and their disks.

use std::path::PathBuf;

use clap::Subcommand;

use crate::size::Size;
use crate::terms::DrainArgs;

/// `site ...`
#[derive(Debug, Subcommand)]
pub enum SiteCommand {
    /// List the sites.
    List,
    /// Move every running VM away from a site, each to a site with a replica.
    ///
    /// The largest go first; each goes where it fits and the least is to cross the link. It stays in force until it is undrained: what comes to
    /// run there later leaves as well, and nothing is moved there. What cannot leave is listed with its reason; stopped VMs stay.
    #[command(after_help = DRAIN_EXAMPLE)]
    Drain {
        /// Name of the site.
        site: String,
        /// How.
        #[command(flatten)]
        drain: DrainArgs,
    },
    /// End that a site is drained: what waits is cancelled, what is under way goes on.
    Undrain {
        /// Name of the site.
        site: String,
    },
}

/// `worker ...`
#[derive(Debug, Subcommand)]
pub enum WorkerCommand {
    /// List the workers.
    List,
    /// Show the pools of storage of the workers: what replicas, recovery points and scratch occupy in each, and may.
    Pools,
    /// Move every running VM away from a worker, each to another site with a replica; see `site drain`.
    Drain {
        /// Name of the worker.
        worker: String,
        /// How.
        #[command(flatten)]
        drain: DrainArgs,
    },
    /// End that a worker is drained: what waits is cancelled, what is under way goes on.
    Undrain {
        /// Name of the worker.
        worker: String,
    },
    /// Have a worker's host turned off by its fence agent, and start elsewhere what ran there.
    ///
    /// For a host that does not answer. The controllers grant its VMs to nobody, run the agent that controller.toml names
    /// for the worker, and once it has confirmed that the host is off they start each VM at a complete replica. What a VM
    /// wrote since its replica was last synchronised is lost. An agent that fails changes nothing.
    Fence {
        /// Name of the worker.
        worker: String,
        /// The worker's name once more; asked for at the terminal when left out.
        #[arg(long, value_name = "NAME")]
        confirm: Option<String>,
        /// Why the host is turned off; kept for good.
        #[arg(long, value_name = "TEXT", required_unless_present = "check")]
        reason: Option<String>,
        /// Only ask the agent whether it reaches the host's power control; changes nothing.
        #[arg(long, conflicts_with_all = ["reason", "confirm"])]
        check: bool,
    },
    /// After a restore of the controllers: say that a worker is not coming back with any VM.
    ///
    /// VMs are unknown until every worker of the backup has reported; this one is not waited for any more. If it runs a VM all the same, that VM may
    /// run twice: be sure that its host is off. The word is kept. Refused while the worker is connected, and when every VM is known.
    DeclareDead {
        /// Name of the worker.
        worker: String,
        /// The worker's name once more; asked for at the terminal when left out.
        #[arg(long, value_name = "NAME")]
        confirm: Option<String>,
        /// How you know; kept for good.
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// `vm ...`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Define a VM from a file.
    Define {
        /// Description of the VM (YAML), "-" for standard input.
        #[arg(short = 'f', long = "file", value_name = "FILE")]
        file: PathBuf,
        /// The VM's first site.
        #[arg(long, value_name = "SITE")]
        site: String,
    },
    /// List the VMs.
    List,
    /// Show one VM.
    Get {
        /// Name or id of the VM.
        vm: String,
    },
    /// Start a VM.
    Start {
        /// Name or id of the VM.
        vm: String,
    },
    /// Stop a VM through ACPI.
    Stop {
        /// Name or id of the VM.
        vm: String,
        /// Pull the plug instead.
        #[arg(long)]
        force: bool,
    },
    /// Settle by hand who owns a VM that is in doubt or whose worker is lost for good.
    ///
    /// The controllers never guess: as long as a worker that may run the VM does not answer, the VM is started nowhere
    /// else. If YOU know that it runs nowhere (the host is off, or its disk is gone), this makes another site the owner.
    /// If you are wrong the VM runs twice and its disks part ways. The command is recorded with your name and reason.
    Resolve {
        /// Name or id of the VM.
        vm: String,
        /// The site that owns the VM from now on: one that holds a replica, or the source of the move in doubt.
        #[arg(long, value_name = "SITE")]
        force_owner: String,
        /// The VM's name once more; asked for at the terminal when left out.
        #[arg(long, value_name = "NAME")]
        confirm: Option<String>,
        /// Why you know that it runs nowhere else; kept for good.
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// After a restore of the controllers: take a VM that was defined since the backup into the fleet again.
    ///
    /// `vm list` shows such VMs: their workers go on running them, and nothing manages them. A VM comes back with the definition that its worker has
    /// kept. It is unknown until every worker has reported, and what runs goes on running. Protections and limits are to be ordered again.
    #[command(after_help = ADOPT_EXAMPLE)]
    Adopt {
        /// Name or id of the VM.
        #[arg(required_unless_present = "all")]
        vm: Option<String>,
        /// Every VM that `vm list` shows as found.
        #[arg(long, conflicts_with = "vm")]
        all: bool,
    },
    /// Delete a stopped VM and its replicas; its original disk image stays.
    Delete {
        /// Name or id of the VM.
        vm: String,
    },
    /// Attach to a VM's serial console; leave with Ctrl-].
    Console {
        /// Name or id of the VM.
        vm: String,
        /// Once piped input has ended, leave when the console was silent for this many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 2)]
        linger: u32,
    },
}

/// `disk ...`
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a disk larger, while the VM runs or not.
    ///
    /// A running guest sees the larger disk at once (it must grow its partitions and file systems itself); a stopped one when it is started. A
    /// protected VM's replicas follow with their next recovery point: points from before keep the old size. Refused while the VM migrates or is
    /// being seeded. Disks never become smaller.
    #[command(after_help = RESIZE_EXAMPLE)]
    Resize {
        /// Name or id of the VM.
        vm: String,
        /// Name of its disk.
        disk: String,
        /// What it is to have, like 20GiB; a multiple of 4KiB.
        #[arg(long, value_name = "SIZE")]
        size: Size,
    },
    /// Give a VM one more disk, while it runs or not.
    ///
    /// The VM's worker makes an empty image. A running guest finds the disk plugged in; it is told by its name as the serial number
    /// (`/dev/disk/by-id/virtio-NAME`), as other disks are. A protected VM's replicas hold it from their next recovery point on; points from before do not.
    /// Until then the VM does not move there. Replicas that are not protected are to be seeded again. A guest whose QEMU was started by a version without
    /// places for such disks gets it when it is stopped and started.
    #[command(after_help = ADD_EXAMPLE)]
    Add {
        /// Name or id of the VM.
        vm: String,
        /// Name of the new disk: 1 to 20 of a-z, 0-9 and "-".
        disk: String,
        /// What it is to have, like 20GiB; a multiple of 4KiB.
        #[arg(long, value_name = "SIZE")]
        size: Size,
        /// Where the VM's worker makes the image; nothing may be there. Left out: below its data folder, and removed with the VM.
        #[arg(long, value_name = "FILE")]
        path: Option<String>,
    },
}

const DRAIN_EXAMPLE: &str = "\
Example:
  pageportctl site drain a --dry-run             what would go where, and what cannot leave
  pageportctl site drain a --to b --watch
  pageportctl site undrain a";

const ADOPT_EXAMPLE: &str = "\
Example:
  pageportctl vm list                            which VMs were found at workers
  pageportctl vm adopt web
  pageportctl vm adopt --all";

const RESIZE_EXAMPLE: &str = "\
Example:
  pageportctl disk resize web root --size 20GiB
  pageportctl vm get web                         its disks, and how large they are now";

const ADD_EXAMPLE: &str = "\
Example:
  pageportctl disk add web data --size 100GiB
  pageportctl disk add web data --size 100GiB --path /var/lib/pageport/images/web-data.img
  pageportctl replica list web                   PROBLEM says which replicas do not hold it yet";
