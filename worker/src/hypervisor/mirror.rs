//! A disk copied, while the guest writes to it, to an NBD server of the worker.
//!
//! ```text
//!   guest ─▶ top-DISK ─▶ disk-DISK ─▶ image
//!               └─ job mirror-DISK (background) ─▶ mirror-to-DISK (nbd) ─▶ unix socket ─▶ the worker
//!
//!   start ─▶ wait_ready (progress) ─▶ finish: last writes, flush, job ends, node removed
//!      └────────────┴──▶ cancel: job ends at once, node removed
//! ```
//!
//! Guarantees: no guest write waits for, or fails because of, the target: the job runs in the background, reports a
//! target's error by ending, and the NBD client does not reconnect. The target is never zeroed as a whole: every
//! range is sent as what it is, so a target that compares with what it holds passes on only differences. (QEMU zeroes
//! the target first when it may unmap there, hence `discard: ignore` on it.)
//!
//! Does not rescue itself from a target that hangs: the deadlines here report it, and the caller then closes the NBD
//! socket, which makes QEMU end the job. Until then every command may hang, and so may a guest that resets the disk's device
//! (seen with firmware booting): QEMU first waits for the mirror's requests in flight. QEMU connects to the NBD server in its main loop, so the server must be
//! listening, and answering, before [`Vm::start_mirror`].

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::block::{BlockJob, JobEvent, LOOK_INTERVAL, nbd_target};
use super::disk::top_node;
use super::error::HypervisorError;
use super::qmp::{COMMAND_DEADLINE, Ignored, qmp_command};
use super::vm::Vm;

qmp_command!(/// Starts the copy.
BlockdevMirror = "blockdev-mirror" -> Ignored {
    job_id: String,
    device: String,
    target: String,
    sync: MirrorSync,
    copy_mode: &'static str,
    on_source_error: &'static str,
    on_target_error: &'static str,
});

/// What a mirror copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MirrorSync {
    /// The whole disk, and what the guest writes.
    Full,
    /// What the guest writes from now on; such a mirror is ready at once.
    None,
}

/// How far a mirror is. `total_bytes` grows with the guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorProgress {
    /// Looked at or copied so far.
    pub done_bytes: u64,
    /// In all, as of now.
    pub total_bytes: u64,
    /// Has it caught up?
    pub ready: bool,
}

/// A mirror under way. Dropping it leaves the job running: end it with `finish` or `cancel`.
#[derive(Debug)]
#[must_use = "a mirror runs until it is finished or cancelled"]
pub struct MirrorHandle {
    disk: String,
    job: BlockJob,
    ready: bool,
}

impl Vm {
    /// Starts to copy `disk` to the NBD `export` on a unix socket.
    pub async fn start_mirror(
        &self,
        disk: &str,
        nbd_socket: &Path,
        export: &str,
    ) -> Result<MirrorHandle, HypervisorError> {
        self.start_mirror_of(MirrorSync::Full, disk, nbd_socket, export).await
    }

    /// As [`Self::start_mirror`], of a part of the disk.
    ///
    /// # Errors
    /// The server does not answer, or that of another job does not; or QEMU refuses: the disk has a mirror.
    pub async fn start_mirror_of(
        &self,
        sync: MirrorSync,
        disk: &str,
        nbd_socket: &Path,
        export: &str,
    ) -> Result<MirrorHandle, HypervisorError> {
        let mirror = self.mirror_handle(disk);
        // QEMU would wait for the others' servers, and the guest with it.
        let held = self.hold_jobs(COMMAND_DEADLINE).await?;
        let started = self.begin_mirror(&mirror, sync, nbd_socket, export).await;
        held.resume().await;
        started.map(|()| mirror)
    }

    async fn begin_mirror(
        &self,
        mirror: &MirrorHandle,
        sync: MirrorSync,
        nbd_socket: &Path,
        export: &str,
    ) -> Result<(), HypervisorError> {
        self.add_node(nbd_target(mirror.job.target(), nbd_socket, export)).await?;
        let job = BlockdevMirror {
            job_id: mirror.job.id().to_owned(),
            device: top_node(&mirror.disk),
            target: mirror.job.target().to_owned(),
            sync,
            copy_mode: "background",
            on_source_error: "report",
            on_target_error: "report",
        };
        if let Err(error) = self.execute(&job).await {
            mirror.job.remove_target().await?;
            return Err(error);
        }
        Ok(())
    }

