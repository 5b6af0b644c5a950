//! Why a disk or replica cannot be used.

use std::io;
use std::path::PathBuf;

use pageport_common::store::StoreError;
use pageport_proto::{PoolName, VmId};

use crate::image::ImageError;
use crate::pool::{PoolError, key, place};

/// Why a disk or replica cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The worker's store failed.
    #[error("look up disk {disk:?} of vm {vm}")]
    Store {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The worker's store failed.
    #[error("look up the disks of all vms")]
    Scan {
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The record in the worker's store is damaged.
    #[error("the record of disk {disk:?} of vm {vm} is damaged")]
    Record {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The image cannot be opened or made.
    #[error("open the image {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not enough room.
    #[error(
        "no space for the replica {}: it needs {needed_bytes} bytes and {free_bytes} are free {}, where {} stay free; free some space there, or have the \
         replica made in another pool (\"pageportctl protect --pool\")", path.display(), place(pool), key(pool, "reserve_bytes")
    )]
    NoSpace {
        /// The image.
        path: PathBuf,
        /// What the source's image occupies, less what the replica occupies already.
        needed_bytes: u64,
        /// What the file system has.
        free_bytes: u64,
        /// Where it lies.
        pool: PoolName,
    },
    /// All replicas of a pool together are as large as they may be.
    #[error(
        "the replica of vm {vm} needs {needed_bytes} bytes more, replicas occupy {used_bytes} here and may {quota_bytes} \
         ({}): raise that in the worker's worker.toml, or make room with \"pageportctl replica delete\"",
        key(pool, "replicas_bytes")
    )]
    Quota {
        /// The VM.
        vm: VmId,
        /// What it needs.
        needed_bytes: u64,
        /// What is used, or on its way.
        used_bytes: u64,
        /// What may be.
        quota_bytes: u64,
        /// Where.
        pool: PoolName,
    },
    /// The pool that it lies in, or is to.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The replica lies in another pool.
    #[error(
        "the replica of vm {vm} lies {} and is to lie {}; a replica is not moved: delete it (\"pageportctl replica delete\") and protect the vm again",
        place(held),
        place(asked)
    )]
    Pooled {
        /// The VM.
        vm: VmId,
        /// Where it lies.
        held: PoolName,
        /// Where it is to.
        asked: PoolName,
    },
    /// A replica cannot be brought to stable storage.
    #[error("bring the replica {} to stable storage", path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk that has become smaller.
    #[error(
        "the disk has {size_bytes} bytes and its replica {} has {held_bytes}: a replica is never cut; delete it and begin anew",
        path.display()
    )]
    Shrinks {
        /// The image.
        path: PathBuf,
        /// Its size.
        held_bytes: u64,
        /// What was asked for.
        size_bytes: u64,
    },
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nobody said what the image is, and it looks like something else than raw.
    #[error(
        "the image {} begins like a qcow2 file and the vm's definition does not say which format it has; that is not guessed, since a guest can \
         write such a beginning into a raw disk: define the vm with \"format: qcow2\" for this disk, or with \"format: raw\"", path.display()
    )]
    FormatUnsaid {
        /// The image.
        path: PathBuf,
    },
    /// A file of that name is there, and the disk is new.
    #[error("disk {disk:?} is to be made at {}, and there is something already: move it away", path.display())]
    DiskInTheWay {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
    },
    /// A disk could not be made.
    #[error("make disk {disk:?} at {}", path.display())]
    Make {
        /// The disk.
        disk: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of that name is there, and it is not ours.
    #[error("the image is to be flattened to {}, and such a file is there already: move it away", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// A replica is raw, and this is not yet.
    #[error(
        "the disks of vm {vm} are being flattened from qcow2 to raw here before they are replicas: wait until that is done \
         (\"pageportctl replica list\" shows how far it is)"
    )]
    NotFlat {
        /// The VM.
        vm: VmId,
    },
    /// There is no replica of this disk here.
    #[error("this site holds no replica of disk {disk:?} of vm {vm}: seed it first")]
    Missing {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
    },
    /// The replica lies elsewhere.
    #[error(
        "the replica of disk {disk:?} lies at {} and is to lie at {}; a replica is not moved: delete it (\"pageportctl replica delete\") and protect \
         the vm again", held.display(), asked.display()
    )]
    Placed {
        /// The disk.
        disk: String,
        /// Where it lies.
        held: PathBuf,
        /// Where it is to.
        asked: PathBuf,
    },
    /// The worker's configuration says nothing of the device.
    #[error(
        "{} is to hold a replica, which this worker is not allowed: name it, or its folder, in replication.devices of its worker.toml, or choose \
         another place", path.display()
    )]
    DeviceNotAllowed {
        /// The device.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{} is to hold a replica and is no block device: choose one, or none, and the replica is a file", path.display())]
    NotADevice {
        /// What was named.
        path: PathBuf,
    },
    /// Somebody has it mounted, or uses it.
    #[error("the block device {} is mounted or in use by something else of this host, which `lsblk` shows: free it", path.display())]
    DeviceInUse {
        /// The device.
        path: PathBuf,
    },
    /// It does not hold the disk.
    #[error(
        "the disk has {size_bytes} bytes and the block device {} only {device_bytes}: make the device larger (as with `lvextend`)", path.display()
    )]
    DeviceSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        device_bytes: u64,
        /// The disk's.
        size_bytes: u64,
    },
    /// Another disk lies there.
    #[error("the block device {} is disk {disk:?} of vm {vm} already: choose another", path.display())]
    DeviceTaken {
        /// The device.
        path: PathBuf,
        /// Whose.
        vm: VmId,
        /// Which.
        disk: String,
    },
    /// There is something on it.
    #[error(
        "the block device {} does not begin and end with zeros, so it may hold something: if nobody needs that, clear it with \
         `blkdiscard --zeroout {}`", path.display(), path.display()
    )]
    DeviceNotEmpty {
        /// The device.
        path: PathBuf,
    },
}
