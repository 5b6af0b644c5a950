//! A frozen disk copied to an NBD server of the worker.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::{Frozen, graph};
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
    on_source_error: &'static str,
    on_target_error: &'static str,
});
qmp_command!(/// Bounds a job's speed.
    BlockJobSetSpeed = "block-job-set-speed" -> Ignored { device: String, speed: u64 });

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
    /// Starts to copy a frozen disk to the NBD `export` on a unix socket, at most at `speed_bytes_per_s`. Each disk can be copied once: what has
    /// been copied is no longer kept for it, and costs the guest nothing more.
    ///
    /// # Errors
    /// The server does not answer, or QEMU refuses: the disk is not frozen, or being copied.
    pub async fn copy(
        &self,
        disk: &str,
        nbd_socket: &Path,
        export: &str,
        speed_bytes_per_s: Option<u64>,
    ) -> Result<CopyHandle, HypervisorError> {
        let copy = CopyHandle { disk: disk.to_owned(), job: copy_job(&self.vm, disk) };
        if self.turn.is_none() {
            return Err(copy.failed("the point is released"));
        }
        self.vm.add_node(nbd_target(copy.job.target(), nbd_socket, export)).await?;
        let job = BlockdevBackup {
            job_id: copy.job.id().to_owned(),
            device: graph::point_node(disk),
            target: copy.job.target().to_owned(),
            sync: if self.since.is_some() { "bitmap" } else { "full" },
            bitmap: self.since.clone(),
            bitmap_mode: self.since.as_ref().map(|_| "never"),
            speed: speed_bytes_per_s.unwrap_or(0),
            discard_source: true,
            on_source_error: "report",
            on_target_error: "report",
        };
        if let Err(error) = self.vm.execute(&job).await {
            copy.job.remove_target().await?;
            return Err(error);
        }
        Ok(copy)
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
                Some(JobEvent::Completed) => return self.job.remove_target().await,
                Some(JobEvent::Failed(reason)) => return Err(self.ended(&reason).await),
                Some(JobEvent::Ready) => {}
                None if Instant::now() >= until => return Err(self.job.late("copy of a frozen disk", deadline)),
                // Its events may have been lost: look. How a job ended that is gone is not known.
                None => match self.job.look(until).await {
                    Ok(Some(job)) => progress(progress_of(&job)),
                    Ok(None) => match self.job.next_event(Instant::now()).await? {
                        Some(JobEvent::Completed) => return self.job.remove_target().await,
                        Some(JobEvent::Failed(reason)) => return Err(self.ended(&reason).await),
                        _ => return Err(self.ended("it ended unseen").await),
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
    /// It does not end within `deadline`, because its NBD server does not answer: close that, and cancel again.
    pub async fn cancel(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        self.job.cancel(deadline).await
    }

    async fn ended(&self, reason: &str) -> HypervisorError {
        if let Err(error) = self.job.remove_target().await {
            tracing::warn!(disk = self.disk, error = %error, "target of a copy not removed");
        }
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
