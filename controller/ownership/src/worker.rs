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
//! [`Event::Ready`] on a paused guest releases; an image is acquired only while `seen` is below its epoch. It does not
//! decide whether a VM *should* run: see [`needs_grant`].

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::message::{Message, emits};
use crate::record::{Durable, Record};

/// Makes the controller's answer belong to one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nonce(pub u64);

/// What the hypervisor on this host does for the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum Guest {
    /// No process.
    #[default]
    Absent,
    /// Its CPUs run (or its user paused it: it counts as running).
    Running,
    /// Stopped by us, with its memory complete and its disk drained: the source at the switchover.
    Paused,
    /// An incoming image: complete, its digest agrees, the disk is on stable storage, never resumed.
    Loaded(Epoch),
}

/// What is lost when the worker ends ([`Guest`] is found again by looking at the host).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Volatile {
    /// What the hypervisor does.
    pub guest: Guest,
    /// The question to the controller that is open.
    pub question: Option<Nonce>,
    /// The move that the controller authorised in answer to this worker's own question.
    pub authorised: Option<Epoch>,
}

/// Who owns the VM, as seen from this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// This worker.
    Me,
    /// Another worker.
    Other,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    /// Controller: move the VM away under this epoch (this worker is the source).
    Authorise(Epoch),
    /// Give this move up while it can be: the controller's request, or this worker's own failure as the source.
    Cancel(Epoch),
    /// The guest is paused, its last page is sent and its disk is drained.
    Paused,
    /// The guest runs: the effect `Resume` or `Boot` took place.
    Resumed,
    /// The peer has the whole image.
    Ready(Epoch),
    /// This worker sends a question to the controller.
    Asked(Nonce),
    /// Answer: the image of this move may be loaded here.
    AuthReply {
        /// Of the question.
        nonce: Nonce,
        /// The move.
        epoch: Epoch,
    },
    /// Answer: this worker may run the VM under this epoch.
    Grant {
        /// Of the question.
        nonce: Nonce,
        /// The epoch.
        own: Epoch,
    },
    /// The image of this move is loaded and verified, the replica is on stable storage.
    Loaded(Epoch),
    /// The source (or the controller for it) says that it has released this epoch.
    Release(Epoch),
    /// Give this move up as its destination.
    Refuse(Epoch),
    /// The source will never release this epoch.
    Revoked(Epoch),
    /// The destination will never acquire this epoch.
    Refused(Epoch),
    /// The destination holds the VM under this epoch.
    Acquired(Epoch),
    /// Controller: the newest ownership that is committed.
    Owned {
        /// The epoch.
        epoch: Epoch,
        /// Whose.
        owner: Owner,
    },
    /// The hypervisor ended, told to or not.
    QemuGone,
    /// The worker started; this is what it found on its host.
    Restarted(Guest),
}

/// What the driver does after persisting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// Set the paused guest or the loaded image running. Needs [`crate::MayRun`].
    Resume,
    /// Start the VM from its disk. Needs [`crate::MayRun`].
    Boot,
    /// Stop the guest's CPUs.
    Pause,
    /// End the guest.
    KillGuest,
    /// End the hypervisor that holds (or receives) an incoming image.
    DropImage,
    /// Start a hypervisor that receives the image of this move.
    LoadImage(Epoch),
}

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
/// A cold boot takes two grants: the first is recorded, the second (at the recorded epoch) boots.
pub fn needs_grant(record: &Record, volatile: &Volatile, power_on: bool, owned: Option<Epoch>) -> bool {
    let Some(granted) = owned else { return false };
    match *record {
        Record::Replica { seen, .. } => power_on && granted > seen,
        Record::Own { own, seen } => {
            granted > seen && granted > own || power_on && granted == own && volatile.guest == Guest::Absent
        }
        Record::Prepared { .. } => false,
        Record::Released { epoch } => granted > epoch,
    }
}

