//! What must hold of VMs' recovery points, whoever takes the disks.

use pageport_proto::{PoolName, StoreId};

use super::*;
use crate::pool::config::{PoolConfig, PoolLimits};
use crate::replica::points::{Bound, ChangeDigest};

const SIZE: u64 = 1 << 20;

struct Host {
    folder: tempfile::TempDir,
    replicas: ReplicaStore,
    groups: Groups,
    vm: VmId,
    store_id: StoreId,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let replicas = ReplicaStore::new(store.clone(), folder.path());
        let limits = Limits { points_bytes: 1 << 30, held_bytes: 1 << 30, reserve_bytes: 0 };
        let groups = Groups::new(store, folder.path(), limits);
        Self { folder, replicas, groups, vm: VmId::generate(), store_id: StoreId::generate() }
    }

    /// As a session opens them.
    fn open(&self) -> Arc<Points> {
        let disk = self.replicas.open_for_writing(self.vm, "root", SIZE, 0).unwrap();
        self.groups.open(self.vm, vec![("root".to_owned(), disk)]).unwrap()
    }

    /// A worker that starts, whose points are bounded so: in `data_dir`, and in a pool "ssd" if there is one.
    fn restart(&mut self, all_points_bytes: Option<u64>, of_ssd: Option<Option<u64>>) {
        let pool = |name: &str, path: &str, all_points_bytes| PoolConfig {
            name: name.parse().unwrap(),
            path: self.folder.path().join(path),
            limits: PoolLimits { all_points_bytes, ..PoolLimits::default() },
        };
        let mut pools = vec![pool("default", "", all_points_bytes)];
        pools.extend(of_ssd.map(|bytes| pool("ssd", "ssd", bytes)));
        let (store, id) = (self.groups.store.clone(), self.store_id);
        let pools = Arc::new(Pools::new(store.clone(), id, &pools, &PoolName::default()).unwrap());
        pools.begin().unwrap();
        self.groups = Groups::over(store.clone(), pools.clone(), self.groups.limits);
        self.replicas = ReplicaStore::over(store, pools);
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

#[test]
fn what_a_move_had_written_when_its_worker_was_killed_is_taken_back_by_the_next() {
    let mut host = Host::new();
    let points = host.open();
    points.group.adopt(Lineage::generate(), info(1)).unwrap();
    let before = host.content();
    let layer = host.folder.path().join("replicas").join(host.vm.to_string()).join("points/layer.undo");
    host.restart(None, None);
    host.groups.settle_leftovers(&host.replicas, host.vm).unwrap();
    assert!(!host.groups.lock().contains_key(&host.vm), "without a layer they are not even opened");

    let points = host.open();
    points.open_layer().unwrap();
    points.change(&[Change::Write { disk: "root", offset: 100, data: &[9; 5000] }]).unwrap();
    assert!(layer.exists());
    drop(points);
    host.restart(None, None);
    host.groups.settle_leftovers(&host.replicas, host.vm).unwrap();
    assert!(host.content() == before && !layer.exists());
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
    host.restart(bound, None);
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
    host.restart(bound, None);
    let other = host.open();
    assert!(matches!(commit(&other, 4, 2 * BYTES), Err(PointError::NoSpace { bound: Bound::AllVms, .. })));
    host.groups.forget(first, &LeaseEnd::Removed).unwrap();
    commit(&other, 4, 2 * BYTES).unwrap();
    assert_eq!(host.groups.points(vm).last().unwrap().number, 4);
}

#[test]
fn points_lie_in_the_pool_of_their_vm_and_a_pool_that_is_full_hinders_no_other() {
    const BYTES: usize = 200 << 10;
    let bound = Some(5 * BYTES as u64 / 2);
    let ssd: PoolName = "ssd".parse().unwrap();
    let mut host = Host::new();
    host.restart(None, Some(bound));
    let [first, second, third] = std::array::from_fn(|_| VmId::generate());
    let begin = |host: &mut Host, vm, pool: &PoolName| {
        host.vm = vm;
        host.replicas.choose_pool(vm, pool).unwrap();
        let points = host.open();
        points.group.adopt(Lineage::generate(), info(1)).unwrap();
        points
    };
    let one = begin(&mut host, first, &ssd);
    commit(&one, 2, BYTES).unwrap();
    commit(&one, 3, BYTES).unwrap();
    assert!(host.folder.path().join("ssd/replicas").join(first.to_string()).join("points").exists());
    let two = begin(&mut host, second, &ssd);
    let refused = commit(&two, 2, 2 * BYTES).unwrap_err();
    assert!(refused.to_string().contains("by all vms (all_points_bytes of pool \"ssd\")"), "{refused}");
    let other = begin(&mut host, third, &PoolName::default());
    commit(&other, 2, BYTES).unwrap();
    commit(&other, 3, BYTES).unwrap();
    assert_eq!([first, third].map(|vm| host.groups.points(vm).len()), [3, 3], "nobody has lost any");

    // What is not open after a restart counts where it is.
    for points in [one, two, other] {
        points.group.close(&LeaseEnd::Reopened);
    }
    host.restart(None, Some(bound));
    host.vm = second;
    let two = host.open();
    assert!(commit(&two, 2, 2 * BYTES).is_err());
    host.groups.forget(first, &LeaseEnd::Removed).unwrap();
    assert!(!host.folder.path().join("ssd/replicas").join(first.to_string()).join("points").exists());
    commit(&two, 2, 2 * BYTES).unwrap();
}

#[test]
fn points_in_a_pool_that_is_not_there_are_neither_lost_nor_forgotten() {
    let mut host = Host::new();
    host.restart(None, Some(None));
    host.replicas.choose_pool(host.vm, &"ssd".parse().unwrap()).unwrap();
    host.open().group.adopt(Lineage::generate(), info(1)).unwrap();
    let (mounted, away) = (host.folder.path().join("ssd"), host.folder.path().join("away"));
    std::fs::rename(&mounted, &away).unwrap();
    host.restart(None, Some(None));
    let refused = [
        host.groups.open_existing(&host.replicas, host.vm).map(drop),
        host.groups.surrender(&host.replicas, host.vm, Surrender::NewestPoint),
        host.groups.forget(host.vm, &LeaseEnd::Removed),
    ];
    for refused in refused {
        assert!(refused.unwrap_err().to_string().contains("is its file system mounted?"));
    }
    assert!(!mounted.exists());
    std::fs::rename(&away, &mounted).unwrap();
    let points = host.groups.open_existing(&host.replicas, host.vm).unwrap();
    assert_eq!(points.group.state().points, [info(1)]);
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
