//! What each worker last said, kept apart from what should be.
//!
//! The [`hub`] task owns the observations and publishes each change; they live in memory, at the leader only, and are
//! rebuilt from the next reports after a change of leader.
//!
//! Guarantees: a report is bounded ([`MAX_VMS`] and so on) before it is kept; readers see whole snapshots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_ownership::{Generation, Record};
use pageport_proto::ids::MAX_POOLS;
use pageport_proto::v1::{self, VmState};
use pageport_proto::{MigrationId, RestorationId, SiteName, VmId, WorkerName};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::questions::{self, Questions};
use crate::model::State;
use crate::model::protection::Point;

/// A worker is connected while its last report is younger than this.
pub const CONNECTED_FOR: Duration = Duration::from_secs(5);
/// VMs, migrations, seeds or replications in one report.
pub const MAX_VMS: usize = 4096;
/// Recovery points of one VM in one report; more than any protection keeps, also just after it was told to keep fewer.
pub const MAX_POINTS: usize = 4096;
/// Points that are open for reading, or that ended lately, in one report.
pub const MAX_EXPORTS: usize = 4096;
/// What one preflight can find; there are fewer checks.
pub const MAX_FINDINGS: usize = 64;
/// Disks of one of them.
pub const MAX_EXPORTED_DISKS: usize = 64;
const QUEUE: usize = 256;
/// Observations are published this far apart: each time may cost a copy of all of them.
const MIN_GAP: Duration = Duration::from_millis(2);

/// One worker's last words.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The report.
    pub report: Arc<v1::WorkerReport>,
    /// When it came.
    pub at: Instant,
    /// When it came, for people.
    pub at_unix_ms: i64,
    /// The assignment that the report takes into account, if it is the newest one sent.
    pub assigned: Option<Arc<v1::WorkerAssignment>>,
}

/// All workers' last words.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    workers: BTreeMap<WorkerName, Observed>,
    /// What each has joined, and since when that is known.
    joined: BTreeMap<WorkerName, (Joined, Instant)>,
}

/// Which controllers a worker has joined: their generation, and by which restore it began.
type Joined = (Generation, Option<RestorationId>);

impl Observations {
    /// Takes a report in.
    pub fn put(&mut self, worker: WorkerName, observed: Observed) {
        let generation = Generation(u16::try_from(observed.report.generation).unwrap_or_default());
        let now = (generation, observed.report.restoration_id.parse().ok());
        let joined = self.joined.entry(worker.clone()).or_insert((now, observed.at));
        if joined.0 != now {
            *joined = (now, observed.at);
        }
        self.workers.insert(worker, observed);
    }

    /// How long a worker is known to have joined the controllers of this state.
    pub fn joined_for(&self, worker: &WorkerName, state: &State, now: Instant) -> Option<Duration> {
        let (joined, since) = self.joined.get(worker)?;
        (*joined == (state.generation, state.restoration)).then(|| now.saturating_duration_since(*since))
    }

    /// All workers that have reported to this leader.
    pub fn iter(&self) -> impl Iterator<Item = (&WorkerName, &Observed)> {
        self.workers.iter()
    }

    /// A worker's last words, if they are recent.
    pub fn connected(&self, worker: &WorkerName, now: Instant) -> Option<&Observed> {
        self.workers.get(worker).filter(|observed| now.saturating_duration_since(observed.at) < CONNECTED_FOR)
    }

    /// Does a guard watch a worker's keepers, by its recent words? Only then may VMs that fence themselves be brought there.
    pub fn guarded(&self, worker: &WorkerName, now: Instant) -> bool {
        self.connected(worker, now).is_some_and(|observed| observed.report.guarded)
    }

    /// The newest recovery point that a worker holds of a VM, by its last words.
    pub fn newest_point(&self, worker: &WorkerName, id: VmId) -> Option<Point> {
        let newest = self.last(worker)?.vm(id)?.recovery_points.last()?;
        Some(Point { number: newest.number, taken_unix_ms: newest.taken_unix_ms })
    }

    /// A worker's last words, however old.
    pub fn last(&self, worker: &WorkerName) -> Option<&Observed> {
        self.workers.get(worker)
    }
}

impl Observed {
    /// What the worker said about a VM.
    pub fn vm(&self, id: VmId) -> Option<&v1::VmReport> {
        let id = id.to_string();
        self.report.vms.iter().find(|vm| vm.vm_id == id)
    }

