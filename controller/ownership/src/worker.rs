//! [`worker_step`]: one event at one worker about one VM.
//!
//! ```text
//!   Replica ──grant──▶ Own ──authorise──▶ Prepared ──ready, paused──▶ Released ──acquired──▶ Replica
//!      │                ▲ ▲                  │                            │
//!      └─release, image─┘ └─────revoke───────┘       (grant of a newer epoch: Own again)
//! ```
//! The driver's contract: persist [`Step::record`] (through [`Step::commit`]), then carry out the effects, then send
//! the messages. What an effect brings about comes back as an event of its own ([`Event::Resumed`],
//! [`Event::QemuGone`]), so that a crash can come between any two.
//!
//! Guarantees: `seen` never falls; one durable write at most; a guest is resumed or booted only under `Own`; only
//! [`Event::Ready`] on a paused guest releases; an image is acquired only while `seen` is below its epoch. With a fence
//! ([`Standing`]): nothing is acquired or set running without a valid lease, the keeper is armed before a guest runs, and
//! disarmed once the source has released, since the stopped guest may be the newest memory there is.
//!
//! Nothing here ends a guest because a lease has run out: a worker that is dead or stopped could not. The keeper does, and
//! spares no armed guest, stopped or not; a stopped guest that is not armed waits for the next lease. It does not decide
//! whether a VM *should* run: see [`needs_grant`].

use crate::epoch::Epoch;
pub use crate::event::{Effect, Event, Guest, Nonce, Owner, Standing, Volatile};
use crate::message::{Message, emits};
use crate::record::{Durable, Record};

/// What one event brings about, before it is persisted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The record to write first; [`None`]: it stays as it is.
    pub record: Option<Record>,
    /// The new volatile state.
    pub volatile: Volatile,
    /// To be done after the write, in order.
    pub effects: Vec<Effect>,
}

/// A step whose record is on stable storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The record, new or unchanged, with its permissions.
    pub record: Durable,
    /// The new volatile state.
    pub volatile: Volatile,
    /// To be done now, in order.
    pub effects: Vec<Effect>,
    /// To be said from now on, until another step says otherwise.
    pub messages: Vec<Message>,
}

impl Step {
    /// Writes the record, if there is a new one, and lets the effects out. On an error nothing has happened: the old
    /// record and volatile state stand, and the event may come again.
    pub fn commit<E>(self, before: Durable, persist: impl FnOnce(&Record) -> Result<(), E>) -> Result<Committed, E> {
        let record = match self.record {
            Some(record) => Durable::persist(record, persist)?,
            None => before,
        };
        let messages = emits(&record.record(), &self.volatile);
        Ok(Committed { record, volatile: self.volatile, effects: self.effects, messages })
    }
}

/// Should the worker ask the controller for a grant? `power_on`: the VM should run here; `owned`: the epoch under
/// which the controllers say that this worker owns it, if they do.
///
/// A cold boot takes two grants: the first is recorded, the second (at the recorded epoch) boots. A guest that runs
/// without any record (the store was lost) is taken over with a grant, whatever is wanted of it.
pub fn needs_grant(record: &Record, volatile: &Volatile, power_on: bool, owned: Option<Epoch>) -> bool {
    let Some(granted) = owned else { return false };
    match *record {
        Record::Replica { seen, .. } => (power_on || adrift(record, volatile.guest)) && granted > seen,
        Record::Own { own, seen } => {
            let boots = granted == own && volatile.guest == Guest::Absent && volatile.standing.permits(own);
            granted > seen && granted > own || power_on && boots
        }
        Record::Prepared { .. } => false,
        Record::Released { epoch } => granted > epoch,
    }
}

