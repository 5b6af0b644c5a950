//! [`Message`]: what a worker says about a VM, to its peer and to the controller.
//!
//! A message is a function of its sender's current state and is sent again until superseded (level-triggered): there
//! is no outbox to lose. The same function tells the controller what a reported record is evidence of.

use crate::epoch::Epoch;
use crate::record::Record;
use crate::worker::{Guest, Volatile};

/// Said by a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// Destination to source: the image is loaded, the digest agrees, the replica is on stable storage.
    Ready(Epoch),
    /// Source to destination and controller: the commit point is passed.
    Release(Epoch),
    /// Source: this epoch will never be released.
    Revoked(Epoch),
    /// Destination: this epoch will never be acquired.
    Refused(Epoch),
    /// Owner: runs (or may run) under this epoch.
    Acquired(Epoch),
}

/// Everything that a worker in this state says.
pub fn emits(record: &Record, volatile: &Volatile) -> Vec<Message> {
    let mut messages = said_by(record);
    match (record, volatile.guest) {
        (Record::Replica { seen, .. }, Guest::Loaded(epoch)) if epoch > *seen => messages.push(Message::Ready(epoch)),
        _ => {}
    }
    messages
}

/// Everything that a record alone says.
pub fn said_by(record: &Record) -> Vec<Message> {
    match *record {
        Record::Replica { refused, .. } => refused.map(Message::Refused).into_iter().collect(),
        Record::Own { own, seen } if seen > own => vec![Message::Acquired(own), Message::Revoked(seen)],
        Record::Own { own, .. } => vec![Message::Acquired(own)],
        Record::Prepared { own, .. } => vec![Message::Acquired(own)],
        Record::Released { epoch } => vec![Message::Release(epoch)],
    }
}
