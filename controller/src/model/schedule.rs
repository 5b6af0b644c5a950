//! What the scheduler is told: terms of one order, limits of all, budgets of links, and places that are to be emptied.
//!
//! Everything here is an operator's word; what follows from it is decided in [`crate::scheduler`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;

use pageport_proto::{LONGEST_PAUSE_MS, MigrationId, SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::command::{Answer, Outcome};
use super::convergence::Convergence;
use super::protection::MIN_CAP_BPS;
use super::rejection::Rejection;
use super::state::State;
use crate::scheduler::Window;
use crate::scheduler::plan::{DEFAULT_PRIORITY, MAX_PRIORITY};

/// Moves that a worker takes part in or a link carries at a time, as can be ordered.
pub const SLOTS: RangeInclusive<u32> = 1..=256;
/// Of a host's memory, what VMs may have together, as can be ordered, in per cent.
pub const MEMORY_PERCENT: RangeInclusive<u32> = 10..=1000;
/// Moves that one order may be told to wait for.
pub const MAX_AFTER: usize = 64;
/// Moves that one drain orders with one command: many commands are better than one that is too large.
pub const MAX_DRAINED_AT_ONCE: usize = 256;

/// On which terms a move is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// 0 to 100.
    pub priority: u8,
    /// What it may send, in bits per second; 0: its part of the link.
    pub rate_bps: u64,
    /// It is to begin before this.
    pub deadline_unix_ms: Option<i64>,
    /// It begins only then.
    pub window: Option<Window>,
    /// What is to complete first.
    pub after: BTreeSet<MigrationId>,
    /// An operator holds it.
    pub paused: bool,
    /// It empties a site or worker.
    pub drains: bool,
    /// What becomes of it if it does not converge.
    #[serde(default)]
    pub convergence: Convergence,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            priority: DEFAULT_PRIORITY,
            rate_bps: 0,
            deadline_unix_ms: None,
            window: None,
            after: BTreeSet::new(),
            paused: false,
            drains: false,
            convergence: Convergence::default(),
        }
    }
}

/// What of a move's terms is to be another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The priority.
    pub priority: Option<u8>,
    /// The rate; 0: its part of the link.
    pub rate_bps: Option<u64>,
    /// Held, or not.
    pub paused: Option<bool>,
    /// What becomes of it if it does not converge.
    #[serde(default)]
    pub convergence: Option<Convergence>,
}

/// Limits for all moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Moves that one worker takes part in.
    pub per_worker: u32,
    /// Moves over one link that has no number of its own.
    pub per_link: u32,
    /// Of a host's memory, what VMs may have together, in per cent.
    pub memory_percent: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { per_worker: 4, per_link: 4, memory_percent: 100 }
    }
}

/// What is ordered of one link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkLimits {
    /// For all that is sent over it, in bits per second; 0: no budget.
    pub budget_bps: u64,
    /// Moves at a time; 0: as [`Limits::per_link`] says.
    pub migrations: u32,
}

/// What is being emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The only site that will do; [`None`]: wherever a replica is.
    pub to: Option<SiteName>,
    /// Of its moves.
    pub priority: u8,
    /// When it was ordered.
    pub ordered_unix_ms: i64,
    /// VMs that have left since.
    pub moved: u64,
}

/// A site, or one worker of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Spot {
    /// All workers of a site.
    Site(SiteName),
    /// One worker.
    Worker(WorkerName),
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Site(site) => write!(f, "site \"{site}\""),
            Self::Worker(worker) => write!(f, "worker \"{worker}\""),
        }
    }
}

/// One move of a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainMove {
    /// Id of the move.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Where to.
    pub site: SiteName,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// For all moves.
    #[serde(default)]
    pub limits: Limits,
    /// By source and destination.
    #[serde(default)]
    links: BTreeMap<SiteName, BTreeMap<SiteName, LinkLimits>>,
    /// Sites that are being emptied.
    #[serde(default)]
    pub sites: BTreeMap<SiteName, Drain>,
    /// Workers that are being emptied.
    #[serde(default)]
    pub workers: BTreeMap<WorkerName, Drain>,
    /// Grows with whatever an admission could have been decided without.
    #[serde(default)]
    pub seq: u64,
}

impl Schedule {
    /// What is ordered of a link.
    pub fn link(&self, from: &SiteName, to: &SiteName) -> LinkLimits {
        self.links.get(from).and_then(|links| links.get(to)).copied().unwrap_or_default()
    }

    /// Every link of which something is ordered.
    pub fn links(&self) -> impl Iterator<Item = (&SiteName, &SiteName, LinkLimits)> {
        self.links.iter().flat_map(|(from, links)| links.iter().map(move |(to, limits)| (from, to, *limits)))
    }

    /// How a place is being emptied, if it is.
    pub fn drain(&self, spot: &Spot) -> Option<&Drain> {
        match spot {
            Spot::Site(site) => self.sites.get(site),
            Spot::Worker(worker) => self.workers.get(worker),
        }
    }

