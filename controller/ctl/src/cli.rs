//! The grammar of the command line.
//!
//! Global options may stand before or after the command. Nothing is looked up here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

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
    /// Copies of a VM's disks at other sites.
    #[command(subcommand)]
    Replica(ReplicaCommand),
    /// Move a running VM to another site.
    Migrate {
        /// Name or id of the VM.
        vm: String,
        /// Destination site.
        #[arg(long, value_name = "SITE")]
        to: String,
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

impl Command {
    /// Its name for people who look at traces.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Site(SiteCommand::List) => "site list",
            Self::Worker(WorkerCommand::List) => "worker list",
            Self::Worker(WorkerCommand::Fence { .. }) => "worker fence",
            Self::Cluster(ClusterCommand::Status) => "cluster status",
            Self::Vm(VmCommand::Define { .. }) => "vm define",
            Self::Vm(VmCommand::List) => "vm list",
            Self::Vm(VmCommand::Get { .. }) => "vm get",
            Self::Vm(VmCommand::Start { .. }) => "vm start",
            Self::Vm(VmCommand::Stop { .. }) => "vm stop",
            Self::Vm(VmCommand::Delete { .. }) => "vm delete",
            Self::Vm(VmCommand::Resolve { .. }) => "vm resolve",
            Self::Vm(VmCommand::Console { .. }) => "vm console",
            Self::Replica(ReplicaCommand::Seed { .. }) => "replica seed",
            Self::Replica(ReplicaCommand::List { .. }) => "replica list",
            Self::Replica(ReplicaCommand::Delete { .. }) => "replica delete",
            Self::Migrate { .. } => "migrate",
            Self::Migration(MigrationCommand::Get { .. }) => "migration get",
            Self::Migration(MigrationCommand::List { .. }) => "migration list",
            Self::Migration(MigrationCommand::Watch { .. }) => "migration watch",
            Self::Migration(MigrationCommand::Cancel { .. }) => "migration cancel",
        }
    }
}

/// `site ...`
#[derive(Debug, Subcommand)]
pub enum SiteCommand {
    /// List the sites.
    List,
}

/// `worker ...`
#[derive(Debug, Subcommand)]
pub enum WorkerCommand {
    /// List the workers.
    List,
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
}

/// `cluster ...`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Members, leader and log positions.
    Status,
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

/// `migration ...`
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
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
    /// Ask for a migration to be cancelled.
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
}
