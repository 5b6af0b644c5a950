//! The protocol, model-checked over its own state machines: one VM, two workers, the register of the controllers.
//!
//! | file | what |
//! |---|---|
//! | `config` | what a run explores; the naive designs |
//! | `world` | a state |
//! | `driver` | what a worker's driver does with the rules |
//! | `steps` | what can happen, and when |
//! | `take` | what comes of it |
//! | `reach` | can the VM always still come back? |
//!
//! Any message may be late, lost, doubled or out of order, and any process slow or stopped: what was said may arrive at any time
//! from then on, and nothing has to happen. Faults are bounded by the configuration, and so are moves and failovers.
//! `cargo test -p pageport-ownership --test model -- --ignored --nocapture` runs the large configurations.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod config;
mod driver;
mod naive;
mod reach;
mod steps;
mod take;
mod world;

use std::time::Instant;

use config::Config;
use pageport_ownership::Policy;
use reach::{Judgement, explore};
use stateright::{Checker, Model};
use world::{Life, World};

/// The VM need not come back by itself where a host is lost and the bound on failovers is reached, or a person must decide;
/// or where a store is lost.
fn judge(config: &Config, world: &World) -> Judgement {
    let lost = world.hosts.iter().any(|host| host.life == Life::Lost);
    let by_hand = config.policy == Policy::KeepRunning || world.spent[1] >= config.failovers;
    // A worker without its records cannot say what became of a move, and may refuse one that it had acquired.
    let forgotten = world.spent[5] > 0;
    match (world.well(), lost && by_hand || forgotten) {
        (true, _) => Judgement::Well,
        (false, true) => Judgement::Excused,
        (false, false) => Judgement::Open,
    }
}

/// One to a line.
fn lines<A: std::fmt::Debug>(steps: &[A]) -> String {
    steps.iter().map(|step| format!("\n  {step:?}")).collect()
}

fn check(name: &str, config: Config) {
    let begin = Instant::now();
    let checker = config.checker().threads(2).spawn_bfs().join();
    let safety = begin.elapsed();
    for (property, path) in checker.discoveries() {
        let steps = path.into_actions();
        assert!(property == "the vm runs elsewhere", "{name}: violates \"{property}\":{}", lines(&steps));
    }
    let report = explore(&config, |world| judge(&config, world), |step| !step.is_fault(&config));
    println!(
        "{name}: {} unique states, {} excused, depth {}; safety {safety:.1?}, and liveness {:.1?}",
        report.states,
        report.excused,
        checker.max_depth(),
        begin.elapsed() - safety
    );
    assert_eq!(report.states, checker.unique_state_count(), "{name}");
    if let Some((steps, world)) = report.stuck {
        panic!("{name}: stuck after:{}\n{world:#?}", lines(&steps));
    }
}

#[test]
fn keep_running_one_move() {
    let config = Config { worker_crashes: 1, qemu_crashes: 1, cuts: 1, ..Config::new(Policy::KeepRunning) };
    check("keep-running, one move, 1 worker and 1 qemu crash per host, the workers cut off from each other", config);
}

#[test]
fn keep_running_with_failover() {
    let config = Config { host_crashes: 1, failovers: 1, ..Config::new(Policy::KeepRunning) };
    check("keep-running, one move, 1 host crash per host, 1 failover", config);
}

#[test]
fn self_fence_one_move() {
    let config = Config { failovers: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move, 1 failover", config);
}

#[test]
fn self_fence_with_crashes() {
    let config =
        Config { moves: 0, failovers: 1, worker_crashes: 1, losses: 1, elections: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, no move, 1 worker crash per host, 1 host lost, 1 election, 1 failover", config);
}

#[test]
fn clocks_that_drift() {
    let config = Config { moves: 0, failovers: 1, drift: 2, ..Config::new(Policy::SelfFence) };
    check("self-fence, no move, the leader's clock up to twice as fast, 1 failover", config);
}

#[test]
fn restored_from_a_backup() {
    let config = Config { restores: 1, worker_crashes: 1, ..Config::new(Policy::KeepRunning) };
    check("keep-running, one move, 1 worker crash per host, 1 restore", config);
}

#[test]
fn a_store_that_is_lost() {
    let config = Config { store_losses: 1, qemu_crashes: 1, ..Config::new(Policy::KeepRunning) };
    check("keep-running, one move, 1 qemu crash per host, 1 store lost (safety only after that)", config);
}

/// The figure of issue 3: two crashes of each kind and host, and a partition.
#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_two_crashes_each_and_a_partition() {
    let config =
        Config { worker_crashes: 2, host_crashes: 2, qemu_crashes: 2, cuts: 1, ..Config::new(Policy::KeepRunning) };
    check("keep-running, one move; 2 worker, 2 host, 2 qemu crashes per host, 1 partition", config);
}

#[test]
#[ignore = "a full space that takes many minutes: run with --ignored"]
fn large_keep_running_with_two_failovers() {
    let config = Config {
        worker_crashes: 2,
        host_crashes: 2,
        qemu_crashes: 1,
        failovers: 2,
        cuts: 1,
        ..Config::new(Policy::KeepRunning)
    };
    check("keep-running, one move; 2 worker, 2 host, 1 qemu crash per host, 2 failovers, 1 partition", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_keep_running_there_and_back() {
    let config = Config {
        moves: 2,
        worker_crashes: 1,
        host_crashes: 1,
        qemu_crashes: 1,
        failovers: 1,
        ..Config::new(Policy::KeepRunning)
    };
    check("keep-running, there and back; 1 worker, 1 host, 1 qemu crash per host, 1 failover", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_self_fence_with_host_crashes() {
    let config = Config { host_crashes: 1, failovers: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 host crash per host, 1 failover", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_self_fence_with_worker_crashes() {
    let config = Config { worker_crashes: 1, failovers: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 worker crash per host, 1 failover", config);
}

#[test]
#[ignore = "a full space that takes many minutes: run with --ignored"]
fn large_self_fence_with_crashes_and_a_partition() {
    let config = Config { worker_crashes: 1, host_crashes: 1, failovers: 1, cuts: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 worker, 1 host crash per host, 1 failover, 1 partition", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_self_fence_with_an_election_and_a_loss() {
    let config = Config { losses: 1, elections: 1, failovers: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 host lost, 1 election, 1 failover", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_self_fence_with_stopped_keepers() {
    let config = Config { keeper_stops: 1, failovers: 1, drift: 2, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 keeper stopped per host (guarded), clocks drift by 2, 1 failover", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_restore() {
    let config = Config {
        worker_crashes: 1,
        host_crashes: 1,
        qemu_crashes: 1,
        failovers: 1,
        restores: 1,
        ..Config::new(Policy::KeepRunning)
    };
    check("keep-running, one move; 1 worker, 1 host, 1 qemu crash per host, 1 failover, 1 restore", config);
}

#[test]
#[ignore = "a full space that takes minutes: run with --ignored"]
fn large_restore_of_self_fence() {
    let config = Config { failovers: 1, restores: 1, ..Config::new(Policy::SelfFence) };
    check("self-fence, one move; 1 failover, 1 restore", config);
}
