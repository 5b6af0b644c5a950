//! Nodes of QEMU's block graph, and jobs on them: what mirrors, bitmaps and frozen points have in common.
//!
//! Guarantees: removing a node that is not there is no error, so that everything here may be repeated.
//!
//! A job that waits for its NBD server must never be in the way of a change to the graph. QEMU *drains* for it (nodes are added over others, re-pointed or
//! removed, jobs begin or end; `transaction` and `stop`, too): it waits until no job has anything in flight, and so for their NBD servers, while the
//! guest's requests are held back. Hence [`Vm::hold_jobs`] around every change: a paused job has nothing in flight, and nobody waits but the worker.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedMutexGuard, broadcast};
use tokio::time::Instant;

use super::error::HypervisorError;
use super::event::{VmEvent, VmEventKind};
use super::qmp::{COMMAND_DEADLINE, Ignored, QmpError, qmp_command};
use super::vm::Vm;

/// Between two looks at a job's state: its events may have been lost.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(250);

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
qmp_command!(/// Changes nodes' options, of all at one moment.
    BlockdevReopen = "blockdev-reopen" -> Ignored { options: Vec<Value> });
qmp_command!(/// What nodes there are.
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<NodeInfo> { flat: bool });
qmp_command!(/// Ends a job: when it is ready and without force, after its last writes.
    BlockJobCancel = "block-job-cancel" -> Ignored { device: String, force: bool });
qmp_command!(/// What block jobs there are.
    QueryBlockJobs = "query-block-jobs" -> Vec<JobInfo> {});
qmp_command!(/// What jobs there are, and their states.
    QueryJobs = "query-jobs" -> Vec<JobState> {});
qmp_command!(/// Has a job start nothing new.
    JobPause = "job-pause" -> Ignored { id: String });
qmp_command!(/// Ends a job's pause.
    JobResume = "job-resume" -> Ignored { id: String });

/// What `query-block-jobs` says of one job.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct JobInfo {
    pub device: String,
    pub len: u64,
    pub offset: u64,
    pub ready: bool,
}

/// What `query-jobs` says of one job.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct JobState {
    id: String,
    status: String,
}

impl JobState {
    /// Is nothing of it in flight?
    fn rests(&self) -> bool {
        matches!(self.status.as_str(), "paused" | "standby" | "concluded")
    }
}

/// What `query-named-block-nodes` says of one node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct NodeInfo {
    pub node_name: String,
    /// The driver's name.
    pub drv: String,
    pub image: ImageInfo,
    #[serde(default)]
    pub dirty_bitmaps: Vec<NodeBitmap>,
}

/// The part of a node's description that has its size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ImageInfo {
    pub virtual_size: u64,
}

/// A dirty bitmap, as its node tells it. Those of jobs have no name.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct NodeBitmap {
    pub name: Option<String>,
    pub count: u64,
    pub recording: bool,
    pub busy: bool,
    #[serde(default)]
    pub inconsistent: bool,
}

/// The client of an NBD server of the worker. It never reconnects, and never tries to unmap: QEMU would zero a mirror's whole
/// target first.
pub(super) fn nbd_target(node: &str, socket: &Path, export: &str) -> Value {
    json!({
        "driver": "nbd", "node-name": node, "export": export, "reconnect-delay": 0, "open-timeout": 0,
        "server": {"type": "unix", "path": socket.to_string_lossy()},
        "discard": "ignore", "detect-zeroes": "on", "cache": {"direct": true, "no-flush": false},
    })
}

impl Vm {
    pub(super) async fn add_node(&self, options: Value) -> Result<(), HypervisorError> {
        self.execute(&BlockdevAdd(options)).await.map(drop)
    }

