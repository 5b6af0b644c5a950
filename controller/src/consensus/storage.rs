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

use std::cell::Cell;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::{Entry, HardState};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use super::disk::{Change, Disk, DiskError, FileDisk};
use super::membership::Membership;
use super::snapshot::{self, Snapshot, SnapshotError};
use crate::model::State;

const STORE: &str = "store";
const HARD: &str = "hard";
const MEMBERS: &str = "members";
const TRUNCATED: &str = "truncated";
const LOG: &str = "log/";

/// Why the log could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk said no.
    #[error("keep the replicated log")]
    Disk(#[from] DiskError),
    /// The snapshot cannot be made or read.
    #[error("keep the replicated state")]
    Snapshot(#[from] SnapshotError),
    /// The members cannot be written as JSON.
    #[error("encode the members")]
    Members(#[source] serde_json::Error),
    /// The snapshot is older than the beginning of the log, or gone.
    #[error(
        "the log begins after entry {log}, and the snapshot reaches only to entry {snapshot} (0: it is missing): what lies between is lost here"
    )]
    Gap {
        /// The last entry that was dropped from the log.
        log: u64,
        /// The entry that the snapshot reaches to.
        snapshot: u64,
    },
    /// Entries that were committed are missing.
    #[error("the log ends at entry {last}, and entry {commit} was committed: the end of the log is lost here")]
    Short {
        /// The last entry that is there.
        last: u64,
        /// One that was.
        commit: u64,
    },
    /// A value is not what was written.
    #[error("the replicated log is damaged at {key}")]
    Damaged {
        /// Where.
        key: String,
    },
}

impl LogError {
    /// Is what is on the disk not what was written? Anything else may pass, or be put right outside it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Disk(error) => error.is_damage(),
            Self::Snapshot(error) => error.is_damage(),
            Self::Gap { .. } | Self::Short { .. } | Self::Damaged { .. } => true,
            Self::Members(_) => false,
        }
    }

    /// Is there no room?
    pub fn is_full(&self) -> bool {
        let causes = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        causes.filter_map(io_error).any(|error| error.kind() == std::io::ErrorKind::StorageFull)
    }
}

fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    match error.downcast_ref::<pageport_common::store::EngineError>() {
        Some(pageport_common::store::EngineError::Io(error)) => Some(error),
        _ => error.downcast_ref(),
    }
}

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

fn damaged(key: impl Into<String>) -> LogError {
    LogError::Damaged { key: key.into() }
}

impl LogStorage {
    /// Opens or creates the log in `folder`; gives the state of the last snapshot with it. `first` is who the controllers are
    /// as long as neither log nor snapshot says so.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn open(folder: &Path, first: Membership) -> Result<(Self, State), LogError> {
        Self::open_on(FileDisk::open(folder)?, first, StoreId::generate())
    }
}

