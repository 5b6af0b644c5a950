//! The two ends of QEMU's live migration, with the switchover in our hands.
//!
//! ```text
//!   source                                             destination
//!                                                      StartMode::Incoming
//!                                                      listen_incoming(socket)          Inmigrate
//!   migrate_to(socket, settings)
//!     Setup ─▶ Active ─ passes ─▶ STOP ─▶ PreSwitchover      the stream passes through the workers
//!   continue_switchover()
//!     Device ─▶ Completed                              Completed, paused ─▶ cont()      RESUME
//!   cancel_migration()  before continue_switchover: the guest runs on (if it was paused, it resumes by itself)
//! ```
//!
//! Guarantees: every capability that changes the stream's format is off, whatever QEMU's defaults become; the guest
//! never passes `PreSwitchover` on QEMU's own decision. Does not decide when to switch over, and does not keep a source that
//! has completed from running again: `cont` would revive it.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::HypervisorError;
use super::event::MigrationStatus;
use super::qmp::{Ignored, qmp_command};
use super::vm::Vm;

/// Bandwidth at which QEMU's own limit no longer matters, in bytes per second.
const UNLIMITED_BYTES_PER_S: u64 = 1 << 40;
/// A bandwidth at which memory stands still. (Less than 10 would mean: without a limit.)
const HELD_BYTES_PER_S: u64 = 4096;
/// The least that the link is said to carry at the switchover, in bytes per second: a page within the usual pause. At less QEMU takes the rest for nothing once
/// all that it knows of is sent, and pauses the guest without a look at what was dirtied since. (Zero would mean: go by what you see.)
const LEAST_BYTES_PER_S: u64 = 16 << 10;
const SOURCE_CAPABILITIES: [&str; 2] = ["events", "pause-before-switchover"];
/// Of its CPUs, the least that a guest can be denied, in per cent.
pub const LEAST_THROTTLE_PERCENT: u8 = 1;
/// Of its CPUs, the most that a guest can be denied, in per cent.
pub const MOST_THROTTLE_PERCENT: u8 = 99;
const DESTINATION_CAPABILITIES: [&str; 2] = ["events", "late-block-activate"];

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Capability {
    capability: String,
    state: bool,
}

qmp_command!(/// Which capabilities there are.
    QueryCapabilities = "query-migrate-capabilities" -> Vec<Capability> {});
qmp_command!(/// Turns capabilities on and off.
    SetCapabilities = "migrate-set-capabilities" -> Ignored { capabilities: Vec<Capability> });
qmp_command!(/// Sets limits; absent ones stay.
#[derive(Default)]
SetParameters = "migrate-set-parameters" -> Ignored {
    #[serde(skip_serializing_if = "Option::is_none")] max_bandwidth: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")] downtime_limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")] avail_switchover_bandwidth: Option<u64>,
    #[serde(flatten)] throttling: Option<Throttling>,
});
qmp_command!(/// Starts the source.
    Migrate = "migrate" -> Ignored { uri: String });
qmp_command!(/// Starts the destination.
    MigrateIncoming = "migrate-incoming" -> Ignored { uri: String });
qmp_command!(/// Goes on after the pause.
    MigrateContinue = "migrate-continue" -> Ignored { state: &'static str });
qmp_command!(/// Gives up.
    MigrateCancel = "migrate_cancel" -> Ignored {});
qmp_command!(/// How far is it?
    QueryMigrate = "query-migrate" -> MigrationInfo {});

/// How QEMU slows a guest down. After every second round in which the guest has dirtied more than
/// `throttle_trigger_threshold` per cent of what was sent, it takes `cpu_throttle_increment` per cent more of its CPUs from it,
/// up to `max_cpu_throttle`. It has no word for "not at all", and gives everything back when the migration ends, however it does.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Throttling {
    throttle_trigger_threshold: u8,
    cpu_throttle_initial: u8,
    cpu_throttle_increment: u8,
    max_cpu_throttle: u8,
}

impl Throttling {
    /// As little as QEMU knows, and only of a guest that dirties more than is sent.
    const LEAST: Self = Self {
        throttle_trigger_threshold: 100,
        cpu_throttle_initial: LEAST_THROTTLE_PERCENT,
        cpu_throttle_increment: MOST_THROTTLE_PERCENT,
        max_cpu_throttle: LEAST_THROTTLE_PERCENT,
    };

    /// So much, whatever the guest dirties, after two rounds at most.
    fn to(percent: u8) -> Self {
        let percent = percent.clamp(LEAST_THROTTLE_PERCENT, MOST_THROTTLE_PERCENT);
        Self {
            throttle_trigger_threshold: 1,
            cpu_throttle_initial: percent,
            cpu_throttle_increment: MOST_THROTTLE_PERCENT,
            max_cpu_throttle: percent,
        }
    }
}

/// Whether QEMU can slow its guest down; that cannot be changed while a migration runs. Where it can, QEMU's main loop looks for dirty
/// pages every 5 s by itself, and waits for that while the socket takes nothing: a stalled reader holds up the guest then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoConverge {
    /// It cannot.
    Off,
    /// It can, and does when it is [told to](Vm::set_throttle).
    On,
}

