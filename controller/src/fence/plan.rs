//! [`plan`]: which VMs a fence of one worker takes where, and which it cannot take and why. Pure.
//!
//! A VM is concerned if the worker may hold it. It goes to
//!
//! | the VM | its heir |
//! |---|---|
//! | was handed over *to* this worker, and its source answers | that source, which keeps the guest until it knows better |
//! | was handed over *by* this worker, and its destination answers | that destination: its disk is whole, perhaps its image too |
//! | anything else | a connected worker with a complete replica, the one with the newest recovery point first |
//!
//! Guarantee: what is planned would be committed if nothing changed, since it was tried on a copy of the state. VMs that
//! are not ordered to run stay where they are: nobody waits for them, and their newest disk is there.

use pageport_ownership::{Epoch, Ownership, Policy, Proof};
use pageport_proto::{SiteName, VmId, WorkerName};
use tokio::time::Instant;

use crate::link::failover::heir;
use crate::link::observation::Observations;
use crate::model::State;
use crate::model::protection::Point;
use crate::model::state::{Life, Power, Vm};
use crate::model::takeover::{Order, take_over};

/// A VM that the worker may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concerned {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its newest epoch.
    pub last: Epoch,
    /// What it does when it is cut off.
    pub policy: Policy,
    /// Where it goes, or why nowhere.
    pub heir: Result<Heir, String>,
}

/// Where a VM goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heir {
    /// The site.
    pub site: SiteName,
    /// The worker there.
    pub worker: WorkerName,
    /// The recovery point that it would be booted from.
    pub point: Option<Point>,
}

/// What an agent's word is worth for one VM.
pub fn proof(fenced: &WorkerName, last: Epoch, agent: &str) -> Proof<WorkerName> {
    Proof::Fenced { workers: vec![fenced.clone()], last, agent: agent.to_owned() }
}

/// All VMs that the worker may hold, and where they go once its host is off.
pub fn plan(state: &State, observations: &Observations, fenced: &WorkerName, now: Instant) -> Vec<Concerned> {
    let answers = |worker: &WorkerName| worker != fenced && observations.connected(worker, now).is_some();
    let holds = |vm: &Vm| vm.life == Life::Defined && vm.ownership.possible_holders().contains(&fenced);
    let concerned = state.vms.iter().filter(|(_, vm)| holds(vm));
    concerned
        .map(|(id, vm)| Concerned {
            vm: *id,
            name: vm.spec.name.clone(),
            last: vm.ownership.last(),
            policy: vm.spec.on_isolation,
            heir: heir_of(
                state,
                *id,
                vm,
                fenced,
                &answers,
                &|worker| observations.newest_point(worker, *id),
                &|worker| {
                    let guarded = vm.spec.on_isolation != Policy::SelfFence || observations.guarded(worker, now);
                    answers(worker) && guarded
                },
            ),
        })
        .collect()
}

