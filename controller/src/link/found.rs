//! After a restore: VMs that workers own and the controllers do not know, because they were defined after the backup. Pure.

use std::collections::BTreeMap;

use pageport_ownership::{Epoch, Generation, Record};
use pageport_proto::v1;
use pageport_proto::{VmId, WorkerName};
use tokio::time::Instant;

use super::observation::{Observations, is_up, record_of};
use crate::model::State;

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Which.
    pub id: VmId,
    /// What it is, as the worker with the newest record has kept it.
    pub spec: Option<v1::VmSpec>,
    /// Whose records speak of it as theirs, or as given away in a move; the newest first. At least one.
    pub workers: Vec<WorkerName>,
    /// A guest runs at one of them, or stands paused.
    pub runs: bool,
}

/// All that workers speak of that have joined these controllers and are connected. None before the first restore: what is not known then was
/// deleted.
pub fn found(state: &State, observations: &Observations, now: Instant) -> Vec<Found> {
    if state.generation == Generation::default() {
        return vec![];
    }
    let mut said: BTreeMap<VmId, Vec<(Claim, &WorkerName, &v1::VmReport)>> = BTreeMap::new();
    for (worker, observed) in observations.iter() {
        let joined = observations.joined_for(worker, state, now).is_some();
        if !joined || observations.connected(worker, now).is_none() {
            continue;
        }
        for report in &observed.report.vms {
            let Ok(id) = report.vm_id.parse() else { continue };
            let known = state.vms.contains_key(&id) || state.recovering.contains_key(&id);
            if let Some(claim) = record_of(report).and_then(claim).filter(|_| !known) {
                said.entry(id).or_default().push((claim, worker, report));
            }
        }
    }
    said.into_iter().map(|(id, reports)| of_reports(id, reports)).collect()
}

/// The epoch of which a record speaks, and whether its worker owns the VM under it: who has released it comes after who has acquired it.
type Claim = (Epoch, bool);

/// [`None`]: the worker has, or had, a copy.
fn claim(record: Record) -> Option<Claim> {
    match record {
        Record::Released { epoch } => Some((epoch, false)),
        Record::Replica { .. } | Record::Own { .. } | Record::Prepared { .. } => Some((record.owned()?, true)),
    }
}

fn of_reports(id: VmId, mut reports: Vec<(Claim, &WorkerName, &v1::VmReport)>) -> Found {
    reports.sort_by(|(one, ..), (other, ..)| other.cmp(one));
    Found {
        id,
        spec: reports.iter().find_map(|(_, _, report)| report.spec.clone()),
        workers: reports.iter().map(|(_, worker, _)| (*worker).clone()).collect(),
        runs: reports.iter().any(|(_, _, report)| is_up(report)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use pageport_proto::RestorationId;
    use pageport_proto::v1::VmState;

    use super::*;
    use crate::link::observation::Observed;
    use crate::model::spec::tests::sample;
    use crate::model::state::Worker;

    fn said(state: &State, worker: &str, vms: Vec<v1::VmReport>) -> (WorkerName, Observed) {
        let report = v1::WorkerReport {
            worker: worker.into(),
            generation: state.generation.0.into(),
            restoration_id: state.restoration_id(),
            vms,
            ..Default::default()
        };
        let observed = Observed { report: Arc::new(report), at: Instant::now(), at_unix_ms: 0, assigned: None };
        (worker.parse().unwrap(), observed)
    }

    fn report(id: VmId, record: Record, spec: Option<v1::VmSpec>) -> v1::VmReport {
        let state = if record.owned().is_some() { VmState::Running } else { VmState::Stopped };
        v1::VmReport {
            vm_id: id.to_string(),
            state: state.into(),
            record: Some(record.into()),
            spec,
            ..Default::default()
        }
    }

    fn before() -> State {
        let mut state = State::default();
        for site in ["a", "b"] {
            state.workers.insert(format!("worker-{site}").parse().unwrap(), Worker::at(site.parse().unwrap()));
        }
        state
    }

    #[test]
    fn what_a_worker_owns_and_nobody_knows_is_found_with_its_newest_definition() {
        let state = before().restored(RestorationId::generate());
        let (id, e) = (VmId::generate(), Epoch::from_raw);
        let copy = Record::Replica { seen: e(1), refused: None };
        let mut observations = Observations::default();
        for (worker, record, name) in [
            ("worker-a", Record::Released { epoch: e(2) }, "web-before"),
            ("worker-b", Record::Own { own: e(2), seen: e(2) }, "web"),
        ] {
            let vms = vec![report(id, record, Some(sample(name))), report(VmId::generate(), copy, None)];
            let (worker, observed) = said(&state, worker, vms);
            observations.put(worker, observed);
        }
        let all = found(&state, &observations, Instant::now());
        assert_eq!(all.len(), 1, "nobody owns the copies: {all:?}");
        let name = all[0].spec.as_ref().map(|spec| spec.name.as_str());
        assert_eq!((all[0].id, name, all[0].runs), (id, Some("web"), true));
        assert_eq!(all[0].workers, ["worker-b", "worker-a"].map(|worker| worker.parse().unwrap()));
    }

    #[test]
    fn nothing_is_found_before_a_restore_or_by_workers_that_have_not_joined() {
        let (id, e) = (VmId::generate(), Epoch::from_raw(1));
        let own = || vec![report(id, Record::Own { own: e, seen: e }, Some(sample("web")))];
        let old = before();
        let mut observations = Observations::default();
        let (worker, observed) = said(&old, "worker-a", own());
        observations.put(worker, observed);
        assert_eq!(found(&old, &observations, Instant::now()), []);
        let state = old.restored(RestorationId::generate());
        assert_eq!(found(&state, &observations, Instant::now()), []);
        let (worker, observed) = said(&state, "worker-a", own());
        observations.put(worker, observed);
        assert_eq!(found(&state, &observations, Instant::now()).len(), 1);
    }
}
