//! All disks of a running VM as they were at one moment, to be copied while the guest writes on.
//!
//! ```text
//!   guest ─▶ top-DISK ─▶ filter-DISK (copy-before-write) ─▶ disk-DISK (bitmaps) ─▶ image
//!                           │     └─ old bytes, before they are overwritten ─▶ scratch-DISK (a local file)
//!                        point-DISK (snapshot-access: the disk at that moment)
//!                           └─ QEMU's NBD server ─▶ unix socket ─▶ the worker reads
//!
//!   freeze ─▶ export ─▶ read it all ─▶ release(Committed): `next` goes on, `since` has done its work
//!                         └─ failed ─▶ release(Failed):    `since` goes on, as if nothing had been
//!                         └ in doubt ▶ release(Unknown):   both go on
//! ```
//! | step | why there |
//! |---|---|
//! | the guest's file systems come to rest, if wanted | the last thing that may take time |
//! | bitmap `next` begins | before the moment: no write after it is missed |
//! | one `blockdev-reopen` puts every top node over its filter | this is the moment, one for all disks |
//! | they are thawed | at once: the guest's writes wait since they came to rest |
//! | `since` is merged into a bitmap of the point | after the moment: no write before it is missed |
//!
//! `since` records through all of it, so whatever happens loses nothing, a worker's end included: that leaves both bitmaps
//! (`Unknown`). Both say a little too much at the edges, which costs a block copied twice.
//!
//! Guarantees: no guest write waits for, or fails because of, the worker. If the scratch is full, fails or takes longer than
//! [`SCRATCH_SECONDS`], the point breaks, the guest's write succeeds, and reading the point is refused
//! ([`crate::nbd::ClientError::is_refusal`]). A scratch file has no name once QEMU has it: its space is free when the point is released, or
//! QEMU ends.
//!
//! Does not bound the scratch: the caller looks at [`Frozen::scratch_bytes`] and releases. One point at a time. What the caller owes:
//! - A mirror whose NBD server hangs holds back freezing and releasing; the deadlines here report it, and the caller closes that server.
//! - A reader that takes no answers holds back the release, during which QEMU does nothing else: readers close first. A worker that ends closes its own.
//!
//! A mirror may begin and end before, during and after. What both have, the mirror's is newer.

mod export;
mod graph;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::sync::OwnedMutexGuard;

pub use graph::SCRATCH_SECONDS;

use super::bitmap::{BitmapSource, GRANULARITY_BYTES};
use super::block::NodeInfo;
use super::disk::disk_node;
use super::error::HypervisorError;
use super::guest_agent::Quiescence;
use super::vm::Vm;

/// Time for jobs under way to come to rest; the guest does not wait for that.
const REST_DEADLINE: Duration = Duration::from_secs(5);

/// What a moment has to be, beside the same for all disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// With the guest's file systems at rest, if its agent brings them there in time; or else as after a power cut.
    FileSystems,
}

/// A disk to freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeDisk {
    /// Its name.
    pub name: String,
    /// Where its scratch file is to be made, on a local disk; one that is there is overwritten.
    pub scratch: PathBuf,
}

/// What has become of what was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The point is safe elsewhere: its successor is measured from it.
    Committed,
    /// It is not.
    Failed,
    /// Nobody here knows.
    Unknown,
}

/// Disks at one moment. Dropping it leaves the filters in place, until the next freeze: end it with `release`.
#[derive(Debug)]
#[must_use = "a frozen point costs the guest a copy with each write until it is released"]
pub struct Frozen {
    vm: Vm,
    disks: Vec<FrozenDisk>,
    since: Option<String>,
    next: String,
    moment: SystemTime,
    quiescence: Quiescence,
    /// Until it is released.
    turn: Option<OwnedMutexGuard<()>>,
}

/// One of its disks.
#[derive(Debug)]
struct FrozenDisk {
    name: String,
    scratch: tokio::fs::File,
    copy_bytes: u64,
}

