//! The grammar of the command line.
//!
//! Global options may stand before or after the command. Nothing is looked up here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::place::Place;
use crate::quantity::{Cap, Span};
use crate::size::Size;
use crate::terms::{ConvergenceArgs, DrainArgs, SchedulerCommand, TermsArgs};

/// Sees and moves virtual machines between datacenters.
#[derive(Debug, Parser)]
#[command(name = "pageportctl", version, arg_required_else_help = true)]
pub struct Cli {
    /// How to reach the controllers.
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// Print protobuf messages as JSON (streams: one per line) instead of tables.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How to reach the controllers; what is absent comes from the config file.
#[derive(Debug, Default, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub struct ConnectionArgs {
    /// Addresses of the controllers, tried in this order.
    #[arg(long, global = true, env = "PAGEPORT_CONTROLLERS", value_delimiter = ',', value_name = "HOST:PORT,...")]
    pub controllers: Vec<String>,
    /// Certificate of the authority (PEM).
    #[arg(long, global = true, env = "PAGEPORT_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The operator's certificate (PEM).
    #[arg(long, global = true, env = "PAGEPORT_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// The operator's private key (PEM).
    #[arg(long, global = true, env = "PAGEPORT_KEY", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Config file with controllers, ca, cert, key [default: ~/.config/pageport/ctl.toml].
    #[arg(long, global = true, env = "PAGEPORT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Datacenters.
    #[command(subcommand)]
    Site(SiteCommand),
    /// Hypervisor hosts.
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Virtual machines.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Disks of a virtual machine.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Copies of a VM's disks at other sites.
    #[command(subcommand)]
    Replica(ReplicaCommand),
    /// Keep a VM's replica at a site up to date all the time.
    ///
    /// The VM's worker copies its disks to the site once, and from then on only what changes. Each time it makes a recovery
    /// point: a state of all disks at one moment, which the VM can be brought back to, whatever is killed and when. The
    /// guest does not wait for any of it. Ordered again, it changes the terms. When the VM moves to the site, the
    /// protection turns round: the site it left is kept up to date instead.
    #[command(after_help = PROTECT_EXAMPLE)]
    Protect {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica.
        #[arg(long, value_name = "SITE")]
        to: String,
        /// Target: the newest recovery point is never to be older (5s to 24h).
        #[arg(long, value_name = "DURATION", default_value = "30s")]
        rpo: Span,
        /// Recovery points that are kept, the newest included (1 to 256).
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=256))]
        keep: u32,
        /// Take the points with the guest's file systems at rest, through its QEMU guest agent.
        ///
        /// The guest's writes wait meanwhile: some tenths of a second as a rule, a few seconds at most. Without an agent that answers in
        /// time the points are taken all the same, as after a power cut; `replication status` says why, and `recovery-point list` which
        /// points are quiesced. Ordered again without this, points are no longer quiesced.
        #[arg(long)]
        quiesce: bool,
        /// Make the replica of a disk on this block device of the site's host; may be given for each disk.
        ///
        /// The host's worker must be allowed to use it (`replication.devices` in its worker.toml), and it must be at least as large as the disk and
        /// begin and end with zeros. Disks that are not named have their replicas in files of the worker. A replica that is there is not moved: delete it first.
        #[arg(long, value_name = "DISK=DEVICE")]
        place: Vec<Place>,
        /// Follow the first copy until there is a recovery point.
        #[arg(long)]
        watch: bool,
    },
    /// End the protection of a VM at a site; the replica stays as it is at its newest recovery point.
    Unprotect {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica.
        #[arg(long, value_name = "SITE")]
        site: String,
    },
    /// How the replication of protected VMs stands.
    #[command(subcommand)]
    Replication(ReplicationCommand),
    /// States that a site can bring a VM back to.
    #[command(subcommand)]
    RecoveryPoint(RecoveryPointCommand),
    /// What may be sent between sites.
    #[command(subcommand)]
    Link(LinkCommand),
    /// How many migrations there may be at a time.
    #[command(subcommand)]
    Scheduler(SchedulerCommand),
    /// Move a running VM to another site.
    ///
    /// It begins at once unless the scheduler says that it has to wait: for a slot at a worker or link, for bandwidth, for memory at
    /// the target, for what was ordered here. `migration list` says in one sentence for what.
    #[command(after_help = MIGRATE_EXAMPLE)]
    Migrate {
        /// Name or id of the VM.
        vm: String,
        /// Destination site.
        #[arg(long, value_name = "SITE")]
        to: String,
        /// On which terms.
        #[command(flatten)]
        terms: TermsArgs,
        /// Follow the move until it has ended.
        #[arg(long)]
        watch: bool,
    },
    /// Moves, running and past.
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// The controllers themselves.
    #[command(subcommand)]
    Cluster(ClusterCommand),
}

