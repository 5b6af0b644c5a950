//! The naive designs: each must fail, and in the way that is told of it.

use pageport_ownership::Policy::{self, KeepRunning, SelfFence};
use stateright::{Checker, HasDiscoveries, Model};

use crate::config::{Config, Naive};
use crate::reach::explore;
use crate::{judge, lines};

#[derive(Debug, PartialEq, Eq)]
enum Fails {
    TwoRun,
    GoesBack,
    Stuck,
}

fn faults(policy: Policy) -> Config {
    Config { moves: 0, failovers: 1, ..Config::new(policy) }
}

fn must_fail(naive: Naive, expected: Fails, config: Config) {
    let config = config.without(naive);
    let failed = config.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let violated = |property| failed.discovery(property).map(|path| path.into_actions());
    let (fails, steps) = if let Some(steps) = violated("at most one runs") {
        (Fails::TwoRun, steps)
    } else if let Some(steps) = violated("no memory comes back after a newer one ran") {
        (Fails::GoesBack, steps)
    } else {
        let report = explore(&config, |world| judge(&config, world), |step| !step.is_fault(&config));
        (Fails::Stuck, report.stuck.map(|(steps, _)| steps).unwrap_or_else(|| panic!("{naive:?} does not fail")))
    };
    println!("{naive:?}: {fails:?} in {} steps, {} states:{}", steps.len(), failed.unique_state_count(), lines(&steps));
    assert_eq!(fails, expected, "{naive:?}");
}

#[test]
fn controllers_that_decide_a_cancel() {
    must_fail(Naive::ControllersCancel, Fails::Stuck, Config::new(KeepRunning));
}

#[test]
fn a_revocation_that_is_not_durable() {
    must_fail(Naive::RevokeInMemory, Fails::Stuck, Config { worker_crashes: 1, ..Config::new(KeepRunning) });
}

#[test]
fn a_resume_before_the_durable_acquisition() {
    must_fail(Naive::ResumeBeforeAcquire, Fails::GoesBack, Config { worker_crashes: 1, ..Config::new(KeepRunning) });
}

#[test]
fn a_release_that_is_sent_before_its_record() {
    must_fail(Naive::ReleaseBeforeRecord, Fails::TwoRun, Config { worker_crashes: 1, ..Config::new(KeepRunning) });
}

#[test]
fn a_record_that_starts_the_vm_after_a_reboot() {
    must_fail(Naive::RecordStarts, Fails::TwoRun, Config { host_crashes: 1, ..faults(KeepRunning) });
}

#[test]
fn a_start_permission_without_a_nonce() {
    let config = Config { qemu_crashes: 1, host_crashes: 1, ..faults(KeepRunning) };
    must_fail(Naive::NoNonce, Fails::TwoRun, config);
}

#[test]
fn an_authorisation_as_a_plain_message() {
    let config = Config { moves: 1, host_crashes: 1, ..faults(KeepRunning) };
    must_fail(Naive::PlainAuthorisation, Fails::TwoRun, config);
}

#[test]
fn no_refused_record() {
    must_fail(Naive::NoRefused, Fails::Stuck, Config { qemu_crashes: 1, ..Config::new(KeepRunning) });
}

#[test]
fn no_relay_with_the_worker_link_cut() {
    must_fail(Naive::NoRelay, Fails::Stuck, Config { cuts: 1, ..Config::new(KeepRunning) });
}

#[test]
fn a_destination_that_resumes_without_its_lease() {
    must_fail(Naive::ResumeWithoutLease, Fails::TwoRun, Config { moves: 1, ..faults(SelfFence) });
}

#[test]
fn a_lease_that_the_worker_enforces() {
    must_fail(Naive::WorkerEnforces, Fails::TwoRun, faults(SelfFence));
}

#[test]
fn a_keeper_that_is_stopped_and_not_guarded() {
    must_fail(Naive::KeeperUnguarded, Fails::TwoRun, Config { keeper_stops: 1, ..faults(SelfFence) });
}

#[test]
fn a_deadline_that_spares_stopped_guests() {
    must_fail(Naive::DeadlineSparesPaused, Fails::TwoRun, Config { moves: 1, ..faults(SelfFence) });
}

#[test]
fn a_controllers_lease_without_fence_latency() {
    must_fail(Naive::ShortLease, Fails::TwoRun, Config { drift: 2, ..faults(SelfFence) });
}

#[test]
fn restored_controllers_that_believe_their_backup() {
    must_fail(Naive::BelieveBackup, Fails::TwoRun, Config { host_crashes: 1, restores: 1, ..faults(KeepRunning) });
}

#[test]
fn a_lease_that_runs_from_its_answer() {
    must_fail(Naive::LeaseFromAnswer, Fails::TwoRun, faults(SelfFence));
}

#[test]
fn a_lease_for_any_epoch() {
    must_fail(Naive::LeaseForAnyEpoch, Fails::TwoRun, Config { moves: 1, ..faults(SelfFence) });
}

#[test]
fn an_authorisation_for_who_may_have_refused() {
    let config = Config { store_losses: 1, ..Config::new(KeepRunning) };
    must_fail(Naive::AuthorisesTheForgetful, Fails::TwoRun, config);
}

#[test]
fn a_new_leader_that_does_not_wait() {
    must_fail(Naive::NoWait, Fails::TwoRun, Config { elections: 1, ..faults(SelfFence) });
}

#[test]
fn grants_while_a_failover_is_under_way() {
    must_fail(Naive::NoHold, Fails::TwoRun, faults(SelfFence));
}

#[test]
fn a_boot_under_a_lease_that_is_not_stopped_first() {
    must_fail(Naive::BootsRunning, Fails::TwoRun, faults(SelfFence));
}

#[test]
fn a_move_from_an_owner_that_has_not_acquired() {
    let config = Config { moves: 1, host_crashes: 1, ..faults(KeepRunning) };
    must_fail(Naive::OrderUnconfirmed, Fails::Stuck, config);
}
