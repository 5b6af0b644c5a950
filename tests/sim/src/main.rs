//! `pageport-sim`: many seeds, or one again.

use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, Subcommand};
use pageport_sim::schedule::{self, Verdict};
use pageport_sim::world::Flaw;
use serde::{Deserialize, Serialize};

/// Runs controllers and workers in virtual time, under faults drawn from a seed, and checks what must always hold.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Commands,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Runs many seeds. Exits with 1 if anything did not hold; `replay` shows how it came to that.
    Run {
        /// The first seed.
        #[arg(long, default_value_t = 1)]
        first_seed: u64,
        /// How many seeds.
        #[arg(long, default_value_t = 1000)]
        schedules: u64,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Appends what came of every 5000 seeds here, as JSON lines; what is there and held is not run again for the same commit.
        #[arg(long, value_name = "FILE")]
        results: Option<PathBuf>,
        /// What the results are of.
        #[arg(long, default_value = "unknown")]
        commit: String,
    },
    /// Runs one seed again and prints what happened.
    Replay {
        /// The seed.
        seed: u64,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Commands::Run { first_seed, schedules, jobs, results, commit } => {
            let last = first_seed.saturating_add(schedules);
            let results = Results { path: results, commit };
            run(first_seed..last, jobs.max(1), &results)
        }
        Commands::Replay { seed } => replay(seed),
    }
}

fn replay(seed: u64) -> anyhow::Result<ExitCode> {
    let verdict = schedule::run(seed, Flaw::None, true);
    let mut out = std::io::stdout().lock();
    for line in &verdict.trace {
        writeln!(out, "{line}")?;
    }
    for violation in &verdict.violations {
        writeln!(out, "{} us: {}: {}", violation.at_us, violation.invariant, violation.what)?;
    }
    writeln!(out, "seed {seed}: digest {:016x}, {} facts", verdict.digest, verdict.facts)?;
    Ok(if verdict.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Seeds whose results are written together.
const CHUNK: u64 = 5000;

/// What came of some seeds; a line of the results.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Sum {
    commit: String,
    first_seed: u64,
    schedules: u64,
    facts: u64,
    simulated_s: u64,
    moves_ordered: u64,
    moves_completed: u64,
    takeovers: u64,
    double_running: u64,
    violations: u64,
    failed_seeds: Vec<u64>,
    seconds: f64,
}

impl Sum {
    fn add(&mut self, verdict: &Verdict) {
        self.schedules += 1;
        self.facts += verdict.facts;
        self.simulated_s += verdict.simulated_ms / 1000;
        self.moves_ordered += verdict.moves.0 as u64;
        self.moves_completed += verdict.moves.1 as u64;
        self.takeovers += verdict.takeovers as u64;
        self.violations += verdict.violations.len() as u64;
        self.double_running += verdict.violations.iter().filter(|it| it.invariant == "one-runs").count() as u64;
        if !verdict.violations.is_empty() {
            self.failed_seeds.push(verdict.seed);
        }
    }

    fn join(&mut self, other: &Self) {
        self.schedules += other.schedules;
        self.facts += other.facts;
        self.simulated_s += other.simulated_s;
        self.moves_ordered += other.moves_ordered;
        self.moves_completed += other.moves_completed;
        self.takeovers += other.takeovers;
        self.double_running += other.double_running;
        self.violations += other.violations;
        self.failed_seeds.extend(&other.failed_seeds);
        self.seconds += other.seconds;
    }
}

/// Where results are kept.
struct Results {
    path: Option<PathBuf>,
    commit: String,
}

impl Results {
    /// The seeds of this chunk, if they were run before and all held.
    fn held(&self, seeds: &Range<u64>) -> Option<Sum> {
        let text = std::fs::read_to_string(self.path.as_ref()?).ok()?;
        let sums = text.lines().filter_map(|line| serde_json::from_str::<Sum>(line).ok());
        let of = |sum: &Sum| sum.commit == self.commit && sum.first_seed == seeds.start;
        sums.filter(of).find(|sum| sum.schedules == seeds.end - seeds.start && sum.violations == 0)
    }

    fn append(&self, sum: &Sum) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let context = || format!("append to {}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(context)?;
        }
        let mut line = serde_json::to_vec(sum)?;
        line.push(b'\n');
        let mut file = File::options().create(true).append(true).open(path).with_context(context)?;
        file.write_all(&line).with_context(context)
    }
}

fn run(seeds: Range<u64>, jobs: usize, results: &Results) -> anyhow::Result<ExitCode> {
    // A panic of the simulated is told as a violation, with its text.
    std::panic::set_hook(Box::new(|_| {}));
    let mut total = Sum { commit: results.commit.clone(), first_seed: seeds.start, ..Sum::default() };
    let mut terminal = std::io::stderr();
    let mut first = seeds.start;
    while first < seeds.end {
        let chunk = first..seeds.end.min(first + CHUNK);
        first = chunk.end;
        let sum = match results.held(&chunk) {
            Some(held) => held,
            None => {
                let sum = run_chunk(chunk, jobs, &results.commit);
                results.append(&sum)?;
                sum
            }
        };
        total.join(&sum);
        let done = total.schedules;
        let rate = done as f64 / total.seconds.max(0.001);
        writeln!(terminal, "{done} of {} schedules, {rate:.0} a second", seeds.end - seeds.start)?;
    }
    writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&total)?)?;
    Ok(if total.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_chunk(seeds: Range<u64>, jobs: usize, commit: &str) -> Sum {
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Sum { commit: commit.to_owned(), first_seed: seeds.start, ..Sum::default() });
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let verdict = schedule::run(seed, Flaw::None, false);
                    sum.lock().unwrap_or_else(PoisonError::into_inner).add(&verdict);
                    for violation in &verdict.violations {
                        let mut terminal = std::io::stderr().lock();
                        // A terminal that is gone is no reason to stop.
                        let _ = writeln!(terminal, "seed {seed}: {}: {}", violation.invariant, violation.what);
                    }
                }
            });
        }
    });
    let mut sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    sum.seconds = began.elapsed().as_secs_f64();
    sum.failed_seeds.sort_unstable();
    sum
}
