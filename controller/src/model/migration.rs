//! [`Migration`]: one live move as the controllers see it.
//!
//! ```text
//!                          ┌────────── cancel asked ──────────┐
//!   Queued ── admitted ──▶ Running                            ├─▶ Released ──▶ Acquired ──▶ Completed
//!     │                    └─▶ revoked: Cancelled or Failed ◀─┘        │
//!     └─ cancelled: Cancelled; given up: Failed                        └─▶ refused too: Failed
//! ```
//! Only [`super::queue`] takes a move out of the queue. From then on
//! every edge but the cancel request, the noted failure and the record is a worker's durable ownership record
//! ([`pageport_ownership`] decides which): nothing here guesses. The record of figures may come before or after the
//! owner has changed, and never holds it up.

use pageport_ownership::Epoch;
use pageport_proto::{MigrationId, SiteName, StoreId, VmId, WorkerName};
use prost::Message as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::schedule::Terms;

/// One end of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The site.
    pub site: SiteName,
    /// The worker there.
    pub worker: WorkerName,
}

/// One live move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Its id.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The VM's name when the move was ordered.
    pub vm_name: String,
    /// Where it ran.
    pub from: Place,
    /// Where it goes.
    pub to: Place,
    /// The epoch that was authorised for the move; none before it has begun.
    pub epoch: Epoch,
    /// The destination's store when the move began. One that is younger has forgotten what the destination may have
    /// refused since, so the move is not authorised to it.
    #[serde(default)]
    pub to_store: Option<StoreId>,
    /// When it was ordered.
    pub created_unix_ms: i64,
    /// When it was let begin; [`None`]: it has not begun, or began when it was ordered.
    #[serde(default)]
    pub started_unix_ms: Option<i64>,
    /// W3C trace context of the order.
    pub traceparent: String,
    /// On which terms.
    #[serde(default)]
    pub terms: Terms,
    /// The guest can be slowed down in it: it was let begin with that policy, which its hypervisor has to know before.
    #[serde(default)]
    pub can_throttle: bool,
    /// How far it is.
    pub phase: Phase,
    /// The first failure that a worker gave.
    pub failure: Option<String>,
    /// The figures, once the source has reported them.
    pub record: Option<Record>,
    /// The source has nothing left to do.
    pub source_ended: bool,
    /// The destination has nothing left to do.
    pub destination_ended: bool,
}

/// Was a move asked to be given up?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cancel {
    /// No.
    NotAsked,
    /// Yes: the source's record decides.
    Asked,
}

/// How far a move is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// Ordered; it has not begun. Why it waits is not kept: [`crate::scheduler`] says.
    Queued,
    /// Authorised; before the commit point as far as is known.
    Running {
        /// Was it asked to be given up?
        cancel: Cancel,
    },
    /// The source has passed the commit point.
    Released {
        /// It was asked to be given up, too late.
        cancel: Cancel,
    },
    /// The destination owns the VM; the figures are not here yet.
    Acquired {
        /// When that was committed.
        at_unix_ms: i64,
        /// It was asked to be given up, too late.
        cancel: Cancel,
    },
    /// The VM runs at the destination.
    Completed {
        /// When.
        at_unix_ms: i64,
        /// It was asked to be given up, too late.
        cancel: Cancel,
    },
    /// The VM stayed where it was.
    Failed {
        /// When.
        at_unix_ms: i64,
        /// Why.
        reason: String,
    },
    /// The VM stayed where it was, as was asked.
    Cancelled {
        /// When.
        at_unix_ms: i64,
    },
}

/// How ownership of the VM went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The source has released.
    Released,
    /// The destination has refused; the source has not released.
    Refused,
    /// The destination has acquired.
    Acquired,
    /// The source has revoked.
    Revoked,
    /// The source had released, the destination refused: the source goes on under a newer epoch.
    GivenBack,
    /// The controllers gave the VM to somebody without a worker's word.
    TakenOver,
}

impl Migration {
    /// Has it ended, one way or another?
    pub fn is_over(&self) -> bool {
        match self.phase {
            Phase::Queued | Phase::Running { .. } | Phase::Released { .. } | Phase::Acquired { .. } => false,
            Phase::Completed { .. } | Phase::Failed { .. } | Phase::Cancelled { .. } => true,
        }
    }

    /// Is who owns the VM settled?
    pub fn is_settled(&self) -> bool {
        self.is_over() || matches!(self.phase, Phase::Acquired { .. })
    }

