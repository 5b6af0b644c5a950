//! How much the replicas of a pool may occupy together.
//!
//! ```text
//!   session begins ─▶ what its disks occupy at their source ─▶ fits with all other replicas of the pool? ─no─▶ refused, nothing is changed
//!                                                                └─ yes: noted, so that others count with it before it is there
//! ```
//! A replica counts with what it occupies or, if that is more, what its disk occupied at its source when its last session began. So what is on the way
//! counts, and a session that begins cannot exceed the quota by more than its guest writes while the session begins. Files that this worker has made
//! below the pool's folder of replicas count, also those that a VM runs from by now; images of operators and block devices do not.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use pageport_proto::VmId;

use super::{DiskLocation, Origin, ReplicaError, ReplicaStore, image_bytes};
use crate::pool::Pool;

/// What disks occupied at their sources, by VM and disk, in bytes.
pub(super) type Expected = HashMap<(VmId, String), u64>;

impl ReplicaStore {
    /// Sees to it that the replicas of these disks, with what each occupies at its source in bytes, may be made or become as large.
    ///
    /// # Errors
    /// [`ReplicaError::Quota`], [`ReplicaError::NoSpace`]: nothing is changed. The worker's store failed.
    pub fn make_room(&self, vm: VmId, disks: &[(&str, u64)]) -> Result<(), ReplicaError> {
        // Held until it is noted: two that begin at a time must not both be let in for the same room.
        let mut expected = self.expected();
        let counted = self.room_for(vm, disks, &expected)?;
        expected.extend(counted.into_iter().map(|(disk, allocated)| ((vm, disk.to_owned()), allocated)));
        Ok(())
    }

    /// Would [`Self::make_room`] let them in now? Nothing is noted.
    ///
    /// # Errors
    /// As there.
    pub fn has_room(&self, vm: VmId, disks: &[(&str, u64)]) -> Result<(), ReplicaError> {
        self.room_for(vm, disks, &self.expected()).map(drop)
    }

