//! What a hypervisor counts of its guest's disk writes.

use serde::Deserialize;

use super::error::HypervisorError;
use super::qmp::qmp_command;
use super::vm::Vm;

qmp_command!(/// Counts of all devices.
    QueryBlockstats = "query-blockstats" -> Vec<DeviceStats> {});

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct DeviceStats {
    stats: Stats,
}

#[derive(Debug, Clone, Deserialize)]
struct Stats {
    wr_operations: u64,
    wr_total_time_ns: u64,
}

/// The guest's writes to all of its disks since the hypervisor began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteCount {
    /// Writes done.
    pub operations: u64,
    /// Time that they took in all, in nanoseconds.
    pub total_ns: u64,
}

impl Vm {
    /// What the guest has written so far.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    pub async fn write_count(&self) -> Result<WriteCount, HypervisorError> {
        let devices = self.execute(&QueryBlockstats {}).await?;
        Ok(devices.iter().fold(WriteCount::default(), |count, device| WriteCount {
            operations: count.operations + device.stats.wr_operations,
            total_ns: count.total_ns + device.stats.wr_total_time_ns,
        }))
    }
}