    /// Removes a node, which may be gone.
    pub(super) async fn remove_node(&self, node: &str) -> Result<(), HypervisorError> {
        match self.execute(&BlockdevDel { node_name: node.to_owned() }).await {
            Ok(Ignored {}) => Ok(()),
            Err(error) if refused_with(&error, "Failed to find") => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn nodes(&self) -> Result<Vec<NodeInfo>, HypervisorError> {
        self.execute(&QueryNamedBlockNodes { flat: true }).await
    }

    pub(super) async fn block_jobs(&self) -> Result<Vec<JobInfo>, HypervisorError> {
        self.execute(&QueryBlockJobs {}).await
    }

    /// Changes nodes' options, of all at one moment: the guest's requests are held back, those in flight end, all nodes change. For
    /// who holds the jobs.
    pub(super) async fn reopen_nodes(&self, options: Vec<Value>) -> Result<(), HypervisorError> {
        self.execute(&BlockdevReopen { options }).await.map(drop)
    }

    /// Pauses all jobs, and waits until they have nothing in flight; the guest does not notice.
    ///
    /// # Errors
    /// A job did not come to rest within `deadline`, because its NBD server does not answer. All go on then.
    pub(super) async fn hold_jobs(&self, deadline: Duration) -> Result<HeldJobs, HypervisorError> {
        let until = Instant::now() + deadline;
        let late = HypervisorError::Deadline { vm: self.id(), operation: "pause of the block jobs", deadline };
        // Or one holder would let go on what another holds.
        let Ok(turn) = tokio::time::timeout_at(until, self.graph_turn()).await else { return Err(late) };
        let mut events = self.events();
        let mut held = HeldJobs { vm: self.clone(), jobs: Vec::new(), turn: Some(turn) };
        for job in self.block_jobs().await? {
            match self.execute(&JobPause { id: job.device.clone() }).await {
                Ok(Ignored {}) => held.jobs.push(job.device),
                // It has ended since.
                Err(HypervisorError::Qmp(QmpError::Refused { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        loop {
            let states = self.execute(&QueryJobs {}).await?;
            if states.iter().all(|job| !held.jobs.contains(&job.id) || job.rests()) {
                return Ok(held);
            }
            if Instant::now() >= until {
                held.resume().await;
                return Err(HypervisorError::Deadline {
                    vm: self.id(),
                    operation: "pause of the block jobs",
                    deadline,
                });
            }
            let look = (Instant::now() + LOOK_INTERVAL).min(until);
            let changed = async {
                while !matches!(
                    events.recv().await.map(|event| event.kind),
                    Ok(VmEventKind::JobChanged { .. } | VmEventKind::Exited(_)) | Err(_)
                ) {}
            };
            // Not in time: look all the same.
            let _ = tokio::time::timeout_at(look, changed).await;
        }
    }
}

/// Jobs that rest. They go on when this is dropped.
#[derive(Debug)]
pub(super) struct HeldJobs {
    vm: Vm,
    jobs: Vec<String>,
    turn: Option<OwnedMutexGuard<()>>,
}

impl HeldJobs {
    /// Lets them go on.
    pub(super) async fn resume(mut self) {
        resume(&self.vm, std::mem::take(&mut self.jobs)).await;
    }
}

impl Drop for HeldJobs {
    fn drop(&mut self) {
        let (vm, jobs, turn) = (self.vm.clone(), std::mem::take(&mut self.jobs), self.turn.take());
        if let (false, Ok(runtime)) = (jobs.is_empty(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                resume(&vm, jobs).await;
                drop(turn);
            });
        }
    }
}

async fn resume(vm: &Vm, jobs: Vec<String>) {
    for job in jobs {
        // It may have ended.
        if let Err(error) = vm.execute(&JobResume { id: job.clone() }).await {
            tracing::debug!(vm_id = %vm.id(), job, error = %error, "job not resumed");
        }
    }
}

/// Did QEMU refuse with these words?
pub(super) fn refused_with(error: &HypervisorError, words: &str) -> bool {
    matches!(error, HypervisorError::Qmp(QmpError::Refused { refusal, .. }) if refusal.desc.contains(words))
}

/// A job that copies to an NBD server, with the node that is its target.
#[derive(Debug)]
pub(super) struct BlockJob {
    vm: Vm,
    id: String,
    target: String,
    events: broadcast::Receiver<VmEvent>,
}

/// What has become of a job.
#[derive(Debug)]
pub(super) enum JobEvent {
    /// It has caught up.
    Ready,
    /// It has done its work, and is gone.
    Completed,
    /// It has failed, or was cancelled, and is gone.
    Failed(String),
}

impl BlockJob {
    /// A job that is to be, or is, under way.
    pub(super) fn new(vm: &Vm, id: String, target: String) -> Self {
        Self { vm: vm.clone(), id, target, events: vm.events() }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn target(&self) -> &str {
        &self.target
    }

    /// What QEMU says of it now; `None` when it has ended.
    pub(super) async fn info(&self) -> Result<Option<JobInfo>, HypervisorError> {
        self.info_within(COMMAND_DEADLINE).await
    }

    async fn info_within(&self, deadline: Duration) -> Result<Option<JobInfo>, HypervisorError> {
        let jobs = self.vm.execute_within(&QueryBlockJobs {}, deadline).await?;
        Ok(jobs.into_iter().find(|job| job.device == self.id))
    }

    /// As [`Self::info`], but `Err(None)` when QEMU does not answer before `until`: it may itself wait for the target.
    pub(super) async fn look(&self, until: Instant) -> Result<Option<JobInfo>, Option<HypervisorError>> {
        let left = until.saturating_duration_since(Instant::now());
        match self.info_within(left.min(COMMAND_DEADLINE)).await {
            Err(HypervisorError::Qmp(QmpError::Deadline { .. })) => Err(None),
            answer => answer.map_err(Some),
        }
    }

    /// Asks it to end; `false`: it has.
    pub(super) async fn order_end(&self, force: bool) -> Result<bool, HypervisorError> {
        match self.vm.execute(&BlockJobCancel { device: self.id.clone(), force }).await {
            Ok(Ignored {}) => Ok(true),
            Err(HypervisorError::Qmp(QmpError::Refused { .. })) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ends it at once, in whatever state it is, and removes its target. A job that has ended is no error.
    ///
    /// # Errors
    /// It does not end within `deadline`, because its NBD server does not answer: close that, and cancel again.
    pub(super) async fn cancel(&mut self, deadline: Duration) -> Result<(), HypervisorError> {
        let until = Instant::now() + deadline;
        let mut under_way = self.order_end(true).await?;
        while under_way {
            match self.next_event((Instant::now() + LOOK_INTERVAL).min(until)).await? {
                Some(JobEvent::Ready) => {}
                Some(JobEvent::Completed | JobEvent::Failed(_)) => under_way = false,
                None if Instant::now() >= until => return Err(self.late("cancellation of a block job", deadline)),
                // Its events may have been lost.
                None => under_way = self.info().await?.is_some(),
            }
        }
        self.remove_target().await
    }

    pub(super) async fn remove_target(&self) -> Result<(), HypervisorError> {
        self.vm.remove_node(&self.target).await
    }

    /// The next event about it; `None` at `until`.
    pub(super) async fn next_event(&mut self, until: Instant) -> Result<Option<JobEvent>, HypervisorError> {
        loop {
            let Ok(event) = tokio::time::timeout_at(until, self.events.recv()).await else { return Ok(None) };
            let kind = match event {
                Ok(event) => event.kind,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return Err(self.vm_ended()),
            };
            match kind {
                VmEventKind::Exited(_) => return Err(self.vm_ended()),
                VmEventKind::BlockJobReady { job } if job == self.id => return Ok(Some(JobEvent::Ready)),
                VmEventKind::BlockJobCompleted { job, error: None } if job == self.id => {
                    return Ok(Some(JobEvent::Completed));
                }
                VmEventKind::BlockJobCompleted { job, error: Some(reason) } if job == self.id => {
                    return Ok(Some(JobEvent::Failed(reason)));
                }
                VmEventKind::BlockJobCancelled { job } if job == self.id => {
                    return Ok(Some(JobEvent::Failed("it was cancelled".to_owned())));
                }
                _ => {}
            }
        }
    }

    pub(super) fn late(&self, operation: &'static str, deadline: Duration) -> HypervisorError {
        HypervisorError::Deadline { vm: self.vm.id(), operation, deadline }
    }

    fn vm_ended(&self) -> HypervisorError {
        HypervisorError::Ended { vm: self.vm.id(), operation: "a block job" }
    }
}
