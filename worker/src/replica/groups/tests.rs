//! What must hold of VMs' recovery points, whoever takes the disks.

use super::*;
use crate::replica::points::{Bound, ChangeDigest};

const SIZE: u64 = 1 << 20;

struct Host {
    folder: tempfile::TempDir,
    replicas: ReplicaStore,
    groups: Groups,
    vm: VmId,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let replicas = ReplicaStore::new(store.clone(), folder.path());
        let limits = Limits { points_bytes: 1 << 30, held_bytes: 1 << 30, reserve_bytes: 0 };
        let groups = Groups::new(store, folder.path(), limits);
        Self { folder, replicas, groups, vm: VmId::generate() }
    }

    /// As a session opens them.
    fn open(&self) -> Arc<Points> {
        let disk = self.replicas.open_for_writing(self.vm, "root", SIZE, 0).unwrap();
        self.groups.open(self.vm, vec![("root".to_owned(), disk)]).unwrap()
    }

    fn take_over(&self) {
        self.groups.surrender(&self.replicas, self.vm, Surrender::NewestPoint).unwrap();
        self.replicas.close(self.vm);
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; SIZE as usize];
        self.replicas.open_existing(self.vm, "root").unwrap().read(0, &mut content).unwrap();
        content
    }
}

fn info(number: u64) -> PointInfo {
    PointInfo { number, taken_unix_ms: 5, changed_bytes: 0, quiesced: false, disks: 1 }
}

#[test]
fn a_session_that_outlives_a_takeover_commits_nothing_and_begins_nothing() {
    let host = Host::new();
    let points = host.open();
    let lineage = Lineage::generate();
    points.group.adopt(lineage, info(1)).unwrap();
    let journal = points.group.begin(lineage, 2).unwrap();
    journal.zero("root", 0, 4096).unwrap();
    let mut digest = ChangeDigest::default();
    digest.zero("root", 0, 4096);
    host.take_over();
    // The guest's own write, from here on.
    host.replicas.open_existing(host.vm, "root").unwrap().write(0, &[7; 4096]).unwrap();
    let running = host.content();

    assert!(matches!(points.group.commit(&journal, info(2), digest.finish(), 3), Err(PointError::Closed)));
    assert!(matches!(journal.zero("root", 0, 4096), Err(PointError::Closed)));
    assert!(matches!(points.group.begin(lineage, 2), Err(PointError::Closed)));
    assert!(matches!(points.group.apply(), Err(PointError::Closed)));
    assert!(matches!(points.group.adopt(lineage, info(1)), Err(PointError::Closed)));
    assert!(matches!(points.open_layer(), Err(PointError::Closed)));
    assert_eq!(host.groups.points(host.vm), []);
    host.take_over();
    assert!(host.content() == running, "a later start finds the guest's own disk");
}

#[test]
fn a_first_copy_that_outlives_a_takeover_is_no_point_and_writes_nothing() {
    let host = Host::new();
    let points = host.open();
    host.take_over();
    let stale = &points.disks[0].1;
    assert_eq!(stale.write(0, &[1]).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    assert!(matches!(points.group.adopt(Lineage::generate(), info(1)), Err(PointError::Closed)));
    assert_eq!(host.groups.points(host.vm), []);
}

#[test]
fn a_takeover_takes_back_what_an_unfinished_move_has_written_and_stops_it() {
    let host = Host::new();
    let points = host.open();
    points.group.adopt(Lineage::generate(), info(1)).unwrap();
    let before = host.content();
    points.open_layer().unwrap();
    let change = Change::Write { disk: "root", offset: 100, data: &[9; 5000] };
    points.change(&[change]).unwrap();
    host.take_over();
    assert!(points.change(&[change]).is_err());
    assert!(host.content() == before);
}

/// A point of bytes that cannot be packed.
fn commit(points: &Points, number: u64, length: usize) -> Result<(), PointError> {
    let lineage = points.group.state().lineage.unwrap();
    let raw: Vec<u8> = (0..length).map(|_| rand::random()).collect();
    let mut digest = ChangeDigest::default();
    digest.data("root", 0, &raw);
    let journal = points.group.begin(lineage, number)?;
    journal.write("root", 0, length as u32, &zstd::bulk::compress(&raw, 1).unwrap())?;
    points.group.commit(&journal, info(number), digest.finish(), 10)?;
    points.group.apply()
}

#[test]
fn the_points_of_all_vms_are_bounded_together_and_each_gives_up_its_own_alone() {
    const BYTES: usize = 200 << 10;
    let mut host = Host::new();
    let bound = Some(5 * BYTES as u64 / 2);
    host.groups = Groups::new(host.groups.store.clone(), host.folder.path(), host.groups.limits).within(bound);
    let one = host.open();
    one.group.adopt(Lineage::generate(), info(1)).unwrap();
    commit(&one, 2, BYTES).unwrap();
    commit(&one, 3, BYTES).unwrap();
    let kept = host.groups.points(host.vm);
    assert_eq!(kept.len(), 3, "the undo of one point is all that is there");
    let first = host.vm;
    host.vm = VmId::generate();
    let other = host.open();
    other.group.adopt(Lineage::generate(), info(1)).unwrap();
    commit(&other, 2, BYTES).unwrap();
    // Now its journal, and then its undo, would be too much: its own older points go.
    commit(&other, 3, BYTES).unwrap();
    assert_eq!(other.group.state().points, [info(3)]);
    assert!(other.group.state().lost.is_some());
    let refused = commit(&other, 4, 2 * BYTES).unwrap_err();
    assert!(matches!(refused, PointError::NoSpace { bound: Bound::AllVms, .. }), "{refused:?}");
    assert!(refused.to_string().contains("replication.all_points_bytes"), "{refused}");
    assert_eq!(other.group.state().points, [info(3)], "the newest stays");
    assert_eq!(host.groups.points(first), kept);

    // What is not open after a restart counts, too.
    let vm = host.vm;
    other.group.close(&LeaseEnd::Reopened);
    one.group.close(&LeaseEnd::Reopened);
    host.groups = Groups::new(host.groups.store.clone(), host.folder.path(), host.groups.limits).within(bound);
    let other = host.open();
    assert!(matches!(commit(&other, 4, 2 * BYTES), Err(PointError::NoSpace { bound: Bound::AllVms, .. })));
    host.groups.forget(first, &LeaseEnd::Removed).unwrap();
    commit(&other, 4, 2 * BYTES).unwrap();
    assert_eq!(host.groups.points(vm).last().unwrap().number, 4);
}

#[test]
fn points_over_other_handles_are_opened_anew_and_the_old_ones_end() {
    let host = Host::new();
    let points = host.open();
    let lineage = Lineage::generate();
    points.group.adopt(lineage, info(1)).unwrap();
    assert!(Arc::ptr_eq(&points, &host.open()));
    let journal = points.group.begin(lineage, 2).unwrap();
    host.replicas.close(host.vm);
    let again = host.open();
    let fresh = again.group.begin(lineage, 2).unwrap();
    drop(journal);
    fresh.zero("root", 0, 4096).unwrap();
    let mut digest = ChangeDigest::default();
    digest.zero("root", 0, 4096);
    again.group.commit(&fresh, info(2), digest.finish(), 3).unwrap();
    again.group.apply().unwrap();
    assert!(matches!(points.group.begin(lineage, 2), Err(PointError::Closed)));
    assert_eq!(host.groups.points(host.vm).len(), 2);
}
