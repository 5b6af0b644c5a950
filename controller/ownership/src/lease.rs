//! [`WorkerLease`] and [`LeaseTable`]: for how long a worker may run its self-fence VMs without hearing from the leader,
//! and when the leader may count on its having stopped.
//!
//! ```text
//!  worker        asks, nonce n            answer to n arrives              deadline: the keeper kills
//!  ─────────────────┼───────────────────────────┼────────────────────────────────┼───────────▶ its clock
//!                   └─────────────── lease ──────────────────────────────────────┘
//!  leader                  quorum round, granted                                          surely out
//!  ──────────────────────────────┼─────────────── (lease + fence latency) x drift ───────────────┼─▶ its clock
//! ```
//! Guarantee: when [`LeaseTable::surely_out`] says so of a worker, no guest that is covered by a lease runs there, and
//! none will until a leader grants again. Why:
//!
//! 1. *One leader.* A lease runs from when the worker **asked**, which is before the leader granted it. The two clocks run
//!    apart by at most the drift, and the fence needs at most its latency, so what the worker counts has ended before what the
//!    leader counts. A stale answer is worth nothing: it must carry the nonce of the open question.
//! 2. *An earlier leader.* It grants only after a quorum round that began after the question. In that round a majority
//!    still took it for the leader, so the new leader was elected later, and was `leader_since` later than the asking. A new
//!    leader that waits one full lease from `leader_since` has waited out every lease of every leader before it.
//!    (The round must be a real one: reads on the strength of a leader's own lease would break this.)
//! 3. *Between "surely out" and the failover's commit.* The worker may come back and ask. While the leader *holds* the VM
//!    ([`LeaseTable::begin_failover`]) nothing covers it and nobody is granted it. Should leadership change while the command is
//!    under way, the hold is lost, but a later leader grants only after an entry of its own term is committed and all before it
//!    are applied: by then the command is either applied, and the grant sees it, or can never be committed.
//!    So a failover must be proposed in the term in which it was begun.
//! 4. *Which VM, and which epoch.* An answer lists the VMs that it covers, each with the epoch under which this worker may run it,
//!    read at the moment of the grant ([`LeaseTable::covers`]), and permits nothing else. A worker that comes back after a failover
//!    gets a lease, but not for that VM; and when the VM is then moved to it, a lease for the epoch of the move only. (Without the
//!    epoch two ran, the model found: the lease of a destination let an answer from before the failover boot the old guest.)
//!
//! Assumed: monotonic clocks that count suspended time, drift within the bound, a keeper that fires within its latency. A host
//! that freezes whole and thaws breaks the last, and needs fencing of the hardware. No clock is read here: callers pass
//! milliseconds of their own monotonic clock in. Who keeps the right time is not decided here, and no wall clock is involved.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::controller::Ownership;
use crate::epoch::Epoch;
use crate::event::Nonce;
use crate::failover::Proof;

/// Longest lease that is accepted.
pub const MAX_LEASE_MS: u64 = 24 * 3600 * 1000;
/// Longest fence latency that is accepted.
pub const MAX_FENCE_LATENCY_MS: u64 = 3600 * 1000;
/// Largest drift that is accepted: one clock twice as fast as the other.
pub const MAX_DRIFT_PPM: u32 = 1_000_000;

const PPM: u64 = 1_000_000;

/// What to do with a VM whose worker is cut off from the controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum Policy {
    /// It runs on. Failover needs a fence agent's word or a recorded override.
    #[default]
    KeepRunning,
    /// It is ended when its lease runs out. Failover is automatic after that; a loss of quorum ends such VMs.
    SelfFence,
}

/// Leases that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseTermsError {
    /// Too short or too long.
    #[error("lease of {lease_ms} ms is not between 1 ms and {MAX_LEASE_MS} ms")]
    Lease {
        /// What was asked for.
        lease_ms: u64,
    },
    /// Too far apart.
    #[error("clock drift of {drift_ppm} ppm is more than {MAX_DRIFT_PPM} ppm")]
    Drift {
        /// What was asked for.
        drift_ppm: u32,
    },
    /// Too slow, or nothing.
    #[error("fence latency of {fence_latency_ms} ms is not between 1 ms and {MAX_FENCE_LATENCY_MS} ms")]
    FenceLatency {
        /// What was asked for.
        fence_latency_ms: u64,
    },
}

/// How long leases are, and what is assumed of clocks and fences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseTerms {
    lease_ms: u64,
    drift_ppm: u32,
    fence_latency_ms: u64,
}

impl LeaseTerms {
    /// A worker's lease; how much faster than a worker's clock the leader's may run, in millionths; and how long after the
    /// deadline, on either clock, a guest may still run.
    ///
    /// # Errors
    /// [`LeaseTermsError`]: a value is out of bounds.
    pub fn new(lease_ms: u64, drift_ppm: u32, fence_latency_ms: u64) -> Result<Self, LeaseTermsError> {
        if !(1..=MAX_LEASE_MS).contains(&lease_ms) {
            return Err(LeaseTermsError::Lease { lease_ms });
        }
        if drift_ppm > MAX_DRIFT_PPM {
            return Err(LeaseTermsError::Drift { drift_ppm });
        }
        if !(1..=MAX_FENCE_LATENCY_MS).contains(&fence_latency_ms) {
            return Err(LeaseTermsError::FenceLatency { fence_latency_ms });
        }
        Ok(Self { lease_ms, drift_ppm, fence_latency_ms })
    }