    /// Would the reason of a failure still be of use?
    pub fn wants_reason(&self) -> bool {
        let failing = match self.phase {
            Phase::Running { .. } | Phase::Released { .. } | Phase::Failed { .. } => true,
            Phase::Queued | Phase::Acquired { .. } | Phase::Completed { .. } | Phase::Cancelled { .. } => false,
        };
        failing && self.failure.is_none()
    }

    /// Notes why the move fails; the first reason stays.
    pub fn note_failure(&mut self, why: String) {
        if !self.wants_reason() {
            return;
        }
        if let Phase::Failed { reason, .. } = &mut self.phase {
            reason.clone_from(&why);
        }
        self.failure = Some(why);
    }

    /// When it ended.
    pub fn ended_unix_ms(&self) -> Option<i64> {
        match self.phase {
            Phase::Queued | Phase::Running { .. } | Phase::Released { .. } | Phase::Acquired { .. } => None,
            Phase::Completed { at_unix_ms, .. }
            | Phase::Failed { at_unix_ms, .. }
            | Phase::Cancelled { at_unix_ms } => Some(at_unix_ms),
        }
    }

    /// Follows the ownership of the VM.
    pub fn follow(&mut self, turn: Turn, now_unix_ms: i64) {
        let next = match (&self.phase, turn) {
            (Phase::Running { cancel }, Turn::Released) => Phase::Released { cancel: *cancel },
            (Phase::Running { cancel } | Phase::Released { cancel }, Turn::Acquired) => match self.record {
                Some(_) => Phase::Completed { at_unix_ms: now_unix_ms, cancel: *cancel },
                None => Phase::Acquired { at_unix_ms: now_unix_ms, cancel: *cancel },
            },
            (Phase::Running { cancel: Cancel::Asked }, Turn::Revoked) => Phase::Cancelled { at_unix_ms: now_unix_ms },
            (Phase::Running { cancel: Cancel::NotAsked } | Phase::Released { .. }, Turn::Revoked) => {
                let reason = self.failure.clone().unwrap_or_else(|| "the source gave the move up".to_owned());
                Phase::Failed { at_unix_ms: now_unix_ms, reason }
            }
            (Phase::Running { .. } | Phase::Released { .. }, Turn::GivenBack) => {
                let reason = self.failure.clone().unwrap_or_else(|| "the destination lost the image".to_owned());
                Phase::Failed { at_unix_ms: now_unix_ms, reason }
            }
            (Phase::Running { .. } | Phase::Released { .. }, Turn::TakenOver) => {
                let reason = self.failure.clone().unwrap_or_else(|| "the vm was taken over".to_owned());
                Phase::Failed { at_unix_ms: now_unix_ms, reason }
            }
            (Phase::Running { .. } | Phase::Released { .. }, Turn::Refused)
            | (Phase::Released { .. }, Turn::Released) => {
                return;
            }
            (
                Phase::Queued
                | Phase::Acquired { .. }
                | Phase::Completed { .. }
                | Phase::Failed { .. }
                | Phase::Cancelled { .. },
                _,
            ) => return,
        };
        self.phase = next;
    }

    /// Is it between the two workers?
    pub fn is_under_way(&self) -> bool {
        match self.phase {
            Phase::Running { .. } | Phase::Released { .. } => true,
            Phase::Queued
            | Phase::Acquired { .. }
            | Phase::Completed { .. }
            | Phase::Failed { .. }
            | Phase::Cancelled { .. } => false,
        }
    }

    /// It ends before it has begun: no worker has heard of it.
    pub(super) fn leave_queue(&mut self, ended: Phase) {
        self.phase = ended;
        (self.source_ended, self.destination_ended) = (true, true);
    }

    /// Takes the figures; the first ones stay.
    pub fn take_record(&mut self, record: Record, now_unix_ms: i64) {
        self.record.get_or_insert(record);
        self.complete(now_unix_ms);
    }

    /// Ends a move whose owner has changed, with or without figures.
    pub fn complete(&mut self, now_unix_ms: i64) {
        if let Phase::Acquired { cancel, .. } = self.phase {
            self.phase = Phase::Completed { at_unix_ms: now_unix_ms, cancel };
        }
    }
}

/// The figures of a finished move, kept as they came.
#[derive(Debug, Clone, PartialEq)]
pub struct Record(pub Box<pageport_proto::v1::MigrationRecord>);

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.encode_to_vec().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        pageport_proto::v1::MigrationRecord::decode(bytes.as_slice())
            .map(Box::new)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}
