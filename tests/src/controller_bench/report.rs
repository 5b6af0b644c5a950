//! The figures: `target/bench/controller.json`, and the table at the end.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Round trips that half of all commands take at most.
const COMMIT_GOAL_RTTS: f64 = 1.5;
/// Until another controller leads, in seconds.
const FAILOVER_GOAL_S: f64 = 2.0;
/// To plan the evacuation of 2,000 VMs, in seconds.
const PLAN_GOAL_S: f64 = 1.0;

/// What was measured with a fleet of one size.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FleetFigures {
    /// Simulated workers, each with a connection and heartbeats.
    pub workers: usize,
    /// VMs.
    pub vms: usize,
    /// Round trip between two sites, measured.
    pub rtt_ms: f64,
    /// From the first worker until all were connected.
    pub connect_s: f64,
    /// VMs defined in each second, by many clients.
    pub defines_per_s: f64,
    /// Small commands in each second, by many clients.
    pub commands_per_s: f64,
    /// What half of the small commands took at most that were given one after the other.
    pub commit_p50_ms: f64,
    /// What 99 of 100 took at most.
    pub commit_p99_ms: f64,
    /// As `commit_p50_ms`, in round trips.
    pub commit_p50_rtts: f64,
    /// As `commit_p99_ms`, in round trips.
    pub commit_p99_rtts: f64,
    /// Processor time of the leader with heartbeats alone; 100: one processor.
    pub leader_cpu_percent: f64,
    /// Resident memory of the leader then.
    pub leader_memory_bytes: u64,
    /// From the kill of a leader until a command is taken: the median.
    pub failover_s: f64,
    /// The longest.
    pub failover_worst_s: f64,
    /// From the kill until all workers have reported to the new leader: the median.
    pub workers_back_s: f64,
    /// From the start of a follower that was killed until it has all that was committed then.
    pub restart_s: f64,
    /// To encode and sync a snapshot, in the benchmark's own process.
    pub snapshot_s: f64,
    /// Its size.
    pub snapshot_bytes: usize,
    /// VMs of the site that is evacuated.
    pub evacuated_vms: usize,
    /// To plan where they go and which moves begin, in the benchmark's own process.
    pub plan_s: f64,
    /// From the order to drain the site until all its moves are ordered.
    pub drain_queued_s: f64,
}

/// What it ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Processors, shared by controllers, emulator and load.
    pub processors: usize,
    /// Memory.
    pub memory_bytes: u64,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: total.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() << 10,
        }
    }
}

/// Everything; the figures beside `fleets` are those of the largest fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was checked out; ends in `+` when files differ from it.
    pub commit: String,
    /// What it ran on.
    pub machine: Machine,
    /// Half of all commands, in round trips.
    pub commit_p50_rtts: f64,
    /// 99 of 100 commands, in round trips.
    pub commit_p99_rtts: f64,
    /// The median.
    pub failover_s: f64,
    /// By many clients at once.
    pub commands_per_s: f64,
    /// To plan the evacuation of 2,000 VMs of 10,000.
    pub plan_2000_vms_s: f64,
    /// With heartbeats alone.
    pub leader_cpu_percent: f64,
    /// With heartbeats alone.
    pub leader_memory_bytes: u64,
    /// Of a follower that was killed.
    pub restart_s: f64,
    /// To encode and sync.
    pub snapshot_s: f64,
    /// Each size.
    pub fleets: Vec<FleetFigures>,
}

impl Report {
    /// Of these fleets.
    #[must_use]
    pub fn new(commit: String, mut fleets: Vec<FleetFigures>, plan_2000_vms_s: f64) -> Self {
        fleets.sort_by_key(|fleet| (fleet.workers, fleet.vms));
        let largest = fleets.last().cloned().unwrap_or_default();
        Self {
            commit,
            machine: Machine::this(),
            commit_p50_rtts: largest.commit_p50_rtts,
            commit_p99_rtts: largest.commit_p99_rtts,
            failover_s: largest.failover_s,
            commands_per_s: largest.commands_per_s,
            plan_2000_vms_s,
            leader_cpu_percent: largest.leader_cpu_percent,
            leader_memory_bytes: largest.leader_memory_bytes,
            restart_s: largest.restart_s,
            snapshot_s: largest.snapshot_s,
            fleets,
        }
    }

