//! How protected replicas stand: what the VM's worker reports, and what is known when it does not. Pure.
//!
//! | the VM's worker | newest point, and its age |
//! |---|---|
//! | is connected and reports on it | its word; the age grows with the age of the report |
//! | is not connected | its last word, growing all the same |
//! | has said nothing to this leader, or knows no point yet | the word of the worker that holds the replica; the age then is the difference of two clocks |
//!
//! A target is missed when that age is above it. It is not missed before the first point, which the first copy is waiting for,
//! nor while the VM is not ordered to run: then nothing changes.

use std::time::Duration;

use pageport_proto::v1::{self, ReplicationPhase};
use pageport_proto::{SiteName, VmId, WorkerName};
use tokio::time::Instant;

use super::view::View;
use crate::model::state::{Power, Replica, Vm};

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl View<'_> {
    /// How the replica's standing replication stands; [`None`]: it has none.
    pub fn replication(&self, id: VmId, vm: &Vm, site: &SiteName, replica: &Replica) -> Option<v1::ReplicationStatus> {
        let protection = replica.protection?;
        let owner = vm.ownership.owner().0;
        let heard = self.observations.last(owner);
        let reported = heard.and_then(|heard| Some((heard.replication(id, site)?.status.clone()?, heard.at)));
        let mut status = match reported.clone() {
            Some((status, at)) if status.newest.is_some() => {
                v1::ReplicationStatus { lag_ms: status.lag_ms.saturating_add(self.ms_since(at)), ..status }
            }
            other => self.as_the_holder_says(id, &replica.worker, other.map(|(status, _)| status).unwrap_or_default()),
        };
        if reported.is_none() || self.is_away(owner) {
            status.set_phase(ReplicationPhase::Waiting);
            (status.rate_bps, status.eta_low_ms, status.eta_high_ms) = (0, 0, 0);
        }
        let runs = vm.power == Power::Run;
        let rpo_missed = runs && status.newest.is_some() && status.lag_ms > protection.terms.rpo_ms;
        let away = |worker: &WorkerName| format!("worker \"{worker}\" is not connected");
        let problem = if self.is_away(owner) {
            away(owner)
        } else if self.is_away(&replica.worker) {
            away(&replica.worker)
        } else if !status.problem.is_empty() {
            status.problem
        } else if !runs {
            "the vm is not ordered to run".to_owned()
        } else if reported.is_none() {
            format!("worker \"{owner}\" has not said yet how it stands")
        } else {
            String::new()
        };
        Some(v1::ReplicationStatus { rpo_missed, problem, ..status })
    }

    /// The holder knows its newest point also while nobody replicates to it.
    fn as_the_holder_says(
        &self,
        id: VmId,
        holder: &WorkerName,
        status: v1::ReplicationStatus,
    ) -> v1::ReplicationStatus {
        let newest =
            self.observations.last(holder).and_then(|heard| Some((heard, *heard.vm(id)?.recovery_points.last()?)));
        let Some((heard, newest)) = newest else { return status };
        let age = u64::try_from(heard.at_unix_ms.saturating_sub(newest.taken_unix_ms)).unwrap_or_default();
        let lag_ms = age.saturating_add(self.ms_since(heard.at));
        v1::ReplicationStatus { newest: Some(newest), lag_ms, ..status }
    }

    /// What an operator should know of a VM whose replicas are too old; the oldest one. Empty when none is.
    pub(super) fn behind(&self, id: VmId, vm: &Vm) -> String {
        let statuses = vm.replicas.iter().filter_map(|(site, replica)| {
            let status = self.replication(id, vm, site, replica)?;
            Some((site, replica.protection?.terms.rpo_ms, status))
        });
        let missed = statuses.filter(|(.., status)| status.rpo_missed).max_by_key(|(.., status)| status.lag_ms);
        let Some((site, rpo_ms, status)) = missed else { return String::new() };
        let why = if status.problem.is_empty() { String::new() } else { format!(": {}", status.problem) };
        let (lag, target) = (status.lag_ms / 1000, rpo_ms / 1000);
        format!("replication to site \"{site}\" is {lag} s behind (target {target} s){why}")
    }

    fn is_away(&self, worker: &WorkerName) -> bool {
        self.observations.connected(worker, self.now).is_none()
    }

    fn ms_since(&self, at: Instant) -> u64 {
        ms(self.now.saturating_duration_since(at))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use pageport_ownership::Ownership;

    use super::*;
    use crate::link::observation::{Observations, Observed};
    use crate::model::protection::{Protection, Terms};
    use crate::model::spec::tests::sample;
    use crate::model::state::{ReplicaPhase, Worker};
    use crate::model::{Spec, State};

    const TAKEN: i64 = 1_700_000_000_000;

    /// A VM at worker-a, protected at site b with a target of 30 s.
    struct Story {
        state: State,
        id: VmId,
        begin: Instant,
        seen: Observations,
    }

    impl Story {
        fn new() -> Self {
            let mut state = State::default();
            for site in ["a", "b"] {
                let known = Worker::at(site.parse().unwrap());
                state.workers.insert(format!("worker-{site}").parse().unwrap(), known);
            }
            let owner = Ownership::first("worker-a".parse().unwrap());
            let mut vm = Vm::new(Spec::try_from(sample("web")).unwrap(), owner, Power::Run);
            let terms = Terms { rpo_ms: 30_000, keep_points: 10, quiesce: false };
            let protection = Some(Protection { terms, seq: 1, scrub_seq: 0 });
            let worker = "worker-b".parse().unwrap();
            let replica = Replica::new(worker, 0, ReplicaPhase::Seeded, protection);
            vm.replicas.insert("b".parse().unwrap(), replica);
            let id = VmId::generate();
            state.vms.insert(id, vm);
            Self { state, id, begin: Instant::now(), seen: Observations::default() }
        }

        /// The owner's word, this long after the beginning.
        fn owner_says(&mut self, seconds: u64, status: v1::ReplicationStatus) {
            let report = v1::ReplicationReport {
                vm_id: self.id.to_string(),
                to_site: "b".into(),
                protect_seq: 1,
                status: Some(status),
                ..v1::ReplicationReport::default()
            };
            self.put("worker-a", seconds, v1::WorkerReport { replications: vec![report], ..Default::default() });
        }

        fn holder_says(&mut self, seconds: u64, points: Vec<v1::RecoveryPoint>) {
            let vm = v1::VmReport { vm_id: self.id.to_string(), recovery_points: points, ..Default::default() };
            self.put("worker-b", seconds, v1::WorkerReport { vms: vec![vm], ..Default::default() });
        }

        fn put(&mut self, worker: &str, seconds: u64, report: v1::WorkerReport) {
            let at = self.begin + Duration::from_secs(seconds);
            let at_unix_ms = TAKEN + i64::try_from(seconds).unwrap() * 1000;
            let observed = Observed { report: Arc::new(report), at, at_unix_ms, assigned: None };
            self.seen.put(worker.parse().unwrap(), observed);
        }

        fn vm(&self, seconds: u64) -> v1::Vm {
            let view = View::new(&self.state, &self.seen, self.begin + Duration::from_secs(seconds));
            view.vm(self.id, &self.state.vms[&self.id])
        }

        fn status(&self, seconds: u64) -> v1::ReplicationStatus {
            self.vm(seconds).replicas.remove(0).replication.unwrap()
        }
    }

    fn point() -> v1::RecoveryPoint {
        v1::RecoveryPoint { number: 7, taken_unix_ms: TAKEN, ..v1::RecoveryPoint::default() }
    }

    fn idle(lag_ms: u64) -> v1::ReplicationStatus {
        let phase = ReplicationPhase::Idle.into();
        v1::ReplicationStatus { phase, newest: Some(point()), lag_ms, ..v1::ReplicationStatus::default() }
    }

    #[test]
    fn the_lag_grows_with_the_age_of_the_report_and_the_target_is_missed_once_it_is_above() {
        let mut story = Story::new();
        story.holder_says(0, vec![point()]);
        story.owner_says(0, idle(12_000));
        let now = story.status(3);
        assert_eq!((now.lag_ms, now.rpo_missed, now.phase()), (15_000, false, ReplicationPhase::Idle));
        story.owner_says(1, v1::ReplicationStatus { problem: "scratch is full".into(), ..idle(29_000) });
        assert!(!story.status(2).rpo_missed, "just met");
        let late = story.vm(4);
        assert!(late.replicas[0].replication.as_ref().unwrap().rpo_missed);
        assert_eq!(late.problem, "replication to site \"b\" is 32 s behind (target 30 s): scratch is full");
        assert_eq!(late.replicas[0].problem, "scratch is full");
    }

    #[test]
    fn a_silent_owner_counts_from_its_last_word_and_is_named() {
        let mut story = Story::new();
        story.holder_says(0, vec![point()]);
        story.owner_says(0, v1::ReplicationStatus { rate_bps: 5, ..idle(10_000) });
        story.holder_says(85, vec![point()]);
        let status = story.status(85);
        assert_eq!((status.lag_ms, status.rpo_missed, status.rate_bps), (95_000, true, 0));
        assert_eq!(status.phase(), ReplicationPhase::Waiting);
        let expected = "replication to site \"b\" is 95 s behind (target 30 s): worker \"worker-a\" is not connected";
        assert_eq!(story.vm(85).problem, expected);
    }

    #[test]
    fn a_new_leader_knows_as_the_holder_says_how_old_the_newest_point_is() {
        let mut story = Story::new();
        assert_eq!(story.status(0).newest, None);
        story.holder_says(40, vec![v1::RecoveryPoint::default(), point()]);
        let status = story.status(41);
        assert_eq!(
            (status.newest.map(|point| point.number), status.lag_ms, status.rpo_missed),
            (Some(7), 41_000, true)
        );
    }

    #[test]
    fn nothing_is_missed_before_the_first_point_and_while_the_vm_is_not_to_run() {
        let mut story = Story::new();
        story.holder_says(0, vec![]);
        story.owner_says(0, v1::ReplicationStatus { phase: ReplicationPhase::FullCopy.into(), ..Default::default() });
        let status = story.status(4);
        assert_eq!((status.lag_ms, status.rpo_missed, status.problem.as_str()), (0, false, ""));
        story.owner_says(0, idle(90_000));
        story.state.vms.get_mut(&story.id).unwrap().power = Power::Stop;
        let status = story.status(1);
        assert_eq!((status.rpo_missed, status.problem.as_str()), (false, "the vm is not ordered to run"));
        assert_eq!(story.vm(1).problem, "");
    }

    #[test]
    fn a_replica_whose_worker_is_away_says_so_whatever_the_owner_says() {
        let mut story = Story::new();
        story.owner_says(0, v1::ReplicationStatus { problem: "timed out".into(), ..idle(0) });
        assert_eq!(story.status(1).problem, "worker \"worker-b\" is not connected");
    }

    #[test]
    fn a_worse_problem_hides_that_a_target_is_missed() {
        let mut story = Story::new();
        story.holder_says(0, vec![point()]);
        story.owner_says(0, idle(90_000));
        story.state.vms.get_mut(&story.id).unwrap().problem = "taken over".into();
        assert_eq!(story.vm(1).problem, "taken over");
    }
}
