//! [`LogStorage`]: raft's log and hard state on a [`Disk`], and the snapshot beside it.
//!
//! | key | value |
//! |---|---|
//! | `hard` | term, vote, commit (raft's own encoding) |
//! | `store` | the id of this store, made with it |
//! | `members` | who the controllers are (JSON), once that was changed |
//! | `truncated` | index and term of the newest entry that was dropped from the log (2 x u64, big-endian) |
//! | `log/` + index (u64, big-endian) | one entry |
//!
//! The applied state is the snapshot plus the committed entries after it: they are applied again at the start.
//! Entries since the last truncation are also in memory; [`super::core`] bounds their number by making snapshots.
//!
//! A change of the members counts from when it is applied, and for good: it is on disk before this node acts on it, together
//! with a commit index that covers it. A node that fell back to an older membership could elect a leader with a majority that
//! is none any more.
//!
//! Guarantees: [`LogStorage::persist`] and [`LogStorage::install`] return when all they were given is on stable storage,
//! as one batch; a snapshot file newer than the log (a crash in between) wins at the start.
//! `opening` takes up what is there at the start, and refuses what is damaged (`error`).

mod error;
mod opening;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::{Entry, HardState};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

pub use self::error::LogError;
use super::disk::{Change, Disk, FileDisk};
use super::membership::Membership;
use super::snapshot::{self, Snapshot};
use crate::model::State;

const STORE: &str = "store";
const HARD: &str = "hard";
const MEMBERS: &str = "members";
const TRUNCATED: &str = "truncated";
const LOG: &str = "log/";

/// An entry's place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
}

/// Log, hard state and snapshot of one node.
#[derive(Debug)]
pub struct LogStorage<D = FileDisk> {
    disk: D,
    store: StoreId,
    hard: HardState,
    membership: Arc<Membership>,
    truncated: Place,
    entries: VecDeque<Entry>,
    snapshot: Place,
    snapshot_wanted: Cell<bool>,
}

fn log_key(index: u64) -> Vec<u8> {
    [LOG.as_bytes(), &index.to_be_bytes()].concat()
}

impl<D: Disk> LogStorage<D> {
    /// Which store this is.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// The entry up to which the last snapshot reaches.
    pub fn snapshot_place(&self) -> Place {
        self.snapshot
    }

    /// The newest entry that was dropped from the log.
    pub fn truncated(&self) -> Place {
        self.truncated
    }

    /// Entries kept since the last truncation.
    pub fn kept(&self) -> usize {
        self.entries.len()
    }

    /// Who the controllers are.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }

    /// Keeps a change of the members, and that the entry that made it is committed.
    ///
    /// # Errors
    /// [`LogError`]: the node must end, since what is on disk is unknown.
    pub fn keep_membership(&mut self, membership: Membership) -> Result<(), LogError> {
        self.note_commit(membership.index);
        let mut changes = vec![Change::put(HARD, self.hard.encode_to_vec())];
        self.put_membership(&mut changes, membership)?;
        Ok(self.disk.commit(changes)?)
    }

    /// Did a peer need a newer snapshot since the last call?
    pub fn take_snapshot_wanted(&self) -> bool {
        self.snapshot_wanted.replace(false)
    }

    /// Notes a newer commit index; durable with the next write. Losing it costs nothing: it is learnt again.
    pub fn note_commit(&mut self, commit: u64) {
        self.hard.commit = self.hard.commit.max(commit);
    }

    /// Notes a hard state that need not be durable before anything else happens.
    pub fn note_hard(&mut self, hard: &HardState) {
        self.hard = hard.clone();
    }

    /// Appends entries (overwriting what conflicts) and keeps the hard state.
    ///
    /// # Errors
    /// [`LogError`]: the node must end, since what is on disk is unknown.
    pub fn persist(&mut self, entries: &[Entry]) -> Result<(), LogError> {
        let mut changes = vec![];
        changes.push(Change::put(HARD, self.hard.encode_to_vec()));
        if let Some(first) = entries.first() {
            let kept = first.index.saturating_sub(self.truncated.index + 1) as usize;
            for stale in self.entries.drain(kept.min(self.entries.len())..) {
                changes.push(Change::Remove(log_key(stale.index)));
            }
        }
        for entry in entries {
            changes.push(Change::put(log_key(entry.index), entry.encode_to_vec()));
            self.entries.push_back(entry.clone());
        }
        Ok(self.disk.commit(changes)?)
    }