fn heir_of(
    state: &State,
    id: VmId,
    vm: &Vm,
    fenced: &WorkerName,
    answers: &impl Fn(&WorkerName) -> bool,
    newest: &impl Fn(&WorkerName) -> Option<Point>,
    is_fit: &impl Fn(&WorkerName) -> bool,
) -> Result<Heir, String> {
    if vm.power != Power::Run {
        return Err("it is not ordered to run: start it, and fence again, to have it elsewhere".to_owned());
    }
    let (site, worker) = match &vm.ownership {
        Ownership::Migrating { from, to, released: true, .. } if to == fenced && answers(from) => {
            let site = state.site_of(from).ok_or_else(|| format!("worker \"{from}\" is unknown"))?;
            (site.clone(), from.clone())
        }
        Ownership::Migrating { from, .. } if from != fenced && answers(from) => {
            return Err(format!("it runs at worker \"{from}\", which gives the move to this host up by itself"));
        }
        Ownership::Owned { .. } | Ownership::Migrating { .. } => heir(state, vm, newest, is_fit)
            .ok_or_else(|| "no connected worker holds a complete replica of it".to_owned())?,
    };
    let last = vm.ownership.last();
    let point = newest(&worker);
    let heir = Heir { site: site.clone(), worker: worker.clone(), point };
    let proof = proof(fenced, last, "rehearsal");
    let order = Order { vm: id, site, worker, last, proof, seen: String::new(), ordered_by: None, point };
    match take_over(&mut state.clone(), order, 0) {
        Ok(_) => Ok(heir),
        Err(rejection) => Err(rejection.to_string()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use pageport_proto::v1;

    use super::*;
    use crate::link::observation::Observed;
    use crate::model::Spec;
    use crate::model::spec::tests::sample;
    use crate::model::state::{Replica, ReplicaPhase, Worker};

    fn name(text: &str) -> WorkerName {
        text.parse().unwrap()
    }

    fn e(n: u64) -> Epoch {
        Epoch::from_raw(n)
    }

    /// Workers wa, wb and wc at sites a, b and c; one VM at wa.
    struct Story {
        state: State,
        id: VmId,
        now: Instant,
        seen: Observations,
    }

    impl Story {
        fn new(ownership: Ownership<WorkerName>, connected: &[&str]) -> Self {
            let (mut state, mut seen, now) = (State::default(), Observations::default(), Instant::now());
            for site in ["a", "b", "c"] {
                let known = Worker::at(site.parse().unwrap());
                state.workers.insert(name(&format!("w{site}")), known);
            }
            for worker in connected {
                let report = Arc::new(v1::WorkerReport::default());
                seen.put(name(worker), Observed { report, at: now, at_unix_ms: 0, assigned: None });
            }
            let id = VmId::generate();
            state.vms.insert(id, Vm::new(Spec::try_from(sample("web")).unwrap(), ownership, Power::Run));
            Self { state, id, now, seen }
        }

        fn replica(mut self, site: &str, phase: ReplicaPhase) -> Self {
            let replica = Replica::new(name(&format!("w{site}")), 1, phase, None);
            self.state.vms.get_mut(&self.id).unwrap().replicas.insert(site.parse().unwrap(), replica);
            self
        }

        fn plan(&self) -> Vec<Concerned> {
            plan(&self.state, &self.seen, &name("wa"), self.now)
        }

        fn heir(&self) -> Result<String, String> {
            let [concerned] = &self.plan()[..] else { panic!("{:?}", self.plan()) };
            concerned.heir.clone().map(|heir| heir.worker.to_string())
        }
    }

    fn moving(from: &str, to: &str, released: bool) -> Ownership<WorkerName> {
        let (from, to) = (name(from), name(to));
        Ownership::Migrating { from, to, own: e(1), epoch: e(2), released, refused: false, floor: Epoch::ZERO }
    }

    #[test]
    fn a_vm_goes_to_a_connected_worker_with_a_complete_replica_and_to_no_other() {
        let at_a = || Ownership::first(name("wa"));
        let story = Story::new(at_a(), &["wb", "wc"]);
        assert!(story.heir().unwrap_err().contains("complete replica"));
        assert!(story.replica("b", ReplicaPhase::Outdated).heir().is_err());
        assert_eq!(Story::new(at_a(), &["wb"]).replica("b", ReplicaPhase::Seeded).heir(), Ok("wb".into()));
        assert!(Story::new(at_a(), &["wc"]).replica("b", ReplicaPhase::Seeded).heir().is_err());
        let elsewhere = Story::new(Ownership::first(name("wb")), &["wb"]).replica("a", ReplicaPhase::Seeded);
        assert_eq!(elsewhere.plan(), []);
    }

    #[test]
    fn a_vm_that_is_not_to_run_stays_where_its_disk_is() {
        let mut story = Story::new(Ownership::first(name("wa")), &["wb"]).replica("b", ReplicaPhase::Seeded);
        story.state.vms.get_mut(&story.id).unwrap().power = Power::Stop;
        assert!(story.heir().unwrap_err().contains("not ordered to run"));
    }

    #[test]
    fn a_vm_in_doubt_goes_to_the_other_end_of_its_move() {
        let handed_over = Story::new(moving("wa", "wb", true), &["wb", "wc"]).replica("c", ReplicaPhase::Seeded);
        assert_eq!(handed_over.plan(), [], "the source has let go, so it is not asked");
        let arriving = Story::new(moving("wb", "wa", true), &["wb", "wc"]).replica("c", ReplicaPhase::Seeded);
        assert_eq!(arriving.heir(), Ok("wb".into()));
        let alone = Story::new(moving("wb", "wa", true), &["wc"]).replica("c", ReplicaPhase::Seeded);
        assert_eq!(alone.heir(), Ok("wc".into()));
    }

    #[test]
    fn a_move_before_its_commit_point_leaves_the_vm_with_who_answers() {
        let leaving = Story::new(moving("wa", "wb", false), &["wb"]).replica("b", ReplicaPhase::Mixed);
        assert!(leaving.heir().is_err());
        let other = Story::new(moving("wa", "wb", false), &["wb", "wc"]).replica("c", ReplicaPhase::Seeded);
        assert!(other.heir().unwrap_err().contains("wb"), "the destination may hold it");
        let arriving = Story::new(moving("wb", "wa", false), &["wb", "wc"]).replica("c", ReplicaPhase::Seeded);
        assert!(arriving.heir().unwrap_err().contains("runs at worker \"wb\""));
    }
}
