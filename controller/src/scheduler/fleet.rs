//! [`Fleet`]: all that decisions are made from, as plain values in ordered maps.

use std::collections::{BTreeMap, BTreeSet};

use pageport_proto::{MigrationId, SiteName, VmId, WorkerName};

use super::window::Window;

/// How many moves may be under way, and how full hosts may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Moves that one worker takes part in, as source or destination.
    pub per_worker: u32,
    /// Moves over one link, where the link has no number of its own.
    pub per_link: u32,
    /// Of a host's memory, what VMs may have together, in per cent.
    pub memory_percent: u32,
}

/// A hypervisor host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its site.
    pub site: SiteName,
    /// Its memory in bytes; 0: not known, and not minded.
    pub memory_bytes: u64,
    /// Its worker has reported lately.
    pub connected: bool,
    /// A guard watches its keepers.
    pub guarded: bool,
    /// It, or its site, is being emptied.
    pub drained: bool,
}

/// A directed link between two sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Line {
    /// For all that is sent over it, in bits per second; 0: no budget.
    pub budget_bps: u64,
    /// What replication keeps of the budget, in bits per second.
    pub reserved_bps: u64,
    /// Moves at a time; 0: as [`Limits::per_link`] says.
    pub migrations: u32,
}

/// A VM that runs, or is to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub worker: WorkerName,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Groups of VMs that never share a host.
    pub apart: BTreeSet<String>,
    /// It fences itself: it goes only where a guard is.
    pub fences_itself: bool,
    /// Those of its network cards whose MAC address another guest has, too.
    pub shared: BTreeSet<Nic>,
}

/// A network card: two on one segment with the same address disturb each other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nic {
    /// What it is joined to.
    pub bridge: String,
    /// Its address.
    pub mac: String,
}

/// A move that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The VM.
    pub vm: VmId,
    /// Its source.
    pub from: WorkerName,
    /// Its destination.
    pub to: WorkerName,
}

/// How a move stands that another one waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Predecessor {
    /// It may still complete.
    Pending {
        /// Its VM.
        vm: String,
    },
    /// It has.
    Completed,
    /// It never will.
    Failed,
}

/// A move that has not begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// The VM; not among the guests: it is gone, or does not run.
    pub vm: VmId,
    /// Where it goes, or why it cannot go there as things stand.
    pub to: Result<WorkerName, String>,
    /// When it was ordered.
    pub ordered_unix_ms: i64,
    /// 0 to 100.
    pub priority: u8,
    /// It is to begin before this.
    pub deadline_unix_ms: Option<i64>,
    /// It begins only then.
    pub window: Option<Window>,
    /// What is to complete first.
    pub after: BTreeMap<MigrationId, Predecessor>,
    /// An operator holds it.
    pub paused: bool,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fleet {
    /// For all.
    pub limits: Limits,
    /// Hosts.
    pub hosts: BTreeMap<WorkerName, Host>,
    /// Links that have something of their own.
    pub lines: BTreeMap<(SiteName, SiteName), Line>,
    /// VMs that run or are to.
    pub guests: BTreeMap<VmId, Guest>,
    /// VMs that are defined and not to run.
    pub resting: BTreeSet<VmId>,
    /// Moves that are under way.
    pub running: BTreeMap<MigrationId, Running>,
    /// Moves that have not begun.
    pub queued: BTreeMap<MigrationId, Queued>,
}

impl Fleet {
    /// What is known of a link.
    pub fn line(&self, from: &SiteName, to: &SiteName) -> Line {
        self.lines.get(&(from.clone(), to.clone())).copied().unwrap_or_default()
    }

    /// Moves that a link takes at a time.
    pub fn line_migrations(&self, from: &SiteName, to: &SiteName) -> u32 {
        match self.line(from, to).migrations {
            0 => self.limits.per_link,
            own => own,
        }
    }
}
