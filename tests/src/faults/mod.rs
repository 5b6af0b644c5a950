//! `make faults`: every fault at every point of a move, once, on real processes.
//!
//! ```text
//! plan ─▶ which pairs ─▶ arena (a lab, used again) ─▶ case: hold, strike, let go, heal ─▶ judge ─▶ results ─▶ table
//!                                    sniffer ─▶ witness: who executed ──────────────────────┘
//! ```
//! | file | what |
//! |---|---|
//! | `plan` | points, faults, pairs |
//! | `arena`, `case` | the lab and its guest; one fault at one point |
//! | `sniffer`, `witness` | heartbeats at QEMU's network devices, and what follows from them |
//! | `judge`, `leftovers` | what must hold after healing |
//! | `results`, `table` | what is kept, and shown |
//!
//! After a case that is not passed the lab is taken down, its logs are kept, and a new one is started. Needs namespaces.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

pub mod arena;
mod case;
pub mod error;
mod judge;
mod leftovers;
mod plan;
mod results;
pub mod sniffer;
mod table;
pub mod witness;

pub use arena::HEARTBEAT;
pub use error::{FaultsError, chain};
pub use plan::{Pair, matrix, short_set};
pub use results::{CaseResult, Matrix};
pub use table::{LEGEND, render};

use crate::lab::guest::{GuestImages, SMALL};
use arena::Arena;
use judge::Verdict;
use results::{Results, unix_ms};

/// How long a stopped process stays stopped: longer than a lease.
pub const LEASE: Duration = Duration::from_secs(20);

/// Whether what is passed already is run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// It is not.
    Skip,
    /// It is.
    Again,
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct FaultsConfig {
    /// Which pairs.
    pub pairs: Vec<Pair>,
    /// Those that are passed at this commit.
    pub passed: Passed,
    /// How long a stopped process stays stopped.
    pub lease: Duration,
    /// What the order is drawn from; 0 is the order of the table.
    pub seed: u64,
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
        pair: Pair,
    },
    /// A case has ended.
    Ended(&'a CaseResult),
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The sum, as in `matrix.json`.
    pub matrix: Matrix,
    /// The newest result of every pair of this commit.
    pub newest: std::collections::BTreeMap<String, CaseResult>,
    /// Those of this run's pairs that are not passed.
    pub failed: Vec<CaseResult>,
    /// Where it was written.
    pub files: [PathBuf; 2],
}

/// The pairs that any of the patterns means; all, when there is none.
///
/// # Errors
/// When a pattern means none.
pub fn select(patterns: &[String]) -> Result<Vec<Pair>, FaultsError> {
    let all = matrix();
    for pattern in patterns {
        if !all.iter().any(|pair| pair.is_meant_by(pattern)) {
            return Err(FaultsError::NoSuchPair { pattern: pattern.clone() });
        }
    }
    let meant = |pair: &Pair| patterns.is_empty() || patterns.iter().any(|pattern| pair.is_meant_by(pattern));
    Ok(all.into_iter().filter(meant).collect())
}

/// The newest result of every pair, for the commit that is checked out.
///
/// # Errors
/// When the folder cannot be made.
pub fn known(folder: &std::path::Path) -> Result<std::collections::BTreeMap<String, CaseResult>, FaultsError> {
    Ok(Results::open(folder)?.newest())
}

/// Runs the pairs one after the other.
///
/// # Errors
/// When there can be no lab, or results cannot be kept. A case that is not passed is no error.
pub async fn run(config: &FaultsConfig, mut tell: impl FnMut(News<'_>)) -> Result<Outcome, FaultsError> {
    if !crate::netns::available() {
        return Err(FaultsError::NoNamespaces);
    }
    let results = Results::open(&config.folder)?;
    let known = results.newest();
    let is_due = |pair: &&Pair| {
        config.passed == Passed::Again || !known.get(&pair.to_string()).is_some_and(|result| result.passed)
    };
    let mut due: Vec<Pair> = config.pairs.iter().filter(is_due).copied().collect();
    if config.seed != 0 {
        due.shuffle(&mut StdRng::seed_from_u64(config.seed));
    }
    let images = GuestImages::build(SMALL)?;
    let mut arena: Option<Arena> = None;
    for (number, pair) in (1..).zip(&due) {
        let mut ready = match arena.take() {
            Some(arena) => arena,
            None => {
                tell(News::Lab);
                Arena::open(&images).await?
            }
        };
        tell(News::Begins { number, of: due.len(), pair: *pair });
        let result = run_case(&mut ready, *pair, config, results.commit()).await;
        results.append(&result)?;
        tell(News::Ended(&result));
        if result.passed {
            arena = Some(ready);
        }
    }
    let (newest, matrix) = (results.newest(), results.sum_up(&plan::matrix())?);
    let ours = config.pairs.iter().filter_map(|pair| newest.get(&pair.to_string()));
    let failed = ours.filter(|result| !result.passed).cloned().collect();
    Ok(Outcome { matrix, newest, failed, files: [results.lines(), results.matrix()] })
}

async fn run_case(arena: &mut Arena, pair: Pair, config: &FaultsConfig, commit: &str) -> CaseResult {
    let (began, began_unix_ms) = (Instant::now(), unix_ms());
    let (verdict, route, leader) = match case::strike(arena, pair, config.lease).await {
        Ok(struck) => {
            let verdict = judge::judge(arena, &struck).await;
            (verdict, format!("{} to {}", struck.source, struck.destination), struck.leader)
        }
        Err(error) => {
            let complaints = vec![format!("could not be struck: {}", chain(&error))];
            (Verdict { complaints, ..Verdict::default() }, String::new(), String::new())
        }
    };
    CaseResult {
        pair: pair.to_string(),
        commit: commit.to_owned(),
        seed: config.seed,
        passed: verdict.complaints.is_empty(),
        outcome: verdict.outcome,
        outcome_reason: verdict.reason,
        route,
        owner: verdict.owner,
        leader,
        crashed: verdict.crashed,
        double_running: verdict.double_running,
        lost_vm: verdict.lost_vm,
        orphans: verdict.orphans,
        complaints: verdict.complaints,
        began_unix_ms,
        duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        logs: arena.logs().display().to_string(),
    }
}