/// One event at one worker.
pub fn worker_step(record: &Record, volatile: &Volatile, event: Event) -> Step {
    let now = Now { record: *record, volatile: *volatile };
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
                now.write(Record::Released { epoch }, vec![])
            }
            _ => now.stay(),
        },
        Event::Asked(nonce) => now.with(Volatile { question: Some(nonce), ..*volatile }, vec![]),
        Event::AuthReply { nonce, epoch } if volatile.question == Some(nonce) => now.authorised(epoch),
        Event::Grant { nonce, own } if volatile.question == Some(nonce) => now.granted(own),
        Event::AuthReply { .. } | Event::Grant { .. } => now.stay(),
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
        Event::Owned { owner: Owner::Me, .. } => now.stay(),
        Event::Owned { epoch, owner: Owner::Other } => now.owned_elsewhere(epoch),
        Event::QemuGone => now.qemu_gone(),
        Event::Restarted(found) => now.restarted(found),
    }
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

    /// A paused guest or a loaded image goes on once there is an `Own`.
    fn resume_what_waits(&self) -> Vec<Effect> {
        match self.volatile.guest {
            Guest::Paused => vec![Effect::Resume],
            Guest::Absent | Guest::Running | Guest::Loaded(_) => vec![],
        }
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
                self.write(Record::Own { own, seen: epoch }, self.resume_what_waits())
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
        let volatile = Volatile { question: None, ..self.volatile };
        let recorded = Record::Own { own, seen: own };
        match self.record {
            Record::Own { own: held, .. } if held == own => {
                let effects = match self.volatile.guest {
                    Guest::Absent => vec![Effect::Boot],
                    Guest::Paused | Guest::Loaded(_) => vec![Effect::Resume],
                    Guest::Running => vec![],
                };
                self.with(volatile, effects)
            }
            Record::Replica { seen, .. } if own > seen => {
                let effects = match self.volatile.guest {
                    Guest::Absent => vec![],
                    Guest::Running | Guest::Paused | Guest::Loaded(_) => vec![Effect::DropImage],
                };
                Step { record: Some(recorded), volatile: Volatile { authorised: None, ..volatile }, effects }
            }
            Record::Own { seen, .. } | Record::Released { epoch: seen } if own > seen => {
                Step { record: Some(recorded), volatile, effects: self.resume_what_waits() }
            }
            _ => self.with(volatile, vec![]),
        }
    }

    fn acquire_or_refuse(&self, epoch: Epoch) -> Step {
        match self.record {
            Record::Replica { seen, .. } if epoch > seen => {
                if self.volatile.guest == Guest::Loaded(epoch) {
                    Step {
                        record: Some(Record::Own { own: epoch, seen: epoch }),
                        volatile: Volatile { authorised: None, ..self.volatile },
                        effects: vec![Effect::Resume],
                    }
                } else {
                    self.refuse(epoch)
                }
            }
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
        let fresh = |guest| Volatile { guest, question: None, authorised: None };
        let resume = match found {
            Guest::Absent | Guest::Running => vec![],
            Guest::Paused | Guest::Loaded(_) => vec![Effect::Resume],
        };
        match self.record {
            Record::Replica { seen, .. } => match found {
                Guest::Absent => self.with(fresh(found), vec![]),
                Guest::Loaded(epoch) if epoch > seen => {
                    self.with(Volatile { authorised: Some(epoch), ..fresh(found) }, vec![])
                }
                Guest::Running | Guest::Paused | Guest::Loaded(_) => self.with(fresh(found), vec![Effect::KillGuest]),
            },
            Record::Own { .. } => self.with(fresh(found), resume),
            Record::Prepared { own, epoch } => {
                Step { record: Some(Record::Own { own, seen: epoch }), volatile: fresh(found), effects: resume }
            }
            Record::Released { .. } => {
                let effects = match found {
                    Guest::Running => vec![Effect::Pause],
                    Guest::Absent | Guest::Paused | Guest::Loaded(_) => vec![],
                };
                self.with(fresh(found), effects)
            }
        }
    }
}
