//! What must hold of replicas on block devices, on loop devices.

use std::collections::BTreeMap;

use super::*;
use crate::replica::points::{Change, ChangeDigest, Group, Limits, Lineage, PointInfo};
use crate::test_support::LoopDevice;

const SIZE: u64 = 8 << 20;
const DEVICE: u64 = 12 << 20;

struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    replicas: ReplicaStore,
    vm: VmId,
}

impl Host {
    fn new(allowed: &[&Path]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let allowed = allowed.iter().map(|path| path.to_path_buf()).collect();
        let replicas = ReplicaStore::new(store.clone(), folder.path()).allow(allowed);
        Self { folder, store, replicas, vm: VmId::generate() }
    }

    fn place(&self, device: &Path, size_bytes: u64) -> Result<(), ReplicaError> {
        self.replicas.place(self.vm, "root", device, size_bytes)
    }

    fn disk(&self) -> Arc<super::super::ReplicaDisk> {
        self.replicas.open_as_it_is(self.vm, "root", 0).unwrap()
    }

    fn group(&self) -> Group {
        let limits = Limits { points_bytes: 1 << 30, held_bytes: 1 << 30, reserve_bytes: 0 };
        let disks = BTreeMap::from([("root".to_owned(), self.disk())]);
        Group::open(self.store.clone(), &self.folder.path().join("replicas"), self.vm, disks, limits).unwrap()
    }

    fn content(&self) -> Vec<u8> {
        let disk = self.disk();
        let mut content = vec![0; disk.size_bytes() as usize];
        disk.read(0, &mut content).unwrap();
        content
    }
}

/// A device with this in every byte, and a host that may use it.
fn filled(byte: u8) -> Option<(LoopDevice, Host)> {
    let device = LoopDevice::new(DEVICE)?;
    std::fs::write(device.path(), vec![byte; DEVICE as usize]).unwrap();
    let host = Host::new(&[device.path()]);
    Some((device, host))
}

fn refused(refused: Result<(), ReplicaError>, words: &str) {
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains(words), "{refused}");
}

#[test]
fn places_are_allowed_by_name_or_folder_and_nothing_climbs_out() {
    let allowed = ["/dev/vg0/".into(), "/dev/sdb".into()];
    for (path, is) in [
        ("/dev/vg0/web", true),
        ("/dev/sdb", true),
        ("/dev/vg01/web", false),
        ("/dev/sdb1", false),
        ("/dev/vg0/../sda", false),
        ("dev/vg0/web", false),
    ] {
        assert_eq!(is_allowed(&allowed, Path::new(path)), is, "{path}");
    }
    assert!(!is_allowed(&[], Path::new("/dev/vg0/web")));
}

#[test]
fn a_device_that_must_not_be_used_is_refused_with_the_way_out() {
    let Some((device, host)) = filled(0) else { return };
    let at = device.path();
    refused(Host::new(&[]).place(at, SIZE), "replication.devices");
    let file = host.folder.path().join("file");
    std::fs::write(&file, vec![0; SIZE as usize]).unwrap();
    refused(Host::new(&[&file]).place(&file, SIZE), "no block device");
    refused(host.place(at, DEVICE + 512), "lvextend");
    let exclusive = OpenOptions::new().read(true).custom_flags(OFlag::O_EXCL.bits()).open(at).unwrap();
    refused(host.place(at, SIZE), "mounted or in use");
    drop(exclusive);
    for offset in [0, 1000, DEVICE - 1] {
        let raw = OpenOptions::new().write(true).open(at).unwrap();
        raw.write_all_at(&[1], offset).unwrap();
        refused(host.place(at, SIZE), "blkdiscard --zeroout");
        raw.write_all_at(&[0], offset).unwrap();
    }
    host.place(at, SIZE).unwrap();
    host.place(at, SIZE).unwrap();
    let link = host.folder.path().join("link");
    std::os::unix::fs::symlink(at, &link).unwrap();
    let replicas = ReplicaStore::new(host.store.clone(), host.folder.path()).allow(vec![link.clone()]);
    refused(replicas.place(VmId::generate(), "data", &link, SIZE), "already");
    refused(replicas.place(host.vm, "root", &link, SIZE), "not moved");
    // A VM of this host must not be given somebody's replica either.
    let given = replicas.locate_or_adopt(VmId::generate(), "root", &link, None).unwrap_err().to_string();
    assert!(given.contains("already"), "{given}");
}

