//! What must hold in every schedule, a file each; and the facts that they look at.

mod acknowledged;
mod epochs_grow;
mod memory_goes_on;
mod one_history;
mod one_leader;
mod one_runs;
mod settles;

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};

use pageport_controller::model::State;
use pageport_controller::model::command::Answer;
use pageport_ownership::Record;
use pageport_proto::{RequestId, VmId, WorkerName};

use crate::hypervisor::{Cause, Memory};

/// Something that has happened.
#[derive(Debug)]
pub enum Fact<'a> {
    /// A guest was booted; it does not run yet.
    Booted {
        /// Where.
        worker: &'a WorkerName,
        /// Whose.
        vm: VmId,
    },
    /// A guest runs from now on.
    GuestRuns {
        /// Where.
        worker: &'a WorkerName,
        /// Whose.
        vm: VmId,
        /// In which QEMU.
        instance: u64,
        /// What it remembers.
        memory: Memory,
    },
    /// A guest stands still from now on.
    GuestStops {
        /// Where.
        worker: &'a WorkerName,
        /// Whose.
        vm: VmId,
        /// In which QEMU.
        instance: u64,
        /// What it remembers.
        memory: Memory,
    },
    /// A QEMU holds a copy of a guest's memory.
    Loaded {
        /// Whose.
        vm: VmId,
        /// In which QEMU.
        instance: u64,
        /// What it remembers.
        memory: Memory,
    },
    /// A QEMU has ended.
    GuestGone {
        /// Where.
        worker: &'a WorkerName,
        /// Whose.
        vm: VmId,
        /// Which QEMU.
        instance: u64,
        /// Why.
        cause: Cause,
    },
    /// A worker's record is on stable storage.
    RecordWritten {
        /// Whose.
        worker: &'a WorkerName,
        /// About which VM.
        vm: VmId,
        /// The record.
        record: Record,
    },
    /// A worker has lost its store.
    StoreLost {
        /// Whose.
        worker: &'a WorkerName,
    },
    /// A controller leads.
    Leads {
        /// Which.
        node: u64,
        /// In which term.
        term: u64,
    },
    /// A controller takes an entry for committed.
    Committed {
        /// Which.
        node: u64,
        /// The entry.
        index: u64,
        /// As it lies on the controller's disk.
        entry: &'a [u8],
    },
    /// A controller has a new state.
    Applied {
        /// Which.
        node: u64,
        /// The state.
        state: &'a State,
    },
    /// A controller was started again, with what its disk holds.
    Restarted {
        /// Which.
        node: u64,
    },
    /// A client has sent a request.
    Asked {
        /// Its id.
        request: RequestId,
        /// For people.
        what: &'a str,
    },
    /// A client got its answer.
    Answered {
        /// To which request.
        request: RequestId,
        /// The answer.
        answer: &'a Answer,
    },
    /// A fault strikes, or is over.
    Fault {
        /// For people.
        what: &'a str,
    },
    /// Faults are over for long enough: this is how things are, seen by the leader and at each host.
    End {
        /// The leader's state; [`None`]: nobody leads.
        state: Option<&'a State>,
        /// Every QEMU whose guest runs.
        running: &'a [(WorkerName, VmId)],
        /// Every QEMU.
        present: &'a [(WorkerName, VmId)],
    },
}

/// One thing that must hold.
pub trait Invariant {
    /// Its name.
    fn name(&self) -> &'static str;

    /// Looks at a fact.
    ///
    /// # Errors
    /// What is wrong.
    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String>;
}

/// One thing that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Violation {
    /// When, in microseconds of the world's time.
    pub at_us: u64,
    /// Which invariant.
    pub invariant: &'static str,
    /// What is wrong.
    pub what: String,
}

/// All of them, and the trace.
#[allow(missing_debug_implementations, reason = "trait objects")]
pub struct Invariants {
    all: Vec<Box<dyn Invariant>>,
    violations: Vec<Violation>,
    digest: DefaultHasher,
    trace: Option<Vec<String>>,
    facts: u64,
}

impl Invariants {
    /// All of them. With `keep_trace` each fact is kept as a line.
    pub fn new(keep_trace: bool) -> Self {
        let all: Vec<Box<dyn Invariant>> = vec![
            Box::<one_runs::OneRuns>::default(),
            Box::<memory_goes_on::MemoryGoesOn>::default(),
            Box::<epochs_grow::EpochsGrow>::default(),
            Box::<one_leader::OneLeader>::default(),
            Box::<one_history::OneHistory>::default(),
            Box::<acknowledged::Acknowledged>::default(),
            Box::<settles::Settles>::default(),
        ];
        Self { all, violations: vec![], digest: DefaultHasher::new(), trace: keep_trace.then(Vec::new), facts: 0 }
    }

    /// Looks at a fact.
    pub fn see(&mut self, at_us: u64, fact: &Fact<'_>) {
        self.note(at_us, fact);
        for invariant in &mut self.all {
            if let Err(what) = invariant.see(fact) {
                self.violations.push(Violation { at_us, invariant: invariant.name(), what });
            }
        }
    }

    /// Would this end satisfy them all?
    pub fn would_settle(&mut self, end: &Fact<'_>) -> bool {
        self.all.iter_mut().all(|invariant| invariant.see(end).is_ok())
    }

    fn note(&mut self, at_us: u64, fact: &Fact<'_>) {
        self.facts += 1;
        let mut line = String::new();
        let written = match fact {
            // Large, and a function of what was committed.
            Fact::Applied { node, state } => {
                let owners = state.vms.values().map(|vm| (&vm.ownership, vm.power));
                write!(line, "{at_us} Applied {{ node: {node}, vms: {:?} }}", owners.collect::<Vec<_>>())
            }
            Fact::Committed { node, index, entry } => {
                let mut digest = DefaultHasher::new();
                entry.hash(&mut digest);
                write!(line, "{at_us} Committed {{ node: {node}, index: {index}, entry: {:x} }}", digest.finish())
            }
            Fact::End { state, running, present } => {
                write!(line, "{at_us} End {{ led: {}, running: {running:?}, present: {present:?} }}", state.is_some())
            }
            other => write!(line, "{at_us} {other:?}"),
        };
        debug_assert!(written.is_ok(), "writing to a string");
        line.hash(&mut self.digest);
        if let Some(trace) = &mut self.trace {
            trace.push(line);
        }
    }

    /// What did not hold.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// A digest of all facts in their order.
    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    /// How many facts there were.
    pub fn facts(&self) -> u64 {
        self.facts
    }

    /// The trace, if it was kept.
    pub fn trace(&self) -> &[String] {
        self.trace.as_deref().unwrap_or_default()
    }
}
