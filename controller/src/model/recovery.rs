//! Recovery: the controllers were restored from a backup, which is older than what was done since.
//!
//! ```text
//!   backup ──begin──▶ every VM unknown ──workers join──▶ what their records say: known again
//!                                      └─declared dead─▶ (an operator's word, for one that is not coming back)
//! ```
//! A VM whose owner is not known is kept apart from the others ([`State::recovering`]): whoever looks for VMs to grant, lease, move,
//! fail over or assign does not find it. What decides is [`pageport_ownership::Recover`].
//!
//! VMs that were defined since are in no backup. Workers that have joined speak of them ([`crate::link::found`]), and an operator has them adopted
//! with the definition that their worker has kept: then they are unknown like the others, until everyone has joined.
//!
//! What an operator had ordered since about power is not known either: what runs goes on running, and what does not stays down.
//!
//! Guarantees: a new generation, so that epochs given from now on are newer than all that the lost controllers gave; no VM is given
//! to anybody before every worker of the backup has joined or was declared dead. What was done since the backup is lost, but who
//! owns what and how it is defined: moves that were under way have no record.

use std::collections::BTreeSet;

use pageport_ownership::{Generation, Ownership, Recover, Recovered, Report};
use pageport_proto::{RestorationId, VmId, WorkerName};
use serde::{Deserialize, Serialize};

use super::apply::must_be_free;
use super::command::{Answer, Outcome};
use super::protection::turn_round;
use super::rejection::Rejection;
use super::spec::Spec;
use super::state::{Life, Power, Replica, ReplicaPhase, State, Vm};

/// A VM of the backup, and what is known of who owns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovering {
    /// As it was.
    pub vm: Vm,
    /// What workers have said since.
    pub recover: Recover<WorkerName>,
    /// Workers at which a guest runs.
    pub runs: BTreeSet<WorkerName>,
}

/// Numbers of orders begin so much later than in the backup: workers may know some that were given since.
const SKIPPED_NUMBERS: u64 = 1 << 32;

/// An operator's word on a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredDead {
    /// When.
    pub at_unix_ms: i64,
    /// Who.
    pub by: String,
    /// In their words.
    pub reason: String,
}

impl Recovering {
    /// Who must join first.
    pub fn missing(&self) -> Vec<WorkerName> {
        match self.recover.outcome() {
            Recovered::Waiting { missing } => missing,
            Recovered::Unknown | Recovered::Known(_) => vec![],
        }
    }

    /// Why nothing is done with it, for people.
    pub fn problem(&self) -> String {
        let missing: Vec<String> = self.missing().iter().map(|worker| format!("\"{worker}\"")).collect();
        match missing[..] {
            [] => "the controllers were restored from a backup, and no worker says who owns this vm: decide with \"pageportctl vm resolve\"".to_owned(),
            _ => format!(
                "the controllers were restored from a backup, and who owns this vm is not known until these workers have reported: {}; one that is not coming \
                 back: \"pageportctl worker declare-dead\"",
                missing.join(", ")
            ),
        }
    }

    /// Why an order for it is refused.
    pub fn refusal(&self) -> Rejection {
        Rejection::OwnerUnknown { name: self.vm.spec.name.clone(), why: self.problem() }
    }

    /// With the owner that the backup names, under a generation that was not used yet, for an operator's own decision.
    fn into_vm(self, generation: Generation) -> Vm {
        let mut vm = self.vm;
        let (owner, own) = vm.ownership.owner();
        let last = vm.ownership.last().max(generation.floor());
        vm.ownership = Ownership::Owned { owner: owner.clone(), own, last, image: None, confirmed: false };
        vm
    }
}

impl State {
    /// What controllers begin with that this restore makes.
    pub fn restored(mut self, by: RestorationId) -> Self {
        self.generation = Generation(self.generation.0.saturating_add(1));
        self.restoration = Some(by);
        let workers: Vec<WorkerName> = self.workers.keys().cloned().collect();
        let unfinished = std::mem::take(&mut self.recovering).into_iter().map(|(id, recovering)| (id, recovering.vm));
        for (id, vm) in std::mem::take(&mut self.vms).into_iter().chain(unfinished) {
            let recover = Recover::new(self.generation, workers.iter().cloned());
            let vm = Vm { migration: None, power_seq: vm.power_seq + SKIPPED_NUMBERS, ..vm };
            self.recovering.insert(id, Recovering { vm, recover, runs: BTreeSet::new() });
        }
        self.seed_seq += SKIPPED_NUMBERS;
        self.protect_seq += SKIPPED_NUMBERS;
        self.declared_dead.clear();
        self.migrations.retain(|_, migration| migration.is_over());
        for migration in self.migrations.select_mut(|_| true) {
            (migration.source_ended, migration.destination_ended) = (true, true);
        }
        self
    }

