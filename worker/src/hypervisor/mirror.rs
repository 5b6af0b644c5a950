//! A disk copied, while the guest writes to it, to an NBD server of the worker.
//!
//! ```text
//!   guest ─▶ top-DISK ─▶ disk-DISK ─▶ image
//!               └─ job mirror-DISK (background) ─▶ mirror-DISK-target (nbd) ─▶ unix socket ─▶ the worker
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

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use super::command_line::top_node;
use super::error::HypervisorError;
use super::event::{VmEvent, VmEventKind};
use super::qmp::{COMMAND_DEADLINE, Ignored, QmpError, qmp_command};
use super::vm::Vm;

/// Between two looks at a job's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// A node to add; its options are as varied as the drivers.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(transparent)]
struct BlockdevAdd(Value);
impl super::qmp::Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Ignored;
}
qmp_command!(/// Removes a node.
    BlockdevDel = "blockdev-del" -> Ignored { node_name: String });
qmp_command!(/// Starts the copy.
BlockdevMirror = "blockdev-mirror" -> Ignored {
    job_id: String,
    device: String,
    target: String,
    sync: &'static str,
    copy_mode: &'static str,
    on_source_error: &'static str,
    on_target_error: &'static str,
});
qmp_command!(/// Ends a job: when it is ready and without force, after its last writes.
    BlockJobCancel = "block-job-cancel" -> Ignored { device: String, force: bool });
qmp_command!(/// What jobs there are.
    QueryBlockJobs = "query-block-jobs" -> Vec<JobInfo> {});

/// What `query-block-jobs` says of one job.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct JobInfo {
    device: String,
    len: u64,
    offset: u64,
    ready: bool,
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
    vm: Vm,
    disk: String,
    job: String,
    node: String,
    events: broadcast::Receiver<VmEvent>,
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
        let mirror = self.mirror_handle(disk);
        let target = json!({
            "driver": "nbd", "node-name": mirror.node, "export": export, "reconnect-delay": 0, "open-timeout": 0,
            "server": {"type": "unix", "path": nbd_socket.to_string_lossy()},
            "discard": "ignore", "detect-zeroes": "on", "cache": {"direct": true, "no-flush": false},
        });
        self.execute(&BlockdevAdd(target)).await?;
        let job = BlockdevMirror {
            job_id: mirror.job.clone(),
            device: top_node(disk),
            target: mirror.node.clone(),
            sync: "full",
            copy_mode: "background",
            on_source_error: "report",
            on_target_error: "report",
        };
        if let Err(error) = self.execute(&job).await {
            mirror.remove_node().await?;
            return Err(error);
        }
        Ok(mirror)
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
        MirrorHandle {
            vm: self.clone(),
            disk: disk.to_owned(),
            job: format!("mirror-{disk}"),
            node: format!("mirror-{disk}-target"),
            events: self.events(),
            ready: false,
        }
    }
}

impl MirrorHandle {
    /// The disk being copied.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// How far it is.
    pub async fn progress(&self) -> Result<MirrorProgress, HypervisorError> {
        self.progress_within(COMMAND_DEADLINE).await
    }

