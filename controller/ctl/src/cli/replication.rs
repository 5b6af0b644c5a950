//! Replicas, their recovery points, and the links between sites.

use clap::Subcommand;

use crate::quantity::{Cap, Span};

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

const LINK_EXAMPLE: &str = "\
Example:
  pageportctl link set a b --cap 100mbit    from a to b; the way back has a cap of its own
  pageportctl link set a b --cap none
  pageportctl link set a b --budget 1gbit --migrations 2";