impl Vm {
    /// Freezes disks at one moment. `since` is a bitmap of each of them: what it says is to be read then, or else everything.
    /// The bitmap `next` begins at the moment. What an earlier point has left is removed first.
    ///
    /// # Errors
    /// A disk or `since` is not there, the disks are frozen already, a scratch file cannot be made, or a mirror's server hangs. Nothing is left then: no filter,
    /// no scratch, no new bitmap.
    pub async fn freeze(
        &self,
        disks: &[FreezeDisk],
        since: Option<&str>,
        next: &str,
    ) -> Result<Frozen, HypervisorError> {
        self.freeze_with(disks, since, next, Consistency::Crash).await
    }

    /// As [`Self::freeze`], with the guest's file systems at rest if that is wanted and works: see [`Frozen::take_quiescence`].
    ///
    /// # Errors
    /// As there. That the file systems are not at rest is none.
    pub async fn freeze_with(
        &self,
        disks: &[FreezeDisk],
        since: Option<&str>,
        next: &str,
        consistency: Consistency,
    ) -> Result<Frozen, HypervisorError> {
        let turn = self.take_freeze_turn().ok_or(HypervisorError::AlreadyFrozen { vm: self.id() })?;
        let held = self.hold_jobs(REST_DEADLINE).await?;
        let frozen = self.freeze_held(disks, since, next, consistency, turn).await;
        held.resume().await;
        frozen
    }

    async fn freeze_held(
        &self,
        disks: &[FreezeDisk],
        since: Option<&str>,
        next: &str,
        consistency: Consistency,
        turn: OwnedMutexGuard<()>,
    ) -> Result<Frozen, HypervisorError> {
        self.dismantle().await?;
        let nodes = self.nodes().await?;
        let sizes = disks.iter().map(|disk| self.frozen_size(&nodes, &disk.name, since));
        let sizes = sizes.collect::<Result<Vec<u64>, _>>()?;
        let names: Vec<String> = disks.iter().map(|disk| disk.name.clone()).collect();
        let began_before = self.bitmaps().await?.iter().any(|bitmap| bitmap.name == next);
        let frozen = async {
            let mut frozen = Vec::new();
            for (disk, size) in disks.iter().zip(sizes) {
                let scratch = self.add_filter(disk, size).await?;
                frozen.push(FrozenDisk { name: disk.name.clone(), scratch, copy_bytes: size });
            }
            // As late as can be. Whatever fails from here on drops it, which thaws.
            let at_rest = match consistency {
                Consistency::Crash => None,
                Consistency::FileSystems => Some(self.quiesce().await),
            };
            self.add_bitmap(&names, next).await?;
            let moment = SystemTime::now();
            self.put_filters_in(&names, &nodes).await?;
            let quiescence = match at_rest {
                None => Quiescence::default(),
                Some(Ok(guest)) => guest.thaw().await,
                Some(Err(problem)) => problem.into(),
            };
            for disk in &names {
                self.add_point(disk).await?;
                if let Some(since) = since {
                    let point = graph::point_node(disk);
                    self.add_node_bitmap(&point, since, GRANULARITY_BYTES, true).await?;
                    let source = BitmapSource { node: disk_node(disk), name: since.to_owned() };
                    self.merge_node_bitmap(&point, since, source).await?;
                }
            }
            if let Some(since) = since {
                let nodes = self.nodes().await?;
                for disk in &mut frozen {
                    disk.copy_bytes = dirty_bytes(&nodes, &graph::point_node(&disk.name), since);
                }
            }
            Ok((moment, quiescence, frozen))
        };
        let result = frozen.await;
        match result {
            Ok((moment, quiescence, disks)) => {
                let (since, next) = (since.map(str::to_owned), next.to_owned());
                Ok(Frozen { vm: self.clone(), disks, since, next, moment, quiescence, turn: Some(turn) })
            }
            Err(error) => {
                self.undo_freeze(disks, (!began_before).then_some(next)).await;
                Err(error)
            }
        }
    }

    /// What remains after this does no harm: the next freeze begins with the same.
    async fn undo_freeze(&self, disks: &[FreezeDisk], next: Option<&str>) {
        let names: Vec<String> = disks.iter().map(|disk| disk.name.clone()).collect();
        let mut undone = self.dismantle().await;
        if let (Ok(()), Some(next)) = (&undone, next) {
            undone = self.remove_bitmap(&names, next).await;
        }
        if let Err(error) = undone {
            tracing::warn!(vm_id = %self.id(), error = &error as &dyn std::error::Error, "failed freeze not undone");
        }
    }

