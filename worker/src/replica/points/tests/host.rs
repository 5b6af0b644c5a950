//! The same on the host's own files and the worker's own store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pageport_common::store::Store;
use pageport_proto::VmId;

use super::super::group::Group;
use super::super::{ChangeDigest, Lineage, PointError};
use super::history::{AMPLE, info, read_point};
use crate::replica::store::{ReplicaDisk, ReplicaStore, image_bytes};

const SIZE: u64 = 16 << 20;

struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    replicas: ReplicaStore,
    vm: VmId,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let replicas = ReplicaStore::new(store.clone(), folder.path());
        Self { folder, store, replicas, vm: VmId::generate() }
    }

    fn disk(&self) -> Arc<ReplicaDisk> {
        self.replicas.open_for_writing(self.vm, "root", SIZE, 0).unwrap()
    }

    fn group(&self) -> Group {
        let disks = BTreeMap::from([("root".to_owned(), self.disk())]);
        Group::open(self.store.clone(), &self.vm_folder(), self.vm, disks, AMPLE).unwrap()
    }

    fn vm_folder(&self) -> std::path::PathBuf {
        self.folder.path().join("replicas").join(self.vm.to_string())
    }

    fn allocated(&self, path: &Path) -> u64 {
        image_bytes(&self.vm_folder().join(path)).unwrap().1
    }
}

fn increment(group: &Group, lineage: Lineage, number: u64, writes: &[(u64, u8)], zeros: &[(u64, u64)]) {
    let journal = group.begin(lineage, number).unwrap();
    let mut digest = ChangeDigest::default();
    for (offset, byte) in writes {
        let raw = vec![*byte; 1 << 20];
        digest.data("root", *offset, &raw);
        journal.write("root", *offset, 1 << 20, &zstd::bulk::compress(&raw, 1).unwrap()).unwrap();
    }
    for (offset, length) in zeros {
        digest.zero("root", *offset, *length);
        journal.zero("root", *offset, *length).unwrap();
    }
    group.commit(&journal, info(number), digest.finish(), 3).unwrap();
    group.apply().unwrap();
}

#[test]
fn points_survive_a_restart_and_holes_stay_holes() {
    let host = Host::new();
    let lineage = Lineage::generate();
    let group = host.group();
    assert_eq!(group.state().lineage, None);
    host.disk().write(0, &[1; 1 << 20]).unwrap();
    group.adopt(lineage, info(1)).unwrap();
    increment(&group, lineage, 2, &[(4 << 20, 2), (8 << 20, 3)], &[]);
    assert_eq!(host.allocated(Path::new("root.raw")), 3 << 20);
    assert!(group.used_bytes() < 4096, "the undo of holes is holes: {}", group.used_bytes());
    increment(&group, lineage, 3, &[], &[(0, SIZE)]);
    assert_eq!(host.allocated(Path::new("root.raw")), 0);
    host.replicas.close(host.vm);
    drop(group);

    let group = host.group();
    assert_eq!(group.state().points, [info(1), info(2), info(3)]);
    let mut expected = vec![0; SIZE as usize];
    assert!(read_point(&group, 3, "root").unwrap() == expected);
    expected[..1 << 20].fill(1);
    assert!(read_point(&group, 1, "root").unwrap() == expected);
    expected[4 << 20..5 << 20].fill(2);
    expected[8 << 20..9 << 20].fill(3);
    assert!(read_point(&group, 2, "root").unwrap() == expected);

    // A migration that is given up leaves no more than there was.
    let layer = group.open_layer().unwrap();
    layer.write("root", 2 << 20, &vec![9; 1 << 20]).unwrap();
    layer.flush().unwrap();
    assert_eq!(host.allocated(Path::new("root.raw")), 1 << 20);
    drop((layer, group));
    host.replicas.close(host.vm);
    let group = host.group();
    assert!(!group.state().layer);
    assert_eq!(host.allocated(Path::new("root.raw")), 0);
    assert_eq!(group.state().points.len(), 3);
}

