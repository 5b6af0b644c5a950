//! What a copy costs: time, bytes on the link, processor time.
//!
//! | figure | is |
//! |---|---|
//! | bytes | all that the emulator carried between the two sites, headers and acknowledgements too, but for the guests' segment |
//! | processor time | user and system time of workers, QEMUs and QEMU's tools at both sites, from `/proc/PID/stat` (10 ms steps) |
//!
//! What a hypervisor needs for its guest is part of it. Controllers, keepers and guards are not, nor is the emulator.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::BenchError;
use crate::lab::network::Network;
use crate::lab::processes;

/// Where the disks are.
pub const SOURCE: &str = "a";
/// Where the replicas are.
pub const REPLICA: &str = "b";
/// Programs whose time counts.
const PROGRAMS: [&str; 4] = ["pageport-worker", "qemu-system-", "qemu-nbd", "qemu-img"];
/// Length of a clock tick in what the kernel tells user space, on x86-64.
const TICK: Duration = Duration::from_millis(10);

/// The counters at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    at: Instant,
    to_replica: u64,
    to_source: u64,
    cpu: BTreeMap<i32, Duration>,
}

/// What was used between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// How long it was.
    pub time: Duration,
    /// From the source's site to the replica's.
    pub to_replica: u64,
    /// The other way.
    pub to_source: u64,
    /// Processor time.
    pub cpu: Duration,
}

impl Reading {
    /// Reads the counters now.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub fn take(network: &Network) -> Result<Self, BenchError> {
        let links = network.wan()?.counters().map_err(BenchError::Counters)?;
        let carried = |from: &str, to: &str| {
            let link = links.iter().find(|link| link.from == from && link.to == to);
            link.map_or(0, |link| link.total.bytes - link.segment.bytes)
        };
        let pids = [SOURCE, REPLICA].map(|site| network.processes_at(site)).concat();
        let counted = pids.into_iter().filter(|pid| counts(&processes::command_line(*pid)));
        Ok(Self {
            at: Instant::now(),
            to_replica: carried(SOURCE, REPLICA),
            to_source: carried(REPLICA, SOURCE),
            // One that has just ended is not missed.
            cpu: counted.filter_map(|pid| Some((pid, cpu_time(pid).ok()?))).collect(),
        })
    }

    /// What was used since; processes that have ended meanwhile are not in it.
    ///
    /// # Errors
    /// As [`Reading::take`].
    pub fn until_now(&self, network: &Network) -> Result<Cost, BenchError> {
        Ok(self.until(&Self::take(network)?))
    }

    /// What was used from this moment to a later one.
    #[must_use]
    pub fn until(&self, later: &Self) -> Cost {
        let used = |(pid, cpu): (&i32, &Duration)| cpu.saturating_sub(self.cpu.get(pid).copied().unwrap_or_default());
        Cost {
            time: later.at - self.at,
            to_replica: later.to_replica - self.to_replica,
            to_source: later.to_source - self.to_source,
            cpu: later.cpu.iter().map(used).sum(),
        }
    }
}

fn counts(line: &[String]) -> bool {
    let name = line.first().and_then(|program| Path::new(program).file_name()?.to_str()).unwrap_or_default();
    PROGRAMS.iter().any(|known| name.starts_with(known))
}

/// Processor time of a process; also of one that has ended and was not waited for yet.
///
/// # Errors
/// When there is none.
pub fn cpu_time(pid: i32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    ticks(&stat).map(|ticks| TICK * ticks).ok_or(io::ErrorKind::InvalidData.into())
}

/// User and system time of a `stat` line: fields 14 and 15; the second, a name, may contain anything.
fn ticks(stat: &str) -> Option<u32> {
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u32>().ok();
    Some(field(14)? + field(15)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_read_behind_any_name() {
        let stat = "42 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 17 25 0 0 20 0 1 0 99";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("42 (x"), None);
        assert!(cpu_time(i32::try_from(std::process::id()).unwrap()).is_ok());
    }

    #[test]
    fn a_process_that_came_meanwhile_counts_whole() {
        let begin = Instant::now();
        let reading = |s: u64, bytes, cpu: &[(i32, u64)]| Reading {
            at: begin + Duration::from_secs(s),
            to_replica: bytes,
            to_source: bytes / 10,
            cpu: cpu.iter().map(|(pid, ms)| (*pid, Duration::from_millis(*ms))).collect(),
        };
        let cost = reading(1, 100, &[(1, 500), (2, 70)]).until(&reading(4, 400, &[(1, 800), (3, 50)]));
        let expected =
            Cost { time: Duration::from_secs(3), to_replica: 300, to_source: 30, cpu: Duration::from_millis(350) };
        assert_eq!(cost, expected);
    }

    #[test]
    fn only_what_copies_counts() {
        let line = |program: &str| vec![program.to_owned(), "--config".to_owned()];
        assert!(counts(&line("/x/pageport-worker")) && counts(&line("/usr/bin/qemu-system-x86_64")));
        assert!(!counts(&line("/x/pageport-controller")) && !counts(&[]));
    }
}
