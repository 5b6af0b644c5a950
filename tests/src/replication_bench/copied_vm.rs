//! A running guest whose disk QEMU itself copies to an NBD export at the other site, in one of its ways.
//!
//! | way | first copy | then | the replica is |
//! |---|---|---|---|
//! | mirror | `blockdev-mirror sync=full` | it goes on by itself, in the background | a mixture of moments whenever it is not in sync |
//! | backup | `blockdev-backup sync=full`, with a bitmap | `sync=incremental` | a mixture while an increment is copied; the guest's writes wait |
//!
//! A mirror follows what was written in blocks of 64 KiB, or as small as it is told: with 4 KiB it sends the least that it can, but
//! scattered blocks then take it longer, since QEMU's NBD client has at most 16 requests under way. A backup copies blocks of
//! 64 KiB, whatever its bitmap says. All send plain TCP.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};

use super::BenchError;
use super::digest::same;
use super::export::Export;
use super::stages::Replication;
use crate::baseline::vm::{PlainSpec, PlainVm, Start, VmError};
use crate::lab::network::Network;

const DISK: &str = "disk-root";
const TARGET: &str = "replica";
const JOB: &str = "copy";
const BITMAP: &str = "since";
const DEFAULT_GRANULARITY: u64 = 64 << 10;
const FINEST_GRANULARITY: u64 = 4 << 10;
/// How often a backup is made while the guest writes: what Pageport is ordered to keep to.
const BACKUP_INTERVAL: Duration = Duration::from_secs(5);
const COPY_DEADLINE: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(20);

/// Which of QEMU's ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `blockdev-mirror`, as it is by default.
    Mirror,
    /// `blockdev-mirror`, following the smallest blocks.
    FineMirror,
    /// `blockdev-backup` with a bitmap.
    Backup,
}

/// A guest, its disk, and the copy.
#[derive(Debug)]
pub struct CopiedVm {
    way: Way,
    vm: PlainVm,
    disk: PathBuf,
    export: Export,
}

impl CopiedVm {
    /// Boots the guest at the source's site and connects it to the export; nothing is copied yet.
    ///
    /// # Errors
    /// When QEMU does not start or cannot reach the export.
    pub async fn boot(
        network: &Network,
        site: &str,
        spec: &PlainSpec,
        way: Way,
        export: Export,
        folder: &Path,
    ) -> Result<Self, BenchError> {
        let mut vm = PlainVm::start(network, site, spec, Start::Boot, folder).await?;
        vm.execute("blockdev-add", export.node(TARGET)).await?;
        Ok(Self { way, vm, disk: spec.disk.clone(), export })
    }

    /// Its QEMU.
    pub fn vm(&mut self) -> &mut PlainVm {
        &mut self.vm
    }

    /// Ends the guest and hands back its disk.
    #[must_use]
    pub fn into_disk(self) -> PathBuf {
        self.disk
    }

    async fn job_ended(&mut self, event: &str) -> Result<(), BenchError> {
        let context = self.vm.context();
        let is_it =
            |name: &str, data: &Value| data["device"] == JOB && (name == event || name == "BLOCK_JOB_COMPLETED");
        let ended = self.vm.qmp().wait_for(event, COPY_DEADLINE, |event| is_it(&event.name, &event.data));
        let ended = ended.await.map_err(context)?;
        if ended.name == event && ended.data["error"].is_null() {
            return Ok(());
        }
        Err(BenchError::Job { way: self.way, said: ended.data.to_string() })
    }

    async fn backup(&mut self, sync: Value) -> Result<(), BenchError> {
        let mut backup = json!({"job-id": JOB, "device": DISK, "target": TARGET});
        let bitmap = json!({"node": DISK, "name": BITMAP});
        let mut actions = vec![];
        match sync {
            Value::String(_) => {
                backup["sync"] = sync;
                actions.push(json!({"type": "block-dirty-bitmap-add", "data": bitmap}));
            }
            bitmap => {
                backup["sync"] = json!("incremental");
                backup["bitmap"] = bitmap["name"].clone();
            }
        }
        actions.push(json!({"type": "blockdev-backup", "data": backup}));
        self.vm.execute("transaction", json!({"actions": actions})).await?;
        self.job_ended("BLOCK_JOB_COMPLETED").await
    }

