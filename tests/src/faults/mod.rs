//! `make faults`: every fault at every point of a move, once, on real processes.
//!
//! ```text
//! plan ─▶ which pairs ─▶ arena (a lab, used again) ─▶ case: hold, strike, let go, heal ─▶ judge ─▶ results ─▶ table
//!                                    sniffer ─▶ witness: who executed ──────────────────────┘
//! ```
//! | file | what |
//! |---|---|
//! | `plan` | points, faults, policies, cases |
//! | `arena`, `case` | the lab and its guest; one fault at one point |
//! | `sniffer`, `witness` | heartbeats at QEMU's network devices, and what follows from them |
//! | `judge`, `leftovers` | what must hold after healing |
//! | `results`, `table` | what is kept, and shown |
//!
//! Cases run in lanes, each with a lab of its own. After a case that is not passed its lab is taken down, its logs are kept, and a new one is started. Needs namespaces.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pageport_common::error::with_causes;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokio::task::{JoinSet, LocalSet};

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
pub use error::FaultsError;
pub use plan::{Isolation, Pair, matrix, short_set};
pub use results::{CaseResult, Matrix};
pub use table::{LEGEND, render};

use crate::kept::unix_ms;
use crate::lab::guest::{GuestImages, SMALL};
use arena::Arena;
use judge::Verdict;
use results::Results;

/// How long a stopped process stays stopped: longer than a silent connection lives, and than a lease with all that the controllers
/// add to it.
pub const LEASE: Duration = Duration::from_secs(12);
/// Labs that work side by side: one has its cores to itself for most of a case, which is waiting.
pub const LANES: usize = 2;

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
    /// How many labs work side by side.
    pub lanes: usize,
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

/// Runs the cases, in as many lanes as there are to be: each has a lab of its own and takes the next case that is due.
///
/// # Errors
/// When there can be no lab, or results cannot be kept. A case that is not passed is no error.
pub async fn run(config: &FaultsConfig, tell: impl FnMut(News<'_>) + 'static) -> Result<Outcome, FaultsError> {
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
    let run = Rc::new(Run {
        config: config.clone(),
        results,
        images: GuestImages::build(SMALL)?,
        of: due.len(),
        due: RefCell::new(due),
        tell: RefCell::new(Box::new(tell)),
    });
    // Leaving this drops the lanes, and with them their labs.
    let mut lanes = JoinSet::new();
    let all = LocalSet::new();
    for _ in 0..config.lanes.clamp(1, run.of.max(1)) {
        lanes.spawn_local_on(lane(Rc::clone(&run)), &all);
    }
    let ended = async {
        while let Some(lane) = lanes.join_next().await {
            lane.map_err(FaultsError::Lane)??;
        }
        Ok::<_, FaultsError>(())
    };
    all.run_until(ended).await?;
    let results = &run.results;
    let (newest, matrix) = (results.newest(), results.sum_up(&plan::matrix())?);
    let ours = config.pairs.iter().filter_map(|pair| newest.get(&pair.to_string()));
    let failed = ours.filter(|result| !result.passed).cloned().collect();
    Ok(Outcome { matrix, newest, failed, files: [results.lines.path().to_owned(), results.matrix()] })
}

/// Who is told what goes on.
type Teller = dyn FnMut(News<'_>);

/// What lanes share.
struct Run {
    config: FaultsConfig,
    results: Results,
    images: GuestImages,
    of: usize,
    due: RefCell<Vec<Pair>>,
    tell: RefCell<Box<Teller>>,
}

impl Run {
    /// The next case and its number, preferably one for the guest that is there.
    fn next(&self, isolation: Option<Isolation>) -> Option<(usize, Pair)> {
        let mut due = self.due.borrow_mut();
        let fits = |pair: &Pair| isolation.is_none_or(|isolation| pair.isolation == isolation);
        let index = due.iter().position(fits).or((!due.is_empty()).then_some(0))?;
        let pair = due.remove(index);
        Some((self.of - due.len(), pair))
    }

    fn tell(&self, news: News<'_>) {
        (self.tell.borrow_mut())(news);
    }
}

async fn lane(run: Rc<Run>) -> Result<(), FaultsError> {
    let mut arena: Option<Arena> = None;
    while let Some((number, pair)) = run.next(arena.as_ref().map(|arena| arena.isolation)) {
        let mut ready = match arena.take().filter(|arena| arena.isolation == pair.isolation) {
            Some(arena) => arena,
            None => {
                run.tell(News::Lab);
                Arena::open(&run.images, pair.isolation).await?
            }
        };
        run.tell(News::Begins { number, of: run.of, pair });
        let result = run_case(&mut ready, pair, &run.config, run.results.lines.commit()).await;
        run.results.lines.append(&result)?;
        run.tell(News::Ended(&result));
        if result.passed {
            arena = Some(ready);
        }
    }
    Ok(())
}

async fn run_case(arena: &mut Arena, pair: Pair, config: &FaultsConfig, commit: &str) -> CaseResult {
    let (began, began_unix_ms) = (Instant::now(), unix_ms());
    let (verdict, route, leader) = match case::strike(arena, pair, config.lease).await {
        Ok(struck) => {
            let verdict = judge::judge(arena, &struck).await;
            (verdict, format!("{} to {}", struck.source, struck.destination), struck.leader)
        }
        Err(error) => {
            let complaints = vec![format!("could not be struck: {}", with_causes(&error))];
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
        fenced: verdict.fenced,
        double_running: verdict.double_running,
        lost_vm: verdict.lost_vm,
        orphans: verdict.orphans,
        complaints: verdict.complaints,
        began_unix_ms,
        duration_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        logs: arena.logs().display().to_string(),
    }
}
