//! [`Rejection`]: why a command changed nothing, in words for whoever gave it, with the way out.

use pageport_proto::{MigrationId, PoolName, RequestId, SiteName, WorkerName};

use super::schedule::Spot;
use super::spec::SpecError;

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No such VM.
    #[error("vm \"{vm}\" is unknown; \"pageportctl vm list\" shows all")]
    VmUnknown {
        /// Id or name.
        vm: String,
    },
    /// No VM that a restore has left out.
    #[error(
        "no worker speaks of a vm \"{vm}\" that the controllers do not know: \"pageportctl vm list\" shows those that can be adopted"
    )]
    NotFound {
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
    /// Neither to another pool.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" is there, and lies in pool \"{pool}\": it is not moved; to have it made anew run \
         \"pageportctl unprotect {name} --site {site}\" and \"pageportctl replica delete {name} --site {site}\", then protect the vm again"
    )]
    ReplicaPooled {
        /// The VM.
        name: String,
        /// The site.
        site: SiteName,
        /// Where it lies.
        pool: PoolName,
    },
    /// A seed makes files in the default pool.
    #[error(
        "the replica of vm \"{name}\" at site \"{site}\" is to lie on block devices or in a pool, where a seed does not make one: run \"pageportctl protect {name} --to \
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
    Disk(SpecError),
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
