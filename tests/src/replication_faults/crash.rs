//! The replica as a crash at this very moment would leave it: the destination's files are copied while its worker is dead or stopped, and
//! recovered by the code that the worker itself runs when it opens them.
//!
//! A process that is stopped has written as much as one that is killed at that instant: both leave what is in the page cache.
//! Power losses are another matter: the tests of `replica::points` simulate them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_worker::replica::points::{Group, Limits, PointInfo};
use pageport_worker::replica::store::ReplicaStore;

use super::image;

const DISK: &str = "root";

/// Files of a destination worker that was stopped in the middle of something.
#[derive(Debug)]
pub struct CrashedReplica {
    folder: tempfile::TempDir,
    vm: VmId,
}

impl CrashedReplica {
    /// Copies what the worker of this data folder holds of a VM; it must not run meanwhile.
    ///
    /// # Errors
    /// When there is no room, or nothing to copy.
    pub fn copy(data: &Path, vm: &str, scratch: &Path) -> io::Result<Self> {
        let vm: VmId = vm.parse().map_err(io::Error::other)?;
        let folder = tempfile::tempdir_in(scratch)?;
        for name in ["store", "replicas"] {
            image::copy(&data.join(name), &folder.path().join(name))?;
        }
        Ok(Self { folder, vm })
    }

    /// Recovers it as a worker does; hands back the newest recovery point and its image.
    ///
    /// # Errors
    /// When it cannot be recovered, or has no point that can be trusted.
    pub fn recover(&self) -> io::Result<(PointInfo, PathBuf)> {
        let (folder, vm) = (self.folder.path(), self.vm);
        let open = |name: &str| Store::open(&folder.join(name)).map(Arc::new).map_err(chained);
        // The worker's own store says where its image lies: it is the copy that is to be opened.
        let disks = ReplicaStore::new(open("store-of-the-copy")?, folder);
        let image = folder.join("replicas").join(vm.to_string()).join(format!("{DISK}.raw"));
        let bytes = std::fs::metadata(&image)?.len();
        let disk = disks.open_for_writing(vm, DISK, bytes, 0).map_err(chained)?;
        let limits = Limits { points_bytes: u64::MAX, reserve_bytes: 0 };
        let replica = folder.join("replicas").join(vm.to_string());
        let group = Group::open(open("store")?, &replica, vm, BTreeMap::from([(DISK.to_owned(), disk)]), limits);
        let state = group.map_err(chained)?.state();
        match (state.damaged, state.points.last()) {
            (Some(damage), _) => Err(io::Error::other(format!("the replica is damaged: {damage}"))),
            (None, None) => Err(io::Error::other("the replica has no recovery point")),
            (None, Some(_)) if state.applying => Err(io::Error::other("the newest point is not in place")),
            (None, Some(newest)) => Ok((*newest, image)),
        }
    }
}

fn chained(error: impl std::error::Error) -> io::Error {
    io::Error::other(crate::faults::chain(&error))
}