const MIGRATE_EXAMPLE: &str = "\
Example:
  pageportctl migrate web --to b --watch
  pageportctl migrate db --to b --priority 80 --window 22:00-06:00 --deadline 24h
  pageportctl migrate web --to b --after 0190...      once that migration has completed
  pageportctl migration list                          REASON says what each one waits for
  pageportctl migration set 0190... --rate 50mbit     also while it runs
  pageportctl migrate web --to b --convergence throttle
  pageportctl migration set 0190... --convergence longer-pause --longest-pause 2s";

const DRAIN_EXAMPLE: &str = "\
Example:
  pageportctl site drain a --dry-run             what would go where, and what cannot leave
  pageportctl site drain a --to b --watch
  pageportctl site undrain a";

const PROTECT_EXAMPLE: &str = "\
Example:
  pageportctl link set a b --cap 100mbit          what replication may send from a to b, if it should not take all
  pageportctl protect web --to b --rpo 30s --watch
  pageportctl protect mail --to b --place root=/dev/vg0/mail-root --place spool=/dev/vg0/mail-spool
  pageportctl protect db --to b --quiesce         file systems at rest in each point; the guest needs qemu-guest-agent
  pageportctl replication status web --watch      lag against the target, and the worst it has been
  pageportctl recovery-point list web --site b
  pageportctl recovery-point open web 41 --for 2h   read it as it was then, for a drill";

const SCRUB_EXAMPLE: &str = "\
Example:
  pageportctl replication scrub web --watch
  pageportctl replication scrub web --site b --watch --json | tail -1    .replication.last_scrub: what it found";

const OPEN_EXAMPLE: &str = "\
Example:
  pageportctl recovery-point list web
  pageportctl recovery-point open web 41 --for 2h
Then on the host of the replica, with an URL that it has printed:
  qemu-img create -f qcow2 -F raw -b 'nbd+unix:///web/root?socket=/run/pageport/points/...sock' drill.qcow2
                                                  a disk to boot a drill from; the replica stays as it is
  qemu-img convert -O raw 'nbd+unix:///web/root?socket=...' root.raw
  pageportctl recovery-point close web 41";

const QUOTE_EXAMPLE: &str = "\
Example:
  pageportctl migration quote web --to b
  pageportctl migration quote web --to b --json | jq '.total_time_ms.high'    milliseconds at worst; null: it would not end";

const LINK_EXAMPLE: &str = "\
Example:
  pageportctl link set a b --cap 100mbit    from a to b; the way back has a cap of its own
  pageportctl link set a b --cap none
  pageportctl link set a b --budget 1gbit --migrations 2";