impl<D: Disk> LogStorage<D> {
    /// Takes up what is on a disk; the rest as [`LogStorage::open`]. A new one is called `fresh`.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn open_on(mut disk: D, first: Membership, fresh: StoreId) -> Result<(Self, State), LogError> {
        let snapshot = match disk.snapshot()? {
            Some(bytes) => snapshot::decode(&bytes)?,
            None => Snapshot::default(),
        };
        let hard = match disk.get(HARD)? {
            Some(bytes) => HardState::decode(bytes.as_slice()).map_err(|_| damaged(HARD))?,
            None => HardState::default(),
        };
        let truncated = match disk.get(TRUNCATED)? {
            Some(bytes) => {
                let halves = bytes.split_first_chunk::<8>().zip(bytes.last_chunk::<8>());
                let ((index, _), term) = halves.filter(|_| bytes.len() == 16).ok_or_else(|| damaged(TRUNCATED))?;
                Place { index: u64::from_be_bytes(*index), term: u64::from_be_bytes(*term) }
            }
            None => Place::default(),
        };
        let mut entries = VecDeque::new();
        for (_, bytes) in disk.scan(LOG)? {
            let entry = Entry::decode(bytes.as_slice()).map_err(|_| damaged(LOG))?;
            if entry.index != truncated.index + 1 + entries.len() as u64 {
                return Err(damaged(format!("{LOG}{}", entry.index)));
            }
            entries.push_back(entry);
        }
        let kept = match disk.get(MEMBERS)? {
            Some(bytes) => Some(serde_json::from_slice(&bytes).map_err(|_| damaged(MEMBERS))?),
            None => None,
        };
        let known = snapshot.membership.into_iter().chain(kept);
        let membership = Arc::new(known.max_by_key(|known: &Membership| known.index).unwrap_or(first));
        let place = Place { index: snapshot.index, term: snapshot.term };
        if place.index < truncated.index {
            return Err(LogError::Gap { log: truncated.index, snapshot: place.index });
        }
        let last = truncated.index + entries.len() as u64;
        let commit = hard.commit.max(membership.index);
        if commit > last.max(place.index) {
            return Err(LogError::Short { last, commit });
        }
        let store = match disk.get(STORE)? {
            Some(bytes) => String::from_utf8_lossy(&bytes).parse().map_err(|_| damaged(STORE))?,
            None => {
                disk.commit(vec![Change::put(STORE, fresh.to_string().into_bytes())])?;
                fresh
            }
        };
        let snapshot_wanted = Cell::new(false);
        let mut storage = Self { disk, store, hard, membership, truncated, entries, snapshot: place, snapshot_wanted };
        if storage.last().index < place.index {
            storage.hard.term = storage.hard.term.max(place.term);
            storage.reset_log(place, None)?;
        }
        storage.hard.commit = storage.hard.commit.max(place.index);
        Ok((storage, snapshot.state))
    }

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::membership::Member;
    use super::*;

    fn one() -> Membership {
        Membership::first([Member::new(1, "a".parse().unwrap(), "192.0.2.1:7400".into())])
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![index as u8], ..Entry::default() }
    }

    fn indexes(storage: &LogStorage) -> Vec<(u64, u64)> {
        let (first, last) = (storage.first_index().unwrap(), storage.last_index().unwrap());
        let entries = storage.entries(first, last + 1, None, GetEntriesContext::empty(false)).unwrap();
        entries.iter().map(|entry| (entry.index, entry.term)).collect()
    }

    #[test]
    fn a_store_is_the_same_for_its_life() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = |folder: &tempfile::TempDir| LogStorage::open(folder.path(), one()).unwrap().0.store();
        assert_eq!(id(&folder), id(&folder));
        assert_ne!(id(&folder), id(&other));
    }

    #[test]
    fn a_conflicting_tail_is_overwritten_and_stays_so_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let expected = vec![(1, 1), (2, 2)];
        {
            let (mut storage, _) = LogStorage::open(folder.path(), one()).unwrap();
            storage.persist(&[entry(1, 1), entry(2, 1), entry(3, 1)]).unwrap();
            storage.note_hard(&HardState { term: 2, vote: 1, commit: 1 });
            storage.persist(&[entry(2, 2)]).unwrap();
            assert_eq!(indexes(&storage), expected);
        }
        let (storage, _) = LogStorage::open(folder.path(), one()).unwrap();
        assert_eq!(indexes(&storage), expected);
        assert_eq!(storage.initial_state().unwrap().hard_state.term, 2);
    }

    #[test]
    fn after_a_snapshot_the_log_is_short_and_the_state_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let state = State { seed_seq: 42, ..State::default() };
        {
            let (mut storage, _) = LogStorage::open(folder.path(), one()).unwrap();
            storage.persist(&(1..=10).map(|index| entry(index, 1)).collect::<Vec<_>>()).unwrap();
            storage.make_snapshot(8, &state, 2).unwrap();
            assert_eq!(indexes(&storage), [(7, 1), (8, 1), (9, 1), (10, 1)]);
        }
        let (storage, found) = LogStorage::open(folder.path(), one()).unwrap();
        assert_eq!((found, storage.snapshot_place().index, storage.term(6).unwrap()), (state, 8, 1));
        assert!(storage.entries(6, 8, None, GetEntriesContext::empty(false)).is_err());
        assert_eq!(storage.snapshot(0, 2).unwrap().get_metadata().index, 8);
    }

    /// A node's files: 10 entries, committed to 9, a snapshot at 8.
    fn used() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let (mut storage, _) = LogStorage::open(folder.path(), one()).unwrap();
        storage.persist(&(1..=10).map(|index| entry(index, 1)).collect::<Vec<_>>()).unwrap();
        storage.note_hard(&HardState { term: 1, vote: 1, commit: 9 });
        storage.make_snapshot(8, &State::default(), 2).unwrap();
        folder
    }

    fn refusal(folder: &tempfile::TempDir) -> String {
        let error = LogStorage::open(folder.path(), one()).map(drop).unwrap_err();
        assert!(error.is_damage(), "{error:?}");
        let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }

    #[test]
    fn a_file_that_is_missing_is_a_refusal_and_not_a_fresh_start() {
        let folder = used();
        std::fs::remove_file(folder.path().join("snapshot")).unwrap();
        assert!(refusal(&folder).contains("the log begins after entry 6, and the snapshot reaches only to entry 0"));
        let folder = used();
        std::fs::remove_dir_all(folder.path().join("log")).unwrap();
        assert!(refusal(&folder).contains("terms and votes are lost"));
        assert!(!folder.path().join("log").exists(), "and nothing was made in its place");
    }

    #[test]
    fn a_snapshot_that_is_cut_or_changed_is_refused_with_the_way_out() {
        let folder = used();
        let path = folder.path().join("snapshot");
        let good = std::fs::read(&path).unwrap();
        for length in [0, 7, 11, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(refusal(&folder).contains("the snapshot is damaged"), "{length} bytes");
        }
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 0x40;
        std::fs::write(&path, &bad).unwrap();
        assert!(refusal(&folder).contains("the snapshot is damaged"));
        std::fs::write(&path, &good).unwrap();
        assert!(LogStorage::open(folder.path(), one()).is_ok());
    }

    #[test]
    fn a_log_without_its_end_or_a_part_of_its_middle_is_refused() {
        let without = |gone: &[u64]| {
            let folder = used();
            {
                let mut disk = FileDisk::open(folder.path()).unwrap();
                disk.commit(gone.iter().map(|index| Change::Remove(log_key(*index))).collect()).unwrap();
            }
            refusal(&folder)
        };
        assert!(without(&[9, 10]).contains("the log ends at entry 8, and entry 9 was committed"));
        assert!(without(&[8]).contains("the replicated log is damaged at log/9"));
    }

    #[test]
    fn a_snapshot_file_that_is_ahead_of_the_log_wins() {
        let folder = tempfile::tempdir().unwrap();
        {
            let (mut storage, _) = LogStorage::open(folder.path(), one()).unwrap();
            storage.persist(&[entry(1, 1), entry(2, 1)]).unwrap();
        }
        let ahead =
            Snapshot { index: 9, term: 3, membership: Some(Membership { index: 8, ..one() }), state: State::default() };
        snapshot::replace(folder.path(), &snapshot::encode(&ahead).unwrap()).unwrap();
        let (storage, _) = LogStorage::open(folder.path(), one()).unwrap();
        assert_eq!((storage.first_index().unwrap(), storage.last_index().unwrap()), (10, 9));
        assert_eq!(storage.initial_state().unwrap().hard_state.commit, 9);
        assert_eq!(storage.membership().index, 8, "its members count");
    }

    #[test]
    fn a_change_of_the_members_is_durable_at_once_and_outlives_older_snapshots() {
        let folder = tempfile::tempdir().unwrap();
        {
            let (mut storage, _) = LogStorage::open(folder.path(), one()).unwrap();
            storage.persist(&[entry(1, 1), entry(2, 1), entry(3, 1)]).unwrap();
            storage.make_snapshot(1, &State::default(), 0).unwrap();
            storage.keep_membership(Membership { index: 3, ..Membership::default() }).unwrap();
        }
        let (storage, _) = LogStorage::open(folder.path(), one()).unwrap();
        assert_eq!((storage.membership().index, storage.membership().voters.len()), (3, 0));
        assert_eq!(storage.initial_state().unwrap().hard_state.commit, 3, "what it rests on counts as committed");
        assert!(storage.snapshot(0, 2).is_err(), "a snapshot from before the change is sent to nobody");
        assert!(storage.take_snapshot_wanted());
    }
}