/// What the source is told before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceSettings {
    /// Longest pause that QEMU plans for; not zero, with which QEMU does not converge.
    pub downtime_limit: Duration,
    /// Bytes per second at which the rest will really go over the WAN.
    pub switchover_bandwidth: u64,
    /// Whether it can slow its guest down.
    pub auto_converge: AutoConverge,
}

/// QEMU's figures of a migration.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where it is; absent when none was ever begun.
    pub status: Option<MigrationStatus>,
    /// Memory; absent before it begins.
    pub ram: Option<RamInfo>,
    /// Milliseconds that QEMU expects to pause for.
    pub expected_downtime: Option<u64>,
    /// Milliseconds that it paused for.
    pub downtime: Option<u64>,
    /// Milliseconds since it began.
    pub total_time: Option<u64>,
    /// Of its CPUs, what the guest is denied, in per cent; absent when nothing is.
    pub cpu_throttle_percentage: Option<u8>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

/// QEMU's figures of a migration's memory.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamInfo {
    /// Bytes written to the stream.
    pub transferred: u64,
    /// Bytes still to look at.
    pub remaining: u64,
    /// Pages that were sent, but for those of one byte repeated.
    pub normal: u64,
    /// Pages of one byte repeated, most of them zero, that were sent as such.
    pub duplicate: u64,
    /// Bytes of memory.
    pub total: u64,
    /// Pages per second that the guest dirties; 0 before the second pass.
    pub dirty_pages_rate: u64,
    /// Passes over the memory.
    pub dirty_sync_count: u64,
    /// Bytes per page.
    pub page_size: u64,
}

impl RamInfo {
    /// Bytes of memory that were sent, as pages of either kind.
    pub fn sent_bytes(&self) -> u64 {
        (self.normal + self.duplicate) * self.page_size
    }
}

impl Vm {
    /// Source: starts to send to a unix socket on which the worker listens.
    pub async fn migrate_to(&self, socket: &Path, settings: SourceSettings) -> Result<(), HypervisorError> {
        let slowing: &[&str] = match settings.auto_converge {
            AutoConverge::Off => &[],
            AutoConverge::On => &["auto-converge"],
        };
        self.set_capabilities(&[&SOURCE_CAPABILITIES, slowing].concat()).await?;
        let parameters = SetParameters {
            max_bandwidth: Some(UNLIMITED_BYTES_PER_S),
            downtime_limit: Some(u64::try_from(settings.downtime_limit.as_millis()).unwrap_or(u64::MAX).max(1)),
            avail_switchover_bandwidth: Some(settings.switchover_bandwidth),
            throttling: Some(Throttling::LEAST),
        };
        self.execute(&parameters).await?;
        self.forget_migration();
        self.execute(&Migrate { uri: uri(socket) }).await.map(drop)
    }

    /// Destination: starts to listen on a unix socket; when this returns, a connection is accepted.
    pub async fn listen_incoming(&self, socket: &Path) -> Result<(), HypervisorError> {
        self.set_capabilities(&DESTINATION_CAPABILITIES).await?;
        self.forget_migration();
        self.execute(&MigrateIncoming { uri: uri(socket) }).await.map(drop)
    }

    /// How far the migration is.
    pub async fn migration_info(&self) -> Result<MigrationInfo, HypervisorError> {
        self.execute(&QueryMigrate {}).await
    }

    /// Source, at any time: the rate at which the rest will really go over the WAN, in bytes per second. QEMU pauses the
    /// guest when the rest fits into the downtime limit at this rate; at 0 only when there is no rest.
    pub async fn set_switchover_bandwidth(&self, bytes_per_s: u64) -> Result<(), HypervisorError> {
        let avail_switchover_bandwidth = Some(bytes_per_s.max(LEAST_BYTES_PER_S));
        self.execute(&SetParameters { avail_switchover_bandwidth, ..SetParameters::default() }).await.map(drop)
    }

