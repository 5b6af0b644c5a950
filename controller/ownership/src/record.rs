//! [`Record`]: the one durable fact per VM and worker; [`Durable`]: the proof that it is on stable storage.
//!
//! | record | written by | means |
//! |---|---|---|
//! | `Replica{seen, refused}` | anyone | never acquires any epoch <= `seen` |
//! | `Own{own, seen}` | acquire, grant, revoke | only this worker may run `own`; `seen` > `own`: `seen` was revoked |
//! | `Prepared{own, epoch}` | the source, before it pauses | not released; the guest may still run `own` |
//! | `Released{epoch}` | the source | the commit point: never resumes on its own |
//!
//! Guarantees: a [`Durable`] comes only out of a write that succeeded or out of the store itself, and the permissions
//! [`MayRun`] and [`MayRelease`] come only out of a [`Durable`]. [`MayRun`] needs a [`Licence`] besides, which a VM that
//! fences itself has only inside its lease. It does not write: the store does.

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::lease::{Policy, ValidLease};

/// What a worker has on disk about one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Record {
    /// Not the owner.
    Replica {
        /// Never acquires this epoch or an older one.
        seen: Epoch,
        /// The move that was durably refused last, if any.
        refused: Option<Epoch>,
    },
    /// The owner.
    Own {
        /// May run under this epoch.
        own: Epoch,
        /// Newest epoch known; revoked when newer than `own`.
        seen: Epoch,
    },
    /// The source of a move before its commit point.
    Prepared {
        /// May still run under this epoch.
        own: Epoch,
        /// The epoch of the move.
        epoch: Epoch,
    },
    /// The source of a move after its commit point.
    Released {
        /// The epoch of the move.
        epoch: Epoch,
    },
}

impl Record {
    /// What a worker that never heard of the VM has.
    pub const UNKNOWN: Self = Self::Replica { seen: Epoch::ZERO, refused: None };

    /// The newest epoch that this record knows of; never falls.
    pub fn seen(&self) -> Epoch {
        match *self {
            Self::Replica { seen, .. } | Self::Own { seen, .. } => seen,
            Self::Prepared { epoch, .. } | Self::Released { epoch } => epoch,
        }
    }

    /// May this worker run the VM, and under which epoch?
    pub fn owned(&self) -> Option<Epoch> {
        match *self {
            Self::Own { own, .. } | Self::Prepared { own, .. } => Some(own),
            Self::Replica { .. } | Self::Released { .. } => None,
        }
    }
}

/// A record that is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    record: Record,
}

impl Durable {
    /// Writes a record with `persist`, which must return only after it is on stable storage.
    pub fn persist<E>(record: Record, persist: impl FnOnce(&Record) -> Result<(), E>) -> Result<Self, E> {
        persist(&record)?;
        Ok(Self { record })
    }

    /// Reads a record with `read`, which must return what is on stable storage ([`None`]: nothing is).
    pub fn read<E>(read: impl FnOnce() -> Result<Option<Record>, E>) -> Result<Self, E> {
        Ok(Self { record: read()?.unwrap_or(Record::UNKNOWN) })
    }

    /// The record.
    pub fn record(&self) -> Record {
        self.record
    }

    /// The permission to resume (or boot) the guest: there is an `Own`, and a licence for its epoch.
    pub fn may_run(&self, licence: Licence) -> Option<MayRun> {
        match self.record {
            Record::Own { own, .. } if licence.lease.is_none_or(|lease| lease.own() == own) => {
                Some(MayRun { own, licence })
            }
            Record::Own { .. } | Record::Replica { .. } | Record::Prepared { .. } | Record::Released { .. } => None,
        }
    }

    /// The permission to tell the destination that it may run: there is a `Released`.
    pub fn may_release(&self) -> Option<MayRelease> {
        match self.record {
            Record::Released { epoch } => Some(MayRelease { epoch }),
            Record::Replica { .. } | Record::Own { .. } | Record::Prepared { .. } => None,
        }
    }
}

/// What a worker needs besides its record to set a guest running: a valid lease, where the policy asks for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Licence {
    lease: Option<ValidLease>,
}

impl Licence {
    /// [`None`]: the policy asks for a lease, and there is none that is valid.
    pub fn of(policy: Policy, lease: Option<ValidLease>) -> Option<Self> {
        match policy {
            Policy::KeepRunning => Some(Self { lease: None }),
            Policy::SelfFence => lease.map(|lease| Self { lease: Some(lease) }),
        }
    }
}

/// Proof of a durable `Own` and of a licence: ask for it wherever a guest is set running.
#[derive(Debug, PartialEq, Eq)]
pub struct MayRun {
    own: Epoch,
    licence: Licence,
}

impl MayRun {
    /// The epoch to run under.
    pub fn own(&self) -> Epoch {
        self.own
    }

    /// What the keeper must be armed with **before** the guest is set running, on the worker's clock; [`None`]: it is not.
    pub fn deadline_ms(&self) -> Option<u64> {
        self.licence.lease.map(|lease| lease.until_ms())
    }
}

/// Proof of a durable `Released`: ask for it wherever a release is sent.
#[derive(Debug, PartialEq, Eq)]
pub struct MayRelease {
    epoch: Epoch,
}

impl MayRelease {
    /// The epoch of the move.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::WorkerLease;
    use crate::worker::Nonce;

    #[test]
    fn a_write_that_failed_gives_no_proof() {
        let record = Record::Own { own: Epoch::from_raw(1), seen: Epoch::from_raw(1) };
        assert_eq!(Durable::persist(record, |_| Err("disk full")), Err("disk full"));
    }

    #[test]
    fn only_own_permits_to_run_and_only_released_to_release() {
        let e = Epoch::from_raw(2);
        for record in [
            Record::UNKNOWN,
            Record::Own { own: e, seen: e },
            Record::Prepared { own: Epoch::from_raw(1), epoch: e },
            Record::Released { epoch: e },
        ] {
            let durable = Durable::persist(record, |_| Ok::<(), ()>(())).expect("persists");
            let licence = Licence::of(Policy::KeepRunning, None).expect("needs no lease");
            assert_eq!(durable.may_run(licence).is_some(), matches!(record, Record::Own { .. }));
            assert_eq!(durable.may_release().is_some(), matches!(record, Record::Released { .. }));
        }
    }

    #[test]
    fn who_fences_itself_runs_only_inside_its_lease_and_to_its_deadline() {
        let mut lease = WorkerLease::default();
        assert_eq!(Licence::of(Policy::SelfFence, lease.valid_at(0)), None);
        lease.asked(Nonce(1), 5);
        lease.granted(Nonce(1), Epoch::from_raw(1), 10);
        let licence = Licence::of(Policy::SelfFence, lease.valid_at(14)).expect("valid");
        let own = Record::Own { own: Epoch::from_raw(1), seen: Epoch::from_raw(1) };
        let durable = Durable::persist(own, |_| Ok::<(), ()>(())).expect("persists");
        assert_eq!(durable.may_run(licence).expect("owns").deadline_ms(), Some(15));
        let older = Record::Own { own: Epoch::ZERO, seen: Epoch::ZERO };
        let older = Durable::persist(older, |_| Ok::<(), ()>(())).expect("persists");
        assert_eq!(older.may_run(licence), None, "the lease is for another epoch");
        assert_eq!(Licence::of(Policy::SelfFence, lease.valid_at(15)), None);
    }
}
