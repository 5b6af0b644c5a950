use pageport_teleport::{BlockDigest, BlockLookup, BlockRef, KEPT_MEMORY, PageHash};

use super::arrived::Both;
use super::*;

const ON: KeepConfig = KeepConfig { keep: true, reserve_bytes: 0 };

fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE_SIZE]
}

fn digest(fill: u8) -> BlockDigest {
    PageHash::of(page(fill).as_slice().try_into().unwrap()).digest()
}

fn ids() -> (VmId, MigrationId) {
    (VmId::generate(), MigrationId::generate())
}

#[test]
fn pages_are_kept_in_order_once_the_guest_has_gone_and_read_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let kept = KeptMemory::new(dir.path(), ON);
    let (vm, migration) = ids();
    let mut keeping = kept.begin(vm, migration, 1 << 20).unwrap();
    keeping.add([page(1), page(2)].concat());
    assert!(kept.open(vm, migration).is_none(), "not before the guest has gone");
    keeping.add(page(3));
    keeping.finish().unwrap();
    let pages = kept.open(vm, migration).unwrap();
    assert_eq!(pages.count(), 3);
    let mut read = vec![0; 2 * PAGE_SIZE];
    pages.read(1, &mut read).unwrap();
    assert_eq!(read, [page(2), page(3)].concat());
    assert!(pages.read(2, &mut read).is_err() && pages.read(u64::MAX, &mut read).is_err());
    assert!(kept.open(vm, MigrationId::generate()).is_none());
    // The next move keeps its own.
    let next = MigrationId::generate();
    kept.begin(vm, next, 1 << 20).unwrap().finish().unwrap();
    assert!(kept.open(vm, migration).is_none() && kept.open(vm, next).is_none(), "no pages, none kept");
}

#[test]
fn what_is_given_up_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let kept = KeptMemory::new(dir.path(), ON);
    let (vm, migration) = ids();
    let folder = dir.path().join("kept").join(vm.to_string());
    let files = || std::fs::read_dir(&folder).unwrap().count();
    drop(kept.begin(vm, migration, 1 << 20).unwrap());
    assert_eq!(files(), 0, "a migration that failed");
    let mut keeping = kept.begin(vm, migration, PAGE_SIZE as u64).unwrap();
    keeping.add(page(1));
    keeping.add(page(2));
    assert_eq!(files(), 0, "more than the guest has memory");
    keeping.add(page(3));
    keeping.finish().unwrap();
    assert!(kept.open(vm, migration).is_none());
    kept.begin(vm, migration, 1 << 20).unwrap().finish().unwrap();
    kept.delete(vm);
    kept.delete(vm);
    assert!(!folder.exists());
    assert!(kept.begin(vm, migration, u64::MAX).is_none(), "no room");
    let off = KeptMemory::new(dir.path(), KeepConfig { keep: false, reserve_bytes: 0 });
    assert!(off.begin(vm, migration, 1).is_none());
}

#[test]
fn a_worker_that_starts_deletes_what_is_unfinished_or_of_vms_that_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let kept = KeptMemory::new(dir.path(), ON);
    let [(here, done), (gone, also)] = [ids(), ids()];
    for (vm, migration) in [(here, done), (gone, also)] {
        let mut keeping = kept.begin(vm, migration, 1 << 20).unwrap();
        keeping.add(page(1));
        keeping.finish().unwrap();
    }
    std::fs::write(dir.path().join("kept").join(here.to_string()).join("killed.part"), "x").unwrap();
    kept.retain(|vm| vm == here);
    assert!(kept.open(here, done).is_some() && kept.open(gone, also).is_none());
    assert_eq!(std::fs::read_dir(dir.path().join("kept").join(here.to_string())).unwrap().count(), 1);
}

#[test]
fn a_page_is_found_by_digest_behind_the_disks_and_at_its_number() {
    let (vm, migration) = ids();
    let mut arrived = Arrived::of(migration, "worker-a");
    arrived.add(&[Some(digest(1)), None, Some(digest(2))]);
    arrived.add(&[Some(digest(1))]);
    let at = |block| BlockRef { disk: KEPT_MEMORY, block };
    assert_eq!((arrived.count(), arrived.migration()), (4, Some(migration)));
    assert_eq!((arrived.find(&digest(1)), arrived.find(&digest(2))), (Some(at(3)), Some(at(2))));
    assert!(arrived.holds(at(0), &digest(1)) && !arrived.holds(at(1), &digest(1)) && !arrived.holds(at(4), &digest(1)));

    let on_disk = BlockRef { disk: 0, block: 7 };
    let mut disks = pageport_teleport::BlockIndex::new();
    disks.add_disk(0, 8).unwrap();
    disks.set(on_disk, digest(2)).unwrap();
    let both = Both(disks, Some(&arrived));
    assert_eq!(
        (both.find(&digest(2)), both.find(&digest(1)), both.find(&digest(3))),
        (Some(on_disk), Some(at(3)), None)
    );
    assert!(both.holds(at(2), &digest(2)) && both.holds(on_disk, &digest(2)));
    assert!(!Both(both.0, None).holds(at(2), &digest(2)));

    let kept = KeptMemory::new(Path::new("/nowhere"), ON);
    kept.came(vm, arrived);
    assert!(kept.kept_by(vm, "worker-a").is_some() && kept.kept_by(vm, "worker-c").is_none());
    kept.forget_arrived(vm);
    assert!(kept.kept_by(vm, "worker-a").is_none());
}
