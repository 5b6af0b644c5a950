//! How much of the disk a move reads and sends.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

const PERIOD: Duration = Duration::from_millis(50);

/// What the disk cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFigures {
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Rewritten since the replica's newest recovery point, before the move was ordered; the loads write more.
    pub changed_bytes: u64,
    /// What the transport sent for it during the move.
    pub wan_bytes: u64,
    /// What the source's QEMU read from files during the move, for its guest and for the copy.
    pub source_read_bytes: u64,
}

/// Counts what a process reads from files until it ends.
#[derive(Debug)]
pub struct Reads {
    task: JoinHandle<u64>,
}

impl Reads {
    /// Begins to count.
    #[must_use]
    pub fn of(pid: i32) -> Self {
        let task = tokio::spawn(async move {
            let Some(before) = read_so_far(pid) else { return 0 };
            let mut last = before;
            while let Some(now) = read_so_far(pid) {
                last = now;
                tokio::time::sleep(PERIOD).await;
            }
            last - before
        });
        Self { task }
    }

    /// Waits for the end of the process; bytes.
    pub async fn total(self) -> u64 {
        self.task.await.unwrap_or(0)
    }
}

/// Bytes that the process's reads of files have returned; [`None`]: it is gone.
fn read_so_far(pid: i32) -> Option<u64> {
    let counters = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    counters.lines().find_map(|line| line.strip_prefix("rchar: "))?.trim().parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_process_reads_is_counted_until_it_ends() {
        let mut child = std::process::Command::new("dd")
            .args(["if=/dev/zero", "of=/dev/null", "bs=1M", "count=1", "iflag=fullblock"])
            .spawn()
            .unwrap();
        let before = read_so_far(std::process::id() as i32).unwrap();
        std::fs::read("/proc/self/exe").unwrap();
        assert!(read_so_far(std::process::id() as i32).unwrap() > before + 1_000_000);
        let reads = Reads::of(child.id() as i32);
        child.wait().unwrap();
        reads.total().await;
        assert_eq!(read_so_far(child.id() as i32), None);
    }
}
