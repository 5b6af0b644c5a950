//! The nodes of a frozen point: put in, and taken out again from whatever state they are in. For who holds the jobs.

use std::collections::BTreeSet;

use serde_json::json;

use super::FreezeDisk;
use crate::hypervisor::block::NodeInfo;
use crate::hypervisor::disk::{disk_node, repointed};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::vm::Vm;

/// Longest time that a guest's write may take for its old bytes to be saved; after that the point breaks. A guest that discards a
/// GiB has that much saved in one request.
pub const SCRATCH_SECONDS: u32 = 5;

/// The filter that saves old bytes.
pub(super) fn filter_node(disk: &str) -> String {
    format!("filter-{disk}")
}

/// The file that it saves them to.
fn scratch_node(disk: &str) -> String {
    format!("scratch-{disk}")
}

/// The disk at the moment.
pub(super) fn point_node(disk: &str) -> String {
    format!("point-{disk}")
}

impl Vm {
    /// Makes a disk's scratch file and the filter, which nothing goes through yet.
    pub(super) async fn add_filter(&self, disk: &FreezeDisk, size: u64) -> Result<tokio::fs::File, HypervisorError> {
        let (name, path) = (&disk.name, &disk.scratch);
        let failed = |operation| move |source| HypervisorError::File { operation, path: disk.scratch.clone(), source };
        let mut options = tokio::fs::OpenOptions::new();
        let scratch = options.create(true).write(true).truncate(true).open(path).await.map_err(failed("create"))?;
        let added = async {
            scratch.set_len(size).await.map_err(failed("size"))?;
            self.add_node(json!({
                "driver": "file", "node-name": scratch_node(name), "filename": path.to_string_lossy(),
                "discard": "unmap", "cache": {"direct": false, "no-flush": true},
            }))
            .await?;
            // Its `bitmap` option would be read too early: a write between here and the moment would not be saved.
            self.add_node(json!({
                "driver": "copy-before-write", "node-name": filter_node(name), "file": disk_node(name),
                "target": scratch_node(name), "on-cbw-error": "break-snapshot", "cbw-timeout": SCRATCH_SECONDS,
                "discard": "unmap", "cache": {"direct": false, "no-flush": false},
            }))
            .await
        };
        let added = added.await;
        // QEMU has it open: without a name it cannot outlive QEMU.
        let unlinked = tokio::fs::remove_file(path).await.map_err(failed("unlink"));
        added.and(unlinked).map(|()| scratch)
    }

    /// Re-points the disks' devices to their filters: the moment.
    pub(super) async fn put_filters_in(&self, disks: &[String], nodes: &[NodeInfo]) -> Result<(), HypervisorError> {
        self.reopen_nodes(disks.iter().map(|disk| repointed(nodes, disk, &filter_node(disk))).collect()).await
    }

    /// Opens the disk as it was when its filter was put in. Only then: before, it would ask that nobody writes to the disk.
    pub(super) async fn add_point(&self, disk: &str) -> Result<(), HypervisorError> {
        self.add_node(json!({
            "driver": "snapshot-access", "node-name": point_node(disk), "file": filter_node(disk), "discard": "unmap",
        }))
        .await
    }

    /// Takes out whatever there is of a frozen point.
    pub(super) async fn dismantle(&self) -> Result<(), HypervisorError> {
        self.stop_nbd_server().await?;
        let nodes = self.nodes().await?;
        let names: BTreeSet<&str> = nodes.iter().map(|node| node.node_name.as_str()).collect();
        let with = |node: fn(&str) -> String| {
            let prefix = node("");
            let disks = names.iter().filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned));
            disks.collect::<Vec<String>>()
        };
        for disk in with(point_node) {
            self.remove_node(&point_node(&disk)).await?;
        }
        let filtered = with(filter_node);
        if !filtered.is_empty() {
            let back = filtered.iter().map(|disk| repointed(&nodes, disk, &disk_node(disk)));
            self.reopen_nodes(back.collect()).await?;
            tracing::debug!(vm_id = %self.id(), disks = ?filtered, "frozen point taken out");
        }
        for disk in filtered {
            self.remove_node(&filter_node(&disk)).await?;
        }
        for disk in with(scratch_node) {
            self.remove_node(&scratch_node(&disk)).await?;
        }
        Ok(())
    }
}
