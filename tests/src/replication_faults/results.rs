//! What is kept of the cases: one line each in `replication.jsonl`, and the sum in `replication.json`.
//!
//! Of a case the newest line of a commit counts: see [`crate::kept`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::faults::FaultsError;
use crate::kept::{Line, Lines, write_sum};

/// One line of `replication.jsonl`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CaseResult {
    /// `fault/seed`.
    pub case: String,
    /// What its moment was drawn from.
    pub seed: u64,
    /// Of which commit; ends in `+` when files differed from it.
    pub commit: String,
    /// Nothing was wrong.
    pub passed: bool,
    /// After what the fault struck.
    pub cue: String,
    /// How long after it, in milliseconds.
    pub delay_ms: u64,
    /// How long it lasted, in milliseconds.
    pub lasts_ms: u64,
    /// What the destination was at: `settled`, `journal`, `applying`; empty: not known.
    pub phase_at_fault: String,
    /// The newest recovery point of the replica as the fault left it.
    pub point_at_fault: Option<u64>,
    /// Operations of the history that it holds.
    pub operations_at_fault: Option<u64>,
    /// From healing to when a point taken after it was seen, in milliseconds.
    pub resumed_ms: Option<u64>,
    /// Bytes that the workers sent from the fault's end to that point.
    pub resumed_wan_bytes: Option<u64>,
    /// Images whose file system was not sound.
    pub fsck_failures: usize,
    /// Images that were not what they had to be, at the fault or in the end.
    pub content_mismatches: usize,
    /// Lines of trouble in the guest's kernel log, failed writes, and writes slower than 5 s.
    pub guest_io_errors: usize,
    /// The guest's slowest write with its sync, in milliseconds.
    pub slowest_write_ms: u64,
    /// No newer point came in time.
    pub stuck: bool,
    /// All that was wrong.
    pub complaints: Vec<String>,
    /// When it began.
    pub began_unix_ms: u64,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Where the daemons' logs are.
    pub logs: String,
}

impl Line for CaseResult {
    fn commit(&self) -> &str {
        &self.commit
    }
}

/// `replication.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sum {
    /// Cases that were run.
    pub cases: usize,
    /// Of those passed.
    pub passed: usize,
    /// Images whose file system was not sound.
    pub fsck_failures: usize,
    /// Images that were not what they had to be.
    pub content_mismatches: usize,
    /// I/O errors, hung and slow writes that the guests met.
    pub guest_io_errors: usize,
    /// Cases after which replication did not go on.
    pub stuck: usize,
    /// What the moments were drawn from.
    pub seeds: BTreeSet<u64>,
    /// The slowest write of any guest with its sync, in milliseconds.
    pub slowest_write_ms: u64,
    /// Cases by what the fault caught the destination at.
    pub phases_at_fault: BTreeMap<String, usize>,
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
        Ok(Self { folder: folder.to_owned(), lines: Lines::open(folder, "replication.jsonl")? })
    }

    /// Where the sum is.
    #[must_use]
    pub fn sum(&self) -> PathBuf {
        self.folder.join("replication.json")
    }

    /// The newest result of each case.
    #[must_use]
    pub fn newest(&self) -> BTreeMap<String, CaseResult> {
        self.lines.all().into_iter().map(|result| (result.case.clone(), result)).collect()
    }

    /// Sums up what is known of this commit and writes it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn sum_up(&self) -> Result<Sum, FaultsError> {
        let newest = self.newest();
        let total = |count: fn(&CaseResult) -> usize| newest.values().map(count).sum();
        let mut phases_at_fault = BTreeMap::new();
        for case in newest.values() {
            *phases_at_fault.entry(case.phase_at_fault.clone()).or_default() += 1;
        }
        let sum = Sum {
            cases: newest.len(),
            passed: total(|case| usize::from(case.passed)),
            fsck_failures: total(|case| case.fsck_failures),
            content_mismatches: total(|case| case.content_mismatches),
            guest_io_errors: total(|case| case.guest_io_errors),
            stuck: total(|case| usize::from(case.stuck)),
            seeds: newest.values().map(|case| case.seed).collect(),
            slowest_write_ms: newest.values().map(|case| case.slowest_write_ms).max().unwrap_or_default(),
            phases_at_fault,
            commit: self.lines.commit().to_owned(),
        };
        write_sum(self.sum(), &sum)?;
        Ok(sum)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_newest_line_of_this_commit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let lines = Lines::of(folder.path().join("replication.jsonl"), "now".into());
        let results = Results { folder: folder.path().to_owned(), lines };
        let line = |case: &str, commit: &str, stuck: bool| CaseResult {
            case: case.to_owned(),
            seed: 3,
            commit: commit.to_owned(),
            passed: !stuck,
            stuck,
            slowest_write_ms: 40,
            phase_at_fault: "journal".into(),
            ..CaseResult::default()
        };
        for (case, commit, stuck) in [
            ("cut-both/3", "now", true),
            ("cut-both/3", "now", false),
            ("kill-qemu/3", "now", true),
            ("kill-source-worker/3", "before", true),
        ] {
            results.lines.append(&line(case, commit, stuck)).unwrap();
        }
        let sum = results.sum_up().unwrap();
        assert_eq!((sum.cases, sum.passed, sum.stuck, sum.slowest_write_ms), (2, 1, 1, 40));
        let written: serde_json::Value = serde_json::from_slice(&fs::read(results.sum()).unwrap()).unwrap();
        assert_eq!(written["seeds"], serde_json::json!([3]));
        assert_eq!(written["phases_at_fault"], serde_json::json!({"journal": 2}));
    }
}
