//! What happens to a VM, as its QEMU tells it. Pure: QMP events in, [`VmEvent`]s out.
//!
//! Each event carries two times: when the worker read it, and what QEMU's own (wall) clock said when it happened. Spans
//! within one host are differences of QEMU's times; the worker's monotonic time places them among its own doings.
//! Unknown events, and known ones without the expected fields, are dropped.

use std::time::{Duration, Instant};

use super::qmp::RawEvent;

/// When something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventTime {
    /// When the worker read it.
    pub received: Instant,
    /// QEMU's clock, since the Unix epoch.
    pub qemu: Duration,
}

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEvent {
    /// When.
    pub at: EventTime,
    /// What.
    pub kind: VmEventKind,
}

/// What happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEventKind {
    /// The guest no longer runs.
    Stopped,
    /// The guest runs.
    Resumed,
    /// The guest has shut down; QEMU is about to end.
    Shutdown {
        /// By the guest itself, rather than by a command to QEMU.
        by_guest: bool,
    },
    /// A migration has entered a state.
    Migration(MigrationStatus),
    /// A pass over the guest's memory begins.
    MigrationPass(u64),
    /// A block job has caught up.
    BlockJobReady {
        /// Its id.
        job: String,
    },
    /// A block job has ended.
    BlockJobCompleted {
        /// Its id.
        job: String,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// A block job was cancelled by force.
    BlockJobCancelled {
        /// Its id.
        job: String,
    },
    /// A block job met an I/O error.
    BlockJobError {
        /// Its id.
        job: String,
        /// `read` or `write`.
        operation: String,
    },
    /// A job has entered a state.
    JobChanged {
        /// Its id.
        job: String,
    },
    /// A disk of the guest met an I/O error.
    DiskError {
        /// The device.
        device: String,
        /// `read` or `write`.
        operation: String,
        /// What the system said.
        reason: String,
    },
    /// QEMU has ended. Nothing follows.
    Exited(ExitReport),
}

/// Why QEMU ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The worker killed it or told it to quit.
    Ordered,
    /// The guest shut itself down.
    GuestShutdown,
    /// Its keeper killed it because the lease had run out.
    LeaseExpired,
    /// Nobody told it to.
    Unexpected,
}

/// How QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    /// Why.
    pub cause: ExitCause,
    /// Exit code or signal in words; empty for an adopted QEMU, whose status goes to another process.
    pub status: String,
    /// The end of its log.
    pub log_tail: String,
}

impl ExitReport {
    /// Did the guest or its operator want this?
    pub fn expected(&self) -> bool {
        matches!(self.cause, ExitCause::Ordered | ExitCause::GuestShutdown)
    }
}

/// QEMU's states of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// Not begun.
    None,
    /// Being set up.
    Setup,
    /// Memory flows.
    Active,
    /// The guest is paused, and the worker's word is awaited.
    PreSwitchover,
    /// Device state flows.
    Device,
    /// All done.
    Completed,
    /// Gave up; at the source the guest runs on.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the guest runs on.
    Cancelled,
    /// A state that this worker never asks for (post-copy, COLO, wait-unplug).
    #[serde(other)]
    Other,
}

impl MigrationStatus {
    /// Has it ended, one way or the other?
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// Reads one QMP event.
pub(crate) fn translate(event: &RawEvent, received: Instant) -> Option<VmEvent> {
    let text = |key: &str| event.data.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    let kind = match event.name.as_str() {
        "STOP" => VmEventKind::Stopped,
        "RESUME" => VmEventKind::Resumed,
        "SHUTDOWN" => {
            VmEventKind::Shutdown { by_guest: event.data.get("guest").and_then(|v| v.as_bool()).unwrap_or(false) }
        }
        "MIGRATION" => {
            VmEventKind::Migration(serde_json::from_value(event.data.get("status").cloned().unwrap_or_default()).ok()?)
        }
        "MIGRATION_PASS" => VmEventKind::MigrationPass(event.data.get("pass")?.as_u64()?),
        "BLOCK_JOB_READY" => VmEventKind::BlockJobReady { job: text("device")? },
        "BLOCK_JOB_COMPLETED" => VmEventKind::BlockJobCompleted { job: text("device")?, error: text("error") },
        "BLOCK_JOB_CANCELLED" => VmEventKind::BlockJobCancelled { job: text("device")? },
        "BLOCK_JOB_ERROR" => {
            VmEventKind::BlockJobError { job: text("device")?, operation: text("operation").unwrap_or_default() }
        }
        "JOB_STATUS_CHANGE" => VmEventKind::JobChanged { job: text("id")? },
        "BLOCK_IO_ERROR" => VmEventKind::DiskError {
            device: text("qom-path").or_else(|| text("device"))?,
            operation: text("operation").unwrap_or_default(),
            reason: text("reason").unwrap_or_default(),
        },
        _ => return None,
    };
    Some(VmEvent { at: EventTime { received, qemu: event.at }, kind })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kind(name: &str, data: serde_json::Value) -> Option<VmEventKind> {
        let event = RawEvent { name: name.into(), data, at: Duration::from_secs(1) };
        translate(&event, Instant::now()).map(|event| event.kind)
    }

    #[test]
    fn every_event_that_matters_is_understood() {
        use VmEventKind as K;
        let job = || "mirror-root".to_owned();
        let table = [
            ("STOP", json!(null), Some(K::Stopped)),
            ("RESUME", json!(null), Some(K::Resumed)),
            ("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}), Some(K::Shutdown { by_guest: true })),
            ("MIGRATION", json!({"status": "pre-switchover"}), Some(K::Migration(MigrationStatus::PreSwitchover))),
            ("MIGRATION", json!({"status": "postcopy-active"}), Some(K::Migration(MigrationStatus::Other))),
            ("MIGRATION", json!({}), None),
            ("MIGRATION_PASS", json!({"pass": 3}), Some(K::MigrationPass(3))),
            ("BLOCK_JOB_READY", json!({"device": "mirror-root"}), Some(K::BlockJobReady { job: job() })),
            (
                "BLOCK_JOB_COMPLETED",
                json!({"device": "mirror-root", "error": "Input/output error"}),
                Some(K::BlockJobCompleted { job: job(), error: Some("Input/output error".into()) }),
            ),
            ("BLOCK_JOB_CANCELLED", json!({"device": "mirror-root"}), Some(K::BlockJobCancelled { job: job() })),
            ("JOB_STATUS_CHANGE", json!({"id": "mirror-root", "status": "paused"}), Some(K::JobChanged { job: job() })),
            ("BLOCK_JOB_READY", json!({"device": 7}), None),
            ("RTC_CHANGE", json!({"offset": 1}), None),
        ];
        for (name, data, expected) in table {
            assert_eq!(kind(name, data.clone()), expected, "{name} {data}");
        }
    }
}