    /// Removes what a worker that has ended left of a frozen point: exports, filters, scratch. The bitmaps stay, all complete, as after
    /// [`Outcome::Unknown`].
    ///
    /// # Errors
    /// A mirror's NBD server hangs, or QEMU does not answer.
    pub async fn end_orphaned_freezes(&self, deadline: Duration) -> Result<(), HypervisorError> {
        let _turn = self.take_freeze_turn().ok_or(HypervisorError::AlreadyFrozen { vm: self.id() })?;
        self.dismantle_holding_jobs(deadline).await
    }

    async fn dismantle_holding_jobs(&self, deadline: Duration) -> Result<(), HypervisorError> {
        let held = self.hold_jobs(deadline).await?;
        let dismantled = self.dismantle().await;
        held.resume().await;
        dismantled
    }

    fn frozen_size(&self, nodes: &[NodeInfo], disk: &str, since: Option<&str>) -> Result<u64, HypervisorError> {
        let node = nodes.iter().find(|node| node.node_name == disk_node(disk));
        let node = node.ok_or_else(|| HypervisorError::NoDisk { vm: self.id(), disk: disk.to_owned() })?;
        if let Some(since) = since {
            let usable = node.dirty_bitmaps.iter().any(|bitmap| {
                bitmap.name.as_deref() == Some(since) && bitmap.recording && !bitmap.inconsistent && !bitmap.busy
            });
            if !usable {
                return Err(HypervisorError::NoBitmap { disk: disk.to_owned(), bitmap: since.to_owned() });
            }
        }
        Ok(node.image.virtual_size)
    }
}

fn dirty_bytes(nodes: &[NodeInfo], node: &str, bitmap: &str) -> u64 {
    let node = nodes.iter().find(|info| info.node_name == node);
    let bitmap = node.and_then(|node| node.dirty_bitmaps.iter().find(|found| found.name.as_deref() == Some(bitmap)));
    bitmap.map_or(0, |bitmap| bitmap.count)
}

impl Frozen {
    /// A time at or just before the moment: everything that the guest had written by then is in it.
    pub fn moment(&self) -> SystemTime {
        self.moment
    }

    /// Whether the guest's file systems were at rest at the moment, and what an operator should know of that; the second time nothing.
    pub fn take_quiescence(&mut self) -> Quiescence {
        std::mem::take(&mut self.quiescence)
    }

    /// The bitmap that says what is to be read; [`None`]: everything.
    pub fn since(&self) -> Option<&str> {
        self.since.as_deref()
    }

    /// What is to be read of all disks.
    pub fn dirty_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.copy_bytes).sum()
    }

    /// What the scratch files of all disks occupy now.
    ///
    /// # Errors
    /// The file system cannot say.
    pub async fn scratch_bytes(&self) -> std::io::Result<u64> {
        let mut sum = 0;
        for disk in &self.disks {
            sum += disk.scratch.metadata().await?.blocks() * 512;
        }
        Ok(sum)
    }

    /// Ends the export, takes the filters out, frees the scratch, and settles the bitmaps. May be repeated, with the same outcome, if it failed. The disks can be frozen again then.
    ///
    /// # Errors
    /// A mirror does not come to rest within `deadline`: close its NBD server and try again. The bitmaps are
    /// settled by then. Or QEMU does not answer.
    pub async fn release(&mut self, outcome: Outcome, deadline: Duration) -> Result<(), HypervisorError> {
        if self.turn.is_none() {
            return Ok(());
        }
        let names: Vec<String> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        match (outcome, &self.since) {
            (Outcome::Committed, Some(since)) => self.vm.remove_bitmap(&names, since).await?,
            (Outcome::Failed, _) => self.vm.remove_bitmap(&names, &self.next).await?,
            (Outcome::Committed, None) | (Outcome::Unknown, _) => {}
        }
        self.vm.dismantle_holding_jobs(deadline).await?;
        self.turn = None;
        Ok(())
    }
}