/// One event at one worker.
pub fn worker_step(record: &Record, volatile: &Volatile, event: Event) -> Step {
    let now = Now { record: *record, volatile: *volatile };
    if adrift(record, volatile.guest) && matches!(event, Event::Release(_) | Event::Refuse(_) | Event::Revoked(_)) {
        // A record that says "not here" while a guest runs would let it run on unseen.
        return now.stay();
    }
    match event {
        Event::Authorise(epoch) => now.authorise(epoch),
        Event::Cancel(epoch) | Event::Refused(epoch) => now.revoke(epoch),
        Event::Paused => match volatile.guest {
            Guest::Running => now.with_guest(Guest::Paused),
            Guest::Absent | Guest::Paused | Guest::Loaded(_) => now.stay(),
        },
        Event::Resumed => match record {
            Record::Own { .. } => now.with_guest(Guest::Running),
            Record::Replica { .. } | Record::Prepared { .. } | Record::Released { .. } => now.stay(),
        },
        Event::Ready(epoch) => match *record {
            Record::Prepared { epoch: prepared, .. } if prepared == epoch && volatile.guest == Guest::Paused => {
                now.write(Record::Released { epoch }, now.disarm())
            }
            _ => now.stay(),
        },
        Event::Asked(nonce) => now.with(Volatile { question: Some(nonce), ..*volatile }, vec![]),
        Event::AuthReply { nonce, epoch } if volatile.question == Some(nonce) => now.authorised(epoch),
        Event::Grant { nonce, own } if volatile.question == Some(nonce) => now.granted(own),
        Event::Inherit { nonce, own, image } if volatile.question == Some(nonce) => now.inherit(own, image),
        Event::AuthReply { .. } | Event::Grant { .. } | Event::Inherit { .. } => now.stay(),
        Event::Standing(standing) => now.standing(standing),
        Event::Loaded(epoch) => match *record {
            Record::Replica { seen, .. } if epoch > seen && volatile.authorised == Some(epoch) => {
                now.with_guest(Guest::Loaded(epoch))
            }
            _ => now.stay(),
        },
        Event::Release(epoch) => now.acquire_or_refuse(epoch),
        Event::Refuse(epoch) => match *record {
            Record::Replica { seen, .. } if epoch > seen => now.refuse(epoch),
            _ => now.stay(),
        },
        Event::Revoked(epoch) => match *record {
            Record::Replica { seen, refused } if epoch > seen => now.replica(epoch, refused),
            _ => now.stay(),
        },
        Event::Acquired(epoch) => match *record {
            Record::Released { epoch: released } if epoch >= released => now.hand_over(epoch),
            _ => now.stay(),
        },
        Event::Owned { epoch, owner: Owner::Me } => match *record {
            // The controllers gave this worker a newer epoch: the move can only have been given up.
            Record::Prepared { epoch: prepared, .. } if epoch > prepared => now.revoke(prepared),
            _ => now.stay(),
        },
        Event::Owned { epoch, owner: Owner::Other } => now.owned_elsewhere(epoch),
        Event::Join => match *record {
            Record::Prepared { epoch, .. } => now.revoke(epoch),
            _ => now.stay(),
        },
        Event::QemuGone => now.qemu_gone(),
        Event::Restarted(found) => now.restarted(found),
    }
}

/// Does a guest run here that no record speaks of? The store was lost; the guest was running lawfully when it was.
fn adrift(record: &Record, guest: Guest) -> bool {
    *record == Record::UNKNOWN && guest == Guest::Running
}

/// The state that a step starts from.
struct Now {
    record: Record,
    volatile: Volatile,
}

impl Now {
    fn with(&self, volatile: Volatile, effects: Vec<Effect>) -> Step {
        Step { record: None, volatile, effects }
    }

    fn stay(&self) -> Step {
        self.with(self.volatile, vec![])
    }

    fn with_guest(&self, guest: Guest) -> Step {
        self.with(Volatile { guest, ..self.volatile }, vec![])
    }

    fn write(&self, record: Record, effects: Vec<Effect>) -> Step {
        Step { record: Some(record), volatile: self.volatile, effects }
    }

    /// Sets running what may be, with the keeper armed first.
    fn start(&self, own: Epoch, effect: Effect) -> Vec<Effect> {
        match self.volatile.standing {
            Standing::KeepRunning => vec![effect],
            Standing::Leased(leased) if leased == own => vec![Effect::Arm, effect],
            Standing::Leased(_) | Standing::Unleased => vec![],
        }
    }

    fn disarm(&self) -> Vec<Effect> {
        match self.volatile.standing {
            Standing::KeepRunning => vec![],
            Standing::Leased(_) | Standing::Unleased => vec![Effect::Disarm],
        }
    }

    /// What goes on once there is an `Own` of this epoch: the guest that was stopped, or the image that was acquired.
    fn resume_what_waits(&self, own: Epoch) -> Vec<Effect> {
        match self.volatile.guest {
            Guest::Paused => self.start(own, Effect::Resume),
            Guest::Loaded(epoch) if epoch == own => self.start(own, Effect::Resume),
            Guest::Absent | Guest::Running | Guest::Loaded(_) => vec![],
        }
    }

