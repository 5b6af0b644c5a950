//! [`Fence`]: what a VM's policy, and the lease that its worker holds, permit at a moment of this host's clock.
//!
//! | policy | lease | standing |
//! |---|---|---|
//! | keep-running | - | the record alone decides |
//! | self-fence | valid | may run until the lease ends: the keeper is armed with that |
//! | self-fence | none, or over | nothing is set running |
//! | not known yet | - | as the line above |
//!
//! The clock is `CLOCK_BOOTTIME`, the keeper's. Rounding is always towards an earlier end. Ends no guest: the keeper does.

use pageport_keeper::BootTime;
use pageport_ownership::{Epoch, Licence, Nonce, Policy, Standing, WorkerLease};

const NANOS_PER_MS: u64 = 1_000_000;

/// One VM's policy and lease.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fence {
    policy: Option<Policy>,
    lease: WorkerLease,
}

impl Fence {
    /// With the policy that an earlier worker noted, if it did.
    pub fn new(policy: Option<Policy>) -> Self {
        Self { policy, lease: WorkerLease::default() }
    }

    /// The policy, once it is known.
    pub fn policy(&self) -> Option<Policy> {
        self.policy
    }

    /// The policy is known, or has changed.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = Some(policy);
    }

    /// The question leaves now.
    pub fn asked(&mut self, nonce: Nonce, now: BootTime) {
        self.lease.asked(nonce, now.as_nanos() / NANOS_PER_MS);
    }

    /// The answer covers this VM.
    pub fn granted(&mut self, nonce: Nonce, own: Epoch, lease_ms: u64) {
        self.lease.granted(nonce, own, lease_ms);
    }

    /// What is permitted now.
    pub fn standing(&self, now: BootTime) -> Standing {
        let lease = self.lease.valid_at(ceil_ms(now));
        self.policy.map_or(Standing::Unleased, |policy| Standing::of(policy, lease))
    }

    /// What is needed, besides the record, to set the guest running now.
    pub fn licence(&self, now: BootTime) -> Option<Licence> {
        Licence::of(self.policy?, self.lease.valid_at(ceil_ms(now)))
    }

    /// The end of the lease that is valid now, for a VM that fences itself.
    pub fn deadline(&self, now: BootTime) -> Option<BootTime> {
        let lease = self.lease.valid_at(ceil_ms(now)).filter(|_| self.policy == Some(Policy::SelfFence));
        lease.map(|lease| deadline(lease.until_ms()))
    }
}

/// A moment in the milliseconds that the rules count in.
pub fn deadline(until_ms: u64) -> BootTime {
    BootTime::from_nanos(until_ms.saturating_mul(NANOS_PER_MS))
}

fn ceil_ms(now: BootTime) -> u64 {
    now.as_nanos().div_ceil(NANOS_PER_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_ms(ms: u64) -> BootTime {
        deadline(ms)
    }

    #[test]
    fn nothing_runs_before_the_policy_is_known() {
        let fence = Fence::new(None);
        assert_eq!((fence.standing(at_ms(0)), fence.licence(at_ms(0))), (Standing::Unleased, None));
    }

    #[test]
    fn a_vm_that_keeps_running_needs_no_lease_and_gets_no_deadline() {
        let fence = Fence::new(Some(Policy::KeepRunning));
        assert_eq!(fence.standing(at_ms(0)), Standing::KeepRunning);
        assert!(fence.licence(at_ms(0)).is_some() && fence.deadline(at_ms(0)).is_none());
    }

    #[test]
    fn a_lease_runs_from_the_question_and_parts_of_a_millisecond_count_against_it() {
        let mut fence = Fence::new(Some(Policy::SelfFence));
        fence.asked(Nonce(1), BootTime::from_nanos(5_999_999));
        fence.granted(Nonce(1), Epoch::ZERO, 10);
        assert_eq!(fence.deadline(at_ms(14)), Some(at_ms(15)));
        assert_eq!(fence.standing(BootTime::from_nanos(14_000_001)), Standing::Unleased);
    }
}