#[test]
fn a_committed_point_is_put_in_place_by_the_next_opening_and_an_uncommitted_is_deleted() {
    let host = Host::new();
    let lineage = Lineage::generate();
    let group = host.group();
    group.adopt(lineage, info(1)).unwrap();
    let journal = group.begin(lineage, 2).unwrap();
    let mut digest = ChangeDigest::default();
    digest.data("root", 5, b"abc");
    digest.resize("root", SIZE + 4096);
    journal.write("root", 5, 3, &zstd::bulk::compress(b"abc", 1).unwrap()).unwrap();
    journal.resize("root", SIZE + 4096).unwrap();
    group.commit(&journal, info(2), digest.finish(), 3).unwrap();
    assert_eq!(host.disk().size_bytes(), SIZE);
    drop((journal, group));
    let group = host.group();
    let mut found = [0; 8];
    let disk = host.replicas.open_existing(host.vm, "root").unwrap();
    disk.read(2, &mut found).unwrap();
    assert_eq!((&found, disk.size_bytes()), (b"\0\0\0abc\0\0", SIZE + 4096));
    assert_eq!(group.reader(1, "root").unwrap().size_bytes(), SIZE);
    assert_eq!(group.reader(2, "root").unwrap().size_bytes(), SIZE + 4096);
    std::mem::forget(group.begin(lineage, 3).unwrap());
    let journal = host.vm_folder().join("points/3.journal");
    assert!(journal.exists());
    drop(group);
    let disks = BTreeMap::from([("root".to_owned(), disk)]);
    Group::open(host.store.clone(), &host.vm_folder(), host.vm, disks, AMPLE).unwrap();
    assert!(!journal.exists());
}

#[test]
fn other_disks_than_those_of_the_points_are_said_and_nothing_is_deleted() {
    let host = Host::new();
    let lineage = Lineage::generate();
    let group = host.group();
    group.adopt(lineage, info(1)).unwrap();
    increment(&group, lineage, 2, &[(0, 2)], &[]);
    let second = host.replicas.open_for_writing(host.vm, "second", 4096, 0).unwrap();
    let disks = BTreeMap::from([("second".to_owned(), second)]);
    let other = Group::open(host.store.clone(), &host.vm_folder(), host.vm, disks, AMPLE).unwrap();
    assert!(
        other.state().damaged.is_some_and(|reason| reason.contains("are of the disks root, and the vm has second"))
    );
    assert!(matches!(other.begin(lineage, 3), Err(PointError::Damaged { .. })));
    assert_eq!(host.group().state().points.len(), 2);
    other.adopt(Lineage::generate(), info(1)).unwrap();
    assert_eq!(other.state().points.len(), 1);
}

/// Of a group of the disks "root" and "added", which sorts before it.
fn with_added(host: &Host) -> Group {
    let added = host.replicas.open_as_it_is(host.vm, "added", 0).unwrap();
    let disks = BTreeMap::from([("root".to_owned(), host.disk()), ("added".to_owned(), added)]);
    Group::open(host.store.clone(), &host.vm_folder(), host.vm, disks, AMPLE).unwrap()
}