    /// What was let in of a VM and then not made is not on its way any more.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn expect_only_what_is_made(&self, vm: VmId) -> Result<(), ReplicaError> {
        let made = self.names(vm)?;
        self.expected().retain(|(of, disk), _| *of != vm || made.contains(disk));
        Ok(())
    }

    /// Looks at all pools, for reports. May wait for a slow disk.
    pub fn look_at_pools(&self) {
        // A copy: nobody waits for this look.
        let expected = self.expected().clone();
        self.pools.look_at_all(|pool| self.counted(pool, &expected, |_, _| true).unwrap_or_default());
    }

    /// Those of the disks that count.
    fn room_for<'a>(
        &self,
        vm: VmId,
        disks: &[(&'a str, u64)],
        expected: &Expected,
    ) -> Result<Vec<(&'a str, u64)>, ReplicaError> {
        let pool = self.pools.ready(vm)?;
        let mut files = vec![];
        for (disk, allocated_bytes) in disks {
            let path = match self.locate(vm, disk)? {
                Some(location) if !counts(&pool, &location) => continue,
                Some(location) => location.path,
                None => pool.replica(vm).join(format!("{disk}.raw")),
            };
            files.push((*disk, path, *allocated_bytes));
        }
        let names: BTreeSet<&str> = files.iter().map(|(disk, ..)| *disk).collect();
        let others = self.counted(&pool, expected, |of, disk| of != vm || !names.contains(disk))?;
        let held_bytes: u64 = files.iter().map(|(_, path, _)| occupied(path)).sum();
        let needed_bytes: u64 =
            files.iter().map(|(_, path, allocated_bytes)| allocated_bytes.saturating_sub(occupied(path))).sum();
        if needed_bytes > 0 {
            let used_bytes = others.saturating_add(held_bytes);
            if let Some(quota_bytes) = pool.limits().replicas_bytes
                && used_bytes.saturating_add(needed_bytes) > quota_bytes
            {
                let pool = pool.name().clone();
                return Err(ReplicaError::Quota { vm, needed_bytes, used_bytes, quota_bytes, pool });
            }
            must_be_free(&pool, files.first().map_or(&pool.replicas(), |(_, path, _)| path), needed_bytes)?;
        }
        Ok(files.into_iter().map(|(disk, _, allocated)| (disk, allocated)).collect())
    }

    /// A VM's replicas are gone.
    pub(super) fn expect_nothing(&self, vm: VmId) {
        self.expected().retain(|(of, _), _| *of != vm);
    }

    /// What replicas of a pool count with together, of those that are meant, in bytes.
    fn counted(
        &self,
        pool: &Pool,
        expected: &Expected,
        meant: impl Fn(VmId, &str) -> bool,
    ) -> Result<u64, ReplicaError> {
        let (mut bytes, mut to_be_made) = (0u64, expected.clone());
        for (vm, disk, location) in self.all_locations()? {
            let here = counts(pool, &location) && meant(vm, &disk);
            let noted = to_be_made.remove(&(vm, disk)).unwrap_or_default();
            if here {
                bytes = bytes.saturating_add(occupied(&location.path).max(noted));
            }
        }
        for ((vm, disk), noted) in to_be_made {
            if meant(vm, &disk) && self.pools.of(vm)?.name() == pool.name() {
                bytes = bytes.saturating_add(noted);
            }
        }
        Ok(bytes)
    }

    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn counts(pool: &Pool, location: &DiskLocation) -> bool {
    location.origin == Origin::Made && location.path.starts_with(pool.replicas())
}

fn must_be_free(pool: &Pool, path: &Path, needed_bytes: u64) -> Result<(), ReplicaError> {
    let free_bytes = pool.free_bytes()?;
    if needed_bytes.saturating_add(pool.limits().reserve_bytes) <= free_bytes {
        return Ok(());
    }
    Err(ReplicaError::NoSpace { path: path.to_owned(), needed_bytes, free_bytes, pool: pool.name().clone() })
}

/// One that is not there occupies nothing.
fn occupied(path: &Path) -> u64 {
    image_bytes(path).map(|(_, allocated_bytes)| allocated_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pageport_common::store::Store;
    use pageport_proto::{PoolName, StoreId};

    use super::super::free_bytes;
    use super::*;
    use crate::pool::Pools;
    use crate::pool::config::{PoolConfig, PoolLimits};

    const MIB: u64 = 1 << 20;

    struct Host {
        folder: tempfile::TempDir,
        store: Arc<Store>,
        id: StoreId,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
            Self { folder, store, id: StoreId::generate() }
        }

        /// A worker that starts, with this default pool.
        fn replicas(&self, replicas_bytes: Option<u64>, reserve_bytes: u64) -> ReplicaStore {
            self.replicas_in(replicas_bytes, reserve_bytes, None)
        }

        /// As before, with a pool "ssd" of such a quota besides, which reserves nothing.
        fn replicas_in(
            &self,
            replicas_bytes: Option<u64>,
            reserve_bytes: u64,
            of_ssd: Option<Option<u64>>,
        ) -> ReplicaStore {
            let pool = |name: PoolName, path, replicas_bytes, reserve_bytes| {
                let limits = PoolLimits { replicas_bytes, reserve_bytes, ..PoolLimits::default() };
                PoolConfig { name, path, limits }
            };
            let mut pools = vec![pool(PoolName::default(), self.data_dir(), replicas_bytes, reserve_bytes)];
            pools.extend(of_ssd.map(|replicas_bytes| pool(ssd(), self.folder.path().join("ssd"), replicas_bytes, 0)));
            let pools = Pools::new(self.store.clone(), self.id, &pools, &PoolName::default()).unwrap();
            pools.begin().unwrap();
            ReplicaStore::over(self.store.clone(), Arc::new(pools))
        }

        fn data_dir(&self) -> std::path::PathBuf {
            let data_dir = self.folder.path().join("data");
            std::fs::create_dir_all(&data_dir).unwrap();
            data_dir
        }
    }

    fn ssd() -> PoolName {
        "ssd".parse().unwrap()
    }

    /// A replica that occupies so much.
    fn copy(replicas: &ReplicaStore, vm: VmId, disk: &str, bytes: u64) {
        replicas.make_room(vm, &[(disk, bytes)]).unwrap();
        let replica = replicas.open_for_writing(vm, disk, 64 * MIB, bytes).unwrap();
        replica.write(0, &vec![1; bytes as usize]).unwrap();
        replica.flush().unwrap();
    }

    fn refused_in(outcome: Result<(), ReplicaError>, key: &str) -> (u64, u64) {
        match outcome {
            Err(error @ ReplicaError::Quota { needed_bytes, used_bytes, .. }) => {
                let told = error.to_string();
                assert!(told.contains(&format!("({key})")) && told.contains("replica delete"), "{told}");
                (needed_bytes, used_bytes)
            }
            other => panic!("{other:?}"),
        }
    }

    fn refused(outcome: Result<(), ReplicaError>) -> (u64, u64) {
        refused_in(outcome, "replication.replicas_bytes")
    }

    #[test]
    fn at_the_quota_a_replica_is_refused_before_a_byte_moves_and_others_go_on() {
        let host = Host::new();
        let replicas = host.replicas(Some(10 * MIB), 0);
        let (one, other) = (VmId::generate(), VmId::generate());
        copy(&replicas, one, "root", 4 * MIB);
        assert_eq!(refused(replicas.make_room(other, &[("root", 4 * MIB), ("data", 3 * MIB)])), (7 * MIB, 4 * MIB));
        assert!(!host.data_dir().join("replicas").join(other.to_string()).exists());
        // It is the sum that counts, of what is there and what is on the way.
        replicas.make_room(other, &[("root", 3 * MIB)]).unwrap();
        replicas.open_for_writing(other, "root", 64 * MIB, 3 * MIB).unwrap();
        assert_eq!(refused(replicas.make_room(one, &[("root", 8 * MIB)])), (4 * MIB, 7 * MIB));
        replicas.make_room(one, &[("root", 7 * MIB)]).unwrap();
        assert_eq!(refused(replicas.make_room(other, &[("root", 4 * MIB)])), (4 * MIB, 7 * MIB));
        replicas.remove(one).unwrap();
        // Who only looks takes nothing.
        replicas.has_room(VmId::generate(), &[("root", 7 * MIB)]).unwrap();
        assert_eq!(refused(replicas.has_room(one, &[("root", 8 * MIB)])), (8 * MIB, 3 * MIB));
        replicas.make_room(other, &[("root", 10 * MIB)]).unwrap();
    }

    #[test]
    fn what_was_let_in_counts_before_it_is_made_and_no_longer_when_it_is_given_up() {
        let host = Host::new();
        let replicas = host.replicas_in(Some(10 * MIB), 0, Some(None));
        let [one, other, third] = std::array::from_fn(|_| VmId::generate());
        replicas.make_room(one, &[("root", 6 * MIB)]).unwrap();
        assert_eq!(refused(replicas.make_room(other, &[("root", 5 * MIB)])), (5 * MIB, 6 * MIB));
        replicas.make_room(one, &[("root", 6 * MIB), ("data", MIB)]).unwrap();
        replicas.choose_pool(third, &ssd()).unwrap();
        replicas.make_room(third, &[("root", 9 * MIB)]).unwrap();
        replicas.make_room(other, &[("root", 3 * MIB)]).unwrap();
        replicas.open_for_writing(one, "root", 64 * MIB, 6 * MIB).unwrap();
        replicas.expect_only_what_is_made(one).unwrap();
        assert_eq!(refused(replicas.make_room(other, &[("root", 5 * MIB)])), (5 * MIB, 6 * MIB));
        replicas.make_room(other, &[("root", 4 * MIB)]).unwrap();
    }

    #[test]
    fn a_pool_that_is_full_hinders_no_other() {
        let host = Host::new();
        let replicas = host.replicas_in(Some(6 * MIB), 0, Some(Some(10 * MIB)));
        let [one, other, third] = std::array::from_fn(|_| VmId::generate());
        replicas.choose_pool(one, &ssd()).unwrap();
        copy(&replicas, one, "root", 9 * MIB);
        assert!(host.folder.path().join("ssd/replicas").join(one.to_string()).join("root.raw").exists());
        // Its disks that come later lie there, too, and count there.
        let added = refused_in(replicas.make_room(one, &[("added", 2 * MIB)]), "replicas_bytes of pool \"ssd\"");
        assert_eq!(added, (2 * MIB, 9 * MIB));
        replicas.choose_pool(other, &ssd()).unwrap();
        refused_in(replicas.has_room(other, &[("root", 2 * MIB)]), "replicas_bytes of pool \"ssd\"");
        // Nothing of it is there yet: the operator may think better of it.
        replicas.choose_pool(other, &PoolName::default()).unwrap();
        copy(&replicas, other, "root", 5 * MIB);
        assert_eq!(refused(replicas.make_room(third, &[("root", 2 * MIB)])), (2 * MIB, 5 * MIB));
        replicas.choose_pool(third, &ssd()).unwrap();
        copy(&replicas, third, "root", MIB);
        replicas.look_at_pools();
        let seen = replicas.pools.reports();
        let used: Vec<_> =
            seen.iter().map(|pool| (pool.name.as_str(), pool.replicas.unwrap().used_bytes / MIB)).collect();
        assert_eq!(used, [("default", 5), ("ssd", 10)]);

        // After a restart it is the same, and what is removed is room for others.
        drop(replicas);
        let replicas = host.replicas_in(Some(6 * MIB), 0, Some(Some(10 * MIB)));
        refused_in(replicas.has_room(third, &[("root", 2 * MIB)]), "replicas_bytes of pool \"ssd\"");
        replicas.remove(one).unwrap();
        assert!(!host.folder.path().join("ssd/replicas").join(one.to_string()).exists());
        replicas.make_room(third, &[("root", 2 * MIB)]).unwrap();
        refused(replicas.has_room(one, &[("root", 2 * MIB)]));
    }

    #[test]
    fn a_replica_is_not_moved_to_another_pool() {
        let host = Host::new();
        let replicas = host.replicas_in(None, 0, Some(None));
        let vm = VmId::generate();
        copy(&replicas, vm, "root", MIB);
        replicas.choose_pool(vm, &PoolName::default()).unwrap();
        let told = replicas.choose_pool(vm, &ssd()).unwrap_err().to_string();
        assert!(
            told.contains("lies in data_dir and is to lie in pool \"ssd\"") && told.contains("replica delete"),
            "{told}"
        );
        replicas.remove(vm).unwrap();
        replicas.choose_pool(vm, &ssd()).unwrap();
        copy(&replicas, vm, "root", MIB);
        let told = replicas.choose_pool(vm, &PoolName::default()).unwrap_err().to_string();
        assert!(told.contains("lies in pool \"ssd\" and is to lie in data_dir"), "{told}");
        let told = replicas.choose_pool(VmId::generate(), &"hdd".parse().unwrap()).unwrap_err().to_string();
        assert!(told.contains("no pool \"hdd\"; it has: default, ssd"), "{told}");
    }

    #[test]
    fn a_disk_that_is_added_to_a_vm_that_runs_in_a_pool_lies_there_and_goes_with_it() {
        let host = Host::new();
        let replicas = host.replicas_in(None, 0, Some(None));
        let vm = VmId::generate();
        replicas.choose_pool(vm, &ssd()).unwrap();
        copy(&replicas, vm, "root", MIB);
        let added = replicas.make_image(vm, "log", None, MIB).unwrap();
        assert!(added.path.starts_with(host.folder.path().join("ssd/disks")), "{}", added.path.display());
        replicas.remove(vm).unwrap();
        let left: Vec<_> = ["ssd/disks", "ssd/replicas"].map(|folder| host.folder.path().join(folder)).into();
        assert!(left.iter().all(|folder| std::fs::read_dir(folder).unwrap().next().is_none()));
    }

    #[test]
    fn what_lies_in_a_pool_that_is_not_there_waits_for_it_and_nothing_is_made_in_its_place() {
        let host = Host::new();
        let replicas = host.replicas_in(None, 0, Some(None));
        let (vm, other) = (VmId::generate(), VmId::generate());
        replicas.choose_pool(vm, &ssd()).unwrap();
        copy(&replicas, vm, "root", MIB);
        drop(replicas);
        // Its file system is not mounted: there is an empty folder.
        let (mounted, away) = (host.folder.path().join("ssd"), host.folder.path().join("away"));
        std::fs::rename(&mounted, &away).unwrap();
        std::fs::create_dir(&mounted).unwrap();

        let replicas = host.replicas_in(None, 0, Some(None));
        let gone = |outcome: Result<(), ReplicaError>| {
            let told = outcome.unwrap_err().to_string();
            assert!(told.contains("pool \"ssd\" at") && told.contains("is its file system mounted?"), "{told}");
        };
        gone(replicas.choose_pool(vm, &ssd()));
        gone(replicas.make_room(vm, &[("root", MIB)]));
        gone(replicas.open_as_it_is(vm, "root", 0).map(drop));
        gone(replicas.open_existing(vm, "root").map(drop));
        gone(replicas.image(vm, &replicas.locate(vm, "root").unwrap().unwrap()).map(drop));
        gone(replicas.make_image(vm, "log", None, MIB).map(drop));
        gone(replicas.remove(vm));
        gone(replicas.choose_pool(other, &ssd()));
        assert!(std::fs::read_dir(&mounted).unwrap().next().is_none(), "nothing was made");
        copy(&replicas, other, "root", MIB);
        replicas.look_at_pools();
        let seen = replicas.pools.reports();
        assert!(seen[0].problem.is_empty() && seen[1].problem.contains("mounted?"), "{seen:?}");

        // It is mounted, while the worker runs.
        std::fs::remove_dir(&mounted).unwrap();
        std::fs::rename(&away, &mounted).unwrap();
        replicas.make_room(vm, &[("root", MIB)]).unwrap();
        assert_eq!(replicas.open_existing(vm, "root").unwrap().size_bytes(), 64 * MIB);
        replicas.remove(vm).unwrap();
        assert!(!mounted.join("replicas").join(vm.to_string()).exists());
    }

    #[test]
    fn what_lies_in_a_pool_that_is_not_configured_any_more_can_only_be_forgotten() {
        let host = Host::new();
        let replicas = host.replicas_in(None, 0, Some(None));
        let vm = VmId::generate();
        replicas.choose_pool(vm, &ssd()).unwrap();
        copy(&replicas, vm, "root", MIB);
        let path = replicas.locate(vm, "root").unwrap().unwrap().path;
        drop(replicas);
        let replicas = host.replicas(None, 0);
        let told = replicas.make_room(vm, &[("root", MIB)]).unwrap_err().to_string();
        assert!(told.contains("no pool \"ssd\"; it has: default") && told.contains("[[pools]]"), "{told}");
        replicas.remove(vm).unwrap();
        assert!(!path.exists() && replicas.locate(vm, "root").unwrap().is_none());
        copy(&replicas, vm, "root", MIB);
    }

    #[test]
    fn a_replica_that_does_not_grow_is_kept_up_to_date_under_a_quota_that_was_lowered() {
        let host = Host::new();
        let vm = VmId::generate();
        copy(&host.replicas(None, 0), vm, "root", 8 * MIB);
        let replicas = host.replicas(Some(MIB), 0);
        replicas.make_room(vm, &[("root", 8 * MIB)]).unwrap();
        refused(replicas.make_room(vm, &[("root", 9 * MIB)]));
    }

    #[test]
    fn images_of_operators_count_nothing_and_need_no_room() {
        let host = Host::new();
        let replicas = host.replicas(Some(MIB), 0);
        let (vm, given) = (VmId::generate(), host.folder.path().join("given.raw"));
        std::fs::write(&given, vec![1; 4 * MIB as usize]).unwrap();
        replicas.locate_or_adopt(vm, "root", &given, None).unwrap();
        replicas.make_room(vm, &[("root", 64 * MIB)]).unwrap();
        replicas.make_room(VmId::generate(), &[("root", MIB)]).unwrap();
    }

    #[test]
    fn what_is_to_be_left_free_is_left_free_in_each_pool() {
        let host = Host::new();
        let free = free_bytes(host.folder.path()).unwrap();
        let replicas = host.replicas_in(None, free.saturating_sub(MIB), Some(None));
        let told = replicas.make_room(VmId::generate(), &[("root", 1 << 30)]).unwrap_err().to_string();
        assert!(told.contains("are free in data_dir, where replication.reserve_bytes stay free"), "{told}");
        let vm = VmId::generate();
        replicas.choose_pool(vm, &ssd()).unwrap();
        replicas.make_room(vm, &[("root", MIB)]).unwrap();
        let told = replicas.make_room(vm, &[("root", 1 << 60)]).unwrap_err().to_string();
        assert!(told.contains("are free in pool \"ssd\", where reserve_bytes of pool \"ssd\" stay free"), "{told}");
    }
}