impl Command {
    /// Its name for people who look at traces.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Site(SiteCommand::List) => "site list",
            Self::Site(SiteCommand::Drain { .. }) => "site drain",
            Self::Site(SiteCommand::Undrain { .. }) => "site undrain",
            Self::Worker(WorkerCommand::Drain { .. }) => "worker drain",
            Self::Worker(WorkerCommand::Undrain { .. }) => "worker undrain",
            Self::Scheduler(SchedulerCommand::Get) => "scheduler get",
            Self::Scheduler(SchedulerCommand::Set { .. }) => "scheduler set",
            Self::Worker(WorkerCommand::List) => "worker list",
            Self::Worker(WorkerCommand::Fence { .. }) => "worker fence",
            Self::Worker(WorkerCommand::DeclareDead { .. }) => "worker declare-dead",
            Self::Cluster(ClusterCommand::Status) => "cluster status",
            Self::Cluster(ClusterCommand::Add { .. }) => "cluster add",
            Self::Cluster(ClusterCommand::Remove { .. }) => "cluster remove",
            Self::Cluster(ClusterCommand::TransferLeader { .. }) => "cluster transfer-leader",
            Self::Cluster(ClusterCommand::Backup { .. }) => "cluster backup",
            Self::Vm(VmCommand::Define { .. }) => "vm define",
            Self::Vm(VmCommand::List) => "vm list",
            Self::Vm(VmCommand::Get { .. }) => "vm get",
            Self::Vm(VmCommand::Start { .. }) => "vm start",
            Self::Vm(VmCommand::Stop { .. }) => "vm stop",
            Self::Vm(VmCommand::Delete { .. }) => "vm delete",
            Self::Vm(VmCommand::Resolve { .. }) => "vm resolve",
            Self::Vm(VmCommand::Console { .. }) => "vm console",
            Self::Disk(DiskCommand::Resize { .. }) => "disk resize",
            Self::Disk(DiskCommand::Add { .. }) => "disk add",
            Self::Replica(ReplicaCommand::Seed { .. }) => "replica seed",
            Self::Replica(ReplicaCommand::List { .. }) => "replica list",
            Self::Replica(ReplicaCommand::Delete { .. }) => "replica delete",
            Self::Protect { .. } => "protect",
            Self::Unprotect { .. } => "unprotect",
            Self::Replication(ReplicationCommand::Status { .. }) => "replication status",
            Self::Replication(ReplicationCommand::Scrub { .. }) => "replication scrub",
            Self::RecoveryPoint(RecoveryPointCommand::List { .. }) => "recovery-point list",
            Self::RecoveryPoint(RecoveryPointCommand::Open { .. }) => "recovery-point open",
            Self::RecoveryPoint(RecoveryPointCommand::Close { .. }) => "recovery-point close",
            Self::Link(LinkCommand::List) => "link list",
            Self::Link(LinkCommand::Set { .. }) => "link set",
            Self::Migrate { .. } => "migrate",
            Self::Migration(MigrationCommand::Quote { .. }) => "migration quote",
            Self::Migration(MigrationCommand::Get { .. }) => "migration get",
            Self::Migration(MigrationCommand::List { .. }) => "migration list",
            Self::Migration(MigrationCommand::Watch { .. }) => "migration watch",
            Self::Migration(MigrationCommand::Set { .. }) => "migration set",
            Self::Migration(MigrationCommand::Pause { .. }) => "migration pause",
            Self::Migration(MigrationCommand::Resume { .. }) => "migration resume",
            Self::Migration(MigrationCommand::Cancel { .. }) => "migration cancel",
        }
    }
}

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

/// `cluster ...`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Write all that the controllers have agreed on to a file.
    ///
    /// It holds everything that was answered before: VMs, replicas, moves, links, answers to repeated requests; no disks and no memory. Take one
    /// after each change of the fleet that you would not like to make again, and keep it where the controllers are not. It is for the case that a
    /// majority of the controllers is lost for good: "pageport-controller --restore FILE" begins a new cluster from it. The file appears whole or
    /// not at all.
    #[command(after_help = BACKUP_EXAMPLE)]
    Backup {
        /// Where to.
        file: PathBuf,
        /// Replace a file that is there.
        #[arg(long)]
        replace: bool,
    },
    /// Members, leader and log positions.
    ///
    /// When the leader answers (name its address with --controllers): also what each member lacks of the log, and for how long it has
    /// been silent.
    Status,
    /// Add a controller, and follow it until it votes; or give one that is there another address.
    ///
    /// The new controller first only receives the log. When it has caught up it gets its vote, which is when this command ends. Interrupted, or
    /// when the new controller does not answer, it stays without a vote: give the same command again, or take it back with `cluster remove`.
    /// Everything else goes on meanwhile. Three or five controllers at as many sites are what to aim for: an even number tolerates no more failures
    /// than one fewer.
    #[command(after_help = ADD_MEMBER_EXAMPLE)]
    Add {
        /// Number of the controller, as in its configuration; none that was ever used.
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
        /// Its site.
        #[arg(long, value_name = "SITE")]
        site: String,
        /// Where the other controllers, the workers and pageportctl reach it.
        #[arg(long, value_name = "HOST:PORT")]
        address: String,
    },
    /// Remove a controller for good.
    ///
    /// It stops with a message, and its number is never given again. If it leads another takes over first. Refused when fewer than a majority
    /// of those that are left answer: nothing could be decided any more.
    #[command(after_help = REMOVE_MEMBER_EXAMPLE)]
    Remove {
        /// Number of the controller.
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
        /// Also when fewer than a majority of those that are left answer.
        #[arg(long)]
        force: bool,
    },
    /// Make another controller lead, and wait until it does.
    ///
    /// For a planned stop of the leader's host: without it the others elect a leader only after 1.5 to 3 s of silence. Commands
    /// that come meanwhile wait for the new leader; migrations, replication and guests go on. Refused when the member does not
    /// vote, does not answer or lacks much of the log; then nothing has changed.
    #[command(after_help = TRANSFER_EXAMPLE)]
    TransferLeader {
        /// Number of the member; left out: the one with the most complete log.
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        member: Option<u64>,
    },
}

