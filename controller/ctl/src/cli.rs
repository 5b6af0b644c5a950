//! The grammar of the command line.
//!
//! Global options may stand before or after the command. Nothing is looked up here.

mod cluster;
mod fleet;
mod replication;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use cluster::ClusterCommand;
pub use fleet::{DiskCommand, SiteCommand, VmCommand, WorkerCommand};
pub use replication::{LinkCommand, RecoveryPointCommand, ReplicaCommand, ReplicationCommand};

use crate::place::Place;
use crate::quantity::{Cap, Span};
use crate::terms::{ConvergenceArgs, SchedulerCommand, TermsArgs};

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
        /// Make the replica in this pool of storage of the site's host, and keep its recovery points there.
        ///
        /// `worker pools` shows the pools of each host, which its worker.toml names. Chosen once: a replica that is there is not moved, delete it first. Disks with
        /// a --place lie there, and the recovery points in the pool. Left out: where the replica lies already, or in the pool "default".
        #[arg(long, value_name = "NAME")]
        pool: Option<String>,
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

const PROTECT_EXAMPLE: &str = "\
Example:
  pageportctl link set a b --cap 100mbit          what replication may send from a to b, if it should not take all
  pageportctl protect web --to b --rpo 30s --watch
  pageportctl protect mail --to b --place root=/dev/vg0/mail-root --place spool=/dev/vg0/mail-spool
  pageportctl protect logs --to b --pool hdd      in another pool of b's host; `worker pools` shows them
  pageportctl protect db --to b --quiesce         file systems at rest in each point; the guest needs qemu-guest-agent
  pageportctl replication status web --watch      lag against the target, and the worst it has been
  pageportctl recovery-point list web --site b
  pageportctl recovery-point open web 41 --for 2h   read it as it was then, for a drill";

const PREFLIGHT_EXAMPLE: &str = "\
Example:
  pageportctl migration preflight web --to b && pageportctl migrate web --to b
  pageportctl migration preflight web --to b --json | jq '.findings[] | select(.severity != \"ok\")'";

const QUOTE_EXAMPLE: &str = "\
Example:
  pageportctl migration quote web --to b
  pageportctl migration quote web --to b --json | jq '.total_time_ms.high'    milliseconds at worst; null: it would not end";

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
            Self::Worker(WorkerCommand::Pools) => "worker pools",
            Self::Worker(WorkerCommand::Fence { .. }) => "worker fence",
            Self::Worker(WorkerCommand::DeclareDead { .. }) => "worker declare-dead",
            Self::Cluster(ClusterCommand::Restore { .. }) => "cluster restore",
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
            Self::Vm(VmCommand::Adopt { .. }) => "vm adopt",
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
            Self::Migration(MigrationCommand::Preflight { .. }) => "migration preflight",
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

/// `migration ...`
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// Look for what would hinder a move of a running VM; nothing moves, and nothing is changed.
    ///
    /// The controllers say whether an order would be taken and begin; the VM's worker asks the one at the destination: the link both ways, certificates and
    /// clocks, versions of QEMU, machine type and CPU model, memory, disk space and bridges. Each finding comes with its fix. The exit code is 0 unless one
    /// blocks the move. Every move looks at the same before any byte of it moves, fails if something blocks it, and keeps the warnings in its record.
    #[command(after_help = PREFLIGHT_EXAMPLE)]
    Preflight {
        /// Name or id of the VM.
        vm: String,
        /// Destination site.
        #[arg(long, value_name = "SITE")]
        to: String,
    },
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
        let Command::Protect { pool, .. } = parse(&["--pool", "ssd"]).unwrap().command else { panic!() };
        assert_eq!(pool.as_deref(), Some("ssd"));
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
