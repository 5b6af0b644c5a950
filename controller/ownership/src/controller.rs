//! [`Ownership`]: what the controllers have committed about who may run one VM.
//!
//! | state | fact | next |
//! |---|---|---|
//! | `Owned` | `Acquired` by the owner | the same, confirmed |
//! | `Owned`, confirmed | order | `Migrating` with the next epoch: the authorisation |
//! | `Migrating` | `Revoked` by the source | `Owned` by the source, same epoch as before |
//! | `Migrating` | `Acquired` by the destination | `Owned` by the destination, at the move's epoch |
//! | `Migrating` | `Released` by the source **and** `Refused` by the destination | `Owned` by the source, a newer epoch |
//! | either | a [`crate::Proof`] about all possible holders | `Owned` by another, a newer epoch ([`crate::failover`]) |
//!
//! Guarantees: `last` never falls and no epoch is given twice; nothing but a worker's durable record or a proof changes an
//! owner. Cancelling does not appear: it is a request to the source, whose record decides.

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::message::{Message, said_by};
use crate::record::Record;

/// Who may run one VM. `W` names a worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Ownership<W> {
    /// One worker may run the VM.
    Owned {
        /// The worker.
        owner: W,
        /// Its epoch.
        own: Epoch,
        /// The newest epoch that was ever given for this VM.
        last: Epoch,
        /// After a failover to the destination of a move: that move. Its image may be gone on from.
        #[serde(default)]
        image: Option<Epoch>,
        /// The owner's record says so, too. Until then the VM is not moved on: a worker that has not acquired it could neither
        /// release nor revoke, and the move would never end.
        #[serde(default)]
        confirmed: bool,
    },
    /// A move was authorised: until one of the two has spoken, either may hold the VM.
    Migrating {
        /// The source.
        from: W,
        /// The destination.
        to: W,
        /// The epoch under which the source runs it.
        own: Epoch,
        /// The epoch of the move, the newest ever given for this VM.
        epoch: Epoch,
        /// The source has passed the commit point.
        released: bool,
        /// The destination will never acquire the epoch.
        refused: bool,
        /// Epochs that are given after this move are newer than this, too: of a newer generation, if the controllers were
        /// restored while it was under way.
        #[serde(default)]
        floor: Epoch,
    },
}

/// What a durable record proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Fact {
    /// The source will never release this epoch or an older one.
    Revoked(Epoch),
    /// The source has released this epoch.
    Released(Epoch),
    /// The destination will never acquire this epoch.
    Refused(Epoch),
    /// The worker holds this epoch.
    Acquired(Epoch),
}

/// A fact, and whose record proves it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Evidence<W> {
    /// The worker whose record it is.
    pub worker: W,
    /// What it proves.
    pub fact: Fact,
}

/// What a worker's record proves.
pub fn facts(record: &Record) -> Vec<Fact> {
    let fact = |message| match message {
        Message::Ready(_) => None,
        Message::Release(epoch) => Some(Fact::Released(epoch)),
        Message::Revoked(epoch) => Some(Fact::Revoked(epoch)),
        Message::Refused(epoch) => Some(Fact::Refused(epoch)),
        Message::Acquired(epoch) => Some(Fact::Acquired(epoch)),
    };
    said_by(record).into_iter().filter_map(fact).collect()
}

impl<W: Clone + Eq> Ownership<W> {
    /// A VM that was just defined: its first owner, at the first epoch.
    pub fn first(owner: W) -> Self {
        let own = Epoch::ZERO.next();
        Self::Owned { owner, own, last: own, image: None, confirmed: false }
    }

    /// The newest owner that is certain, and its epoch.
    pub fn owner(&self) -> (&W, Epoch) {
        match self {
            Self::Owned { owner, own, .. } => (owner, *own),
            Self::Migrating { from, own, .. } => (from, *own),
        }
    }

    /// The newest epoch that was ever given.
    pub fn last(&self) -> Epoch {
        match self {
            Self::Owned { last, .. } => *last,
            Self::Migrating { epoch, floor, .. } => *epoch.max(floor),
        }
    }