#[test]
fn a_disk_that_is_added_is_in_the_points_from_then_on_and_not_in_those_before() {
    let host = Host::new();
    let lineage = Lineage::generate();
    let group = host.group();
    group.adopt(lineage, info(1)).unwrap();
    increment(&group, lineage, 2, &[(0, 2)], &[]);
    drop(group);
    let content = |group: &Group, point, disk| {
        let reader = group.reader(point, disk)?;
        let mut content = vec![0; reader.size_bytes() as usize];
        reader.read(0, &mut content)?;
        Ok::<_, PointError>(content)
    };

    let group = with_added(&host);
    let before = [1, 2].map(|point| content(&group, point, "root").unwrap());
    let journal = group.begin(lineage, 3).unwrap();
    let mut digest = ChangeDigest::default();
    for (disk, size) in [("added", 8192), ("root", SIZE)] {
        digest.resize(disk, size);
        journal.resize(disk, size).unwrap();
        digest.data(disk, 4096, &[5; 100]);
        journal.write(disk, 4096, 100, &zstd::bulk::compress(&[5; 100], 1).unwrap()).unwrap();
    }
    group.commit(&journal, info(3), digest.finish(), 3).unwrap();
    group.apply().unwrap();
    drop((journal, group));

    let group = with_added(&host);
    assert_eq!(group.state().points.len(), 3);
    for (point, before) in [1, 2].iter().zip(&before) {
        assert!(
            content(&group, *point, "root").unwrap() == *before,
            "older points still mean the disks that they meant"
        );
        assert!(matches!(content(&group, *point, "added"), Err(PointError::NoDisk { .. })));
    }
    let added = content(&group, 3, "added").unwrap();
    assert_eq!((added.len(), &added[4096..4196]), (8192, &[5; 100][..]));
    // Without it the points are no longer of these disks.
    assert!(host.group().state().damaged.is_some());
}

#[test]
fn a_disk_that_no_point_holds_yet_is_nothing_when_the_group_is_opened() {
    let host = Host::new();
    let group = host.group();
    group.adopt(Lineage::generate(), info(1)).unwrap();
    drop(group);
    let added = host.replicas.open_for_writing(host.vm, "added", 8192, 0).unwrap();
    added.write(0, b"of a session that came to nothing").unwrap();
    with_added(&host);
    assert_eq!(added.size_bytes(), 0);
}

#[test]
fn removal_of_the_replicas_removes_the_points() {
    let host = Host::new();
    let lineage = Lineage::generate();
    let group = host.group();
    group.adopt(lineage, info(1)).unwrap();
    increment(&group, lineage, 2, &[(0, 2)], &[]);
    drop(group);
    host.replicas.remove(host.vm).unwrap();
    assert!(!host.vm_folder().exists());
    assert_eq!(host.group().state().lineage, None);
}

#[test]
fn a_layer_writes_where_a_disk_has_grown_since_the_newest_point_and_takes_it_back() {
    let host = Host::new();
    let group = host.group();
    group.adopt(Lineage::generate(), info(1)).unwrap();
    let disk = host.replicas.open_for_writing(host.vm, "root", SIZE + 8192, 0).unwrap();
    let layer = group.open_layer().unwrap();
    layer.write("root", SIZE - 100, &[5; 8000]).unwrap();
    let past = layer.write("root", SIZE + 8191, &[5; 2]);
    assert!(matches!(past, Err(PointError::Hostile { .. })), "{past:?}");
    assert_eq!(group.reader(1, "root").unwrap().size_bytes(), SIZE);
    layer.undo().unwrap();
    let mut found = [1; 100];
    disk.read(SIZE - 100, &mut found).unwrap();
    assert_eq!((found, disk.size_bytes()), ([0; 100], SIZE));
}

#[test]
fn what_has_made_a_disk_larger_and_came_to_nothing_is_cut_off_when_the_group_is_opened() {
    let host = Host::new();
    let group = host.group();
    group.adopt(Lineage::generate(), info(1)).unwrap();
    let disk = host.disk();
    let open = || {
        let disks = BTreeMap::from([("root".to_owned(), disk.clone())]);
        Group::open(host.store.clone(), &host.vm_folder(), host.vm, disks, AMPLE).unwrap()
    };
    disk.grow(SIZE + 8192).unwrap();
    drop(group);
    open();
    assert_eq!(disk.size_bytes(), SIZE);
    // What no point speaks of stays.
    open().forget().unwrap();
    disk.grow(SIZE + 8192).unwrap();
    open();
    assert_eq!(disk.size_bytes(), SIZE + 8192);
}
