//! `pageport-sim`: many seeds, or one again.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, Subcommand};
use pageport_sim::schedule::{self, Verdict};
use pageport_sim::world::Flaw;

/// Runs controllers and workers in virtual time, under faults drawn from a seed, and checks what must always hold.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Commands,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Runs many seeds. Exits with 1 if anything did not hold; says how to look at it.
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
        /// Where the sum goes, as JSON.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Runs one seed again and prints what happened.
    Replay {
        /// The seed.
        seed: u64,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Commands::Run { first_seed, schedules, jobs, out } => run(first_seed, schedules, jobs.max(1), out),
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

/// The sum of a run.
#[derive(Debug, Default, serde::Serialize)]
struct Sum {
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
}

fn run(first_seed: u64, schedules: u64, jobs: usize, out: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    const PROGRESS_EVERY: u64 = 1000;
    let began = Instant::now();
    let next = AtomicU64::new(first_seed);
    let sum = Mutex::new(Sum { first_seed, ..Sum::default() });
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first_seed.saturating_add(schedules) {
                        return;
                    }
                    let verdict = schedule::run(seed, Flaw::None, false);
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    sum.add(&verdict);
                    let mut terminal = std::io::stderr().lock();
                    for violation in &verdict.violations {
                        // A terminal that is gone is no reason to stop.
                        let _ = writeln!(terminal, "seed {seed}: {}: {}", violation.invariant, violation.what);
                    }
                    if sum.schedules.is_multiple_of(PROGRESS_EVERY) {
                        let rate = sum.schedules as f64 / began.elapsed().as_secs_f64();
                        let _ = writeln!(terminal, "{} of {schedules} schedules, {rate:.0} a second", sum.schedules);
                    }
                }
            });
        }
    });
    let mut sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    sum.seconds = began.elapsed().as_secs_f64();
    sum.failed_seeds.sort_unstable();
    let text = serde_json::to_string_pretty(&sum)?;
    writeln!(std::io::stdout(), "{text}")?;
    if let Some(path) = out {
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(if sum.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
