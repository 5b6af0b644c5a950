//! [`Command`]: what can be asked of the state; [`Answer`]: what comes back, if not a [`Rejection`].
//!
//! Commands carry everything that is not a function of the state: time, ids, and the choice of a worker.

use pageport_ownership::{Evidence, Report};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::migration::Record;
use super::protection::{Placement, Terms};
use super::rejection::Rejection;
use super::schedule::{self, Change, DrainMove, Limits, LinkLimits, Spot};
use super::spec::Spec;
use super::state::{Power, Worker};
use super::takeover;

/// An entry of the replicated log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// When it was proposed.
    pub now_unix_ms: i64,
    /// What is to be done.
    pub order: Order,
}

/// What is to be done: first what clients ask, then what reports show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Order {
    /// A client's request.
    Client {
        /// The same id takes effect once and gives the same answer.
        request: RequestId,
        /// What it asks.
        order: ClientOrder,
    },
    /// A worker is new or says something new about itself.
    RegisterWorker {
        /// Its name.
        name: WorkerName,
        /// What it is.
        worker: Worker,
    },
    /// A worker's durable record proves something about a move.
    Evidence {
        /// The VM.
        vm: VmId,
        /// What it proves.
        evidence: Evidence<WorkerName>,
    },
    /// A copy has ended.
    SeedEnded {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
        /// Of which order.
        seed_seq: u64,
        /// Why it failed; [`None`]: it did not.
        failure: Option<String>,
    },
    /// A replica that is kept up to date has a recovery point.
    ReachedPoint {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
        /// Under which order.
        protect_seq: u64,
    },
    /// A VM's owner has the image of a disk that was to be made.
    DiskMade {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: String,
    },
    /// A replica that is kept up to date has a recovery point of so many disks.
    HoldsDisks {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
        /// Under which order.
        protect_seq: u64,
        /// The first so many of the VM's disks.
        disks: usize,
    },
    /// A removed copy is gone.
    ReplicaRemoved {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
    },
    /// The scheduler lets moves begin.
    Admit {
        /// The moves, in this order.
        ids: Vec<MigrationId>,
        /// The schedule's number when that was decided.
        seq: u64,
    },
    /// The scheduler gives a queued move up.
    GiveUp {
        /// The move.
        id: MigrationId,
        /// Why.
        reason: String,
    },
    /// Moves that empty a site or worker.
    QueueDrain {
        /// What is emptied.
        spot: Spot,
        /// The moves.
        moves: Vec<DrainMove>,
    },
    /// A worker gave the reason why it gives a move up.
    MigrationFailing {
        /// The move.
        id: MigrationId,
        /// Why.
        reason: String,
    },
    /// The figures of a move.
    MigrationRecord {
        /// The move.
        id: MigrationId,
        /// The figures.
        record: Record,
    },
    /// The figures of a move did not come in time.
    MigrationComplete {
        /// The move.
        id: MigrationId,
    },
    /// A worker has nothing left to do for an ended move.
    MigrationEnded {
        /// The move.
        id: MigrationId,
        /// The worker.
        worker: WorkerName,
    },
    /// A VM's guest ended without being told to.
    VmHalted {
        /// The VM.
        vm: VmId,
        /// Under which order to run.
        power_seq: u64,
        /// How.
        cause: Halt,
        /// What the worker said.
        problem: String,
    },
    /// A VM whose worker surely does not run it any more gets another one.
    TakeOver(takeover::Order),
    /// After a restore: a worker that has joined says what it has of a VM.
    Joined {
        /// The VM.
        vm: VmId,
        /// The worker.
        worker: WorkerName,
        /// What it has.
        report: Report<WorkerName>,
        /// A guest runs there, or stands paused.
        runs: bool,
    },
    /// No worker holds anything of a deleted VM any more.
    ForgetVm {
        /// The VM.
        vm: VmId,
    },
}