#[test]
fn a_given_link_is_kept_and_a_device_that_is_gone_is_not_made() {
    let Some((device, _)) = filled(0) else { return };
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("by-id");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    let host = Host::new(&[folder.path()]);
    host.place(&link, SIZE).unwrap();
    let location = host.replicas.locate(host.vm, "root").unwrap().unwrap();
    assert_eq!((location.path.as_path(), location.origin), (link.as_path(), Origin::Given));
    std::fs::remove_file(&link).unwrap();
    assert!(host.replicas.open_as_it_is(host.vm, "root", 0).is_err());
    assert!(!link.exists());
}

#[test]
fn the_disk_has_its_own_size_and_what_is_new_reads_as_zeros() {
    let Some((device, host)) = filled(0) else { return };
    host.place(device.path(), SIZE).unwrap();
    // In the middle, where nobody looked.
    let raw = OpenOptions::new().read(true).write(true).open(device.path()).unwrap();
    raw.write_all_at(&vec![7; SIZE as usize], 2 << 20).unwrap();
    let disk = host.disk();
    assert_eq!(disk.size_bytes(), 0);
    let before = disk.version();
    disk.grow_to_compare(4 << 20).unwrap();
    assert_ne!(disk.version(), before, "nobody takes it for zeros");
    assert_eq!(disk.next_data(0).unwrap(), Some((0, 4 << 20)));
    assert_eq!(disk.next_data(4 << 20).unwrap(), None);
    disk.grow(SIZE).unwrap();
    assert!(host.content()[4 << 20..].iter().all(|byte| *byte == 0));
    assert_eq!(disk.write(SIZE - 1, &[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    // Not at the bounds of blocks or sectors.
    disk.write(0, &vec![9; SIZE as usize]).unwrap();
    disk.zero(1001, (2 << 20) + 77).unwrap();
    disk.zero(SIZE - 100, 100).unwrap();
    disk.zero(SIZE - 8000, 3).unwrap();
    let mut expected = vec![9; SIZE as usize];
    expected[1001..1001 + (2 << 20) + 77].fill(0);
    expected[SIZE as usize - 100..].fill(0);
    expected[SIZE as usize - 8000..][..3].fill(0);
    assert!(host.content() == expected);
    let mut behind = [0; 4096];
    raw.read_exact_at(&mut behind, SIZE).unwrap();
    assert_eq!(behind, [7; 4096], "what lies behind the disk is left alone");
    disk.flush().unwrap();
    for refused in [disk.grow(DEVICE + 4096), disk.grow_to_compare(DEVICE + 4096), disk.grow(SIZE + 1)] {
        assert!(refused.is_err());
    }
    refused(disk.must_have_room(DEVICE + 1), "lvextend");
    disk.cut(4096).unwrap();
    host.replicas.close(host.vm);
    assert_eq!(
        (host.disk().size_bytes(), host.content()),
        (4096, vec![9; 1001].into_iter().chain([0; 3095]).collect())
    );
    host.disk().grow(8192).unwrap();
    assert_eq!(host.content()[4096..], [0; 4096], "what was cut off is gone");
}

#[test]
fn nobody_can_use_it_exclusively_while_it_is_a_replica_and_its_content_outlives_its_record() {
    let Some((device, host)) = filled(0) else { return };
    host.place(device.path(), SIZE).unwrap();
    let disk = host.disk();
    disk.grow(SIZE).unwrap();
    disk.write(0, b"mine").unwrap();
    refused(claim(device.path()).map(drop), "in use");
    host.replicas.close(host.vm);
    claim(device.path()).unwrap();
    assert_eq!(disk.write(0, b"more").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    host.replicas.remove(host.vm).unwrap();
    assert_eq!(&std::fs::read(device.path()).unwrap()[..4], b"mine");
    refused(host.place(device.path(), SIZE), "blkdiscard --zeroout");
}

#[test]
fn a_vm_on_a_device_has_all_of_it_and_a_replica_there_grows_only_as_far() {
    let Some((device, host)) = filled(3) else { return };
    let location = host.replicas.locate_or_adopt(host.vm, "root", device.path(), None).unwrap();
    assert_eq!(location.bytes().unwrap(), (DEVICE, DEVICE));
    let image = location.image().unwrap();
    assert_eq!((image.device_bytes(), image.size_bytes().unwrap()), (Some(DEVICE), DEVICE));
    let larger = host.replicas.open_for_writing(host.vm, "root", DEVICE + 4096, 0).unwrap_err().to_string();
    assert!(larger.contains("lvextend"), "{larger}");
    host.replicas.close(host.vm);
    refused(host.replicas.grow_on_device(host.vm, "root", DEVICE + 4096), "lvextend");
    assert!(host.content() == vec![3; DEVICE as usize]);
}

#[test]
fn a_stopped_vms_disk_grows_within_its_device_with_zeros() {
    let Some((device, host)) = filled(0) else { return };
    host.place(device.path(), SIZE).unwrap();
    host.disk().grow_to_compare(4 << 20).unwrap();
    let raw = OpenOptions::new().write(true).open(device.path()).unwrap();
    raw.write_all_at(&vec![7; DEVICE as usize], 0).unwrap();
    host.replicas.close(host.vm);
    host.replicas.grow_on_device(host.vm, "root", SIZE).unwrap();
    host.replicas.grow_on_device(host.vm, "root", 4096).unwrap();
    let mut expected = vec![7; SIZE as usize];
    expected[4 << 20..].fill(0);
    assert!(host.content() == expected);
}

#[test]
fn points_on_a_device_are_made_undone_and_survive_a_restart() {
    let Some((device, host)) = filled(0) else { return };
    host.place(device.path(), SIZE).unwrap();
    host.disk().grow(4 << 20).unwrap();
    let group = host.group();
    let lineage = Lineage::generate();
    let info = |number| PointInfo { number, taken_unix_ms: 5, changed_bytes: 0, quiesced: false, disks: 1 };
    host.disk().write(0, &vec![1; 1 << 20]).unwrap();
    group.adopt(lineage, info(1)).unwrap();
    let first = host.content();
    let journal = group.begin(lineage, 2).unwrap();
    let mut digest = ChangeDigest::default();
    let raw = vec![2; 1 << 20];
    journal.resize("root", SIZE).unwrap();
    journal.write("root", 6 << 20, 1 << 20, &zstd::bulk::compress(&raw, 1).unwrap()).unwrap();
    journal.zero("root", 5, 1 << 19).unwrap();
    digest.resize("root", SIZE);
    digest.data("root", 6 << 20, &raw);
    digest.zero("root", 5, 1 << 19);
    group.commit(&journal, info(2), digest.finish(), 3).unwrap();
    drop((journal, group));
    // The worker ends before the point is in place.
    host.replicas.close(host.vm);
    let group = host.group();
    let mut second = first.clone();
    second.resize(SIZE as usize, 0);
    second[6 << 20..7 << 20].fill(2);
    second[5..5 + (1 << 19)].fill(0);
    assert!(host.content() == second);
    let reader = group.reader(1, "root").unwrap();
    let mut read = vec![0; first.len()];
    assert_eq!(reader.size_bytes(), first.len() as u64);
    reader.read(0, &mut read).unwrap();
    assert!(read == first);
    let layer = group.open_layer().unwrap();
    host.disk().grow(DEVICE).unwrap();
    layer.change(&[Change::Write { disk: "root", offset: DEVICE - 4096, data: &[5; 4096] }]).unwrap();
    layer.change(&[Change::Zero { disk: "root", offset: 6 << 20, length: 1 << 20 }]).unwrap();
    drop((reader, layer, group));
    host.replicas.close(host.vm);
    let group = host.group();
    group.undo_layer().unwrap();
    assert!(host.content() == second);
}
