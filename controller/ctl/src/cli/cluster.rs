//! The controllers themselves.

use std::path::PathBuf;

use clap::Subcommand;

/// `cluster ...`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Write all that the controllers have agreed on to a file.
    ///
    /// It holds everything that was answered before: VMs, replicas, moves, links, answers to repeated requests; no disks and no memory. Take one
    /// after each change of the fleet that you would not like to make again, and keep it where the controllers are not. It is for the case that a
    /// majority of the controllers is lost for good: `cluster restore` begins a new cluster from it. The file appears whole or not at all.
    #[command(after_help = BACKUP_EXAMPLE)]
    Backup {
        /// Where to.
        file: PathBuf,
        /// Replace a file that is there.
        #[arg(long)]
        replace: bool,
    },
    /// Begin a new cluster from a backup: when a majority of the controllers is lost for good.
    ///
    /// On the host of its first controller this asks nobody, and runs "pageport-controller --restore FILE", as the user that the service has; start the
    /// service then. From elsewhere, with --at, it sends the backup to a controller that was started with "pageport-controller --await-restore", which
    /// goes on with it. Its configuration has a number (id) that none of the lost controllers had, itself as its only member, and an empty
    /// data_dir. None of the lost ones may ever run again. Add others to it with `cluster add`.
    #[command(after_help = RESTORE_EXAMPLE)]
    Restore {
        /// What `cluster backup` has written.
        file: PathBuf,
        /// A controller that waits for it; left out: the one of this host, which does not run.
        #[arg(long, value_name = "HOST:PORT", conflicts_with = "controller_config")]
        at: Option<String>,
        /// The configuration of this host's controller.
        #[arg(long, value_name = "FILE", default_value = "/etc/pageport/controller.toml")]
        controller_config: PathBuf,
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
    /// For a planned stop of the leader's host: without it the others elect a leader only after 1 to 2 s of silence. Commands
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

const RESTORE_EXAMPLE: &str = "\
Example, on the host that is to begin, whose controller.toml has id = 4 and only itself in [[members]]:
  sudo -u pageport pageportctl cluster restore /var/backups/pageport-controllers
  systemctl start pageport-controller
  pageportctl cluster status                 which workers have yet to report
From an operator's machine, while \"pageport-controller --await-restore\" runs there:
  pageportctl cluster restore /var/backups/pageport-controllers --at 192.0.2.4:7400";

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
