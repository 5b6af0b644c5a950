//! The simulation in small: what `make simulate` runs a hundred thousand times.

#![allow(clippy::unwrap_used, reason = "a test says what is wrong by failing")]

use pageport_sim::schedule::run;
use pageport_sim::world::Flaw;

#[test]
fn everything_holds_in_the_first_schedules() {
    let verdicts: Vec<_> = (1..=400).map(|seed| run(seed, Flaw::None, false)).collect();
    let failed: Vec<_> = verdicts.iter().filter(|verdict| !verdict.violations.is_empty()).collect();
    assert!(failed.is_empty(), "pageport-sim replay SEED shows how: {failed:#?}");
    // They are not schedules in which nothing happens.
    assert!(verdicts.iter().map(|verdict| verdict.moves.1).sum::<usize>() > 100, "moves are carried out");
    assert!(verdicts.iter().map(|verdict| verdict.takeovers).sum::<usize>() > 5, "vms are taken over");
}

#[test]
fn a_seed_gives_the_same_trace_again() {
    for seed in 1..=30 {
        let (first, again) = (run(seed, Flaw::None, true), run(seed, Flaw::None, true));
        assert_eq!(first.trace, again.trace, "seed {seed}");
        assert_eq!(first.digest, again.digest, "seed {seed}");
        assert!(first.facts > 20, "seed {seed}");
    }
    assert_ne!(run(1, Flaw::None, false).digest, run(2, Flaw::None, false).digest);
}

/// A simulator that finds nothing proves nothing: each of these must be noticed, by the invariant that is about it.
fn noticed(flaw: Flaw, by: &[&str]) {
    const SEEDS: u64 = 3000;
    let found = (1..=SEEDS).find_map(|seed| run(seed, flaw, false).violations.first().cloned());
    let violation = found.unwrap_or_else(|| panic!("{flaw:?} is not noticed in {SEEDS} schedules"));
    assert!(by.contains(&violation.invariant), "{flaw:?} is noticed as {violation:?}");
}

#[test]
fn a_keeper_that_never_fires_is_noticed() {
    noticed(Flaw::DeafKeeper, &["one-runs"]);
}

#[test]
fn a_leader_that_counts_leases_too_short_is_noticed() {
    noticed(Flaw::ShortLease, &["one-runs"]);
}

#[test]
fn a_worker_whose_records_are_not_durable_is_noticed() {
    noticed(Flaw::LazyRecord, &["epochs-grow", "one-runs", "memory-goes-on", "settles"]);
}

#[test]
fn a_controller_whose_log_is_not_durable_is_noticed() {
    noticed(Flaw::LazyLog, &["one-history", "acknowledged", "one-leader", "epochs-grow", "no-panic"]);
}

#[test]
fn a_release_before_its_record_is_noticed() {
    noticed(Flaw::EarlyRelease, &["one-runs", "epochs-grow", "memory-goes-on", "settles"]);
}