    /// The table, ready to print.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("{:<44}", "workers / VMs");
        for fleet in &self.fleets {
            let _ = write!(text, "{:>14}", format!("{}/{}", fleet.workers, fleet.vms));
        }
        text.push('\n');
        for (name, figure) in ROWS {
            let _ = write!(text, "{name:<44}");
            for fleet in &self.fleets {
                let _ = write!(text, "{:>14}", figure(fleet));
            }
            text.push('\n');
        }
        let Machine { processors, memory_bytes } = self.machine;
        let memory_gib = memory_bytes >> 30;
        let _ = writeln!(
            text,
            "\nthree controllers, the emulated WAN and all load share {processors} processors and {memory_gib} GiB"
        );
        text + &self.goals()
    }

    fn goals(&self) -> String {
        let line = |what: &str, figure: f64, unit: &str, goal: f64| {
            let word = if figure <= goal { "met" } else { "MISSED" };
            format!("goal: {what}, at most {goal} {unit}: {word} ({figure:.2} {unit})\n")
        };
        line("half of all commands", self.commit_p50_rtts, "round trips", COMMIT_GOAL_RTTS)
            + &line("another controller leads", self.failover_s, "s", FAILOVER_GOAL_S)
            + &line("an evacuation of 2000 VMs planned", self.plan_2000_vms_s, "s", PLAN_GOAL_S)
    }
}

/// A figure as it is shown.
type Shown = fn(&FleetFigures) -> String;

const ROWS: [(&str, Shown); 15] = [
    ("a command, 50th percentile, round trips", |it| format!("{:.2}", it.commit_p50_rtts)),
    ("a command, 99th percentile, round trips", |it| format!("{:.2}", it.commit_p99_rtts)),
    ("commands per second", |it| format!("{:.0}", it.commands_per_s)),
    ("VMs defined per second", |it| format!("{:.0}", it.defines_per_s)),
    ("another controller leads, median, s", |it| format!("{:.2}", it.failover_s)),
    ("another controller leads, longest, s", |it| format!("{:.2}", it.failover_worst_s)),
    ("all workers are back, median, s", |it| format!("{:.1}", it.workers_back_s)),
    ("leader, heartbeats alone, % of a processor", |it| format!("{:.0}", it.leader_cpu_percent)),
    ("leader, resident memory, MB", |it| format!("{:.0}", it.leader_memory_bytes as f64 / 1e6)),
    ("a killed follower is back, s", |it| format!("{:.2}", it.restart_s)),
    ("snapshot, s", |it| format!("{:.3}", it.snapshot_s)),
    ("snapshot, MB", |it| format!("{:.1}", it.snapshot_bytes as f64 / 1e6)),
    ("VMs to evacuate", |it| it.evacuated_vms.to_string()),
    ("evacuation planned, s", |it| format!("{:.3}", it.plan_s)),
    ("all its moves ordered after a drain, s", |it| format!("{:.2}", it.drain_queued_s)),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(workers: usize, commit_p50_rtts: f64) -> FleetFigures {
        FleetFigures { workers, vms: workers * 10, commit_p50_rtts, failover_s: 1.25, ..FleetFigures::default() }
    }

    #[test]
    fn the_largest_fleet_is_judged() {
        let report = Report::new("now".into(), vec![fleet(1000, 1.6), fleet(100, 1.1)], 0.25);
        assert_eq!((report.fleets[0].workers, report.fleets[1].workers), (100, 1000));
        let table = report.table();
        assert!(table.contains("half of all commands, at most 1.5 round trips: MISSED (1.60"), "{table}");
        assert!(table.contains("another controller leads, at most 2 s: met (1.25 s)"), "{table}");
        assert!(table.contains("2000 VMs planned, at most 1 s: met (0.25 s)"), "{table}");
        assert!(table.contains("1000/10000"), "{table}");
    }
}
