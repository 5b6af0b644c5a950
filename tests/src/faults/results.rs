//! What is kept of the cases: one line each in `results.jsonl`, and the sum in `matrix.json`.
//!
//! Results are appended, never changed; of a pair the newest line of a commit counts. So a matrix can be run in pieces, also
//! by several processes at once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::error::FaultsError;
use super::plan::Pair;
use crate::paths;

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
    commit: String,
}

impl Results {
    /// Those in `folder`, for the commit that is checked out.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, FaultsError> {
        fs::create_dir_all(folder).map_err(|source| FaultsError::File {
            operation: "make",
            path: folder.to_owned(),
            source,
        })?;
        Ok(Self { folder: folder.to_owned(), commit: commit() })
    }

    /// The commit.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Where the lines are.
    #[must_use]
    pub fn lines(&self) -> PathBuf {
        self.folder.join("results.jsonl")
    }

    /// Where the sum is.
    #[must_use]
    pub fn matrix(&self) -> PathBuf {
        self.folder.join("matrix.json")
    }

    /// The newest result of each pair, for this commit; lines that are none are passed over.
    #[must_use]
    pub fn newest(&self) -> BTreeMap<String, CaseResult> {
        let text = fs::read_to_string(self.lines()).unwrap_or_default();
        let results = text.lines().filter_map(|line| serde_json::from_str::<CaseResult>(line).ok());
        results.filter(|result| result.commit == self.commit).map(|result| (result.pair.clone(), result)).collect()
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&self, result: &CaseResult) -> Result<(), FaultsError> {
        append_line(&self.lines(), result)
    }

    /// Schedules that the simulator has run at this commit, and what did not hold in them; of the same seeds the newest line counts.
    fn simulated(&self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(self.folder.join("simulation.jsonl")).ok()?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Simulated>(line).ok());
        let of_commit = lines.filter(|line| line.commit == self.commit);
        let by_seed: BTreeMap<u64, Simulated> = of_commit.map(|line| (line.first_seed, line)).collect();
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
            commit: self.commit.clone(),
        };
        let path = self.matrix();
        let text = serde_json::to_string_pretty(&matrix).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text + "\n")).map_err(|source| FaultsError::File {
            operation: "write",
            path,
            source,
        })?;
        Ok(matrix)
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Appends one line of JSON to a file.
pub(crate) fn append_line(path: &Path, result: &impl Serialize) -> Result<(), FaultsError> {
    let error = |source| FaultsError::File { operation: "append to", path: path.to_owned(), source };
    let mut line = serde_json::to_vec(result).map_err(|source| error(source.into()))?;
    line.push(b'\n');
    let mut file = File::options().create(true).append(true).open(path).map_err(error)?;
    file.write_all(&line).map_err(error)
}

/// What is checked out; `unknown` outside of a repository.
pub(crate) fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(paths::root()).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|changes| !changes.is_empty());
    head + if changed { "+" } else { "" }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
        let results = Results { folder: folder.path().to_owned(), commit: "now".into() };
        for (pair, commit, passed) in [
            ("memory/kill-leader", "now", false),
            ("memory/kill-leader", "now", true),
            ("load/kill-leader", "now", false),
            ("load/kill-leader", "before", true),
            ("no/such-pair", "now", false),
        ] {
            results.append(&result(pair, commit, passed)).unwrap();
        }
        File::options().append(true).open(results.lines()).unwrap().write_all(b"{\"pair\":\"mem").unwrap();
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