/// How a guest ended without being told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Halt {
    /// It shut itself down.
    ByItself,
    /// Its hypervisor ended.
    Crashed,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ClientOrder {
    /// A new VM.
    DefineVm {
        /// Its id.
        id: VmId,
        /// What it is.
        spec: Box<Spec>,
        /// Its first owner.
        worker: WorkerName,
    },
    /// What a VM should be doing.
    SetPower {
        /// The VM.
        vm: VmId,
        /// Run, stop or kill.
        power: Power,
    },
    /// An operator's word on who owns a VM.
    Resolve(takeover::Order),
    /// An operator's word after a restore: this worker is not coming back.
    DeclareDead {
        /// The worker.
        worker: WorkerName,
        /// Who says so.
        by: String,
        /// In their words.
        reason: String,
    },
    /// After a restore: take a VM that was defined since the backup into the fleet again.
    AdoptVm {
        /// The VM.
        vm: VmId,
        /// What it is, as its worker has kept it.
        spec: Box<Spec>,
        /// The worker that speaks of it as its own.
        worker: WorkerName,
    },
    /// Remove a VM from the fleet.
    DeleteVm {
        /// The VM.
        vm: VmId,
    },
    /// Copy a VM's disks.
    SeedReplica {
        /// The VM.
        vm: VmId,
        /// Where to.
        site: SiteName,
        /// The worker there.
        worker: WorkerName,
    },
    /// Keep a replica up to date; ordered again: on other terms.
    Protect {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
        /// The worker there.
        worker: WorkerName,
        /// On which terms.
        terms: Terms,
        /// Where it is to lie.
        #[serde(flatten)]
        at: Placement,
    },
    /// Leave a replica as it is.
    Unprotect {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
    },
    /// Compare a protected replica's files with the disks, and repair what differs.
    Scrub {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
    },
    /// Cap what replication and seeds send from one site to another.
    SetLinkCap {
        /// From where.
        from: SiteName,
        /// To where.
        to: SiteName,
        /// In bits per second; 0: no cap.
        cap_bps: u64,
    },
    /// Make a disk larger.
    ResizeDisk {
        /// The VM.
        vm: VmId,
        /// Its disk.
        disk: String,
        /// What it is to have, in bytes.
        size_bytes: u64,
    },
    /// Give a VM one more disk.
    AddDisk {
        /// The VM.
        vm: VmId,
        /// The new disk.
        disk: String,
        /// Where its image is made; empty: where its worker makes disks.
        path: String,
        /// What it is to have, in bytes.
        size_bytes: u64,
    },
    /// Remove a copy.
    DeleteReplica {
        /// The VM.
        vm: VmId,
        /// Where.
        site: SiteName,
    },
    /// Move a VM when the scheduler lets it.
    QueueMigration {
        /// Id of the move.
        id: MigrationId,
        /// The VM.
        vm: VmId,
        /// Where to.
        site: SiteName,
        /// W3C trace context of the order.
        traceparent: String,
        /// On which terms.
        terms: Box<schedule::Terms>,
        /// The scheduler has let it begin, when this was the schedule's number; [`None`]: it has not.
        admitted: Option<u64>,
    },
    /// Change the terms of a move that has not ended.
    ChangeMigration {
        /// The move.
        id: MigrationId,
        /// What is to be another one.
        change: Change,
    },
    /// Set what a link carries.
    SetLinkLimits {
        /// From where.
        from: SiteName,
        /// To where.
        to: SiteName,
        /// What it carries.
        limits: LinkLimits,
    },
    /// Set the limits of all moves.
    SetLimits {
        /// The limits.
        limits: Limits,
    },
    /// Move everything away.
    Drain {
        /// From where.
        spot: Spot,
        /// The only site that will do.
        to: Option<SiteName>,
        /// Of the moves.
        priority: u8,
    },
    /// Move no more away.
    Undrain {
        /// From where.
        spot: Spot,
    },
    /// Move a VM at once, as versions before there was a queue ordered it.
    CreateMigration {
        /// Id of the move.
        id: MigrationId,
        /// The VM.
        vm: VmId,
        /// Where to.
        site: SiteName,
        /// W3C trace context of the order.
        traceparent: String,
    },
    /// Give a move up if that is still possible.
    CancelMigration {
        /// The move.
        id: MigrationId,
    },
}

/// What a command has brought about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done, or there was nothing to do.
    Done,
    /// This VM was made or changed.
    Vm(VmId),
    /// This move was made or changed.
    Migration(MigrationId),
    /// This copy was ordered.
    Replica(VmId, SiteName),
}

/// What [`super::apply()`] returns.
pub type Outcome = Result<Answer, Rejection>;
