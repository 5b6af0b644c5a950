//! [`Command`]: what can be asked of the state; [`Answer`] and [`Rejection`]: what comes back.
//!
//! Commands carry everything that is not a function of the state: time, ids, and the choice of a worker.

use pageport_ownership::{Evidence, Report};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::migration::Record;
use super::protection::{Places, Terms};
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
        /// Where replicas of disks are to lie.
        #[serde(default)]
        places: Places,
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

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No such VM.
    #[error("vm \"{vm}\" is unknown; \"pageportctl vm list\" shows all")]
    VmUnknown {
        /// Id or name.
        vm: String,
    },
    /// No such move.
    #[error("migration {id} is unknown; \"pageportctl migration list\" shows all")]
    MigrationUnknown {
        /// Its id.
        id: String,
    },
    /// No such worker.
    #[error("worker \"{worker}\" is unknown; \"pageportctl worker list\" shows all")]
    WorkerUnknown {
        /// Its name.
        worker: WorkerName,
    },
    /// Nobody has said who owns it since the controllers were restored.
    #[error("vm \"{name}\": {why}")]
    OwnerUnknown {
        /// The VM.
        name: String,
        /// Who must report first, and what else can be done.
        why: String,
    },
    /// Every VM is known.
    #[error(
        "who owns each vm is known: nothing was changed about worker \"{worker}\"; for a host that does not answer there is \"pageportctl worker fence\""
    )]
    NotRecovering {
        /// The worker.
        worker: WorkerName,
    },
    /// The name is taken.
    #[error("vm \"{name}\" exists already: choose another name, or delete it first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Moved to where it is.
    #[error("vm \"{name}\" already runs at site \"{site}\"")]
    AlreadyThere {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// One move at a time.
    #[error("vm \"{name}\" is already migrating (migration {id}): wait for its end or cancel it")]
    AlreadyMigrating {
        /// The VM.
        name: String,
        /// The move that is under way.
        id: MigrationId,
    },
    /// An id for two moves.
    #[error("migration {id} exists already: choose a new id")]
    MigrationKnown {
        /// The id.
        id: MigrationId,
    },
    /// One order at a time.
    #[error(
        "vm \"{name}\" has a migration queued already ({id}): change it (\"pageportctl migration set {id}\") or cancel it"
    )]
    AlreadyQueued {
        /// The VM.
        name: String,
        /// The move that waits.
        id: MigrationId,
    },
    /// It is being given up.
    #[error("migration {id} is being cancelled: its terms cannot be changed any more")]
    BeingCancelled {
        /// The move.
        id: MigrationId,
    },
    /// The guest has changed hands.
    #[error("the terms of migration {id} cannot be changed any more: the source has already handed the vm over")]
    HandedOver {
        /// The move.
        id: MigrationId,
    },
    /// Its hypervisor cannot slow the guest down.
    #[error(
        "migration {id} was not begun with --convergence throttle, and QEMU cannot slow its guest down in it: cancel it and order it again with \
         that, or change it to --convergence longer-pause"
    )]
    CannotThrottle {
        /// The move.
        id: MigrationId,
    },
    /// Nothing to empty.
    #[error("site \"{site}\" has no workers; \"pageportctl site list\" shows all sites")]
    SiteWithoutWorkers {
        /// The site.
        site: SiteName,
    },
    /// Nothing to end.
    #[error("{spot} is not being drained")]
    NotDrained {
        /// What was asked for.
        spot: Spot,
    },
    /// It has just been given to its worker.
    #[error("vm \"{name}\" was given to worker \"{worker}\", which has not confirmed it yet: try again in a moment")]
    NotConfirmed {
        /// The VM.
        name: String,
        /// Its owner.
        worker: WorkerName,
    },
    /// Only running VMs move.
    #[error("vm \"{name}\" does not run: start it first")]
    NotRunning {
        /// The VM.
        name: String,
    },
    /// Stopped VMs only.
    #[error("vm \"{name}\" runs: stop it first")]
    StillRunning {
        /// The VM.
        name: String,
    },
    /// No copy there.
    #[error(
        "no replica of vm \"{name}\" at site \"{site}\": run \"pageportctl replica seed {name} --to {site}\" first"
    )]
    NoReplica {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// The copy is not complete.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" is not complete: wait for the seed, or run \"pageportctl replica seed {name} --to {site}\" again"
    )]
    ReplicaNotSeeded {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// A copy is going away.
    #[error("the old replica of vm \"{name}\" at site \"{site}\" is still being removed: try again in a moment")]
    ReplicaLeaving {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// A copy is not moved.
    #[error(
        "the replica of disk \"{disk}\" of vm \"{name}\" at site \"{site}\" is there, and lies elsewhere: it is not moved; to have it made anew run \
         \"pageportctl unprotect {name} --site {site}\" and \"pageportctl replica delete {name} --site {site}\", then protect the vm again"
    )]
    ReplicaPlaced {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
        /// The disk.
        disk: String,
    },
    /// A seed makes files.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" is to lie on block devices, where a seed does not make one: run \"pageportctl protect {name} --to \
         {site}\", or \"pageportctl replica delete {name} --site {site}\" first"
    )]
    ToBePlaced {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// No such disk.
    #[error("vm \"{name}\" has no disk \"{disk}\"; it has: {known}")]
    DiskUnknown {
        /// The VM.
        name: String,
        /// What was asked for.
        disk: String,
        /// What there is.
        known: String,
    },
    /// A disk that cannot be added.
    #[error("{}: {}", .0.field, .0.problem)]
    Disk(super::spec::SpecError),
    /// A disk is newer than the copy.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" does not hold disk \"{disk}\" yet, which was added: wait for its next recovery point (\"pageportctl replication status {name}\"), or run \"pageportctl replica seed {name} --to {site}\" if it is not protected"
    )]
    LacksDisk {
        /// The VM.
        name: String,
        /// The disk.
        disk: String,
        /// The site.
        site: SiteName,
    },
    /// A size that no disk can have.
    #[error("a disk cannot have {size_bytes} bytes: give a multiple of 4 KiB, 8 TiB at most")]
    DiskSize {
        /// What was asked for.
        size_bytes: u64,
    },
    /// Disks are never cut.
    #[error(
        "disk \"{disk}\" of vm \"{name}\" has {held_bytes} bytes and cannot be made smaller ({size_bytes} bytes were asked for): the guest's data could lie there"
    )]
    DiskShrinks {
        /// The VM.
        name: String,
        /// Its disk.
        disk: String,
        /// What was asked for.
        size_bytes: u64,
        /// What it has, or was ordered to have.
        held_bytes: u64,
    },
    /// A copy that began with the disks as they are.
    #[error(
        "the disks of vm \"{name}\" are being copied to site \"{site}\": wait for the end of the seed (\"pageportctl replica list {name}\")"
    )]
    BeingSeeded {
        /// The VM.
        name: String,
        /// Where to.
        site: SiteName,
    },
    /// Replication makes its copies itself.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" is kept up to date already: \"pageportctl replication status {name}\" shows how it stands"
    )]
    KeptUpToDate {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// What is protected is not deleted.
    #[error("vm \"{name}\" is protected at site \"{site}\": run \"pageportctl unprotect {name} --site {site}\" first")]
    StillProtected {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// Nothing to end.
    #[error(
        "vm \"{name}\" is not protected at site \"{site}\"; \"pageportctl replication status {name}\" shows where it is"
    )]
    NotProtected {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// The first copy is under way.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" has no recovery point yet: wait for the first copy (\"pageportctl replication status {name} --watch\")"
    )]
    NoPointYet {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
    },
    /// From a site to itself.
    #[error("there is no link from site \"{site}\" to itself: name two sites")]
    NoLink {
        /// The site.
        site: SiteName,
    },
    /// Handed over, and nobody has said that it arrived.
    #[error(
        "vm \"{name}\" is in doubt (migration {id}): its source has handed it over and its destination has not said whether it runs; both are being asked. If one of them is lost for good: \"pageportctl vm resolve {name} --force-owner SITE\""
    )]
    InDoubt {
        /// The VM.
        name: String,
        /// The move.
        id: MigrationId,
    },
    /// The state changed between the look and the command.
    #[error("the owner of vm \"{name}\" has changed meanwhile: look again")]
    Overtaken {
        /// The VM.
        name: String,
    },
    /// The proof does not suffice.
    #[error("vm \"{name}\" cannot be taken over: {why}")]
    NotToBeTaken {
        /// The VM.
        name: String,
        /// Why.
        why: String,
    },
    /// Past the commit point.
    #[error("migration {id} cannot be cancelled: the source has already handed the vm over")]
    TooLate {
        /// The move.
        id: MigrationId,
    },
    /// Over.
    #[error("migration {id} has already ended")]
    AlreadyEnded {
        /// The move.
        id: MigrationId,
    },
    /// The same id for another thing.
    #[error("request id {request} was already used for another command: choose a new one")]
    RequestReused {
        /// The id.
        request: RequestId,
    },
}
