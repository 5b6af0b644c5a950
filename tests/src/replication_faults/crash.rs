//! The replica as a crash at this very moment would leave it: the destination's files are copied while its worker is dead or stopped, and
//! recovered by the code that the worker itself runs when it opens them.
//!
//! A process that is stopped has written as much as one that is killed at that instant: both leave what is in the page cache.
//! Power losses are another matter: the tests of `replica::points` simulate them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageport_common::error::with_causes;
use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_worker::replica::points::{Group, Limits, PointInfo};
use pageport_worker::replica::store::ReplicaStore;

use super::image;

const POINTS: &str = "points";

/// Files of a destination worker that was stopped in the middle of something.
#[derive(Debug)]
pub struct CrashedReplica {
    folder: tempfile::TempDir,
    vm: VmId,
    disks: Vec<&'static str>,
}

/// What came of it.
#[derive(Debug)]
pub struct Recovered {
    /// What the destination was at: `settled`, `journal` (of a point that is not committed) or `applying` (of one that is).
    pub phase: &'static str,
    /// The newest recovery point.
    pub newest: PointInfo,
    /// Its images.
    pub images: Vec<PathBuf>,
}

impl CrashedReplica {
    /// Copies what the worker of this data folder holds of a VM, wherever the replica's images, by disk, lie; it must not run meanwhile.
    ///
    /// # Errors
    /// When there is no room, or nothing to copy.
    pub fn copy(data: &Path, vm: &str, replica: &[(&'static str, PathBuf)], scratch: &Path) -> io::Result<Self> {
        let vm: VmId = vm.parse().map_err(io::Error::other)?;
        let disks = replica.iter().map(|(disk, _)| *disk).collect();
        let copied = Self { folder: tempfile::tempdir_in(scratch)?, vm, disks };
        let here = copied.replicas();
        std::fs::create_dir_all(&here)?;
        image::copy(&data.join("store"), &copied.folder.path().join("store"))?;
        image::copy(&data.join("replicas").join(vm.to_string()).join(POINTS), &here.join(POINTS))?;
        for (disk, image) in replica {
            image::copy(image, &copied.image(disk))?;
        }
        Ok(copied)
    }

    fn replicas(&self) -> PathBuf {
        self.folder.path().join("replicas").join(self.vm.to_string())
    }

    fn image(&self, disk: &str) -> PathBuf {
        self.replicas().join(format!("{disk}.raw"))
    }

    /// Recovers it as a worker does.
    ///
    /// # Errors
    /// When it cannot be recovered, or has no point that can be trusted.
    pub fn recover(&self) -> io::Result<Recovered> {
        let (folder, vm) = (self.folder.path(), self.vm);
        let open = |name: &str| Store::open(&folder.join(name)).map(Arc::new).map_err(chained);
        let replica = self.replicas();
        // The worker's own store says where its images lie: it is the copies that are to be opened.
        let copies = ReplicaStore::new(open("store-of-the-copy")?, folder);
        let mut disks = BTreeMap::new();
        for disk in &self.disks {
            let bytes = std::fs::metadata(self.image(disk))?.len();
            disks.insert((*disk).to_owned(), copies.open_for_writing(vm, disk, bytes, 0).map_err(chained)?);
        }
        let limits = Limits { points_bytes: u64::MAX, held_bytes: u64::MAX, reserve_bytes: 0 };
        let store = open("store")?;
        let left = Group::recorded(&store, vm).map_err(chained)?;
        let phase = match left {
            Some(state) if state.applying => "applying",
            _ if holds_journal(&replica.join(POINTS)) => "journal",
            _ => "settled",
        };
        let group = Group::open(store, &replica, vm, disks, limits);
        let state = group.map_err(chained)?.state();
        match (state.damaged, state.points.last()) {
            (Some(damage), _) => Err(io::Error::other(format!("the replica is damaged: {damage}"))),
            (None, None) => Err(io::Error::other("the replica has no recovery point")),
            (None, Some(_)) if state.applying => Err(io::Error::other("the newest point is not in place")),
            (None, Some(newest)) => {
                let images = self.disks.iter().map(|disk| self.image(disk)).collect();
                Ok(Recovered { phase, newest: *newest, images })
            }
        }
    }
}

fn holds_journal(points: &Path) -> bool {
    let entries = std::fs::read_dir(points).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().extension().is_some_and(|extension| extension == "journal"))
}

fn chained(error: impl std::error::Error) -> io::Error {
    io::Error::other(with_causes(&error))
}
