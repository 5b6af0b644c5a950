//! The benchmark of the controllers gives every figure, with a tiny fleet. Needs root; says so and passes when there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::time::Duration;

use pageport_lab::controller_bench::{BenchConfig, Effort, Known, Size, plot, run};
use pageport_lab::netns;
use serde_json::Value;

const TINY: Size = Size { workers: 3, vms: 20 };
/// What is asked of the largest fleet.
const FIGURES: [&str; 9] = [
    "commit_p50_rtts",
    "commit_p99_rtts",
    "failover_s",
    "commands_per_s",
    "plan_2000_vms_s",
    "leader_cpu_percent",
    "leader_memory_bytes",
    "restart_s",
    "snapshot_s",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_figure_of_a_tiny_fleet_is_there_and_plausible() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (stretch, settle) = (Duration::from_secs(1), Duration::from_millis(300));
    let config = BenchConfig {
        sizes: vec![TINY],
        effort: Effort { writes: 20, failovers: 1, stretch, clients: 8, settle },
        planned: Size { workers: 30, vms: 10_000 },
        known: Known::Again,
        folder: folder.path().to_owned(),
    };
    let report = run(&config, &|text| eprintln!("{text}")).await.unwrap();
    // As it is read from its file: a figure's last bit may change on the way.
    let value: Value = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    // Processor time comes in steps that a tiny fleet may not fill.
    let least = |name: &str| if name == "leader_cpu_percent" { 0.0 } else { f64::MIN_POSITIVE };
    let figure = |of: &Value, name: &str| of[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {of}"));
    for name in FIGURES {
        assert!(figure(&value, name) >= least(name), "{name} in {value}");
    }
    let fleet = &value["fleets"][0];
    for name in fleet.as_object().unwrap().keys() {
        assert!(figure(fleet, name) >= least(name), "{name} in {value}");
    }
    // Two sites are never nearer than the emulated link, nor an agreement than they are.
    assert!(figure(fleet, "rtt_ms") >= 50.0 && figure(fleet, "commit_p50_ms") >= 50.0, "{value}");
    assert_eq!(figure(fleet, "evacuated_vms"), 4.0);
    let lines = std::fs::read_to_string(folder.path().join("controller.jsonl")).unwrap();
    let line: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((&line["commit"], &line["commit_p50_ms"]), (&value["commit"], &fleet["commit_p50_ms"]));
    assert!(plot::plot(&report).contains("Latency of a command"));
    assert!(report.table().contains("goal: another controller leads"));
}