    /// The policy or the lease has changed.
    fn standing(&self, standing: Standing) -> Step {
        let before = self.volatile.standing;
        let now = Self { record: self.record, volatile: Volatile { standing, ..self.volatile } };
        let runs = matches!(now.volatile.guest, Guest::Running | Guest::Paused);
        let mut effects = match (now.record.owned(), standing) {
            (Some(_), Standing::KeepRunning) if runs && before != standing => vec![Effect::Disarm],
            (Some(own), Standing::Leased(leased)) if runs && own == leased => vec![Effect::Arm],
            _ => vec![],
        };
        if let Record::Own { own, .. } = now.record {
            effects.extend(now.resume_what_waits(own));
            effects.dedup();
        }
        now.with(now.volatile, effects)
    }

    fn authorise(&self, epoch: Epoch) -> Step {
        match self.record {
            Record::Own { own, seen } if epoch > seen => match self.volatile.guest {
                Guest::Running => self.write(Record::Prepared { own, epoch }, vec![]),
                Guest::Absent | Guest::Paused | Guest::Loaded(_) => {
                    self.write(Record::Own { own, seen: epoch }, vec![])
                }
            },
            _ => self.stay(),
        }
    }

    fn revoke(&self, epoch: Epoch) -> Step {
        match self.record {
            Record::Prepared { own, epoch: prepared } if prepared == epoch => {
                self.write(Record::Own { own, seen: epoch }, self.resume_what_waits(own))
            }
            Record::Own { own, seen } if epoch > seen => self.write(Record::Own { own, seen: epoch }, vec![]),
            _ => self.stay(),
        }
    }

    fn authorised(&self, epoch: Epoch) -> Step {
        let answered = Volatile { question: None, ..self.volatile };
        match self.record {
            Record::Replica { seen, .. } if epoch > seen => match self.volatile.guest {
                Guest::Absent => {
                    self.with(Volatile { authorised: Some(epoch), ..answered }, vec![Effect::LoadImage(epoch)])
                }
                Guest::Running | Guest::Paused | Guest::Loaded(_) => self.with(answered, vec![]),
            },
            _ => self.with(answered, vec![]),
        }
    }

    fn granted(&self, own: Epoch) -> Step {
        let now = self.answered();
        let volatile = now.volatile;
        match self.record {
            Record::Own { own: held, .. } if held == own => {
                let effects = match volatile.guest {
                    Guest::Absent => now.start(own, Effect::Boot),
                    Guest::Paused | Guest::Loaded(_) => now.resume_what_waits(own),
                    Guest::Running => vec![],
                };
                now.with(volatile, effects)
            }
            Record::Replica { seen, .. } if own > seen => {
                if adrift(&self.record, volatile.guest) {
                    return now.own(own, volatile, now.arm(own));
                }
                let effects = match volatile.guest {
                    Guest::Absent => vec![],
                    Guest::Running | Guest::Paused | Guest::Loaded(_) => vec![Effect::DropImage],
                };
                now.own(own, Volatile { authorised: None, ..volatile }, effects)
            }
            Record::Own { own: held, seen } if own > seen => now.take_on(own, held),
            Record::Released { epoch } if own > epoch => now.own(own, volatile, now.resume_what_waits(own)),
            _ => now.with(volatile, vec![]),
        }
    }

    /// A failover to this worker, which may hold the image of the move that was under way.
    fn inherit(&self, own: Epoch, image: Epoch) -> Step {
        match self.record {
            Record::Replica { seen, .. } if own > seen && self.volatile.guest == Guest::Loaded(image) => {
                self.answered().take_on(own, image)
            }
            _ => self.granted(own),
        }
    }

    /// An own of a newer epoch; an image of the older one that this worker may run counts as one of the newer.
    fn take_on(&self, own: Epoch, image: Epoch) -> Step {
        let guest = match self.volatile.guest {
            Guest::Loaded(epoch) if epoch == image => Guest::Loaded(own),
            guest => guest,
        };
        let volatile = Volatile { guest, authorised: None, ..self.volatile };
        let now = Self { record: self.record, volatile };
        now.own(own, volatile, now.resume_what_waits(own))
    }

    fn own(&self, own: Epoch, volatile: Volatile, effects: Vec<Effect>) -> Step {
        Step { record: Some(Record::Own { own, seen: own }), volatile, effects }
    }

    fn answered(&self) -> Self {
        Self { record: self.record, volatile: Volatile { question: None, ..self.volatile } }
    }

    fn arm(&self, own: Epoch) -> Vec<Effect> {
        if self.volatile.standing == Standing::Leased(own) { vec![Effect::Arm] } else { vec![] }
    }