    /// Workers that must join before every VM is known again.
    pub fn awaited(&self) -> BTreeSet<WorkerName> {
        self.recovering.values().flat_map(Recovering::missing).collect()
    }

    /// Brings a VM back as the backup has it, for an operator to decide, if everyone has joined and nobody knows who owns it.
    pub fn leave_to_the_operator(&mut self, id: VmId) {
        if self.recovering.get(&id).is_some_and(|recovering| recovering.missing().is_empty())
            && let Some(recovering) = self.recovering.remove(&id)
        {
            let vm = recovering.into_vm(self.generation);
            self.vms.insert(id, vm);
        }
    }

    /// The VM of this id or name of which it is not known who owns it.
    pub fn find_recovering(&self, id_or_name: &str) -> Option<(VmId, &Recovering)> {
        let id = id_or_name.parse::<VmId>().ok();
        let mut defined = self.recovering.iter().filter(|(_, it)| it.vm.life == Life::Defined);
        defined.find(|(key, it)| Some(**key) == id || it.vm.spec.name == id_or_name).map(|(key, it)| (*key, it))
    }
}

/// What a worker that has joined says of a VM.
pub(super) fn joined(state: &mut State, id: VmId, worker: WorkerName, report: Report<WorkerName>, runs: bool) {
    let Some(recovering) = state.recovering.get_mut(&id) else { return };
    match runs {
        true => recovering.runs.insert(worker.clone()),
        false => recovering.runs.remove(&worker),
    };
    recovering.recover.joined(worker, report);
    settle(state, id);
}

/// Takes in a VM that was defined since the backup. Who owns it is found out as of those of the backup.
pub(super) fn adopt(state: &mut State, id: VmId, spec: Spec, worker: WorkerName) -> Outcome {
    if state.recovering.contains_key(&id) {
        return Ok(Answer::Vm(id));
    }
    // One that is known is not lost, and one that is being deleted is not to come back.
    if state.vms.contains_key(&id) || state.generation == Generation::default() {
        return Err(Rejection::NotFound { vm: id.to_string() });
    }
    must_be_free(state, &spec.name)?;
    if !state.workers.contains_key(&worker) {
        return Err(Rejection::WorkerUnknown { worker });
    }
    let mut recover = Recover::new(state.generation, state.workers.keys().cloned());
    state.declared_dead.keys().for_each(|dead| recover.declared_dead(dead.clone()));
    let vm = Vm { power_seq: SKIPPED_NUMBERS, ..Vm::new(spec, Ownership::first(worker), Power::Stop) };
    state.recovering.insert(id, Recovering { vm, recover, runs: BTreeSet::new() });
    Ok(Answer::Vm(id))
}

/// An operator's word: this worker is not coming back with any VM.
pub(super) fn declare_dead(state: &mut State, worker: WorkerName, word: DeclaredDead) -> Outcome {
    if !state.workers.contains_key(&worker) && !state.awaited().contains(&worker) {
        return Err(Rejection::WorkerUnknown { worker });
    }
    if state.recovering.is_empty() {
        return Err(Rejection::NotRecovering { worker });
    }
    for recovering in state.recovering.values_mut() {
        recovering.recover.declared_dead(worker.clone());
    }
    state.declared_dead.insert(worker, word);
    for id in state.recovering.keys().copied().collect::<Vec<_>>() {
        settle(state, id);
    }
    Ok(Answer::Done)
}

/// A VM of which it is known now who owns it is one like any other.
fn settle(state: &mut State, id: VmId) {
    let Some(recovering) = state.recovering.get(&id) else { return };
    let before = recovering.vm.ownership.owner().0.clone();
    let ownership = match recovering.recover.outcome() {
        Recovered::Waiting { .. } => return,
        Recovered::Known(ownership) => ownership,
        Recovered::Unknown => match recovering.recover.never_held(&before) {
            Some(ownership) => ownership,
            None => return,
        },
    };
    let Some(Recovering { mut vm, recover, runs }) = state.recovering.remove(&id) else { return };
    let owner = ownership.owner().0.clone();
    vm.power = match vm.power {
        // What was handed over was running.
        _ if runs.contains(&owner) || ownership.in_doubt() => Power::Run,
        Power::Run if recover.said(&owner).is_some() => Power::Stop,
        power => power,
    };
    vm.ownership = ownership;
    state.vms.insert(id, vm);
    moved(state, id, &before, &owner, ReplicaPhase::Outdated);
}