    /// Takes a snapshot that came from the leader in place of the log.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn install(&mut self, bytes: &[u8], at: Place, membership: Option<Membership>) -> Result<(), LogError> {
        self.disk.replace_snapshot(bytes)?;
        self.snapshot = at;
        self.hard.commit = self.hard.commit.max(at.index);
        self.hard.term = self.hard.term.max(at.term);
        self.reset_log(at, membership)
    }

    /// Keeps the state as a snapshot and drops all but the newest `keep` entries up to it, but always the first one: who joins
    /// must begin with a snapshot, since the log does not say who the members were before it.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn make_snapshot(&mut self, applied: u64, state: &State, keep: u64) -> Result<(), LogError> {
        let Ok(term) = self.term(applied) else { return Ok(()) };
        let membership = Some(Membership::clone(&self.membership));
        let bytes = snapshot::encode(&Snapshot { index: applied, term, membership, state: state.clone() })?;
        self.disk.replace_snapshot(&bytes)?;
        self.snapshot = Place { index: applied, term };
        let index = applied.saturating_sub(keep).max(1);
        if index <= self.truncated.index {
            return Ok(());
        }
        let Ok(term) = self.term(index) else { return Ok(()) };
        let mut changes = vec![];
        changes.push(Change::put(HARD, self.hard.encode_to_vec()));
        for entry in self.entries.drain(..(index - self.truncated.index) as usize) {
            changes.push(Change::Remove(log_key(entry.index)));
        }
        self.put_truncated(&mut changes, Place { index, term });
        Ok(self.disk.commit(changes)?)
    }

    /// The log begins after `at`, empty.
    fn reset_log(&mut self, at: Place, membership: Option<Membership>) -> Result<(), LogError> {
        let mut changes = vec![];
        if let Some(membership) = membership {
            self.put_membership(&mut changes, membership)?;
        }
        for entry in self.entries.drain(..) {
            changes.push(Change::Remove(log_key(entry.index)));
        }
        changes.push(Change::put(HARD, self.hard.encode_to_vec()));
        self.put_truncated(&mut changes, at);
        Ok(self.disk.commit(changes)?)
    }

    fn put_membership(&mut self, changes: &mut Vec<Change>, membership: Membership) -> Result<(), LogError> {
        changes.push(Change::put(MEMBERS, serde_json::to_vec(&membership).map_err(LogError::Members)?));
        self.membership = Arc::new(membership);
        Ok(())
    }

    fn put_truncated(&mut self, changes: &mut Vec<Change>, at: Place) {
        self.truncated = at;
        changes.push(Change::put(TRUNCATED, [at.index.to_be_bytes(), at.term.to_be_bytes()].concat()));
    }

    fn last(&self) -> Place {
        match self.entries.back() {
            Some(entry) => Place { index: entry.index, term: entry.term },
            None => self.truncated,
        }
    }
}

impl<D: Disk> Storage for LogStorage<D> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: self.membership.conf_state() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last().index + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let at = |index: u64| (index - self.truncated.index - 1) as usize;
        let mut entries: Vec<Entry> = self.entries.range(at(low)..at(high)).cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.truncated.index {
            return Ok(self.truncated.term);
        }
        if index == self.snapshot.index {
            return Ok(self.snapshot.term);
        }
        if index < self.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let entry = self.entries.get((index - self.truncated.index - 1) as usize);
        entry.map(|entry| entry.term).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.truncated.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last().index)
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<raft::eraftpb::Snapshot> {
        let unavailable = raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable);
        // One from before a change of the members would not tell a new member that it is one.
        let oldest = request_index.max(self.truncated.index).max(self.membership.index);
        if self.snapshot.index < oldest || self.snapshot.index == 0 {
            self.snapshot_wanted.set(true);
            return Err(unavailable);
        }
        let kept = self.disk.snapshot().ok().flatten();
        let Some((data, decoded)) = kept.and_then(|bytes| snapshot::decode(&bytes).ok().map(|it| (bytes, it))) else {
            self.snapshot_wanted.set(true);
            return Err(unavailable);
        };
        let mut out = raft::eraftpb::Snapshot { data, ..Default::default() };
        let metadata = out.mut_metadata();
        metadata.index = decoded.index;
        metadata.term = decoded.term;
        metadata.set_conf_state(self.membership.conf_state());
        Ok(out)
    }
}
