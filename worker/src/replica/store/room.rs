//! How much the replicas of this host may occupy together.
//!
//! ```text
//!   session begins ─▶ what its disks occupy at their source ─▶ fits with all other replicas? ─no─▶ refused, nothing is changed
//!                                                                └─ yes: noted, so that others count with it before it is there
//! ```
//! A replica counts with what it occupies or, if that is more, what its disk occupied at its source when its last session began. So what is on the way
//! counts, and a session that begins cannot exceed the quota by more than its guest writes while the session begins. Files that this worker has made
//! below its folder of replicas count, also those that a VM runs from by now; images of operators and block devices do not.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use pageport_proto::VmId;

use super::disk::SPARE_BYTES;
use super::{DiskLocation, Origin, ReplicaError, ReplicaStore, free_bytes, image_bytes};

/// How much replicas may occupy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoomLimits {
    /// All of them together, in bytes; [`None`]: as much as there is.
    pub replicas_bytes: Option<u64>,
    /// Left free on their file system when one is to become larger, in bytes.
    pub reserve_bytes: u64,
}

impl Default for RoomLimits {
    /// No quota.
    fn default() -> Self {
        Self { replicas_bytes: None, reserve_bytes: SPARE_BYTES }
    }
}

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

    /// Those of the disks that count.
    fn room_for<'a>(
        &self,
        vm: VmId,
        disks: &[(&'a str, u64)],
        expected: &Expected,
    ) -> Result<Vec<(&'a str, u64)>, ReplicaError> {
        let mut files = vec![];
        for (disk, allocated_bytes) in disks {
            let path = match self.locate(vm, disk)? {
                Some(location) if !self.counts(&location) => continue,
                Some(location) => location.path,
                None => self.folder.join(vm.to_string()).join(format!("{disk}.raw")),
            };
            files.push((*disk, path, *allocated_bytes));
        }
        let names: BTreeSet<&str> = files.iter().map(|(disk, ..)| *disk).collect();
        let others = self.counted(expected, |of, disk| of != vm || !names.contains(disk))?;
        let held_bytes: u64 = files.iter().map(|(_, path, _)| occupied(path)).sum();
        let needed_bytes: u64 =
            files.iter().map(|(_, path, allocated_bytes)| allocated_bytes.saturating_sub(occupied(path))).sum();
        if needed_bytes > 0 {
            let used_bytes = others.saturating_add(held_bytes);
            if let Some(quota_bytes) = self.limits.replicas_bytes
                && used_bytes.saturating_add(needed_bytes) > quota_bytes
            {
                return Err(ReplicaError::Quota { vm, needed_bytes, used_bytes, quota_bytes });
            }
            self.must_be_free(files.first().map_or(&self.folder, |(_, path, _)| path), needed_bytes)?;
        }
        Ok(files.into_iter().map(|(disk, _, allocated)| (disk, allocated)).collect())
    }

    /// A VM's replicas are gone.
    pub(super) fn expect_nothing(&self, vm: VmId) {
        self.expected().retain(|(of, _), _| *of != vm);
    }

    fn must_be_free(&self, path: &Path, needed_bytes: u64) -> Result<(), ReplicaError> {
        let failed = |source| ReplicaError::Open { path: path.to_owned(), source };
        std::fs::create_dir_all(&self.folder).map_err(failed)?;
        let free_bytes = free_bytes(&self.folder).map_err(failed)?;
        if needed_bytes.saturating_add(self.limits.reserve_bytes) <= free_bytes {
            return Ok(());
        }
        Err(ReplicaError::NoSpace { path: path.to_owned(), needed_bytes, free_bytes })
    }

    /// What replicas count with together, of those that are meant, in bytes.
    fn counted(&self, expected: &Expected, meant: impl Fn(VmId, &str) -> bool) -> Result<u64, ReplicaError> {
        let mut bytes = 0u64;
        for (vm, disk, location) in self.all_locations()? {
            if self.counts(&location) && meant(vm, &disk) {
                let noted = expected.get(&(vm, disk)).copied().unwrap_or_default();
                bytes = bytes.saturating_add(occupied(&location.path).max(noted));
            }
        }
        Ok(bytes)
    }

    fn counts(&self, location: &DiskLocation) -> bool {
        location.origin == Origin::Made && location.path.starts_with(&self.folder)
    }

    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that is not there occupies nothing.
fn occupied(path: &Path) -> u64 {
    image_bytes(path).map(|(_, allocated_bytes)| allocated_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pageport_common::store::Store;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn setup(replicas_bytes: Option<u64>, reserve_bytes: u64) -> (tempfile::TempDir, ReplicaStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let limits = RoomLimits { replicas_bytes, reserve_bytes };
        let replicas = ReplicaStore::new(store, folder.path()).limited(limits);
        (folder, replicas)
    }

    /// A replica that occupies so much.
    fn copy(replicas: &ReplicaStore, vm: VmId, disk: &str, bytes: u64) {
        replicas.make_room(vm, &[(disk, bytes)]).unwrap();
        let replica = replicas.open_for_writing(vm, disk, 64 * MIB, bytes).unwrap();
        replica.write(0, &vec![1; bytes as usize]).unwrap();
        replica.flush().unwrap();
    }

    fn refused(outcome: Result<(), ReplicaError>) -> (u64, u64) {
        match outcome {
            Err(error @ ReplicaError::Quota { needed_bytes, used_bytes, .. }) => {
                let told = error.to_string();
                assert!(told.contains("replication.replicas_bytes") && told.contains("replica delete"), "{told}");
                (needed_bytes, used_bytes)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn at_the_quota_a_replica_is_refused_before_a_byte_moves_and_others_go_on() {
        let (folder, replicas) = setup(Some(10 * MIB), 0);
        let (one, other) = (VmId::generate(), VmId::generate());
        copy(&replicas, one, "root", 4 * MIB);
        assert_eq!(refused(replicas.make_room(other, &[("root", 4 * MIB), ("data", 3 * MIB)])), (7 * MIB, 4 * MIB));
        assert!(!folder.path().join("replicas").join(other.to_string()).exists());
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
    fn a_replica_that_does_not_grow_is_kept_up_to_date_under_a_quota_that_was_lowered() {
        let (_folder, replicas) = setup(None, 0);
        let vm = VmId::generate();
        copy(&replicas, vm, "root", 8 * MIB);
        let lowered = RoomLimits { replicas_bytes: Some(MIB), reserve_bytes: 0 };
        let replicas = replicas.limited(lowered);
        replicas.make_room(vm, &[("root", 8 * MIB)]).unwrap();
        refused(replicas.make_room(vm, &[("root", 9 * MIB)]));
    }

    #[test]
    fn images_of_operators_count_nothing_and_need_no_room() {
        let (folder, replicas) = setup(Some(MIB), 0);
        let (vm, given) = (VmId::generate(), folder.path().join("given.raw"));
        std::fs::write(&given, vec![1; 4 * MIB as usize]).unwrap();
        replicas.locate_or_adopt(vm, "root", &given, None).unwrap();
        replicas.make_room(vm, &[("root", 64 * MIB)]).unwrap();
        replicas.make_room(VmId::generate(), &[("root", MIB)]).unwrap();
    }

    #[test]
    fn what_is_to_be_left_free_is_left_free() {
        let (folder, _) = setup(None, 0);
        let free = free_bytes(folder.path()).unwrap();
        let (_folder, replicas) = setup(None, free.saturating_sub(MIB));
        let refused = replicas.make_room(VmId::generate(), &[("root", 1 << 40)]);
        assert!(matches!(refused, Err(ReplicaError::NoSpace { .. })), "{refused:?}");
    }
}