/// The VM runs at another worker than before: its copy there is its disk now, and what it left is a copy.
pub(super) fn moved(state: &mut State, id: VmId, from: &WorkerName, to: &WorkerName, left: ReplicaPhase) {
    let (from_site, to_site) = (state.site_of(from).cloned(), state.site_of(to).cloned());
    let (Some(vm), Some(from_site), Some(to_site)) = (state.vms.get_mut(&id), from_site, to_site) else { return };
    if from_site == to_site {
        return;
    }
    let arrived = vm.replicas.remove(&to_site);
    let protection = turn_round(&mut state.protect_seq, arrived.as_ref());
    vm.replicas.insert(from_site, Replica::new(from.clone(), 0, left, protection));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use pageport_ownership::{Epoch, Proof, Record};
    use pageport_proto::RequestId;

    use super::*;
    use crate::model::command::{ClientOrder, Command, Order};
    use crate::model::spec::tests::sample;
    use crate::model::state::Worker;
    use crate::model::{Spec, apply, takeover};

    fn worker(letter: char) -> WorkerName {
        format!("worker-{letter}").parse().unwrap()
    }

    /// Site a owns a VM, site b has a copy of it; then the controllers were restored.
    fn restored() -> (State, VmId) {
        let mut state = State::default();
        for site in ["a", "b"] {
            state.workers.insert(worker(site.chars().next().unwrap()), Worker::at(site.parse().unwrap()));
        }
        let spec = Spec::try_from(sample("web")).unwrap();
        let mut vm = Vm::new(spec, Ownership::first(worker('a')), Power::Run);
        vm.replicas.insert("b".parse().unwrap(), Replica::new(worker('b'), 1, ReplicaPhase::Seeded, None));
        let id = VmId::generate();
        state.vms.insert(id, vm);
        (state.restored(RestorationId::generate()), id)
    }

    fn carry_out(state: &mut State, order: Order) -> Outcome {
        apply(state, Command { now_unix_ms: 1, order })
    }

    fn says(state: &mut State, id: VmId, letter: char, record: Record, whose: Option<char>) {
        let runs = record.owned().is_some();
        let report = Report { record, whose: whose.map(worker) };
        carry_out(state, Order::Joined { vm: id, worker: worker(letter), report, runs }).unwrap();
    }

    fn client(order: ClientOrder) -> Order {
        Order::Client { request: RequestId::generate(), order }
    }

    #[test]
    fn nothing_is_done_with_a_vm_until_every_worker_has_joined() {
        let (mut state, id) = restored();
        let refused = carry_out(&mut state, client(ClientOrder::SetPower { vm: id, power: Power::Stop })).unwrap_err();
        assert!(matches!(refused, Rejection::OwnerUnknown { .. }), "{refused}");
        assert!(refused.to_string().contains("\"worker-a\", \"worker-b\""), "{refused}");
        let taken = client(ClientOrder::DefineVm {
            id: VmId::generate(),
            spec: Box::new(Spec::try_from(sample("web")).unwrap()),
            worker: worker('a'),
        });
        assert!(matches!(carry_out(&mut state, taken), Err(Rejection::NameTaken { .. })));
        let e = Epoch::from_raw;
        says(&mut state, id, 'a', Record::Own { own: e(1), seen: e(1) }, None);
        assert!(state.vms.is_empty());
        says(&mut state, id, 'b', Record::UNKNOWN, None);
        let vm = &state.vms[&id];
        assert_eq!((vm.ownership.owner(), vm.ownership.last()), ((&worker('a'), e(1)), Epoch::new(1, 0)));
        assert!(state.recovering.is_empty() && vm.replicas.contains_key(&"b".parse().unwrap()));
    }

    #[test]
    fn what_runs_goes_on_running_and_what_does_not_stays_down_whatever_the_backup_says() {
        for (ordered, runs, expected) in [
            (Power::Stop, true, Power::Run),
            (Power::Run, false, Power::Stop),
            (Power::Run, true, Power::Run),
            (Power::Crashed, false, Power::Crashed),
        ] {
            let (mut state, id) = restored();
            state.recovering.get_mut(&id).unwrap().vm.power = ordered;
            says(&mut state, id, 'b', Record::UNKNOWN, None);
            let e = Epoch::from_raw(1);
            let report = Report { record: Record::Own { own: e, seen: e }, whose: None };
            carry_out(&mut state, Order::Joined { vm: id, worker: worker('a'), report, runs }).unwrap();
            let vm = &state.vms[&id];
            assert_eq!(vm.power, expected, "{ordered:?}, runs: {runs}");
            assert!(vm.power_seq > 1 << 31, "an order that a worker may know from before the restore");
        }
    }

    #[test]
    fn a_vm_that_moved_since_the_backup_is_where_the_records_say() {
        let (mut state, id) = restored();
        let e = Epoch::from_raw;
        says(&mut state, id, 'a', Record::Replica { seen: e(2), refused: None }, Some('b'));
        says(&mut state, id, 'b', Record::Own { own: e(2), seen: e(2) }, None);
        let vm = &state.vms[&id];
        assert_eq!(vm.ownership.owner(), (&worker('b'), e(2)));
        let left: Vec<_> = vm.replicas.iter().map(|(site, replica)| (site.as_str(), &replica.phase)).collect();
        assert_eq!(left, [("a", &ReplicaPhase::Outdated)]);
    }

    #[test]
    fn a_worker_that_is_declared_dead_is_not_waited_for() {
        let (mut state, id) = restored();
        says(&mut state, id, 'b', Record::Replica { seen: Epoch::from_raw(1), refused: None }, Some('a'));
        let word = DeclaredDead { at_unix_ms: 0, by: "ann".into(), reason: "burnt".into() };
        let dead = client(ClientOrder::DeclareDead { worker: worker('a'), by: "ann".into(), reason: "burnt".into() });
        carry_out(&mut state, dead.clone()).unwrap();
        assert_eq!(state.declared_dead[&worker('a')], DeclaredDead { at_unix_ms: 1, ..word });
        let vm = &state.vms[&id];
        assert_eq!(vm.ownership.owner(), (&worker('a'), Epoch::new(1, 1)), "the backup's owner, until it is resolved");
        let order = takeover::Order {
            vm: id,
            site: "b".parse().unwrap(),
            worker: worker('b'),
            last: vm.ownership.last(),
            proof: Proof::Override { who: "ann".into(), reason: "burnt".into() },
            seen: String::new(),
            ordered_by: None,
            point: None,
        };
        carry_out(&mut state, client(ClientOrder::Resolve(order))).unwrap();
        assert_eq!(state.vms[&id].ownership.owner(), (&worker('b'), Epoch::new(1, 2)));
        assert!(matches!(
            carry_out(
                &mut state,
                client(ClientOrder::DeclareDead { worker: worker('b'), by: String::new(), reason: String::new() })
            ),
            Err(Rejection::NotRecovering { .. })
        ));
    }

    #[test]
    fn a_vm_that_was_defined_since_is_adopted_once_and_is_unknown_until_everyone_has_joined() {
        let (mut state, known) = restored();
        let (id, e) = (VmId::generate(), Epoch::from_raw);
        let adopt = |name: &str, vm: VmId| {
            let spec = Box::new(Spec::try_from(sample(name)).unwrap());
            client(ClientOrder::AdoptVm { vm, spec, worker: worker('b') })
        };
        assert!(matches!(carry_out(&mut state, adopt("web", id)), Err(Rejection::NameTaken { .. })));
        for _ in 0..2 {
            assert_eq!(carry_out(&mut state, adopt("late", id)), Ok(Answer::Vm(id)));
        }
        assert_eq!(state.recovering.len(), 2);
        let order = client(ClientOrder::SetPower { vm: id, power: Power::Stop });
        assert!(matches!(carry_out(&mut state, order), Err(Rejection::OwnerUnknown { .. })));
        says(&mut state, id, 'b', Record::Own { own: e(2), seen: e(2) }, None);
        assert!(!state.vms.contains_key(&id), "a may own it as well");
        says(&mut state, id, 'a', Record::Replica { seen: e(2), refused: None }, Some('b'));
        let vm = &state.vms[&id];
        assert_eq!((vm.ownership.owner(), vm.power), ((&worker('b'), e(2)), Power::Run));
        assert!(vm.power_seq > 1 << 31, "its worker may know orders from before");
        assert!(matches!(carry_out(&mut state, adopt("late", id)), Err(Rejection::NotFound { .. })));
        says(&mut state, known, 'a', Record::Own { own: e(1), seen: e(1) }, None);
        says(&mut state, known, 'b', Record::UNKNOWN, None);
        assert!(matches!(carry_out(&mut state, adopt("web", known)), Err(Rejection::NotFound { .. })), "it is known");
    }

    #[test]
    fn nothing_is_adopted_where_nothing_was_restored() {
        let mut state = State::default();
        state.workers.insert(worker('a'), Worker::at("a".parse().unwrap()));
        let spec = Box::new(Spec::try_from(sample("late")).unwrap());
        let adopt = client(ClientOrder::AdoptVm { vm: VmId::generate(), spec, worker: worker('a') });
        assert!(matches!(carry_out(&mut state, adopt), Err(Rejection::NotFound { .. })));
        assert_eq!(state.recovering.len(), 0);
    }

    #[test]
    fn a_second_restore_begins_anew_under_another_generation() {
        let (mut state, id) = restored();
        says(&mut state, id, 'a', Record::UNKNOWN, None);
        let again = state.restored(RestorationId::generate());
        assert_eq!((again.generation, again.recovering[&id].missing().len()), (Generation(2), 2));
    }
}
