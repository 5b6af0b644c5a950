//! Frozen disks copied to NBD servers of the worker.
//!
//! A job that has done its work stays, pending, until the point is released: its end would be a change to the graph, and wait for what the others
//! have in flight.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::{Frozen, REST_DEADLINE, graph};
use crate::hypervisor::block::{BlockJob, JobEvent, JobInfo, LOOK_INTERVAL, nbd_target};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::qmp::{Ignored, qmp_command};
use crate::hypervisor::vm::Vm;

/// What a job says that was refused a block of a point that broke (`EACCES`; a local disk gives no such error).
const REFUSED_BLOCK: &str = "Permission denied";

qmp_command!(/// Starts the copy.
BlockdevBackup = "blockdev-backup" -> Ignored {
    job_id: String,
    device: String,
    target: String,
    sync: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap_mode: Option<&'static str>,
    speed: u64,
    discard_source: bool,
    auto_finalize: bool,
    on_source_error: &'static str,
    on_target_error: &'static str,
});
qmp_command!(/// Does several things at one moment.
    Transaction = "transaction" -> Ignored { actions: Vec<Action> });
qmp_command!(/// Bounds a job's speed.
    BlockJobSetSpeed = "block-job-set-speed" -> Ignored { device: String, speed: u64 });

/// One thing of several.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub(crate) enum Action {
    BlockdevBackup(BlockdevBackup),
}

/// Where a frozen disk is to be copied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyTarget {
    /// Which disk.
    pub disk: String,
    /// The NBD server's unix socket. It listens.
    pub nbd_socket: PathBuf,
    /// The name there.
    pub export: String,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// Copied so far.
    pub done_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

/// A copy under way. Dropping it leaves the job running, until the point is released.
#[derive(Debug)]
#[must_use = "a copy runs until it has ended or is cancelled"]
pub struct CopyHandle {
    disk: String,
    job: BlockJob,
}

pub(super) fn copy_job(vm: &Vm, disk: &str) -> BlockJob {
    BlockJob::new(vm, format!("copy-{disk}"), format!("copy-to-{disk}"))
}

impl Frozen {
    /// Starts to copy frozen disks, each at most at `speed_bytes_per_s`; all in one call, or the later ones wait until the earlier ones' servers
    /// have answered what is in flight. Each disk can be copied once: what has been copied is no longer kept for it, and costs the
    /// guest nothing more. The handles are in the order of `targets`.
    ///
    /// # Errors
    /// A server, or that of another job, does not answer, or QEMU refuses: a disk is not frozen, or has been copied. No copy has begun then.
    pub async fn copy(
        &self,
        targets: &[CopyTarget],
        speed_bytes_per_s: Option<u64>,
    ) -> Result<Vec<CopyHandle>, HypervisorError> {
        let handle =
            |target: &CopyTarget| CopyHandle { disk: target.disk.clone(), job: copy_job(&self.vm, &target.disk) };
        let copies: Vec<CopyHandle> = targets.iter().map(handle).collect();
        if self.turn.is_none() {
            return Err(HypervisorError::NotFrozen { vm: self.vm.id() });
        }
        let held = self.vm.hold_jobs(REST_DEADLINE).await?;
        let started = self.start(targets, &copies, speed_bytes_per_s.unwrap_or(0)).await;
        held.resume().await;
        started.map(|()| copies)
    }

