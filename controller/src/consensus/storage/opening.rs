//! What is on the disk when a node starts: read, judged, and taken up.

use std::cell::Cell;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::{Entry, HardState};

use super::{HARD, LOG, LogError, LogStorage, MEMBERS, Place, STORE, TRUNCATED};
use crate::consensus::disk::{Change, Disk, FileDisk};
use crate::consensus::membership::Membership;
use crate::consensus::snapshot::{self, Snapshot};
use crate::model::State;

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
        let hard = hard_state(&disk)?;
        let truncated = truncated(&disk)?;
        let entries = entries_after(&disk, truncated)?;
        let known = snapshot.membership.into_iter().chain(members(&disk)?);
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
        let store = store_id(&mut disk, fresh)?;
        let snapshot_wanted = Cell::new(false);
        let mut storage = Self { disk, store, hard, membership, truncated, entries, snapshot: place, snapshot_wanted };
        if storage.last().index < place.index {
            storage.hard.term = storage.hard.term.max(place.term);
            storage.reset_log(place, None)?;
        }
        storage.hard.commit = storage.hard.commit.max(place.index);
        Ok((storage, snapshot.state))
    }
}

fn hard_state(disk: &impl Disk) -> Result<HardState, LogError> {
    match disk.get(HARD)? {
        Some(bytes) => HardState::decode(bytes.as_slice()).map_err(|_| damaged(HARD)),
        None => Ok(HardState::default()),
    }
}

fn truncated(disk: &impl Disk) -> Result<Place, LogError> {
    let Some(bytes) = disk.get(TRUNCATED)? else { return Ok(Place::default()) };
    let halves = bytes.split_first_chunk::<8>().zip(bytes.last_chunk::<8>());
    let ((index, _), term) = halves.filter(|_| bytes.len() == 16).ok_or_else(|| damaged(TRUNCATED))?;
    Ok(Place { index: u64::from_be_bytes(*index), term: u64::from_be_bytes(*term) })
}

/// The entries, which follow each other.
fn entries_after(disk: &impl Disk, truncated: Place) -> Result<VecDeque<Entry>, LogError> {
    let mut entries = VecDeque::new();
    for (_, bytes) in disk.scan(LOG)? {
        let entry = Entry::decode(bytes.as_slice()).map_err(|_| damaged(LOG))?;
        if entry.index != truncated.index + 1 + entries.len() as u64 {
            return Err(damaged(format!("{LOG}{}", entry.index)));
        }
        entries.push_back(entry);
    }
    Ok(entries)
}

fn members(disk: &impl Disk) -> Result<Option<Membership>, LogError> {
    let kept = disk.get(MEMBERS)?;
    kept.map(|bytes| serde_json::from_slice(&bytes).map_err(|_| damaged(MEMBERS))).transpose()
}

/// Which store this is: from now on `fresh`, if it is a new one.
fn store_id(disk: &mut impl Disk, fresh: StoreId) -> Result<StoreId, LogError> {
    if let Some(bytes) = disk.get(STORE)? {
        return String::from_utf8_lossy(&bytes).parse().map_err(|_| damaged(STORE));
    }
    disk.commit(vec![Change::put(STORE, fresh.to_string().into_bytes())])?;
    Ok(fresh)
}

fn damaged(key: impl Into<String>) -> LogError {
    LogError::Damaged { key: key.into() }
}