const BACKUP_EXAMPLE: &str = "\
Example:
  pageportctl cluster backup --replace /var/backups/pageport-controllers";

const ADD_MEMBER_EXAMPLE: &str = "\
Example, a fourth controller that takes the place of controller 2, whose host is lost:
  on its host: controller.toml with id = 4, join = true, the three [[members]] that there are; then
  systemctl start pageport-controller
  pageportctl cluster add 4 --site b --address 192.0.2.4:7400
  pageportctl cluster remove 2
  pageportctl cluster status";

const REMOVE_MEMBER_EXAMPLE: &str = "\
Example:
  pageportctl cluster remove 2
Then stop its service for good and delete its data_dir. Take its address out of the lists of controllers in worker.toml and ctl.toml.";

const TRANSFER_EXAMPLE: &str = "\
Example:
  pageportctl cluster status                 who leads
  pageportctl cluster transfer-leader        someone else, before its host is stopped
  pageportctl cluster transfer-leader 2";

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

const RESIZE_EXAMPLE: &str = "\
Example:
  pageportctl disk resize web root --size 20GiB
  pageportctl vm get web                         its disks, and how large they are now";

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

const ADD_EXAMPLE: &str = "\
Example:
  pageportctl disk add web data --size 100GiB
  pageportctl disk add web data --size 100GiB --path /var/lib/pageport/images/web-data.img
  pageportctl replica list web                   PROBLEM says which replicas do not hold it yet";

/// `replica ...`
#[derive(Debug, Subcommand)]
pub enum ReplicaCommand {
    /// Copy a VM's disks to a site, or go on with a copy.
    Seed {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica.
        #[arg(long, value_name = "SITE")]
        to: String,
        /// Follow the copy until it has ended.
        #[arg(long)]
        watch: bool,
    },
    /// List a VM's replicas.
    List {
        /// Name or id of the VM.
        vm: String,
    },
    /// Delete a replica and its files.
    Delete {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica.
        #[arg(long, value_name = "SITE")]
        site: String,
    },
}

/// `replication ...`
#[derive(Debug, Subcommand)]
pub enum ReplicationCommand {
    /// Show every protected VM and site: phase, newest recovery point, lag against the target, and the worst it has been.
    ///
    /// LAG is the age of the newest recovery point, BEHIND what the guest has written since. With --watch the table is shown
    /// again as it changes, until Ctrl-C.
    Status {
        /// Name or id of a VM; left out: all.
        vm: Option<String>,
        /// Show it again as it changes.
        #[arg(long)]
        watch: bool,
    },
    /// Compare a protected replica with the VM's disks, block by block, and repair what differs.
    ///
    /// Both are read from the files themselves, and compared by digest; blocks that differ are brought with the next recovery point. Recovery points
    /// are taken as often as without, and the guest's writes slow it down, not the other way round. It goes on after a restart of
    /// anything; ordered again it begins anew. `replication status` shows how far it is and what the last one found. The exit code is 0
    /// whether something differed or not.
    #[command(after_help = SCRUB_EXAMPLE)]
    Scrub {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica; may be left out if there is one only.
        #[arg(long, value_name = "SITE")]
        site: Option<String>,
        /// Follow it until it has ended.
        #[arg(long)]
        watch: bool,
    },
}