    /// Source: whether memory is held back, so that the guest is not stopped however little is left.
    pub async fn hold_memory(&self, hold: bool) -> Result<(), HypervisorError> {
        let max_bandwidth = Some(if hold { HELD_BYTES_PER_S } else { UNLIMITED_BYTES_PER_S });
        self.execute(&SetParameters { max_bandwidth, ..SetParameters::default() }).await.map(drop)
    }

    /// Source, at any time: the longest pause that QEMU plans for.
    pub async fn set_downtime_limit(&self, limit: Duration) -> Result<(), HypervisorError> {
        let downtime_limit = Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1));
        self.execute(&SetParameters { downtime_limit, ..SetParameters::default() }).await.map(drop)
    }

    /// Source with [`AutoConverge::On`], at any time: so much of its CPUs the guest is denied, in per cent, once two more rounds have
    /// ended; [`LEAST_THROTTLE_PERCENT`] to [`MOST_THROTTLE_PERCENT`].
    pub async fn set_throttle(&self, percent: u8) -> Result<(), HypervisorError> {
        let throttling = Some(Throttling::to(percent));
        self.execute(&SetParameters { throttling, ..SetParameters::default() }).await.map(drop)
    }

    /// Source, in `PreSwitchover`: lets go of the disks and sends the device state.
    pub async fn continue_switchover(&self) -> Result<(), HypervisorError> {
        self.execute(&MigrateContinue { state: "pre-switchover" }).await.map(drop)
    }

    /// Source, before `continue_switchover`: gives up; the guest runs on. Wait for a final status afterwards.
    pub async fn cancel_migration(&self) -> Result<(), HypervisorError> {
        self.execute(&MigrateCancel {}).await.map(drop)
    }

    /// Waits until the migration is in `wanted`. Ending in another state, or QEMU's end, is an error.
    pub async fn wait_migration(&self, wanted: MigrationStatus, deadline: Duration) -> Result<(), HypervisorError> {
        let mut marks = self.marks();
        let reached =
            marks.wait_for(|marks| marks.ended || marks.migration.is_some_and(|now| now == wanted || now.is_final()));
        let status = match tokio::time::timeout(deadline, reached).await {
            Ok(Ok(marks)) if !marks.ended => marks.migration,
            Ok(_) => return Err(HypervisorError::Ended { vm: self.id(), operation: "the migration" }),
            Err(_) => return Err(HypervisorError::Deadline { vm: self.id(), operation: "migration", deadline }),
        };
        match status {
            Some(status) if status != wanted => {
                let reason = self.migration_info().await?.error_desc.unwrap_or_default();
                Err(HypervisorError::Migration { vm: self.id(), status, reason })
            }
            _ => Ok(()),
        }
    }

    async fn set_capabilities(&self, on: &[&str]) -> Result<(), HypervisorError> {
        let mut capabilities = self.execute(&QueryCapabilities {}).await?;
        for capability in &mut capabilities {
            capability.state = on.contains(&capability.capability.as_str());
        }
        self.execute(&SetCapabilities { capabilities }).await.map(drop)
    }
}

fn uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_figures_are_read_at_every_stage() {
        let none: MigrationInfo = serde_json::from_str("{}").unwrap();
        assert!(none.status.is_none() && none.ram.is_none());
        let active = r#"{"expected-downtime": 300, "status": "active", "setup-time": 2, "total-time": 1500,
            "ram": {"total": 67108864, "postcopy-requests": 0, "dirty-sync-count": 2, "multifd-bytes": 0,
            "pages-per-second": 9, "downtime-bytes": 0, "page-size": 4096, "remaining": 4096, "mbps": 1.5,
            "transferred": 100, "duplicate": 7, "dirty-pages-rate": 12, "normal-bytes": 0, "normal": 0}}"#;
        let active: MigrationInfo = serde_json::from_str(active).unwrap();
        let ram = active.ram.unwrap();
        assert_eq!(active.status, Some(MigrationStatus::Active));
        assert_eq!((ram.remaining, ram.dirty_pages_rate, ram.dirty_sync_count, ram.page_size), (4096, 12, 2, 4096));
    }
}