    /// Who may run the VM, or may become able to without being told by the controllers.
    pub fn possible_holders(&self) -> Vec<&W> {
        match self {
            Self::Owned { owner, .. } => vec![owner],
            Self::Migrating { from, to, released, refused, .. } => {
                let source = (!released).then_some(from);
                source.into_iter().chain((!refused).then_some(to)).collect()
            }
        }
    }

    /// The epoch under which this worker may run the VM, should it hold it.
    pub fn holds_under(&self, worker: &W) -> Option<Epoch> {
        match self {
            Self::Owned { owner, own, .. } if owner == worker => Some(*own),
            Self::Migrating { from, own, released: false, .. } if from == worker => Some(*own),
            Self::Migrating { to, epoch, refused: false, .. } if to == worker => Some(*epoch),
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    /// The source has let go, and the destination has neither taken over nor refused: either may be the one to run it.
    pub fn in_doubt(&self) -> bool {
        matches!(self, Self::Migrating { released: true, refused: false, .. })
    }

    /// Authorises a move; [`None`] while another one is in doubt, when the VM is already there, or before its owner has confirmed.
    pub fn order(&self, to: W) -> Option<Self> {
        match self {
            Self::Owned { owner, own, last, confirmed: true, .. } if *owner != to => Some(Self::Migrating {
                from: owner.clone(),
                to,
                own: *own,
                epoch: last.next(),
                released: false,
                refused: false,
                floor: Epoch::ZERO,
            }),
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    /// The owner that may be told to run the VM: none while a move is in doubt.
    pub fn grantable(&self, worker: &W) -> Option<Epoch> {
        match self {
            Self::Owned { owner, own, .. } if owner == worker => Some(*own),
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    /// The move whose image this worker may go on from when it is granted the VM ([`crate::Event::Inherit`]).
    pub fn inherits(&self, worker: &W) -> Option<Epoch> {
        match self {
            Self::Owned { owner, image, .. } if owner == worker => *image,
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    /// The move that this worker may load the image of. Not to be told to a worker whose store is younger than the move: it
    /// may have refused it, and not know.
    pub fn authorised(&self, worker: &W) -> Option<Epoch> {
        match self {
            Self::Migrating { to, epoch, refused: false, .. } if to == worker => Some(*epoch),
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    /// What a piece of evidence changes; [`None`]: nothing (it is known, stale or about something else).
    pub fn step(&self, evidence: &Evidence<W>) -> Option<Self> {
        let Self::Migrating { from, to, own, epoch, released, refused, .. } = self else {
            return self.confirm(evidence);
        };
        let by_source = evidence.worker == *from;
        let by_destination = evidence.worker == *to;
        let next = match evidence.fact {
            Fact::Revoked(revoked) if by_source && revoked >= *epoch && !released => {
                Self::Owned { owner: from.clone(), own: *own, last: self.last(), image: None, confirmed: true }
            }
            Fact::Acquired(acquired) if by_destination && acquired == *epoch => {
                Self::Owned { owner: to.clone(), own: *epoch, last: self.last(), image: None, confirmed: true }
            }
            Fact::Released(e) if by_source && e == *epoch => self.doubt(true, *refused),
            Fact::Refused(e) if by_destination && e == *epoch => self.doubt(*released, true),
            Fact::Revoked(_) | Fact::Acquired(_) | Fact::Released(_) | Fact::Refused(_) => return None,
        };
        (next != *self).then_some(next)
    }

    fn confirm(&self, evidence: &Evidence<W>) -> Option<Self> {
        let mut next = self.clone();
        match &mut next {
            Self::Owned { owner, own, confirmed, .. }
                if *owner == evidence.worker && evidence.fact == Fact::Acquired(*own) && !*confirmed =>
            {
                *confirmed = true;
                Some(next)
            }
            Self::Owned { .. } | Self::Migrating { .. } => None,
        }
    }

    fn doubt(&self, now_released: bool, now_refused: bool) -> Self {
        let mut next = self.clone();
        match &mut next {
            Self::Migrating { from, .. } if now_released && now_refused => {
                let own = self.last().next();
                Self::Owned { owner: from.clone(), own, last: own, image: None, confirmed: false }
            }
            Self::Migrating { released, refused, .. } => {
                (*released, *refused) = (now_released, now_refused);
                next
            }
            Self::Owned { .. } => next,
        }
    }
}