/// `recovery-point ...`
#[derive(Debug, Subcommand)]
pub enum RecoveryPointCommand {
    /// List the recovery points that a site holds of a VM, oldest first, and those that are open for reading.
    List {
        /// Name or id of the VM.
        vm: String,
        /// Site of the replica; may be left out if there is one only.
        #[arg(long, value_name = "SITE")]
        site: Option<String>,
    },
    /// Open a recovery point for reading over NBD, for a drill or to fetch files; replication goes on.
    ///
    /// Each disk of the VM is an export `VM/DISK`, read-only, as it was at that point, at a unix socket on the host of the replica that only the worker's
    /// user may use. What is needed to read it is kept until the export is closed or its time is over, also across restarts of the
    /// worker, but never at the cost of newer recovery points: if the room is needed it ends, and `recovery-point list` says why. Opened
    /// again, it ends when the new order says.
    #[command(after_help = OPEN_EXAMPLE)]
    Open {
        /// Name or id of the VM.
        vm: String,
        /// Number of the recovery point.
        #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        number: u64,
        /// Site of the replica; may be left out if there is one only.
        #[arg(long, value_name = "SITE")]
        site: Option<String>,
        /// Until it ends at the latest (1s to 168h).
        #[arg(long = "for", value_name = "DURATION", default_value = "24h")]
        lasts: Span,
        /// Listen at this TCP address of the replica's host, too (port 0: any that is free).
        ///
        /// NBD has neither users nor encryption: WHOEVER REACHES THE PORT READS THE DISKS. So it must be a loopback address, or one
        /// that drill.listen in the worker's worker.toml names.
        #[arg(long, value_name = "IP:PORT")]
        listen: Option<std::net::SocketAddr>,
    },
    /// Close a recovery point that is open for reading; readers are cut off.
    Close {
        /// Name or id of the VM.
        vm: String,
        /// Number of the recovery point.
        #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        number: u64,
        /// Site of the replica; may be left out if there is one only.
        #[arg(long, value_name = "SITE")]
        site: Option<String>,
    },
}

/// `link ...`
#[derive(Debug, Subcommand)]
pub enum LinkCommand {
    /// List the links between sites with their caps.
    List,
    /// Bound what is sent from one site to another; takes effect while it runs.
    ///
    /// Migrations share the budget evenly, and replication gets what they leave, a fifth of it at least. The cap is of replication alone.
    #[command(after_help = LINK_EXAMPLE, group = clap::ArgGroup::new("limits").required(true).multiple(true))]
    Set {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
        /// Of each worker's replication and seeds, in bits per second, like 100mbit or 1gbit (100kbit at least), or none.
        #[arg(long, value_name = "RATE", group = "limits")]
        cap: Option<Cap>,
        /// Of all, migrations and replication together, or none.
        #[arg(long, value_name = "RATE", group = "limits")]
        budget: Option<Cap>,
        /// Migrations at a time (1 to 256); 0: as `scheduler get` says.
        #[arg(long, value_name = "N", group = "limits", value_parser = clap::value_parser!(u32).range(0..=256))]
        migrations: Option<u32>,
    },
}