    /// Ends the mirrors that an earlier worker left when it ended, and removes their sockets: a socket that is still there
    /// names its disk.
    pub async fn end_orphaned_mirrors(&self, deadline: Duration) -> Result<(), HypervisorError> {
        for (disk, socket) in self.paths().nbd_sockets() {
            self.mirror_handle(&disk).cancel(deadline).await?;
            tracing::info!(vm_id = %self.id(), disk, "mirror of an earlier worker ended");
            std::fs::remove_file(&socket).map_err(|source| HypervisorError::File {
                operation: "remove",
                path: socket,
                source,
            })?;
        }
        Ok(())
    }

    fn mirror_handle(&self, disk: &str) -> MirrorHandle {
        let job = BlockJob::new(self, format!("mirror-{disk}"), format!("mirror-to-{disk}"));
        MirrorHandle { disk: disk.to_owned(), job, ready: false }
    }
}

impl MirrorHandle {
    /// The disk being copied.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// How far it is.
    pub async fn progress(&self) -> Result<MirrorProgress, HypervisorError> {
        self.progress_of(self.job.info().await?)
    }

    fn progress_of(&self, job: Option<super::block::JobInfo>) -> Result<MirrorProgress, HypervisorError> {
        let job = job.ok_or_else(|| self.failed("the job has ended"))?;
        Ok(MirrorProgress { done_bytes: job.offset, total_bytes: job.len, ready: job.ready })
    }

    /// Waits until the copy has caught up; tells its progress from time to time.
    ///
    /// A job that has failed is an error (its node is removed then); so is a missed deadline, after which the job runs on.
    pub async fn wait_ready(
        &mut self,
        deadline: Duration,
        mut progress: impl FnMut(MirrorProgress),
    ) -> Result<(), HypervisorError> {
        let until = Instant::now() + deadline;
        while !self.ready {
            let look = Instant::now() + LOOK_INTERVAL;
            match self.job.next_event(look.min(until)).await? {
                Some(JobEvent::Ready) => self.ready = true,
                Some(ended) => return Err(self.ended(ended).await),
                None if Instant::now() >= until => return Err(self.job.late("mirror", deadline)),
                // Events may have been lost: look.
                None => match self.job.look(until).await {
                    Ok(job) => {
                        let now = self.progress_of(job)?;
                        progress(now);
                        self.ready = now.ready;
                    }
                    Err(None) => {}
                    Err(Some(error)) => return Err(error),
                },
            }
        }
        progress(self.progress().await?);
        Ok(())
    }

    /// Ends a mirror that is ready: the last writes are copied and flushed, then nothing of it is left.
    ///
    /// With the guest paused the target then equals the disk. After an error the caller closes the NBD socket and cancels.
    pub async fn finish(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        if !self.job.order_end(false).await? {
            return Err(self.failed("the job has ended"));
        }
        let until = Instant::now() + deadline;
        loop {
            match self.job.next_event(until).await? {
                Some(JobEvent::Ready) => {}
                Some(JobEvent::Completed) => return self.job.remove_target().await,
                Some(ended) => return Err(self.ended(ended).await),
                None => return Err(self.job.late("last part of the mirror", deadline)),
            }
        }
    }

    /// Ends the mirror at once, in whatever state it is. A job that has ended is no error.
    pub async fn cancel(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        self.job.cancel(deadline).await
    }

    async fn ended(&self, event: JobEvent) -> HypervisorError {
        if let Err(error) = self.job.remove_target().await {
            tracing::warn!(disk = self.disk, error = %error, "mirror target not removed");
        }
        match event {
            JobEvent::Failed(reason) => self.failed(&reason),
            JobEvent::Ready | JobEvent::Completed => self.failed("it ended too early"),
        }
    }

    fn failed(&self, reason: &str) -> HypervisorError {
        HypervisorError::Mirror { disk: self.disk.clone(), reason: reason.to_owned() }
    }
}