    async fn increment(&mut self) -> Result<(), BenchError> {
        self.backup(json!({"name": BITMAP})).await
    }

    /// Waits until the mirror has nothing left to send.
    async fn in_sync(&mut self) -> Result<(), BenchError> {
        let deadline = Instant::now() + COPY_DEADLINE;
        loop {
            // In this order: the job counts what is under way, but takes note of new writes only when it looks at the bitmap.
            let unsent = unsent_bytes(&self.vm.execute("query-named-block-nodes", json!({"flat": true})).await?);
            let jobs = self.vm.execute("query-block-jobs", json!({})).await?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == JOB);
            match job {
                Some(job) if unsent == 0 && job["ready"] == true && job["offset"] == job["len"] => return Ok(()),
                Some(_) if Instant::now() < deadline => sleep(POLL).await,
                seen => {
                    let said = seen.map_or_else(|| "there is no job".to_owned(), Value::to_string);
                    return Err(BenchError::Job { way: self.way, said });
                }
            }
        }
    }

    async fn order(&mut self, command: &str) -> Result<(), VmError> {
        self.vm.execute(command, json!({})).await.map(drop)
    }
}

impl Replication for CopiedVm {
    async fn first_copy(&mut self) -> Result<(), BenchError> {
        let granularity = match self.way {
            Way::Backup => return self.backup(json!("full")).await,
            Way::Mirror => DEFAULT_GRANULARITY,
            Way::FineMirror => FINEST_GRANULARITY,
        };
        let mirror =
            json!({"job-id": JOB, "device": DISK, "target": TARGET, "sync": "full", "granularity": granularity});
        self.vm.execute("blockdev-mirror", mirror).await?;
        self.job_ended("BLOCK_JOB_READY").await
    }

    async fn catch_up(&mut self) -> Result<(), BenchError> {
        match self.way {
            Way::Mirror | Way::FineMirror => self.in_sync().await,
            Way::Backup => self.increment().await,
        }
    }

    async fn keep_up(&mut self, time: Duration) -> Result<(), BenchError> {
        let end = Instant::now() + time;
        let mut next = Instant::now() + BACKUP_INTERVAL;
        while self.way == Way::Backup && next < end {
            sleep_until(next).await;
            self.increment().await?;
            next = Instant::now().max(next + BACKUP_INTERVAL);
        }
        sleep_until(end).await;
        Ok(())
    }

    async fn is_equal(&mut self) -> Result<bool, BenchError> {
        self.order("stop").await?;
        self.catch_up().await?;
        let equal = same(&self.disk, self.export.file()).await?;
        self.order("cont").await?;
        Ok(equal)
    }
}

/// What the bitmap of a mirror holds: the only one without a name.
fn unsent_bytes(nodes: &Value) -> u64 {
    let bitmaps = nodes.as_array().into_iter().flatten().filter_map(|node| node["dirty-bitmaps"].as_array()).flatten();
    bitmaps.filter(|bitmap| bitmap["name"].is_null()).filter_map(|bitmap| bitmap["count"].as_u64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_mirror_has_not_sent_stands_in_the_bitmap_without_a_name() {
        let nodes = json!([
            {"node-name": "disk-root", "dirty-bitmaps": [{"name": "since", "count": 65_536}]},
            {"node-name": "#block002", "dirty-bitmaps": [{"count": 8192, "granularity": 4096}]},
            {"node-name": "replica"},
        ]);
        assert_eq!(unsent_bytes(&nodes), 8192);
    }
}
