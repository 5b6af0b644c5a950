//! [`Proof`]: what permits to give a VM to another worker although its possible holders have not given it up.
//!
//! | proof | says | for |
//! |---|---|---|
//! | leases out | no guest under a lease runs at these workers, or will ([`crate::LeaseTable::leases_out`]) | self-fence |
//! | fenced | an agent has cut the power (or the disk) of these workers | any policy |
//! | override | a person says so, and is recorded | any policy |
//!
//! Guarantees: a proof counts only for the state that it was made in (`last`), and must name every possible holder but the
//! target. What comes out has a newer epoch than any before. It does not fence, count time, or check a person's word: an
//! override that is false runs a VM twice, and is the only thing that does.

use serde::{Deserialize, Serialize};

use crate::controller::Ownership;
use crate::epoch::Epoch;
use crate::lease::Policy;

/// Why a VM may be taken away.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Proof<W> {
    /// The leases of these workers are surely out, and the leader held the VM from before it looked.
    LeasesOut {
        /// Whose.
        workers: Vec<W>,
        /// The newest epoch of the VM when the leader looked.
        last: Epoch,
    },
    /// A fence agent has confirmed that these workers run nothing, and the leader held the VM from before it asked.
    Fenced {
        /// Which.
        workers: Vec<W>,
        /// The newest epoch of the VM when the agent was asked.
        last: Epoch,
        /// The agent.
        agent: String,
    },
    /// An operator's word.
    Override {
        /// Who.
        who: String,
        /// Why.
        reason: String,
    },
}

/// A failover that is not permitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FailoverError<W> {
    /// Leases bind only who fences itself.
    #[error("fail over by expired leases: the vm does not fence itself")]
    NotSelfFence,
    /// The VM has changed hands since the proof was made.
    #[error("fail over on a proof made at epoch {proved}: the newest epoch is {last}")]
    Stale {
        /// When the proof was made.
        proved: Epoch,
        /// The newest one.
        last: Epoch,
    },
    /// Someone may hold the VM whom the proof does not name.
    #[error("fail over while worker {worker} may hold the vm")]
    MayHold {
        /// Who.
        worker: W,
    },
    /// It has the VM, and nobody else may.
    #[error("fail over to worker {worker}, which owns the vm")]
    AlreadyOwner {
        /// Who.
        worker: W,
    },
    /// An override without a name or a reason.
    #[error("override without the name of who decided it, or without a reason")]
    Unsigned,
}

impl<W: Clone + Eq> Ownership<W> {
    /// Gives the VM to `target` under a new epoch. `policy` is the VM's, as committed.
    ///
    /// # Errors
    /// [`FailoverError`]: the proof does not permit it.
    pub fn fail_over(&self, target: W, policy: Policy, proof: &Proof<W>) -> Result<Self, FailoverError<W>> {
        if matches!(self, Self::Owned { owner, .. } if *owner == target) {
            return Err(FailoverError::AlreadyOwner { worker: target });
        }
        match proof {
            Proof::LeasesOut { .. } if policy != Policy::SelfFence => return Err(FailoverError::NotSelfFence),
            Proof::LeasesOut { workers, last } | Proof::Fenced { workers, last, .. } => {
                if *last != self.last() {
                    return Err(FailoverError::Stale { proved: *last, last: self.last() });
                }
                let unnamed = self.possible_holders().into_iter().find(|it| **it != target && !workers.contains(it));
                if let Some(worker) = unnamed {
                    return Err(FailoverError::MayHold { worker: worker.clone() });
                }
            }
            Proof::Override { who, reason } if who.is_empty() || reason.is_empty() => {
                return Err(FailoverError::Unsigned);
            }
            Proof::Override { .. } => {}
        }
        let image = match self {
            Self::Migrating { to, epoch, refused: false, .. } if *to == target => Some(*epoch),
            Self::Owned { .. } | Self::Migrating { .. } => None,
        };
        let own = self.last().next();
        Ok(Self::Owned { owner: target, own, last: own, image, confirmed: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e(n: u64) -> Epoch {
        Epoch::from_raw(n)
    }

    fn moving(released: bool, refused: bool) -> Ownership<char> {
        let floor = Epoch::ZERO;
        Ownership::Migrating { from: 'a', to: 'b', own: e(1), epoch: e(2), released, refused, floor }
    }

    fn out(workers: &[char], last: u64) -> Proof<char> {
        Proof::LeasesOut { workers: workers.to_vec(), last: e(last) }
    }

    fn owned(owner: char, own: u64, image: Option<u64>) -> Ownership<char> {
        Ownership::Owned { owner, own: e(own), last: e(own), image: image.map(e), confirmed: false }
    }

    #[test]
    fn every_possible_holder_but_the_target_must_be_named() {
        let fail_over = |state: &Ownership<char>, target, workers: &[char], last| {
            state.fail_over(target, Policy::SelfFence, &out(workers, last))
        };
        let may_hold = |worker| Err(FailoverError::MayHold { worker });
        assert_eq!(fail_over(&Ownership::first('a'), 'b', &['a'], 1), Ok(owned('b', 2, None)));
        assert_eq!(fail_over(&Ownership::first('a'), 'b', &['c'], 1), may_hold('a'));
        assert_eq!(fail_over(&moving(false, false), 'c', &['a'], 2), may_hold('b'));
        assert_eq!(fail_over(&moving(true, false), 'c', &['b'], 2), Ok(owned('c', 3, None)));
        assert_eq!(fail_over(&moving(false, true), 'c', &['a'], 2), Ok(owned('c', 3, None)));
        assert_eq!(fail_over(&moving(false, false), 'a', &['b'], 2), Ok(owned('a', 3, None)));
        let stale = Err(FailoverError::Stale { proved: e(1), last: e(2) });
        assert_eq!(fail_over(&moving(false, false), 'a', &['b'], 1), stale);
    }

    #[test]
    fn the_destination_may_go_on_from_its_image_unless_it_has_refused() {
        let proof = Proof::Fenced { workers: vec!['a'], last: e(2), agent: "ipmi".to_owned() };
        let after = moving(false, false).fail_over('b', Policy::KeepRunning, &proof).expect("fenced");
        assert_eq!(after, owned('b', 3, Some(2)));
        assert_eq!((after.grantable(&'b'), after.inherits(&'b'), after.inherits(&'a')), (Some(e(3)), Some(e(2)), None));
        let refused = moving(false, true).fail_over('b', Policy::KeepRunning, &proof).expect("fenced");
        assert_eq!(refused.inherits(&'b'), None);
    }

    #[test]
    fn leases_bind_only_who_fences_itself_and_overrides_are_signed() {
        let state = Ownership::first('a');
        let by_lease = state.fail_over('b', Policy::KeepRunning, &out(&['a'], 1));
        assert_eq!(by_lease, Err(FailoverError::NotSelfFence));
        let word = |who: &str| Proof::Override { who: who.to_owned(), reason: "the site burnt down".to_owned() };
        assert_eq!(state.fail_over('b', Policy::KeepRunning, &word("")), Err(FailoverError::Unsigned));
        assert_eq!(state.fail_over('b', Policy::KeepRunning, &word("ann")), Ok(owned('b', 2, None)));
        let nowhere = state.fail_over('a', Policy::KeepRunning, &word("ann"));
        assert_eq!(nowhere, Err(FailoverError::AlreadyOwner { worker: 'a' }));
    }
}
