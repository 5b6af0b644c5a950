//! Disks that become larger under a guest.
//!
//! Guarantees: may be repeated; never makes a disk smaller (QEMU would, without a word); what is new reads as zeros, and no bitmap of the disk says otherwise.

use super::block::refused_with;
use super::disk::{top_node, unbounded};
use super::error::HypervisorError;
use super::qmp::{COMMAND_DEADLINE, Ignored, qmp_command};
use super::vm::Vm;
use crate::image::Format;

qmp_command!(/// Changes the size of a disk; the guest is told.
    BlockResize = "block_resize" -> Ignored { node_name: String, size: u64 });

impl Vm {
    /// Size of a disk as the guest sees it, in bytes.
    ///
    /// # Errors
    /// There is no such disk, or QEMU does not answer.
    pub async fn disk_bytes(&self, disk: &str) -> Result<u64, HypervisorError> {
        let top = top_node(disk);
        let node = self.nodes().await?.into_iter().find(|node| node.node_name == top);
        let missing = || HypervisorError::NoDisk { vm: self.id(), disk: disk.to_owned() };
        node.map(|node| node.image.virtual_size).ok_or_else(missing)
    }

    /// Makes a disk `size_bytes` large, if it is smaller.
    ///
    /// # Errors
    /// There is no such disk, it is being copied, its image cannot grow, or QEMU does not answer.
    pub async fn grow_disk(&self, disk: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        let held_bytes = self.disk_bytes(disk).await?;
        if held_bytes >= size_bytes {
            return Ok(());
        }
        match self.execute(&BlockResize { node_name: top_node(disk), size: size_bytes }).await {
            Ok(Ignored {}) => {
                tracing::info!(vm_id = %self.id(), disk, held_bytes, size_bytes, "disk grown");
                Ok(())
            }
            Err(error) if refused_with(&error, "is busy") => {
                Err(HypervisorError::DiskBusy { disk: disk.to_owned(), source: Box::new(error) })
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a disk on a block device as large as the device, which has `device_bytes`; what is new is zeros there already.
    ///
    /// # Errors
    /// As [`Self::grow_disk`].
    pub async fn grow_disk_to_device(&self, disk: &str, device_bytes: u64) -> Result<(), HypervisorError> {
        if self.disk_bytes(disk).await? >= device_bytes {
            return Ok(());
        }
        let held = self.hold_jobs(COMMAND_DEADLINE).await?;
        // The guest sees no more than before until the upper node grows, and the bitmaps with it.
        let reopened = self.reopen_nodes(vec![unbounded(disk, Format::Raw)]).await;
        held.resume().await;
        reopened?;
        self.grow_disk(disk, device_bytes).await
    }
}