    async fn progress_within(&self, deadline: Duration) -> Result<MirrorProgress, HypervisorError> {
        let jobs = self.vm.execute_within(&QueryBlockJobs {}, deadline).await?;
        let job = jobs.into_iter().find(|job| job.device == self.job);
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
            let look = Instant::now() + PROGRESS_INTERVAL;
            match self.next_job_event(look.min(until)).await? {
                Some(VmEventKind::BlockJobReady { .. }) => self.ready = true,
                Some(ended) => return Err(self.ended(ended).await),
                None if Instant::now() >= until => return Err(self.late("mirror", deadline)),
                // Events may have been lost: look.
                None => {
                    let left = until.saturating_duration_since(Instant::now());
                    let now = match self.progress_within(left.min(COMMAND_DEADLINE)).await {
                        // QEMU itself waits for the target.
                        Err(HypervisorError::Qmp(QmpError::Deadline { .. })) => continue,
                        answer => answer?,
                    };
                    progress(now);
                    self.ready = now.ready;
                }
            }
        }
        progress(self.progress().await?);
        Ok(())
    }

    /// Ends a mirror that is ready: the last writes are copied and flushed, then nothing of it is left.
    ///
    /// With the guest paused the target then equals the disk. After an error the caller closes the NBD socket and cancels.
    pub async fn finish(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        self.vm.execute(&BlockJobCancel { device: self.job.clone(), force: false }).await?;
        match self.next_end(Instant::now() + deadline).await? {
            Some(VmEventKind::BlockJobCompleted { error: None, .. }) => self.remove_node().await,
            Some(ended) => Err(self.ended(ended).await),
            None => Err(self.late("last part of the mirror", deadline)),
        }
    }

    /// Ends the mirror at once, in whatever state it is. A job that has ended is no error.
    pub async fn cancel(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        match self.vm.execute(&BlockJobCancel { device: self.job.clone(), force: true }).await {
            Ok(Ignored {}) => {
                if self.next_end(Instant::now() + deadline).await?.is_none() {
                    return Err(self.late("cancellation of the mirror", deadline));
                }
            }
            // No such job any more.
            Err(HypervisorError::Qmp(QmpError::Refused { .. })) => {}
            Err(error) => return Err(error),
        }
        self.remove_node().await
    }

    async fn next_end(&mut self, until: Instant) -> Result<Option<VmEventKind>, HypervisorError> {
        loop {
            match self.next_job_event(until).await? {
                Some(VmEventKind::BlockJobReady { .. }) => {}
                other => return Ok(other),
            }
        }
    }

    /// The next event about this job that matters; `None` at `until`.
    async fn next_job_event(&mut self, until: Instant) -> Result<Option<VmEventKind>, HypervisorError> {
        loop {
            let Ok(event) = tokio::time::timeout_at(until, self.events.recv()).await else { return Ok(None) };
            let kind = match event {
                Ok(event) => event.kind,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return Err(self.vm_ended()),
            };
            match &kind {
                VmEventKind::Exited(_) => return Err(self.vm_ended()),
                VmEventKind::BlockJobReady { job }
                | VmEventKind::BlockJobCompleted { job, .. }
                | VmEventKind::BlockJobCancelled { job }
                    if *job == self.job =>
                {
                    return Ok(Some(kind));
                }
                _ => {}
            }
        }
    }

    async fn ended(&self, event: VmEventKind) -> HypervisorError {
        if let Err(error) = self.remove_node().await {
            tracing::warn!(disk = self.disk, error = %error, "mirror target not removed");
        }
        match event {
            VmEventKind::BlockJobCompleted { error: Some(reason), .. } => self.failed(&reason),
            VmEventKind::BlockJobCancelled { .. } => self.failed("it was cancelled"),
            _ => self.failed("it ended too early"),
        }
    }

    async fn remove_node(&self) -> Result<(), HypervisorError> {
        match self.vm.execute(&BlockdevDel { node_name: self.node.clone() }).await {
            Ok(Ignored {}) => Ok(()),
            // It has been removed before.
            Err(HypervisorError::Qmp(QmpError::Refused { refusal, .. })) if refusal.desc.contains("Failed to find") => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn failed(&self, reason: &str) -> HypervisorError {
        HypervisorError::Mirror { disk: self.disk.clone(), reason: reason.to_owned() }
    }

    fn late(&self, operation: &'static str, deadline: Duration) -> HypervisorError {
        HypervisorError::Deadline { vm: self.vm.id(), operation, deadline }
    }

    fn vm_ended(&self) -> HypervisorError {
        HypervisorError::Ended { vm: self.vm.id(), operation: "the mirror" }
    }
}
