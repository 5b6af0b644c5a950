//! States as words. Exhaustive, so that a new state of the API is given its word here.

use pageport_proto::v1::takeover::Ground;
use pageport_proto::v1::{
    Check, ConvergencePolicy, IsolationPolicy, MigrationState, MigrationTerms, PointExportState, ReplicaState,
    ReplicationPhase, Severity, StartPolicy, VmState,
};

use super::units;

/// Of a newer API than ours.
const UNKNOWN_TO_US: &str = "?";

/// The state of a VM.
pub fn vm_state(state: i32) -> &'static str {
    match VmState::try_from(state) {
        Ok(VmState::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(VmState::Unknown) => "unknown",
        Ok(VmState::Stopped) => "stopped",
        Ok(VmState::Starting) => "starting",
        Ok(VmState::Running) => "running",
        Ok(VmState::Paused) => "paused",
        Ok(VmState::Migrating) => "migrating",
        Ok(VmState::Crashed) => "crashed",
        Ok(VmState::InDoubt) => "in doubt",
    }
}

/// The state of a migration.
pub fn migration_state(state: i32) -> &'static str {
    match MigrationState::try_from(state) {
        Ok(MigrationState::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(MigrationState::Requested) => "queued",
        Ok(MigrationState::Running) => "running",
        Ok(MigrationState::Cancelling) => "cancelling",
        Ok(MigrationState::Committed) => "committed",
        Ok(MigrationState::Completed) => "completed",
        Ok(MigrationState::Failed) => "failed",
        Ok(MigrationState::Cancelled) => "cancelled",
    }
}

/// What a preflight looks at.
pub fn check(check: i32) -> &'static str {
    match Check::try_from(check) {
        Ok(Check::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(Check::Vm) => "vm",
        Ok(Check::Replica) => "replica",
        Ok(Check::Placement) => "placement",
        Ok(Check::Addresses) => "addresses",
        Ok(Check::Workers) => "workers",
        Ok(Check::Link) => "link",
        Ok(Check::LinkBack) => "link back",
        Ok(Check::Certificates) => "certificates",
        Ok(Check::Clocks) => "clocks",
        Ok(Check::Qemu) => "qemu",
        Ok(Check::Accelerator) => "accelerator",
        Ok(Check::Machine) => "machine type",
        Ok(Check::Cpu) => "cpu model",
        Ok(Check::Memory) => "memory",
        Ok(Check::DiskSpace) => "disk space",
        Ok(Check::Bridges) => "bridges",
        Ok(Check::Owner) => "owner",
    }
}

/// What a finding of a preflight means for the move.
pub fn severity(severity: i32) -> &'static str {
    match Severity::try_from(severity) {
        Ok(Severity::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(Severity::Ok) => "ok",
        Ok(Severity::Warning) => "warning",
        Ok(Severity::Blocks) => "BLOCKS",
    }
}

/// What becomes of a migration that does not converge, when it is not the usual.
pub fn if_it_does_not_converge(terms: &MigrationTerms) -> Option<String> {
    match terms.convergence() {
        ConvergencePolicy::Unspecified | ConvergencePolicy::Wait => None,
        ConvergencePolicy::Throttle => Some("slows its guest down if it does not converge".to_owned()),
        ConvergencePolicy::LongerPause => Some(format!(
            "stands still for {} at most if it does not converge",
            units::duration(terms.longest_pause_ms)
        )),
        ConvergencePolicy::GiveUp => Some("gives up if it does not converge".to_owned()),
    }
}

/// The state of a replica.
pub fn replica_state(state: i32) -> &'static str {
    match ReplicaState::try_from(state) {
        Ok(ReplicaState::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(ReplicaState::Seeding) => "seeding",
        Ok(ReplicaState::Seeded) => "seeded",
        Ok(ReplicaState::Failed) => "failed",
        Ok(ReplicaState::Outdated) => "outdated",
    }
}

/// What a standing replication does.
pub fn replication_phase(phase: i32) -> &'static str {
    match ReplicationPhase::try_from(phase) {
        Ok(ReplicationPhase::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(ReplicationPhase::Waiting) => "waiting",
        Ok(ReplicationPhase::FullCopy) => "full copy",
        Ok(ReplicationPhase::Increment) => "increment",
        Ok(ReplicationPhase::Idle) => "idle",
        Ok(ReplicationPhase::Migrating) => "migrating",
    }
}

/// What a VM does whose worker is cut off.
pub fn isolation(policy: i32) -> &'static str {
    match IsolationPolicy::try_from(policy) {
        Err(_) => UNKNOWN_TO_US,
        Ok(IsolationPolicy::Unspecified | IsolationPolicy::KeepRunning) => "keeps running",
        Ok(IsolationPolicy::SelfFence) => "fences itself",
    }
}

/// What a VM does whose host has rebooted.
pub fn start_policy(policy: i32) -> &'static str {
    match StartPolicy::try_from(policy) {
        Err(_) => UNKNOWN_TO_US,
        Ok(StartPolicy::Unspecified | StartPolicy::AsOrdered) => "boots again if it was ordered to run",
        Ok(StartPolicy::Manual) => "waits for an order",
    }
}

/// On what ground a VM was taken over.
pub fn ground(ground: i32) -> &'static str {
    match Ground::try_from(ground) {
        Ok(Ground::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(Ground::LeaseExpired) => "its lease had run out",
        Ok(Ground::Fenced) => "its host was fenced",
        Ok(Ground::Override) => "forced",
    }
}

/// The state of an open recovery point.
pub fn point_export_state(state: i32) -> &'static str {
    match PointExportState::try_from(state) {
        Ok(PointExportState::Unspecified) | Err(_) => UNKNOWN_TO_US,
        Ok(PointExportState::Open) => "open",
        Ok(PointExportState::Ended) => "ended",
    }
}

/// `yes` or `no`.
pub fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// The text, or a dash for none.
pub fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