    /// What a worker counts, from when it asked.
    pub fn lease_ms(&self) -> u64 {
        self.lease_ms
    }

    /// What the leader counts, from when it granted.
    pub fn controller_lease_ms(&self) -> u64 {
        let fenced_ms = self.lease_ms + self.fence_latency_ms;
        (fenced_ms * (PPM + u64::from(self.drift_ppm))).div_ceil(PPM)
    }
}

/// A lease that is valid at the moment it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValidLease {
    own: Epoch,
    until_ms: u64,
}

impl ValidLease {
    /// The one epoch under which the VM may run.
    pub fn own(&self) -> Epoch {
        self.own
    }

    /// The keeper's deadline, on the worker's clock.
    pub fn until_ms(&self) -> u64 {
        self.until_ms
    }
}

/// A worker's side: the lease for one VM. One question may serve all VMs of a host. Lost when the worker ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct WorkerLease {
    question: Option<(Nonce, u64)>,
    own: Epoch,
    until_ms: u64,
}

impl WorkerLease {
    /// The worker sends a question now; the one before it is given up.
    pub fn asked(&mut self, nonce: Nonce, now_ms: u64) {
        self.question = Some((nonce, now_ms));
    }

    /// An answer that covers the VM, to be run under `own`. False: it is not the answer to the open question, and changes nothing.
    pub fn granted(&mut self, nonce: Nonce, own: Epoch, lease_ms: u64) -> bool {
        let Some((_, at_ms)) = self.question.filter(|(open, _)| *open == nonce) else { return false };
        self.question = None;
        let until_ms = at_ms.saturating_add(lease_ms.min(MAX_LEASE_MS));
        self.until_ms = if self.own == own { self.until_ms.max(until_ms) } else { until_ms };
        self.own = own;
        true
    }

    /// The lease, if it is valid now.
    pub fn valid_at(&self, now_ms: u64) -> Option<ValidLease> {
        (now_ms < self.until_ms).then_some(ValidLease { own: self.own, until_ms: self.until_ms })
    }

    /// When the open question was asked.
    pub fn open_since_ms(&self) -> Option<u64> {
        self.question.map(|(_, at_ms)| at_ms)
    }

    /// The same lease on a clock that reads `by_ms` less. What would lie before its zero lies at zero.
    pub fn rebased(&self, by_ms: u64) -> Self {
        let question = self.question.map(|(nonce, at_ms)| (nonce, at_ms.saturating_sub(by_ms)));
        Self { question, own: self.own, until_ms: self.until_ms.saturating_sub(by_ms) }
    }
}

/// The leader's side: whom it has granted leases, and which VMs it is failing over. Lost with leadership.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LeaseTable<W, V> {
    terms: LeaseTerms,
    leader_since_ms: u64,
    granted_ms: BTreeMap<W, u64>,
    held: BTreeSet<V>,
}

impl<W: Ord + Clone, V: Ord + Clone> LeaseTable<W, V> {
    /// Of a leader that was elected at `leader_since_ms` (or later: never earlier).
    pub fn new(leader_since_ms: u64, terms: LeaseTerms) -> Self {
        Self { terms, leader_since_ms, granted_ms: BTreeMap::new(), held: BTreeSet::new() }
    }

    /// The terms.
    pub fn terms(&self) -> LeaseTerms {
        self.terms
    }

    /// A lease leaves for this worker now, after a quorum round that began after its question.
    pub fn granted(&mut self, worker: W, now_ms: u64) {
        let at_ms = self.granted_ms.entry(worker).or_insert(now_ms);
        *at_ms = (*at_ms).max(now_ms);
    }

    /// No lease that any leader has granted to this worker lets a guest run there any more.
    pub fn surely_out(&self, worker: &W, now_ms: u64) -> bool {
        let since_ms =
            self.granted_ms.get(worker).map_or(self.leader_since_ms, |at_ms| self.leader_since_ms.max(*at_ms));
        now_ms > since_ms.saturating_add(self.terms.controller_lease_ms())
    }

    /// Holds the VM: call it **before** looking whether leases are out, or telling a fence agent to fence.
    pub fn begin_failover(&mut self, vm: V) {
        self.held.insert(vm);
    }

    /// The failover was applied, or was given up before it was proposed, or can surely not be applied any more.
    pub fn end_failover(&mut self, vm: &V) {
        self.held.remove(vm);
    }

    /// Nobody is granted this VM.
    pub fn held(&self, vm: &V) -> bool {
        self.held.contains(vm)
    }

    /// The proof that permits a failover to `target`; [`None`]: the VM is not held, or someone's lease may be valid.
    pub fn leases_out(&self, vm: &V, ownership: &Ownership<W>, target: &W, now_ms: u64) -> Option<Proof<W>> {
        let others: Vec<W> = ownership.possible_holders().into_iter().filter(|it| *it != target).cloned().collect();
        let out = self.held(vm) && others.iter().all(|worker| self.surely_out(worker, now_ms));
        out.then(|| Proof::LeasesOut { workers: others, last: ownership.last() })
    }

