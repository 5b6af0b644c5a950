//! What is kept of the cases: one line each in `results.jsonl`, and the sum in `matrix.json`.
//!
//! Of a pair the newest line of a commit counts: see [`crate::kept`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::FaultsError;
use super::plan::Pair;
use crate::kept::{Line, Lines, write_sum};

/// One line of `results.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseResult {
    /// `point/fault`, or `point/fault/self-fence`.
    pub pair: String,
    /// Of which commit; ends in `+` when files differed from it.
    pub commit: String,
    /// What the order of the cases was drawn from.
    pub seed: u64,
    /// Nothing was wrong.
    pub passed: bool,
    /// How the move ended.
    pub outcome: String,
    /// Why, in the controllers' words.
    pub outcome_reason: String,
    /// From where to where it was to go.
    pub route: String,
    /// Who owned the VM in the end.
    pub owner: String,
    /// The site of the controller that led at the order.
    pub leader: String,
    /// The VM crashed and was booted again.
    pub crashed: bool,
    /// The VM was ended with its lease, or taken over, and runs again.
    #[serde(default)]
    pub fenced: bool,
    /// Two copies executed.
    pub double_running: bool,
    /// The VM runs nowhere, or is not what it was.
    pub lost_vm: bool,
    /// What was left behind.
    pub orphans: Vec<String>,
    /// All that was wrong.
    pub complaints: Vec<String>,
    /// When it began.
    pub began_unix_ms: u64,
    /// How long it took.
    pub duration_ms: u64,
    /// Where the daemons' logs are.
    pub logs: String,
}

/// What is read of a line of `simulation.jsonl`, which `pageport-sim` writes.
#[derive(Debug, Deserialize)]
struct Simulated {
    commit: String,
    first_seed: u64,
    schedules: u64,
    violations: u64,
}

impl Line for CaseResult {
    fn commit(&self) -> &str {
        &self.commit
    }
}

impl Line for Simulated {
    fn commit(&self) -> &str {
        &self.commit
    }
}

/// `matrix.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// Pairs that were run.
    pub cases: usize,
    /// Of those passed.
    pub passed: usize,
    /// Cases in which two copies executed.
    pub double_running: usize,
    /// Cases that lost the VM.
    pub lost_vms: usize,
    /// Things left behind.
    pub orphans: usize,
    /// Seeds of the simulation; each makes one schedule. Absent: it was not run at this commit.
    pub seeds: Option<u64>,
    /// Schedules of the simulation.
    pub simulated_schedules: Option<u64>,
    /// What did not hold in them.
    pub simulated_violations: Option<u64>,
    /// Pairs of the whole matrix.
    pub pairs: usize,
    /// Of which commit.
    pub commit: String,
}

/// The results of one commit.
#[derive(Debug)]
pub struct Results {
    folder: PathBuf,
    /// One for each case that was run.
    pub lines: Lines<CaseResult>,
}

impl Results {
    /// Those in `folder`, for the commit that is checked out.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, FaultsError> {
        Ok(Self { folder: folder.to_owned(), lines: Lines::open(folder, "results.jsonl")? })
    }

    /// Where the sum is.
    #[must_use]
    pub fn matrix(&self) -> PathBuf {
        self.folder.join("matrix.json")
    }

    /// The newest result of each pair.
    #[must_use]
    pub fn newest(&self) -> BTreeMap<String, CaseResult> {
        self.lines.all().into_iter().map(|result| (result.pair.clone(), result)).collect()
    }

    /// Schedules that the simulator has run at this commit, and what did not hold in them; of the same seeds the newest line counts.
    fn simulated(&self) -> Option<(u64, u64)> {
        let lines = Lines::<Simulated>::of(self.folder.join("simulation.jsonl"), self.lines.commit().to_owned());
        let by_seed: BTreeMap<u64, Simulated> = lines.all().into_iter().map(|line| (line.first_seed, line)).collect();
        let sum = |what: fn(&Simulated) -> u64| by_seed.values().map(what).sum();
        (!by_seed.is_empty()).then(|| (sum(|line| line.schedules), sum(|line| line.violations)))
    }

    /// Sums up what is known of these pairs and writes it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn sum_up(&self, all: &[Pair]) -> Result<Matrix, FaultsError> {
        let newest = self.newest();
        let cases: Vec<&CaseResult> = all.iter().filter_map(|pair| newest.get(&pair.to_string())).collect();
        let simulated = self.simulated();
        let count = |is: fn(&CaseResult) -> bool| cases.iter().filter(|case| is(case)).count();
        let matrix = Matrix {
            cases: cases.len(),
            passed: count(|case| case.passed),
            double_running: count(|case| case.double_running),
            lost_vms: count(|case| case.lost_vm),
            orphans: cases.iter().map(|case| case.orphans.len()).sum(),
            seeds: simulated.map(|(schedules, _)| schedules),
            simulated_schedules: simulated.map(|(schedules, _)| schedules),
            simulated_violations: simulated.map(|(_, violations)| violations),
            pairs: all.len(),
            commit: self.lines.commit().to_owned(),
        };
        write_sum(self.matrix(), &matrix)?;
        Ok(matrix)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;
    use crate::faults::plan;

    fn result(pair: &str, commit: &str, passed: bool) -> CaseResult {
        let complaints = if passed { Vec::new() } else { vec!["two".to_owned()] };
        CaseResult {
            pair: pair.to_owned(),
            commit: commit.to_owned(),
            seed: 1,
            passed,
            outcome: "failed".into(),
            outcome_reason: String::new(),
            route: "a to b".into(),
            owner: "a".into(),
            leader: "c".into(),
            crashed: false,
            fenced: false,
            double_running: !passed,
            lost_vm: false,
            orphans: complaints.clone(),
            complaints,
            began_unix_ms: 0,
            duration_ms: 0,
            logs: String::new(),
        }
    }

    #[test]
    fn the_newest_line_of_this_commit_counts_and_a_torn_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let lines = Lines::of(folder.path().join("results.jsonl"), "now".into());
        let results = Results { folder: folder.path().to_owned(), lines };
        for (pair, commit, passed) in [
            ("memory/kill-leader", "now", false),
            ("memory/kill-leader", "now", true),
            ("load/kill-leader", "now", false),
            ("load/kill-leader", "before", true),
            ("no/such-pair", "now", false),
        ] {
            results.lines.append(&result(pair, commit, passed)).unwrap();
        }
        File::options().append(true).open(results.lines.path()).unwrap().write_all(b"{\"pair\":\"mem").unwrap();
        let matrix = results.sum_up(&plan::matrix()).unwrap();
        assert_eq!((matrix.cases, matrix.passed, matrix.double_running, matrix.orphans), (2, 1, 1, 1));
        let written: serde_json::Value = serde_json::from_slice(&fs::read(results.matrix()).unwrap()).unwrap();
        assert_eq!(written["cases"], 2);
        assert!(written["seeds"].is_null(), "nothing was simulated");
        let line = |commit, first_seed, violations| {
            format!(
                "{{\"commit\":\"{commit}\",\"first_seed\":{first_seed},\"schedules\":10,\"violations\":{violations}}}\n"
            )
        };
        let lines = [line("now", 1, 3), line("now", 1, 0), line("now", 11, 1), line("before", 21, 0)].concat();
        fs::write(folder.path().join("simulation.jsonl"), lines).unwrap();
        let matrix = results.sum_up(&plan::matrix()).unwrap();
        assert_eq!(
            (matrix.seeds, matrix.simulated_schedules, matrix.simulated_violations),
            (Some(20), Some(20), Some(1))
        );
    }
}