    fn acquire_or_refuse(&self, epoch: Epoch) -> Step {
        match self.record {
            Record::Replica { seen, .. } if epoch > seen => match self.volatile.guest {
                Guest::Loaded(loaded) if loaded == epoch && self.volatile.standing.permits(epoch) => {
                    let volatile = Volatile { authorised: None, ..self.volatile };
                    self.own(epoch, volatile, self.start(epoch, Effect::Resume))
                }
                // Outside its lease it may have lost the VM to a failover. The release comes again.
                Guest::Loaded(loaded) if loaded == epoch => self.stay(),
                _ => self.refuse(epoch),
            },
            _ => self.stay(),
        }
    }

    fn refuse(&self, epoch: Epoch) -> Step {
        self.replica(epoch, Some(epoch))
    }

    /// Becomes deaf to `seen` and anything older, and drops what such a move brought here.
    fn replica(&self, seen: Epoch, refused: Option<Epoch>) -> Step {
        let stale = |epoch: Epoch| epoch <= seen;
        let receiving = self.volatile.authorised.is_some_and(stale);
        let loaded = matches!(self.volatile.guest, Guest::Loaded(epoch) if stale(epoch));
        Step {
            record: Some(Record::Replica { seen, refused }),
            volatile: Volatile { authorised: self.volatile.authorised.filter(|epoch| !stale(*epoch)), ..self.volatile },
            effects: if receiving || loaded { vec![Effect::DropImage] } else { vec![] },
        }
    }

    /// The paused guest is no longer needed: the VM runs elsewhere.
    fn hand_over(&self, epoch: Epoch) -> Step {
        let effects = match self.volatile.guest {
            Guest::Absent => vec![],
            Guest::Running | Guest::Paused | Guest::Loaded(_) => vec![Effect::KillGuest],
        };
        self.write(Record::Replica { seen: epoch, refused: None }, effects)
    }

    fn owned_elsewhere(&self, epoch: Epoch) -> Step {
        match self.record {
            Record::Replica { seen, .. } if epoch > seen && adrift(&self.record, self.volatile.guest) => {
                self.with(self.volatile, vec![Effect::KillGuest])
            }
            Record::Replica { seen, refused } if epoch > seen => self.replica(epoch, refused),
            Record::Released { epoch: released } if epoch >= released => self.hand_over(epoch),
            // A guest that may run is ended before the tombstone says that it does not: the event comes again.
            Record::Own { own, .. } | Record::Prepared { own, .. } if epoch > own => match self.volatile.guest {
                Guest::Absent => {
                    self.write(Record::Replica { seen: epoch.max(self.record.seen()), refused: None }, vec![])
                }
                Guest::Running | Guest::Paused | Guest::Loaded(_) => self.with(self.volatile, vec![Effect::KillGuest]),
            },
            _ => self.stay(),
        }
    }

    fn qemu_gone(&self) -> Step {
        let volatile = Volatile { guest: Guest::Absent, authorised: None, ..self.volatile };
        let record = match self.record {
            Record::Prepared { own, epoch } => Some(Record::Own { own, seen: epoch }),
            Record::Replica { .. } | Record::Own { .. } | Record::Released { .. } => None,
        };
        Step { record, volatile, effects: vec![] }
    }

    fn restarted(&self, found: Guest) -> Step {
        // A lease is lost with the worker; the policy is what the driver says it is.
        let standing = match self.volatile.standing {
            Standing::KeepRunning => Standing::KeepRunning,
            Standing::Leased(_) | Standing::Unleased => Standing::Unleased,
        };
        let volatile = Volatile { guest: found, question: None, authorised: None, standing };
        let now = Self { record: self.record, volatile };
        match self.record {
            Record::Replica { .. } if found == Guest::Absent || adrift(&self.record, found) => now.stay(),
            Record::Replica { seen, .. } => match found {
                Guest::Loaded(epoch) if epoch > seen => {
                    now.with(Volatile { authorised: Some(epoch), ..volatile }, vec![])
                }
                _ => now.with(volatile, vec![Effect::KillGuest]),
            },
            Record::Own { own, .. } => match found {
                // What the image is of is known no more.
                Guest::Loaded(epoch) if epoch != own => now.with(volatile, vec![Effect::KillGuest]),
                _ => now.with(volatile, now.resume_what_waits(own)),
            },
            Record::Prepared { own, epoch } => now.write(Record::Own { own, seen: epoch }, now.resume_what_waits(own)),
            Record::Released { .. } => {
                let mut effects = match found {
                    Guest::Running => vec![Effect::Pause],
                    Guest::Absent | Guest::Paused | Guest::Loaded(_) => vec![],
                };
                if found != Guest::Absent {
                    effects.extend(now.disarm());
                }
                now.with(volatile, effects)
            }
        }
    }
}