    /// Under which epoch a lease that is granted now lets this worker run this VM; [`None`]: it does not cover it.
    pub fn covers(&self, vm: &V, ownership: &Ownership<W>, worker: &W) -> Option<Epoch> {
        ownership.holds_under(worker).filter(|_| !self.held(vm))
    }

    /// The same table on a clock that reads `by_ms` less. What would lie before its zero lies at zero.
    pub fn rebased(&self, by_ms: u64) -> Self {
        let leader_since_ms = self.leader_since_ms.saturating_sub(by_ms);
        let granted_ms = self.granted_ms.iter().map(|(worker, at_ms)| (worker.clone(), at_ms.saturating_sub(by_ms)));
        let granted_ms = granted_ms.filter(|(_, at_ms)| *at_ms > leader_since_ms);
        Self { terms: self.terms, leader_since_ms, granted_ms: granted_ms.collect(), held: self.held.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const E: Epoch = Epoch::ZERO;

    fn terms() -> LeaseTerms {
        LeaseTerms::new(10_000, 10_000, 2_000).expect("terms")
    }

    #[test]
    fn terms_out_of_bounds_are_refused() {
        assert_eq!(LeaseTerms::new(0, 0, 1), Err(LeaseTermsError::Lease { lease_ms: 0 }));
        assert_eq!(LeaseTerms::new(1, 1_000_001, 1), Err(LeaseTermsError::Drift { drift_ppm: 1_000_001 }));
        assert_eq!(LeaseTerms::new(1, 0, 0), Err(LeaseTermsError::FenceLatency { fence_latency_ms: 0 }));
        assert_eq!(terms().controller_lease_ms(), 12_120);
        assert_eq!(LeaseTerms::new(1, 1, 1).expect("terms").controller_lease_ms(), 3, "rounded up");
    }

    #[test]
    fn a_lease_runs_from_the_question_and_only_the_open_one_counts() {
        let mut lease = WorkerLease::default();
        assert_eq!(lease.valid_at(0), None);
        assert!(!lease.granted(Nonce(1), E, 10), "never asked");
        lease.asked(Nonce(1), 100);
        lease.asked(Nonce(2), 105);
        assert!(!lease.granted(Nonce(1), E, 10), "given up");
        assert!(lease.granted(Nonce(2), E, 10));
        assert!(!lease.granted(Nonce(2), E, 10), "answered already");
        assert_eq!(lease.valid_at(114).map(|lease| lease.until_ms()), Some(115));
        assert_eq!(lease.valid_at(115), None);
        assert_eq!(lease.rebased(100).valid_at(14).map(|lease| lease.until_ms()), Some(15));
    }

    #[test]
    fn a_lease_for_another_epoch_does_not_last_as_long_as_the_one_before() {
        let mut lease = WorkerLease::default();
        lease.asked(Nonce(1), 100);
        assert!(lease.granted(Nonce(1), Epoch::from_raw(1), 50));
        lease.asked(Nonce(2), 110);
        assert!(lease.granted(Nonce(2), Epoch::from_raw(2), 10));
        assert_eq!(lease.valid_at(119).map(|lease| (lease.own(), lease.until_ms())), Some((Epoch::from_raw(2), 120)));
        assert_eq!(lease.valid_at(120), None);
    }

    #[test]
    fn nobody_counts_as_out_before_a_new_leader_has_waited_one_lease() {
        let table = LeaseTable::<char, u8>::new(1_000, terms());
        assert!(!table.surely_out(&'a', 1_000 + 12_120));
        assert!(table.surely_out(&'a', 1_000 + 12_121));
    }

    #[test]
    fn a_grant_puts_off_the_end_and_a_hold_covers_nobody() {
        let mut table = LeaseTable::<char, u8>::new(0, terms());
        table.granted('a', 50_000);
        assert!(!table.surely_out(&'a', 62_120) && table.surely_out(&'a', 62_121) && table.surely_out(&'b', 50_000));
        let owned = Ownership::first('a');
        let one = Some(Epoch::from_raw(1));
        assert_eq!((table.covers(&1, &owned, &'a'), table.covers(&1, &owned, &'b')), (one, None));
        table.begin_failover(1);
        assert_eq!(table.leases_out(&2, &owned, &'b', 70_000), None, "not held");
        assert_eq!(table.leases_out(&1, &owned, &'b', 62_120), None, "not out");
        let proof = table.leases_out(&1, &owned, &'b', 62_121).expect("out");
        assert!(owned.fail_over('b', Policy::SelfFence, &proof).is_ok());
        assert!(table.held(&1) && table.covers(&1, &owned, &'a').is_none() && table.covers(&2, &owned, &'a') == one);
        table.end_failover(&1);
        assert_eq!(table.covers(&1, &owned, &'a'), one);
        assert!(table.rebased(50_000).surely_out(&'a', 12_121));
    }
}
