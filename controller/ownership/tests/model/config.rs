//! [`Config`]: what one run of the model explores, and [`Naive`]: the designs that must fail in it.

use pageport_ownership::{Evidence, Fact, LeaseTerms, Ownership, Policy};

/// A worker's lease, in ticks.
pub const LEASE: u64 = 1;
/// How long after its deadline a guest may still run, in ticks.
pub const LATENCY: u64 = 1;

/// A design that leaves something out. Each is a switch at one place around the rules, never a copy of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naive {
    /// The controllers decide a cancel themselves, without asking the source.
    ControllersCancel,
    /// A revocation is said before it is on disk, and lost in a crash.
    RevokeInMemory,
    /// The destination resumes before its acquisition is on disk.
    ResumeBeforeAcquire,
    /// The source says `Release` before its record is on disk.
    ReleaseBeforeRecord,
    /// An owner's record starts the VM after a reboot, without asking.
    RecordStarts,
    /// An answer counts whenever it comes: no nonce.
    NoNonce,
    /// The authorisation goes to the destination as a plain message.
    PlainAuthorisation,
    /// A destination without the image is silent instead of refusing.
    NoRefused,
    /// The controllers relay nothing.
    NoRelay,
    /// The destination resumes without its lease.
    ResumeWithoutLease,
    /// The worker, not a keeper, ends guests whose lease has run out.
    WorkerEnforces,
    /// A keeper that is stopped is guarded by nobody.
    KeeperUnguarded,
    /// The deadline spares stopped guests.
    DeadlineSparesPaused,
    /// The controllers count twice the worker's lease where clocks drift by two, and forget how long a fence takes.
    ShortLease,
    /// Restored controllers believe their backup.
    BelieveBackup,
    /// A lease runs from when the answer arrives.
    LeaseFromAnswer,
    /// A new leader does not wait.
    NoWait,
    /// A boot under a lease starts the guest at once, not stopped first.
    BootsRunning,
    /// A lease is for the VM, under whatever epoch.
    LeaseForAnyEpoch,
    /// A worker whose store was lost is authorised for a move that it may have refused.
    AuthorisesTheForgetful,
    /// Grants go on while a failover is under way.
    NoHold,
    /// A move is ordered from a worker that has not acquired the VM yet.
    OrderUnconfirmed,
}

/// What is explored.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Of the VM.
    pub policy: Policy,
    /// Moves that are ordered.
    pub moves: u8,
    /// Per host.
    pub worker_crashes: u8,
    /// Per host. It reboots.
    pub host_crashes: u8,
    /// Per host.
    pub qemu_crashes: u8,
    /// Hosts that never come back.
    pub losses: u8,
    /// Failovers: by a fence agent or a true override (keep-running), by leases (self-fence).
    pub failovers: u8,
    /// Changes of leader.
    pub elections: u8,
    /// The link between the workers may be cut, for good.
    pub cuts: u8,
    /// Keepers that are stopped, per host. (A worker that is stopped is one that does not act: always possible.)
    pub keeper_stops: u8,
    /// Restores of the controllers from a backup.
    pub restores: u8,
    /// Workers that lose their store, and are started again.
    pub store_losses: u8,
    /// The leader's clock runs at up to this many times a worker's.
    pub drift: u8,
    /// What is left out.
    pub naive: Option<Naive>,
}

impl Config {
    /// One move, no faults.
    pub const fn new(policy: Policy) -> Self {
        Self {
            policy,
            moves: 1,
            worker_crashes: 0,
            host_crashes: 0,
            qemu_crashes: 0,
            losses: 0,
            failovers: 0,
            elections: 0,
            cuts: 0,
            keeper_stops: 0,
            restores: 0,
            store_losses: 0,
            drift: 1,
            naive: None,
        }
    }

    /// The same without something.
    pub const fn without(self, naive: Naive) -> Self {
        Self { naive: Some(naive), ..self }
    }

    /// Is this left out?
    pub fn is(&self, naive: Naive) -> bool {
        self.naive == Some(naive)
    }

    /// The register after an order to move the VM to the other worker, if it takes one.
    pub fn order(&self, register: &Ownership<usize>) -> Option<Ownership<usize>> {
        let (owner, own) = register.owner();
        let confirmed = register.step(&Evidence { worker: *owner, fact: Fact::Acquired(own) });
        match confirmed {
            Some(confirmed) if self.is(Naive::OrderUnconfirmed) => confirmed.order(1 - *owner),
            _ => register.order(1 - *owner),
        }
    }

    /// What the leader counts with.
    pub fn terms(&self) -> LeaseTerms {
        // Naive: twice the worker's lease, and nothing for drift and fence together.
        let drift = if self.is(Naive::ShortLease) { 1 } else { self.drift };
        LeaseTerms::new(LEASE, (u32::from(drift) - 1) * 1_000_000, LATENCY).unwrap()
    }
}
