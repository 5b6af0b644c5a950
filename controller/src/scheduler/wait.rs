//! [`Wait`]: why a move has not begun; [`GivenUp`]: why it never will. Both read as one sentence.

use std::fmt;

use pageport_proto::{MigrationId, SiteName, WorkerName};

use super::window::Window;

/// What moves take turns at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// A worker's part in moves.
    Worker(WorkerName),
    /// From a site to another.
    Link(SiteName, SiteName),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(worker) => write!(f, "worker \"{worker}\""),
            Self::Link(from, to) => write!(f, "the link from \"{from}\" to \"{to}\""),
        }
    }
}

/// A VM at the target site has the same MAC address on the same bridge.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "vm \"{vm}\" at site \"{site}\" has the same MAC address, {mac}, on bridge {bridge}: stop it, move it away, or define one of the two anew with an \
     address of its own"
)]
pub struct SameAddress {
    /// Who is there.
    pub vm: String,
    /// Where.
    pub site: SiteName,
    /// The address.
    pub mac: String,
    /// What both are joined to.
    pub bridge: String,
}

/// Why a move waits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Wait {
    /// An operator said so.
    #[error("paused: \"pageportctl migration resume\" lets it go on")]
    Paused,
    /// Another move comes first.
    #[error("waits for migration {id} of vm \"{vm}\", after which it is to run")]
    After {
        /// The other move.
        id: MigrationId,
        /// Its VM.
        vm: String,
    },
    /// Not at this time of the day.
    #[error("waits for its window, {window} UTC")]
    Window {
        /// When it may begin.
        window: Window,
    },
    /// As the VM or its replica is, it cannot move.
    #[error("waits until it can move: {why}")]
    NotMovable {
        /// What an order would be told.
        why: String,
    },
    /// One of its two workers is silent.
    #[error("waits for worker \"{worker}\", which is not connected")]
    WorkerAway {
        /// The worker.
        worker: WorkerName,
    },
    /// It fences itself, and would not be watched.
    #[error(
        "waits for a guard on worker \"{worker}\": the vm fences itself, and pageport-guard.service is not seen there"
    )]
    NotGuarded {
        /// The worker.
        worker: WorkerName,
    },
    /// The target is being emptied.
    #[error("waits because worker \"{worker}\" is being drained: undrain it, or cancel the move")]
    Drained {
        /// The target.
        worker: WorkerName,
    },
    /// The target is full.
    #[error("waits for memory on worker \"{worker}\": the vm needs {} MiB, {} MiB are free", needs_bytes >> 20, free_bytes >> 20)]
    NoMemory {
        /// The target.
        worker: WorkerName,
        /// What the VM has.
        needs_bytes: u64,
        /// What no VM has there.
        free_bytes: u64,
    },
    /// The target runs one that it must not share a host with.
    #[error("waits because vm \"{vm}\" is on worker \"{worker}\", and both are in anti-affinity group \"{group}\"")]
    Apart {
        /// The target.
        worker: WorkerName,
        /// The group.
        group: String,
        /// Who is there.
        vm: String,
    },
    /// It would meet its own address.
    #[error("waits because {0}")]
    SameAddress(SameAddress),
    /// A worker takes part in as many moves as it may.
    #[error("waits for worker \"{worker}\", which takes part in {limit} migrations, as many as it may")]
    WorkerBusy {
        /// The worker.
        worker: WorkerName,
        /// How many it may.
        limit: u32,
    },
    /// A link carries as many moves as it may.
    #[error("waits for the link from \"{from}\" to \"{to}\", which carries {limit} migrations, as many as it may")]
    LinkBusy {
        /// From where.
        from: SiteName,
        /// To where.
        to: SiteName,
        /// How many it may.
        limit: u32,
    },
    /// Another one would leave each too little.
    #[error("waits for bandwidth from \"{from}\" to \"{to}\": {running} migrations share what the budget of {} Mbit/s leaves them", budget_bps / 1_000_000)]
    LinkFull {
        /// From where.
        from: SiteName,
        /// To where.
        to: SiteName,
        /// How many are under way.
        running: u32,
        /// The link's budget.
        budget_bps: u64,
    },
    /// Others are first.
    #[error("waits behind vm \"{vm}\" for {resource}")]
    Behind {
        /// Whose turn it is.
        vm: String,
        /// For what.
        resource: Resource,
    },
}

/// Why a queued move will not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GivenUp {
    /// It is too late.
    #[error("it had not begun by its deadline; {}", .waited.as_ref().map_or_else(|| "it was its turn only then".to_owned(), |wait| format!("at the end: {wait}")))]
    Deadline {
        /// For what it waited last.
        waited: Option<Box<Wait>>,
    },
    /// What it was to run after has not come about.
    #[error("migration {id}, after which it was to run, did not complete")]
    Predecessor {
        /// The other move.
        id: MigrationId,
    },
    /// There is nothing to move.
    #[error("the vm is gone")]
    Gone,
}
