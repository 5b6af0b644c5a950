//! The demo's figures: `target/lab/demo.json` and the table at the end.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::disk::DiskFigures;
use crate::baseline::Figures;
use crate::wan::link::Shape;

/// What the guest was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFigures {
    /// Its memory.
    pub memory_bytes: u64,
    /// Its clean page cache when the move was ordered.
    pub page_cache_bytes: u64,
    /// Its kernel's release.
    pub kernel: String,
}

/// What the link was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkFigures {
    /// Bits per second.
    pub rate_bps: u64,
    /// Delay of each direction.
    pub one_way_delay_ms: u64,
    /// Probability of a packet's loss.
    pub loss: f64,
}

impl From<Shape> for LinkFigures {
    fn from(shape: Shape) -> Self {
        Self { rate_bps: shape.rate_bps, one_way_delay_ms: shape.one_way_delay_ms, loss: shape.loss }
    }
}

/// The highest resident memory that the workers had over the whole run, seed included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerMemory {
    /// The worker that the guest left.
    pub source: u64,
    /// The worker that it came to.
    pub destination: u64,
}

/// Each worker stays below this, whatever the size of the guest.
const WORKER_MEMORY_GOAL_BYTES: u64 = 512 << 20;

/// How many times as long plain pre-copy takes, without the disk, as a move with it.
const PRECOPY_GOAL: f64 = 10.0;
/// How much of a replicated disk crosses the link when half a percent has changed.
const DISK_GOAL_PERCENT: f64 = 1.0;

/// Whether the guest is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestChecks {
    /// Files, and all records that were synced.
    pub files_checksum_equal: bool,
    /// The region that stays, and every page of the region that changes.
    pub memory_checksum_equal: bool,
    /// It did not boot anew.
    pub uptime_continued: bool,
    /// No number of the session was lost or repeated; none when the guest had no network card.
    pub tcp_session_survived: Option<bool>,
}

