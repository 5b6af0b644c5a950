//! What must hold of disks and replicas in files.

use super::*;

/// A store of replicas below a folder of its own.
pub(super) fn setup() -> (tempfile::TempDir, ReplicaStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
    let replicas = ReplicaStore::new(store, folder.path());
    (folder, replicas)
}

#[test]
fn holes_stay_holes_and_writes_past_the_end_are_refused() {
    let (_folder, replicas) = setup();
    let vm = VmId::generate();
    let disk = replicas.open_for_writing(vm, "root", 1 << 20, 0).unwrap();
    disk.write(65536, &[7; 4096]).unwrap();
    assert_eq!(disk.next_data(0).unwrap(), Some((65536, 65536 + 4096)));
    disk.zero(65536, 4096).unwrap();
    assert_eq!(disk.next_data(0).unwrap(), None);
    assert_eq!(disk.write((1 << 20) - 1, &[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(disk.zero(u64::MAX, 2).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(disk.version(), 2);
}

#[test]
fn a_replica_grows_with_its_disk_and_is_never_cut() {
    let (_folder, replicas) = setup();
    let vm = VmId::generate();
    let disk = replicas.open_for_writing(vm, "root", 8192, 0).unwrap();
    disk.write(4096, &[7; 4096]).unwrap();
    let grown = replicas.open_for_writing(vm, "root", 16384, 0).unwrap();
    assert!(Arc::ptr_eq(&disk, &grown));
    assert_eq!(disk.size_bytes(), 16384);
    for _ in ["open", "closed"] {
        let cut = replicas.open_for_writing(vm, "root", 4096, 0);
        assert!(matches!(cut, Err(ReplicaError::Shrinks { held_bytes: 16384, .. })), "{cut:?}");
        replicas.close(vm);
    }
}

#[test]
fn whoever_still_holds_a_closed_replica_reads_it_and_writes_it_no_more() {
    let (_folder, replicas) = setup();
    let (vm, other) = (VmId::generate(), VmId::generate());
    let stale = replicas.open_for_writing(vm, "root", 8192, 0).unwrap();
    let kept = replicas.open_for_writing(other, "root", 8192, 0).unwrap();
    stale.write(0, b"a").unwrap();
    replicas.close(vm);
    for refused in [stale.write(0, b"b").map(drop), stale.zero(0, 1).map(drop), stale.grow(16384)] {
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    let mut found = [0];
    stale.read(0, &mut found).unwrap();
    assert_eq!((&found, stale.size_bytes()), (b"a", 8192));
    kept.write(0, b"c").unwrap();
    replicas.open_existing(vm, "root").unwrap().write(0, b"d").unwrap();
}

#[test]
fn the_format_of_an_image_is_said_once_and_never_guessed() {
    let (folder, replicas) = setup();
    let given = folder.path().join("given");
    std::fs::write(&given, b"QFI\xfb and so on").unwrap();
    let adopt = |vm, format| replicas.locate_or_adopt(vm, "root", &given, format);
    let (unsaid, raw, qcow2) = (VmId::generate(), VmId::generate(), VmId::generate());
    let refused = adopt(unsaid, None).unwrap_err().to_string();
    assert!(refused.contains("format: qcow2") && refused.contains("format: raw"), "{refused}");
    assert_eq!(replicas.locate(unsaid, "root").unwrap(), None);
    assert_eq!(adopt(raw, Some(Format::Raw)).unwrap().format, Format::Raw);
    assert_eq!(adopt(qcow2, Some(Format::Qcow2)).unwrap().format, Format::Qcow2);
    // What is recorded counts from then on.
    assert_eq!(adopt(raw, None).unwrap().format, Format::Raw);
    assert_eq!(adopt(qcow2, None).unwrap().format, Format::Qcow2);
    std::fs::write(&given, [0; 4096]).unwrap();
    assert_eq!(adopt(unsaid, None).unwrap().format, Format::Raw);
}

#[test]
fn a_qcow2_image_is_no_replica() {
    let (folder, replicas) = setup();
    let (vm, given) = (VmId::generate(), folder.path().join("given"));
    replicas.locate_or_adopt(vm, "root", &given, Some(Format::Qcow2)).unwrap();
    let refused = replicas.open_for_writing(vm, "root", 4096, 0);
    assert!(matches!(refused, Err(ReplicaError::NotFlat { .. })), "{refused:?}");
    assert!(!given.exists());
}

#[test]
fn a_replica_that_cannot_fit_is_refused_before_it_is_made() {
    let (folder, replicas) = setup();
    let vm = VmId::generate();
    let refused = replicas.open_for_writing(vm, "root", 1 << 50, 1 << 50);
    assert!(matches!(refused, Err(ReplicaError::NoSpace { .. })), "{refused:?}");
    assert!(!folder.path().join("replicas").join(vm.to_string()).join("root.raw").exists());
}

#[test]
fn removal_deletes_what_the_worker_made_and_spares_what_was_given() {
    let (folder, replicas) = setup();
    let given = folder.path().join("given.raw");
    std::fs::write(&given, [0; 4096]).unwrap();
    let (owner, copied) = (VmId::generate(), VmId::generate());
    assert_eq!(replicas.locate_or_adopt(owner, "root", &given, None).unwrap().path, given);
    let made = replicas.open_for_writing(copied, "root", 4096, 0).unwrap().path().to_owned();
    replicas.remove(owner).unwrap();
    replicas.remove(copied).unwrap();
    assert!(given.exists() && !made.exists());
    assert_eq!(replicas.locate(owner, "root").unwrap(), None);
}