/// `migration ...`
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// Forecast what a move of a running VM would take; nothing moves.
    ///
    /// Its worker looks at a few of the guest's pages and at how fast the guest changes them, and tries the link for a second and a half: about five
    /// seconds in all. The guest goes on. The record of a move that follows within the hour has forecast and actual side by side.
    #[command(after_help = QUOTE_EXAMPLE)]
    Quote {
        /// Name or id of the VM.
        vm: String,
        /// Destination site.
        #[arg(long, value_name = "SITE")]
        to: String,
    },
    /// Show one migration, with its record when it has ended.
    Get {
        /// Id of the migration.
        id: String,
    },
    /// List migrations.
    List {
        /// Only those of this VM.
        #[arg(long, value_name = "VM")]
        vm: Option<String>,
    },
    /// Follow a migration until it has ended.
    Watch {
        /// Id of the migration.
        id: String,
    },
    /// Change the priority or the rate of a migration that waits or runs, or what becomes of it if it does not converge.
    #[command(group = clap::ArgGroup::new("what").arg("convergence").required(true).multiple(true))]
    Set {
        /// Id of the migration.
        id: String,
        /// 0 to 100; more is sooner.
        #[arg(long, value_name = "N", group = "what", value_parser = clap::value_parser!(u32).range(0..=100))]
        priority: Option<u32>,
        /// What it may send at most, like 50mbit; none: its part of the link's budget.
        #[arg(long, value_name = "RATE", group = "what")]
        rate: Option<Cap>,
        /// If it does not converge.
        #[command(flatten)]
        convergence: ConvergenceArgs,
    },
    /// Hold a migration: one that waits does not begin, one that runs hardly sends and its guest is not stopped.
    Pause {
        /// Id of the migration.
        id: String,
    },
    /// Let a migration go on that was paused.
    Resume {
        /// Id of the migration.
        id: String,
    },
    /// Ask for a migration to be cancelled; one that waits is cancelled at once.
    Cancel {
        /// Id of the migration.
        id: String,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli =
            Cli::try_parse_from(["pageportctl", "migrate", "web", "--to", "b", "--json", "--controllers", "x:1,y:2"])
                .unwrap();
        assert!(cli.json);
        assert_eq!(cli.connection.controllers, ["x:1", "y:2"]);
    }

    #[test]
    fn a_protection_has_defaults_and_its_values_are_parsed_at_once() {
        let parse =
            |more: &[&str]| Cli::try_parse_from([&["pageportctl", "protect", "web", "--to", "b"], more].concat());
        let Command::Protect { rpo, keep, watch, .. } = parse(&[]).unwrap().command else { panic!() };
        assert_eq!((rpo, keep, watch), (Span(30_000), 10, false));
        let given = parse(&["--rpo", "5m", "--keep", "24"]).unwrap().command;
        let Command::Protect { rpo, keep, .. } = given else { panic!() };
        assert_eq!((rpo, keep), (Span(300_000), 24));
        assert!(parse(&["--rpo", "30"]).unwrap_err().to_string().contains("like 30s or 5m"));
        assert!(parse(&["--keep", "0"]).is_err());
        let placed = parse(&["--place", "root=/dev/vg0/a=b", "--place", "logs=/dev/sdb"]).unwrap().command;
        let Command::Protect { place, .. } = placed else { panic!() };
        let places: Vec<_> = place.iter().map(|place| (place.disk.as_str(), place.path.as_str())).collect();
        assert_eq!(places, [("root", "/dev/vg0/a=b"), ("logs", "/dev/sdb")]);
        for wrong in ["/dev/sdb", "=/dev/sdb", "root=", "root=sdb"] {
            assert!(parse(&["--place", wrong]).unwrap_err().to_string().contains("like root=/dev/vg0/web"));
        }
        assert!(Cli::try_parse_from(["pageportctl", "link", "set", "a", "b", "--cap", "100MB"]).is_err());
    }

    #[test]
    fn a_change_that_names_nothing_is_refused() {
        let parse = |words: &[&str]| Cli::try_parse_from([&["pageportctl"], words].concat());
        for nothing in [&["link", "set", "a", "b"][..], &["migration", "set", "m1"], &["scheduler", "set"]] {
            assert!(parse(nothing).is_err(), "{nothing:?}");
        }
        parse(&["link", "set", "a", "b", "--budget", "1gbit", "--migrations", "2"]).unwrap();
        parse(&["migration", "set", "m1", "--rate", "none"]).unwrap();
        parse(&["migration", "set", "m1", "--convergence", "throttle"]).unwrap();
        parse(&["scheduler", "set", "--per-link", "1", "--memory-percent", "90"]).unwrap();
        assert!(parse(&["site", "drain", "a", "--dry-run", "--watch"]).is_err());
    }

    #[test]
    fn a_controller_is_added_with_its_site_and_address() {
        let parse = |more: &[&str]| Cli::try_parse_from([&["pageportctl", "cluster"], more].concat());
        let whole = ["add", "4", "--site", "b", "--address", "192.0.2.4:7400"];
        let Command::Cluster(ClusterCommand::Add { id, site, address }) = parse(&whole).unwrap().command else {
            panic!()
        };
        assert_eq!((id, site.as_str(), address.as_str()), (4, "b", "192.0.2.4:7400"));
        for wrong in [&whole[..2], &whole[..4], &["remove"], &["remove", "0"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_leader_is_named_by_its_number_or_left_to_be_chosen() {
        let parse =
            |more: &[&str]| Cli::try_parse_from([&["pageportctl", "cluster", "transfer-leader"], more].concat());
        for (given, expected) in [(&[][..], None), (&["2"], Some(2))] {
            let Command::Cluster(ClusterCommand::TransferLeader { member }) = parse(given).unwrap().command else {
                panic!()
            };
            assert_eq!(member, expected);
        }
        assert!(parse(&["0"]).is_err() && parse(&["controller-2"]).is_err());
    }

    #[test]
    fn a_point_is_open_for_a_day_unless_it_says_otherwise() {
        let parse =
            |more: &[&str]| Cli::try_parse_from([&["pageportctl", "recovery-point", "open", "web"], more].concat());
        let Command::RecoveryPoint(RecoveryPointCommand::Open { number, lasts, listen, site, .. }) =
            parse(&["41"]).unwrap().command
        else {
            panic!()
        };
        assert_eq!((number, lasts, listen, site), (41, Span(24 * 3_600_000), None, None));
        parse(&["41", "--for", "2h", "--listen", "127.0.0.1:10809", "--site", "b"]).unwrap();
        for wrong in [&[][..], &["0"], &["x"], &["41", "--for", "2"], &["41", "--listen", "10809"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