impl GuestChecks {
    /// Whether all that could be checked is well.
    #[must_use]
    pub fn all(&self) -> bool {
        self.files_checksum_equal
            && self.memory_checksum_equal
            && self.uptime_continued
            && self.tcp_session_survived != Some(false)
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The record of the finished migration, as the API gives it.
    pub pageport: Value,
    /// QEMU's plain pre-copy.
    pub qemu_precopy: Figures,
    /// QEMU's multifd with zstd.
    pub qemu_multifd_zstd: Figures,
    /// What moved.
    pub guest: GuestFigures,
    /// Its disk, which was replicated already.
    pub disk: DiskFigures,
    /// Over what.
    pub link: LinkFigures,
    /// What it took of the hosts' memory.
    pub worker_peak_memory_bytes: WorkerMemory,
    /// Whether it is what it was.
    pub guest_checks: GuestChecks,
}

fn mega(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn seconds(milliseconds: u64) -> String {
    format!("{:.1}", milliseconds as f64 / 1e3)
}

impl Report {
    fn figure(&self, key: &str) -> u64 {
        self.pageport[key].as_u64().unwrap_or(0)
    }

    /// What the disk, and the whole move with it, cost.
    fn disk_lines(&self) -> String {
        let DiskFigures { disk_bytes, changed_bytes, wan_bytes, source_read_bytes } = self.disk;
        let share = |bytes: u64| bytes as f64 * 100.0 / disk_bytes.max(1) as f64;
        let total_ms = self.figure("total_time_ms");
        let times = self.qemu_precopy.total_time_ms as f64 / total_ms.max(1) as f64;
        let verdict = |met: bool| if met { "met" } else { "MISSED" };
        format!(
            "\nfrom the order to the resume, the disk included, Pageport took {} s: QEMU pre-copy without the disk took {times:.1}x; \
             goal: 10x: {}\n\
             the disk of {} MB, replicated, {:.2} % of it rewritten since: {} MB ({:.2} %) crossed the link; goal: under 1 %: {}; \
             its QEMU read {} MB\n",
            seconds(total_ms),
            verdict(times >= PRECOPY_GOAL),
            mega(disk_bytes),
            share(changed_bytes),
            mega(wan_bytes),
            share(wan_bytes),
            verdict(share(wan_bytes) < DISK_GOAL_PERCENT),
            mega(source_read_bytes),
        )
    }

    /// The table, ready to print.
    #[must_use]
    pub fn table(&self) -> String {
        let pages = |class: &str| self.pageport["pages"][class].as_u64().unwrap_or(0);
        let (memory_ms, bytes) = (self.figure("memory_time_ms"), self.figure("wan_bytes"));
        let times = |theirs: u64, ours: u64| format!("{:.1}x", theirs as f64 / (ours.max(1)) as f64);
        let mut text =
            format!("{:<24}{:>10}{:>14}{:>12}{:>12}{:>16}\n", "", "total s", "downtime ms", "WAN MB", "time", "bytes");
        let mut row = |name: &str, total: u64, downtime: u64, wan: u64, time: String, ratio: String| {
            text += &format!("{name:<24}{:>10}{downtime:>14}{:>12}{time:>12}{ratio:>16}\n", seconds(total), mega(wan));
        };
        row("Pageport, memory", memory_ms, self.figure("downtime_ms"), bytes, "1".into(), "1".into());
        for (name, figures) in [("QEMU pre-copy", self.qemu_precopy), ("QEMU multifd zstd", self.qemu_multifd_zstd)] {
            let Figures { total_time_ms, downtime_ms, wan_bytes } = figures;
            let (time, ratio) = (times(total_time_ms, memory_ms), times(wan_bytes, bytes));
            row(name, total_time_ms, downtime_ms, wan_bytes, time, ratio);
        }
        text += &self.disk_lines();
        text += &format!(
            "memory moved {} MB; pages: {} zero, {} teleported, {} literal, {} fell back; page cache at the order {} MB\n",
            mega(self.figure("memory_bytes")),
            pages("zero"),
            pages("teleported"),
            pages("literal"),
            pages("fallback"),
            mega(self.guest.page_cache_bytes),
        );
        let WorkerMemory { source, destination } = self.worker_peak_memory_bytes;
        let within = source.max(destination) < WORKER_MEMORY_GOAL_BYTES;
        text += &format!(
            "highest memory of the workers: source {} MiB, destination {} MiB; goal: under {} MiB: {}\n",
            source >> 20,
            destination >> 20,
            WORKER_MEMORY_GOAL_BYTES >> 20,
            if within { "met" } else { "MISSED" },
        );
        let checks = self.guest_checks;
        let word = |good: bool| if good { "yes" } else { "NO" };
        text += &format!(
            "digests of the stream agree: {}; files equal: {}; memory equal: {}; uptime went on: {}; TCP session survived: {}\n",
            word(self.pageport["stream_digest_match"] == true),
            word(checks.files_checksum_equal),
            word(checks.memory_checksum_equal),
            word(checks.uptime_continued),
            checks.tcp_session_survived.map_or("not checked: no network namespaces", word),
        );
        text
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Report {
        Report {
            pageport: json!({
                "total_time_ms": 7000, "memory_time_ms": 5000, "downtime_ms": 500, "wan_bytes": 70_000_000,
                "disk_wan_bytes": 1_000_000, "memory_bytes": 2_100_000_000u64, "stream_digest_match": true,
                "pages": {"zero": 1, "teleported": 405_574, "literal": 3, "fallback": 4}, "phases": [],
            }),
            qemu_precopy: Figures { total_time_ms: 83_000, downtime_ms: 400, wan_bytes: 2_017_000_000 },
            qemu_multifd_zstd: Figures { total_time_ms: 32_400, downtime_ms: 470, wan_bytes: 783_000_000 },
            guest: GuestFigures { memory_bytes: 2 << 30, page_cache_bytes: 1_600_000_000, kernel: "6.1".into() },
            disk: DiskFigures {
                disk_bytes: 4 << 30,
                changed_bytes: 21 << 20,
                wan_bytes: 20_000_000,
                source_read_bytes: 30_000_000,
            },
            link: Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None }.into(),
            worker_peak_memory_bytes: WorkerMemory { source: 300 << 20, destination: 512 << 20 },
            guest_checks: GuestChecks {
                files_checksum_equal: true,
                memory_checksum_equal: true,
                uptime_continued: true,
                tcp_session_survived: Some(false),
            },
        }
    }

    #[test]
    fn the_table_compares_times_and_bytes() {
        let table = report().table();
        let disk = ["pre-copy without the disk took 11.9x; goal: 10x: met", "20.0 MB (0.47 %)", "under 1 %: met"];
        let memory = ["16.6x", "28.8x", "6.5x", "11.2x", "405574 teleported", "TCP session survived: NO"];
        for part in disk.into_iter().chain(memory) {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        assert!(table.contains("source 300 MiB, destination 512 MiB; goal: under 512 MiB: MISSED"), "{table}");
        let mut report = report();
        report.worker_peak_memory_bytes.destination -= 1;
        assert!(report.table().contains("goal: under 512 MiB: met"));
    }

    #[test]
    fn what_was_not_checked_is_said_and_fails_nothing() {
        let mut report = report();
        report.guest_checks.tcp_session_survived = None;
        assert!(report.guest_checks.all());
        assert!(report.table().contains("TCP session survived: not checked: no network namespaces"));
        let value = serde_json::to_value(report).unwrap();
        assert_eq!(value["guest_checks"]["tcp_session_survived"], Value::Null);
        assert!(value["guest_checks"].as_object().unwrap().contains_key("tcp_session_survived"));
    }

    #[test]
    fn the_file_has_the_agreed_keys() {
        let value = serde_json::to_value(report()).unwrap();
        let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        let mut expected = [
            "pageport",
            "qemu_precopy",
            "qemu_multifd_zstd",
            "guest",
            "disk",
            "link",
            "worker_peak_memory_bytes",
            "guest_checks",
        ];
        expected.sort_unstable();
        let mut keys = keys;
        keys.sort();
        assert_eq!(keys, expected);
        assert_eq!(value["link"]["one_way_delay_ms"], 25);
        assert!(!report().guest_checks.all());
    }
}