    async fn start(&self, targets: &[CopyTarget], copies: &[CopyHandle], speed: u64) -> Result<(), HypervisorError> {
        let mut actions = Vec::new();
        let mut added = Ok(());
        for (target, copy) in targets.iter().zip(copies) {
            added = self.vm.add_node(nbd_target(copy.job.target(), &target.nbd_socket, &target.export)).await;
            if added.is_err() {
                break;
            }
            actions.push(Action::BlockdevBackup(BlockdevBackup {
                job_id: copy.job.id().to_owned(),
                device: graph::point_node(&target.disk),
                target: copy.job.target().to_owned(),
                sync: if self.since.is_some() { "bitmap" } else { "full" },
                bitmap: self.since.clone(),
                bitmap_mode: self.since.as_ref().map(|_| "never"),
                speed,
                discard_source: true,
                auto_finalize: false,
                on_source_error: "report",
                on_target_error: "report",
            }));
        }
        let begun = actions.len();
        let started = match added {
            Ok(()) => self.vm.execute(&Transaction { actions }).await.map(drop),
            Err(error) => Err(error),
        };
        if started.is_err() {
            for copy in &copies[..begun] {
                copy.job.remove_target().await?;
            }
        }
        started
    }
}

impl CopyHandle {
    /// The disk being copied.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// How far it is.
    ///
    /// # Errors
    /// It has ended.
    pub async fn progress(&self) -> Result<CopyProgress, HypervisorError> {
        let job = self.job.info().await?;
        job.as_ref().map(progress_of).ok_or_else(|| self.failed("the job has ended"))
    }

    /// Bounds its speed from now on; `None`: without a bound.
    ///
    /// # Errors
    /// It has ended, or QEMU does not answer.
    pub async fn set_speed(&self, bytes_per_s: Option<u64>) -> Result<(), HypervisorError> {
        let speed = bytes_per_s.unwrap_or(0);
        self.job.vm().execute(&BlockJobSetSpeed { device: self.job.id().to_owned(), speed }).await.map(drop)
    }

    /// Waits until everything is copied, that is: every write was answered. The caller flushes its own target. Tells the progress from time to time.
    ///
    /// # Errors
    /// The copy failed, and is gone; or it takes longer than `deadline`, and goes on.
    pub async fn wait(
        &mut self,
        deadline: Duration,
        mut progress: impl FnMut(CopyProgress),
    ) -> Result<(), HypervisorError> {
        let until = Instant::now() + deadline;
        loop {
            let look = Instant::now() + LOOK_INTERVAL;
            match self.job.next_event(look.min(until)).await? {
                Some(JobEvent::Pending) => return Ok(()),
                Some(JobEvent::Failed(reason)) => return Err(self.ended(&reason)),
                Some(JobEvent::Completed) => return Err(self.ended("it was dismissed")),
                Some(JobEvent::Ready) => {}
                None if Instant::now() >= until => return Err(self.job.late("copy of a frozen disk", deadline)),
                // Its events may have been lost: look.
                None => match self.job.look(until).await {
                    Ok(Some(job)) => {
                        progress(progress_of(&job));
                        if job.pending() {
                            return Ok(());
                        }
                    }
                    // Why it ended may have been told just now.
                    Ok(None) => match self.job.next_event(Instant::now()).await? {
                        Some(JobEvent::Failed(reason)) => return Err(self.ended(&reason)),
                        _ => return Err(self.ended("it has ended")),
                    },
                    Err(None) => {}
                    Err(Some(error)) => return Err(error),
                },
            }
        }
    }

    /// Ends the copy at once. One that has ended is no error.
    ///
    /// # Errors
    /// It, or another job, does not come to rest within `deadline`, because its NBD server does not answer: close that, and cancel again.
    pub async fn cancel(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        let held = self.job.vm().hold_jobs(deadline).await?;
        let cancelled = self.job.cancel(deadline).await;
        held.resume().await;
        cancelled
    }

    /// Its target goes when the point is released.
    fn ended(&self, reason: &str) -> HypervisorError {
        if reason == REFUSED_BLOCK {
            return HypervisorError::PointBroken { disk: self.disk.clone() };
        }
        self.failed(reason)
    }

    fn failed(&self, reason: &str) -> HypervisorError {
        HypervisorError::Copy { disk: self.disk.clone(), reason: reason.to_owned() }
    }
}

fn progress_of(job: &JobInfo) -> CopyProgress {
    CopyProgress { done_bytes: job.offset, total_bytes: job.len }
}