    /// What the worker had been told about a VM when it reported.
    pub fn assigned_vm(&self, id: VmId) -> Option<&v1::VmAssignment> {
        let id = id.to_string();
        self.assigned.as_ref()?.vms.iter().find(|vm| vm.vm_id == id)
    }

    /// Had the worker been told to remove its copy of a VM when it reported?
    pub fn assigned_removal(&self, id: VmId) -> bool {
        let id = id.to_string();
        self.assigned.as_ref().is_some_and(|told| told.replica_removals.iter().any(|removal| removal.vm_id == id))
    }

    /// What the worker said about a move.
    pub fn migration(&self, id: MigrationId) -> Option<&v1::MigrationReport> {
        let id = id.to_string();
        self.report.migrations.iter().find(|migration| migration.migration_id == id)
    }

    /// What the worker said about keeping a replica up to date.
    pub fn replication(&self, id: VmId, site: &SiteName) -> Option<&v1::ReplicationReport> {
        let id = id.to_string();
        self.report.replications.iter().find(|report| report.vm_id == id && report.to_site == site.as_str())
    }

    /// What the worker said about points of a VM that are open for reading, or ended lately.
    pub fn point_exports(&self, id: VmId) -> Vec<v1::PointExport> {
        let id = id.to_string();
        self.report.point_exports.iter().filter(|export| export.vm_id == id).cloned().collect()
    }

    /// What the worker said about a copy.
    pub fn seed(&self, id: VmId, seed_seq: u64) -> Option<&v1::SeedReport> {
        let id = id.to_string();
        self.report.seeds.iter().find(|seed| seed.vm_id == id && seed.seed_seq == seed_seq)
    }
}

/// The ownership record in a VM's report, if it is one.
pub fn record_of(report: &v1::VmReport) -> Option<Record> {
    report.record.as_ref().and_then(|record| Record::try_from(record).ok())
}

/// Does a guest run there, or stand paused?
pub fn is_up(report: &v1::VmReport) -> bool {
    matches!(report.state(), VmState::Running | VmState::Paused)
}

/// Is this report small enough to be kept?
pub fn is_bounded(report: &v1::WorkerReport) -> bool {
    let lengths = [report.vms.len(), report.migrations.len(), report.seeds.len(), report.replications.len()];
    lengths.iter().all(|length| *length <= MAX_VMS)
        && report.vms.iter().all(|vm| vm.recovery_points.len() <= MAX_POINTS)
        && report.quotes.len().max(report.preflights.len()) <= questions::MAX_OPEN
        && report.preflights.iter().all(|preflight| preflight.findings.len() <= MAX_FINDINGS)
        && report.migrations.iter().flat_map(|it| &it.record).all(|record| record.warnings.len() <= MAX_FINDINGS)
        && report.pools.len() <= MAX_POOLS
        && report.point_exports.len() <= MAX_EXPORTS
        && report.point_exports.iter().all(|export| export.disks.len() <= MAX_EXPORTED_DISKS)
}

/// To and from the hub.
#[derive(Debug, Clone)]
pub struct Hub {
    /// What workers are asked, whose answers come in reports.
    pub questions: Questions,
    reports: mpsc::Sender<(WorkerName, Observed)>,
    observations: watch::Receiver<Arc<Observations>>,
}

impl Hub {
    /// Hands a report in. Waits while the hub is behind.
    pub async fn put(&self, worker: WorkerName, observed: Observed) {
        // The hub ends only with the process: then nobody reads what was reported.
        let _ = self.reports.send((worker, observed)).await;
    }

    /// The observations now.
    pub fn now(&self) -> Arc<Observations> {
        self.observations.borrow().clone()
    }

    /// The observations and their changes.
    pub fn watch(&self) -> watch::Receiver<Arc<Observations>> {
        self.observations.clone()
    }
}

/// Starts the task that owns the observations; it ends when the last [`Hub`] is dropped.
pub fn hub() -> Hub {
    let (reports, mut inbox) = mpsc::channel::<(WorkerName, Observed)>(QUEUE);
    let (published, observations) = watch::channel(Arc::new(Observations::default()));
    tokio::spawn(async move {
        let mut said = Vec::with_capacity(QUEUE);
        while inbox.recv_many(&mut said, QUEUE).await > 0 {
            published.send_modify(|observations| {
                let observations = Arc::make_mut(observations);
                said.drain(..).for_each(|(worker, observed)| observations.put(worker, observed));
            });
            tokio::time::sleep(MIN_GAP).await;
        }
    });
    Hub { questions: Questions::default(), reports, observations }
}