    /// Is a worker, or its site, being emptied?
    pub fn is_drained(&self, worker: &WorkerName, site: &SiteName) -> bool {
        self.workers.contains_key(worker) || self.sites.contains_key(site)
    }

    /// Everything that is being emptied.
    pub fn drains(&self) -> Vec<(Spot, &Drain)> {
        let sites = self.sites.iter().map(|(site, drain)| (Spot::Site(site.clone()), drain));
        sites.chain(self.workers.iter().map(|(worker, drain)| (Spot::Worker(worker.clone()), drain))).collect()
    }

    /// A VM has left.
    pub(super) fn has_left(&mut self, worker: &WorkerName, site: &SiteName) {
        let drains = [self.sites.get_mut(site), self.workers.get_mut(worker)];
        drains.into_iter().flatten().for_each(|drain| drain.moved += 1);
    }
}

/// Terms or limits that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The priority.
    #[error("priority {priority} cannot be: give 0 to {MAX_PRIORITY}; more is sooner, {DEFAULT_PRIORITY} is usual")]
    Priority {
        /// What was asked for.
        priority: u32,
    },
    /// A rate or a budget.
    #[error("{what} cannot be {bps} bit/s: give at least 100 kbit/s, or none")]
    Rate {
        /// Of what.
        what: &'static str,
        /// What was asked for.
        bps: u64,
    },
    /// Too late already.
    #[error("the deadline has passed already: give one to come, or none")]
    Deadline,
    /// The window.
    #[error(transparent)]
    Window(#[from] crate::scheduler::window::ParseWindowError),
    /// Too many predecessors.
    #[error("a migration can be told to run after {MAX_AFTER} others at most, {count} were named")]
    After {
        /// How many were named.
        count: usize,
    },
    /// What becomes of a move that does not converge.
    #[error("there is no convergence policy {policy}: give 1 (wait), 2 (throttle), 3 (longer-pause) or 4 (give-up)")]
    Convergence {
        /// What was asked for.
        policy: i32,
    },
    /// The longest pause.
    #[error(
        "a longer pause needs its maximum, from {} ms to {} ms, and {ms} ms is none: say how long the guest may stand still",
        LONGEST_PAUSE_MS.start(),
        LONGEST_PAUSE_MS.end()
    )]
    LongestPause {
        /// What was asked for.
        ms: u64,
    },
    /// A longest pause, for nothing.
    #[error("a longest pause belongs to the policy longer-pause alone: choose that one, or leave the pause out")]
    NoLongerPause,
    /// The number of moves at a time.
    #[error("{count} migrations at a time cannot be: give 1 to 256")]
    Slots {
        /// What was asked for.
        count: u32,
    },
    /// The share of memory.
    #[error("{percent} % of a host's memory cannot be given to vms: give 10 to 1000")]
    MemoryPercent {
        /// What was asked for.
        percent: u32,
    },
}

/// A priority as it may be ordered.
///
/// # Errors
/// [`ScheduleError::Priority`].
pub fn valid_priority(priority: u32) -> Result<u8, ScheduleError> {
    u8::try_from(priority).ok().filter(|it| *it <= MAX_PRIORITY).ok_or(ScheduleError::Priority { priority })
}

/// A rate as it may be ordered; 0: none.
///
/// # Errors
/// [`ScheduleError::Rate`].
pub fn valid_rate(what: &'static str, bps: u64) -> Result<u64, ScheduleError> {
    if bps == 0 || bps >= MIN_CAP_BPS { Ok(bps) } else { Err(ScheduleError::Rate { what, bps }) }
}

/// A number of moves at a time as it may be ordered.
///
/// # Errors
/// [`ScheduleError::Slots`].
pub fn valid_slots(count: u32) -> Result<u32, ScheduleError> {
    if SLOTS.contains(&count) { Ok(count) } else { Err(ScheduleError::Slots { count }) }
}

/// A share of memory as it may be ordered, in per cent.
///
/// # Errors
/// [`ScheduleError::MemoryPercent`].
pub fn valid_memory_percent(percent: u32) -> Result<u32, ScheduleError> {
    if MEMORY_PERCENT.contains(&percent) { Ok(percent) } else { Err(ScheduleError::MemoryPercent { percent }) }
}

/// Sets what is ordered of a link.
pub(super) fn set_link_limits(state: &mut State, from: SiteName, to: SiteName, limits: LinkLimits) -> Outcome {
    if from == to {
        return Err(Rejection::NoLink { site: from });
    }
    state.schedule.links.entry(from).or_default().insert(to, limits);
    state.schedule.seq += 1;
    Ok(Answer::Done)
}

/// Sets the limits of all moves.
pub(super) fn set_limits(state: &mut State, limits: Limits) -> Outcome {
    state.schedule.limits = limits;
    state.schedule.seq += 1;
    Ok(Answer::Done)
}
