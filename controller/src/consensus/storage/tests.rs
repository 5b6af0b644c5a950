use super::*;
use crate::consensus::membership::Member;

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
    pageport_common::error::with_causes(&error)
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
