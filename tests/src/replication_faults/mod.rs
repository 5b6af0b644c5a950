//! `make faults-replication`: everything that can end or fill up strikes standing replication at moments drawn from seeds, on real processes.
//!
//! ```text
//! plan ─▶ which cases ─▶ arena (a lab, used again) ─▶ case: history, cue, fault, crash, heal, quiet ─▶ results
//!                                                           ledger: what the host had heard of the history
//! ```
//! | file | what |
//! |---|---|
//! | `plan` | faults, seeds, moments |
//! | `arena` | the lab, its guest, what the controllers say of the replica |
//! | `cue`, `fault` | the moment; the fault and its end |
//! | `crash`, `image` | the replica as a crash leaves it; what an image is worth |
//! | `ledger` | what a recovery point must hold |
//! | `case` | one case, judged |
//! | `results` | what is kept |
//!
//! After a case that is not passed its lab is taken down, its logs are kept, and a new one is started. Needs namespaces.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

mod arena;
mod case;
pub mod crash;
mod cue;
mod fault;
pub mod image;
pub mod ledger;
mod plan;
mod results;

pub use plan::{Case, cases, short_set};
pub use results::{CaseResult, Sum};

use crate::faults::{FaultsError, Passed};
use crate::kept::unix_ms;
use crate::lab::guest::{GuestImages, SMALL};
use arena::Arena;
use results::Results;

/// Seeds of each fault in a whole run; the turned-round direction has a third of them.
pub const SEEDS: u64 = 6;

/// What is to be run.
#[derive(Clone, Debug)]
pub struct ReplicationFaultsConfig {
    /// Which cases, in this order.
    pub cases: Vec<Case>,
    /// Those that are passed at this commit.
    pub passed: Passed,
    /// Where results go.
    pub folder: PathBuf,
}

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum News<'a> {
    /// A lab is started.
    Lab,
    /// A case begins.
    Begins {
        /// Its number in this run, from 1.
        number: usize,
        /// How many there are.
        of: usize,
        /// Which.
        case: Case,
    },
    /// A case has ended.
    Ended(&'a CaseResult),
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The sum, as in `replication.json`.
    pub sum: Sum,
    /// Those of this run's cases that are not passed.
    pub failed: Vec<CaseResult>,
    /// Where it was written.
    pub files: [PathBuf; 2],
}

/// The cases that any of the patterns means; all, when there is none.
///
/// # Errors
/// When a pattern means none.
pub fn select(all: &[Case], patterns: &[String]) -> Result<Vec<Case>, FaultsError> {
    if let Some(pattern) = patterns.iter().find(|pattern| !all.iter().any(|case| case.is_meant_by(pattern))) {
        return Err(FaultsError::NoSuchPair { pattern: pattern.clone() });
    }
    let meant = |case: &&Case| patterns.is_empty() || patterns.iter().any(|pattern| case.is_meant_by(pattern));
    Ok(all.iter().filter(meant).copied().collect())
}

/// The newest result of every case, for the commit that is checked out.
///
/// # Errors
/// When the folder cannot be made.
pub fn known(folder: &Path) -> Result<BTreeMap<String, CaseResult>, FaultsError> {
    Ok(Results::open(folder)?.newest())
}

/// Runs the cases, one after the other.
///
/// # Errors
/// When there can be no lab, or results cannot be kept. A case that is not passed is no error.
pub async fn run(config: &ReplicationFaultsConfig, mut tell: impl FnMut(News<'_>)) -> Result<Outcome, FaultsError> {
    if !crate::netns::available() {
        return Err(FaultsError::NoNamespaces);
    }
    let results = Results::open(&config.folder)?;
    let known = results.newest();
    let is_due = |case: &&Case| {
        config.passed == Passed::Again || !known.get(&case.to_string()).is_some_and(|result| result.passed)
    };
    let due: Vec<Case> = config.cases.iter().filter(is_due).copied().collect();
    let images = GuestImages::build(SMALL)?;
    let mut arena = None;
    for (number, case) in (1..).zip(&due) {
        let mut ready = match arena.take() {
            Some(arena) => arena,
            None => {
                tell(News::Lab);
                Arena::open(&images).await?
            }
        };
        tell(News::Begins { number, of: due.len(), case: *case });
        let result = run_case(&mut ready, *case, results.lines.commit()).await;
        results.lines.append(&result)?;
        results.sum_up()?;
        tell(News::Ended(&result));
        arena = result.passed.then_some(ready);
    }
    let (newest, sum) = (results.newest(), results.sum_up()?);
    let ours = config.cases.iter().filter_map(|case| newest.get(&case.to_string()));
    let failed = ours.filter(|result| !result.passed).cloned().collect();
    Ok(Outcome { sum, failed, files: [results.lines.path().to_owned(), results.sum()] })
}

async fn run_case(arena: &mut Arena, case: Case, commit: &str) -> CaseResult {
    let (began, began_unix_ms, strike) = (Instant::now(), unix_ms(), case.strike());
    let milliseconds = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let result = case::run(arena, case).await;
    CaseResult {
        case: case.to_string(),
        seed: case.seed,
        commit: commit.to_owned(),
        passed: result.complaints.is_empty(),
        cue: strike.cue.name().to_owned(),
        delay_ms: milliseconds(strike.delay),
        lasts_ms: milliseconds(strike.lasts),
        began_unix_ms,
        duration_ms: milliseconds(began.elapsed()),
        logs: arena.lab.logs().display().to_string(),
        ..result
    }
}
