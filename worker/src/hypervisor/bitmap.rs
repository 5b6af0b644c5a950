//! Bitmaps: what the guest has written to each disk since a moment.
//!
//! They lie on the disks' own nodes, below filters and mirrors, and see every write, discard and zeroing of the guest. One name means
//! one moment, on all disks that were named when it began. They end with QEMU.
//!
//! Guarantees: each command may be repeated. A bitmap that was added records before the call returns. Several disks are done one
//! after the other, which loses nothing: a bitmap may only say too much. (QEMU's `transaction` is no way: it waits for what every job has in
//! flight, and so for their NBD servers, while the guest's requests are held back. These commands wait for nothing.)

use serde::Serialize;

use super::block::refused_with;
use super::disk::disk_node;
use super::error::HypervisorError;
use super::qmp::{Ignored, qmp_command};
use super::vm::Vm;

/// What one bit stands for. Smaller than what a copy moves, so that a bitmap tells how much has changed; 32 MiB of memory for each
/// TiB of disk.
pub(super) const GRANULARITY_BYTES: u32 = 4096;

qmp_command!(/// Begins a bitmap.
BitmapAdd = "block-dirty-bitmap-add" -> Ignored { node: String, name: String, granularity: u32, disabled: bool });
qmp_command!(/// Ends a bitmap.
BitmapRemove = "block-dirty-bitmap-remove" -> Ignored { node: String, name: String });
qmp_command!(/// Has a bitmap record.
BitmapEnable = "block-dirty-bitmap-enable" -> Ignored { node: String, name: String });
qmp_command!(/// Adds bitmaps to another.
BitmapMerge = "block-dirty-bitmap-merge" -> Ignored { node: String, target: String, bitmaps: Vec<BitmapSource> });

/// A bitmap of any node.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BitmapSource {
    pub node: String,
    pub name: String,
}

/// A bitmap of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// The disk.
    pub disk: String,
    /// Its name.
    pub name: String,
    /// What it says was written.
    pub dirty_bytes: u64,
    /// Does it record?
    pub recording: bool,
    /// Is a job using it?
    pub busy: bool,
    /// It cannot be used, only removed.
    pub inconsistent: bool,
}

impl BitmapInfo {
    /// Has it seen every write since its moment, as far as it can say?
    pub fn usable(&self) -> bool {
        self.recording && !self.inconsistent
    }
}

impl Vm {
    /// All bitmaps of all disks.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub async fn bitmaps(&self) -> Result<Vec<BitmapInfo>, HypervisorError> {
        let mut all = Vec::new();
        for node in self.nodes().await? {
            let Some(disk) = node.node_name.strip_prefix(&disk_node("")) else { continue };
            for bitmap in node.dirty_bitmaps {
                let Some(name) = bitmap.name else { continue };
                all.push(BitmapInfo {
                    disk: disk.to_owned(),
                    name,
                    dirty_bytes: bitmap.count,
                    recording: bitmap.recording,
                    busy: bitmap.busy,
                    inconsistent: bitmap.inconsistent,
                });
            }
        }
        all.sort_by(|a, b| (&a.disk, &a.name).cmp(&(&b.disk, &b.name)));
        Ok(all)
    }

    /// Begins a bitmap on each of `disks`. One that is there is kept, and records: it says too much rather than too little.
    ///
    /// # Errors
    /// QEMU refuses, such as for a disk that is not there; then those of the disks before it are removed again.
    pub async fn add_bitmap(&self, disks: &[String], name: &str) -> Result<(), HypervisorError> {
        let mut added = Vec::new();
        for disk in disks {
            match self.add_node_bitmap(&disk_node(disk), name, GRANULARITY_BYTES, false).await {
                Ok(()) => added.push(disk.clone()),
                Err(error) if refused_with(&error, "already exists") => self.enable_bitmap(disk, name).await?,
                Err(error) => {
                    self.remove_bitmap(&added, name).await?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Ends a bitmap on each of `disks`. One that is not there is no error.
    ///
    /// # Errors
    /// QEMU refuses, or does not answer.
    pub async fn remove_bitmap(&self, disks: &[String], name: &str) -> Result<(), HypervisorError> {
        for disk in disks {
            match self.execute(&BitmapRemove { node: disk_node(disk), name: name.to_owned() }).await {
                Ok(Ignored {}) => {}
                Err(error) if refused_with(&error, "not found") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds to the bitmap `into` what `from` says, on each of `disks`; `into` records from now on.
    ///
    /// # Errors
    /// One of the bitmaps is not there or not usable, or QEMU does not answer. Some disks may have been done.
    pub async fn merge_bitmap(&self, disks: &[String], from: &str, into: &str) -> Result<(), HypervisorError> {
        for disk in disks {
            let node = disk_node(disk);
            // First: what is written in between is in both.
            self.enable_bitmap(disk, into).await?;
            self.merge_node_bitmap(&node, into, BitmapSource { node: node.clone(), name: from.to_owned() }).await?;
        }
        Ok(())
    }

    async fn enable_bitmap(&self, disk: &str, name: &str) -> Result<(), HypervisorError> {
        self.execute(&BitmapEnable { node: disk_node(disk), name: name.to_owned() }).await.map(drop)
    }

    pub(super) async fn add_node_bitmap(
        &self,
        node: &str,
        name: &str,
        granularity: u32,
        disabled: bool,
    ) -> Result<(), HypervisorError> {
        let add = BitmapAdd { node: node.to_owned(), name: name.to_owned(), granularity, disabled };
        self.execute(&add).await.map(drop)
    }

    pub(super) async fn merge_node_bitmap(
        &self,
        node: &str,
        into: &str,
        from: BitmapSource,
    ) -> Result<(), HypervisorError> {
        let merge = BitmapMerge { node: node.to_owned(), target: into.to_owned(), bitmaps: vec![from] };
        self.execute(&merge).await.map(drop)
    }
}
