//! The queue of moves in the replicated state: admission, terms, cancelling, drains, and what older versions wrote.

#![allow(clippy::unwrap_used, missing_docs)]

use pageport_controller::link::assignment::assignment;
use pageport_controller::link::budget;
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::convergence::Convergence;
use pageport_controller::model::migration::{Cancel, Phase};
use pageport_controller::model::protection::Placement;
use pageport_controller::model::schedule::{Change, DrainMove, Limits, LinkLimits, Spot, Terms};
use pageport_controller::model::state::{Power, Worker};
use pageport_controller::model::{Command, Order, Outcome, Rejection, Spec, State, apply};
use pageport_ownership::{Epoch, Evidence, controller::Fact};
use pageport_proto::v1::{self, ConvergencePolicy};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};

const MBIT: u64 = 1_000_000;

fn site(name: &str) -> SiteName {
    name.parse().unwrap()
}

fn worker(site: &str) -> WorkerName {
    format!("worker-{site}").parse().unwrap()
}

/// VMs that run at `a`, each with a seeded replica at `b`.
struct Story {
    state: State,
    vms: Vec<VmId>,
    now: i64,
}

impl Story {
    fn new(vms: usize) -> Self {
        let mut story = Self { state: State::default(), vms: vec![], now: 0 };
        for name in ["a", "b"] {
            let known = Worker::at(site(name));
            story.tell(Order::RegisterWorker { name: worker(name), worker: known });
        }
        for number in 0..vms {
            let spec = v1::VmSpec {
                name: format!("vm{number}"),
                memory_bytes: 64 << 20,
                vcpus: 1,
                disks: vec![v1::DiskSpec { name: "root".into(), path: "/x.raw".into(), ..v1::DiskSpec::default() }],
                ..v1::VmSpec::default()
            };
            let (id, spec) = (VmId::generate(), Box::new(Spec::try_from(spec).unwrap()));
            story.client(ClientOrder::DefineVm { id, spec, worker: worker("a") }).unwrap();
            story.client(ClientOrder::SetPower { vm: id, power: Power::Run }).unwrap();
            story.evidence(id, "a", Fact::Acquired(story.state.vms[&id].ownership.last()));
            story.client(ClientOrder::SeedReplica { vm: id, site: site("b"), worker: worker("b") }).unwrap();
            let seed_seq = story.state.seed_seq;
            story.tell(Order::SeedEnded { vm: id, site: site("b"), seed_seq, failure: None });
            story.vms.push(id);
        }
        story
    }

    fn tell(&mut self, order: Order) {
        self.now += 1;
        apply(&mut self.state, Command { now_unix_ms: self.now, order }).unwrap();
    }

    fn client(&mut self, order: ClientOrder) -> Outcome {
        self.now += 1;
        let order = Order::Client { request: RequestId::generate(), order };
        apply(&mut self.state, Command { now_unix_ms: self.now, order })
    }

    fn evidence(&mut self, vm: VmId, at: &str, fact: Fact) {
        self.tell(Order::Evidence { vm, evidence: Evidence { worker: worker(at), fact } });
    }

    fn queue(&mut self, vm: usize, terms: Terms, admitted: Option<u64>) -> Result<MigrationId, Rejection> {
        let (id, vm) = (MigrationId::generate(), self.vms[vm]);
        let (site, traceparent, terms) = (site("b"), String::new(), Box::new(terms));
        self.client(ClientOrder::QueueMigration { id, vm, site, traceparent, terms, admitted }).map(|_| id)
    }

    fn phase(&self, id: MigrationId) -> &Phase {
        &self.state.migrations[&id].phase
    }

    fn admit(&mut self, ids: &[MigrationId]) {
        let seq = self.state.schedule.seq;
        self.tell(Order::Admit { ids: ids.to_vec(), seq });
    }

    fn arrive(&mut self, id: MigrationId) {
        let (vm, epoch) = (self.state.migrations[&id].vm, self.state.migrations[&id].epoch);
        self.evidence(vm, "a", Fact::Released(epoch));
        self.evidence(vm, "b", Fact::Acquired(epoch));
        self.tell(Order::MigrationComplete { id });
    }
}

const RUNNING: Phase = Phase::Running { cancel: Cancel::NotAsked };

#[test]
fn an_order_that_need_not_wait_begins_with_it_and_one_that_was_decided_on_before_another_began_waits() {
    let mut story = Story::new(2);
    let seq = story.state.schedule.seq;
    let first = story.queue(0, Terms::default(), Some(seq)).unwrap();
    assert_eq!(story.phase(first), &RUNNING);
    let second = story.queue(1, Terms::default(), Some(seq)).unwrap();
    assert_eq!(story.phase(second), &Phase::Queued, "what it was decided from is no more");
    assert_eq!((story.state.migrations[&second].epoch, story.state.vms[&story.vms[1]].migration), (Epoch::ZERO, None));
    assert!(assignment(&story.state, &worker("a")).migrations.len() == 1, "no worker hears of it");
    story.tell(Order::Admit { ids: vec![second], seq });
    assert_eq!(story.phase(second), &Phase::Queued);
    story.admit(&[second]);
    assert_eq!(story.phase(second), &RUNNING);
    assert_eq!(story.state.vms[&story.vms[1]].migration, Some(second));
    let told = assignment(&story.state, &worker("a"));
    let ordered: Vec<_> = told.migrations.iter().map(|told| told.ordered_unix_ms).collect();
    assert_eq!(ordered[1], story.now, "the time that it took counts from when it began");
}

#[test]
fn a_queued_move_holds_nothing_and_is_looked_at_again_when_it_begins() {
    let mut story = Story::new(1);
    let id = story.queue(0, Terms::default(), None).unwrap();
    let vm = story.vms[0];
    let again = story.queue(0, Terms::default(), None).unwrap_err();
    assert_eq!(again, Rejection::AlreadyQueued { name: "vm0".into(), id });
    story.client(ClientOrder::SetPower { vm, power: Power::Stop }).unwrap();
    story.admit(&[id]);
    assert_eq!(story.phase(id), &Phase::Queued, "a stopped VM does not move");
    story.client(ClientOrder::SetPower { vm, power: Power::Run }).unwrap();
    story.admit(&[id]);
    assert_eq!(story.phase(id), &RUNNING);
}

#[test]
fn a_queued_move_is_cancelled_at_once_and_given_up_with_its_reason() {
    let mut story = Story::new(2);
    let (one, other) =
        (story.queue(0, Terms::default(), None).unwrap(), story.queue(1, Terms::default(), None).unwrap());
    story.client(ClientOrder::CancelMigration { id: one }).unwrap();
    assert!(matches!(story.phase(one), Phase::Cancelled { .. }));
    story.tell(Order::GiveUp { id: other, reason: "it had not begun by its deadline".into() });
    assert!(matches!(story.phase(other), Phase::Failed { reason, .. } if reason.contains("deadline")));
    let problem = &story.state.vms[&story.vms[1]].problem;
    assert_eq!(problem, "migration to site \"b\" was not made: it had not begun by its deadline");
    story.admit(&[one, other]);
    assert!(story.state.migrations.values().all(|migration| migration.is_over()), "ended is ended");
    let change = Change { paused: Some(true), ..Change::default() };
    let refused = story.client(ClientOrder::ChangeMigration { id: one, change }).unwrap_err();
    assert_eq!(refused, Rejection::AlreadyEnded { id: one });
}

#[test]
fn what_comes_first_must_be_known() {
    let mut story = Story::new(1);
    let id = MigrationId::generate();
    let after = Terms { after: [id].into(), ..Terms::default() };
    let unknown = story.queue(0, after, None).unwrap_err();
    assert_eq!(unknown, Rejection::MigrationUnknown { id: id.to_string() });
}

#[test]
fn moves_and_replication_share_a_budget_and_a_rate_changes_while_a_move_runs() {
    let mut story = Story::new(3);
    let limits = LinkLimits { budget_bps: 100 * MBIT, migrations: 0 };
    story.client(ClientOrder::SetLinkLimits { from: site("a"), to: site("b"), limits }).unwrap();
    let terms = pageport_controller::model::Terms { rpo_ms: 30_000, keep_points: 1, quiesce: false };
    let (vm, worker_b) = (story.vms[2], worker("b"));
    story
        .client(ClientOrder::Protect { vm, site: site("b"), worker: worker_b, terms, at: Placement::default() })
        .unwrap();
    let ids = [0, 1].map(|vm| story.queue(vm, Terms::default(), None).unwrap());
    let told = |story: &Story| {
        let told = assignment(&story.state, &worker("a"));
        let moves: Vec<_> = told.migrations.iter().map(|told| told.rate_bps / MBIT).collect();
        (moves, told.replications[0].cap_bps / MBIT)
    };
    assert_eq!(told(&story), (vec![], 100), "nothing moves");
    story.admit(&ids);
    assert_eq!(told(&story), (vec![40, 40], 20));
    let mut set = |change| story.client(ClientOrder::ChangeMigration { id: ids[0], change }).map(drop);
    set(Change { rate_bps: Some(10 * MBIT), ..Change::default() }).unwrap();
    assert_eq!(told(&story), (vec![10, 70], 20));
    let mut set = |change| story.client(ClientOrder::ChangeMigration { id: ids[0], change }).map(drop);
    set(Change { paused: Some(true), ..Change::default() }).unwrap();
    let told = assignment(&story.state, &worker("a"));
    assert!(
        told.migrations[0].paused && told.migrations[0].rate_bps < MBIT && told.migrations[1].rate_bps == 80 * MBIT
    );
    story.arrive(ids[1]);
    assert_eq!(budget::rate_bps(&story.state, &story.state.migrations[&ids[1]]), 0);
    let vm = story.state.migrations[&ids[0]].vm;
    story.evidence(vm, "a", Fact::Released(story.state.migrations[&ids[0]].epoch));
    let late = story.client(ClientOrder::ChangeMigration { id: ids[0], change: Change::default() }).unwrap_err();
    assert_eq!(late, Rejection::HandedOver { id: ids[0] });
}

#[test]
fn what_becomes_of_a_move_that_does_not_converge_changes_while_it_runs_but_slowing_down_is_ordered_before() {
    let mut story = Story::new(2);
    let throttle = Terms { convergence: Convergence::Throttle, ..Terms::default() };
    let ids = [story.queue(0, Terms::default(), None).unwrap(), story.queue(1, throttle, None).unwrap()];
    story.admit(&ids);
    let told = |story: &Story, index: usize| {
        let told = assignment(&story.state, &worker("a")).migrations;
        let told = told.iter().find(|told| told.migration_id == ids[index].to_string()).unwrap();
        (told.convergence(), told.longest_pause_ms, told.can_throttle)
    };
    assert_eq!(told(&story, 0), (ConvergencePolicy::Wait, 0, false), "nothing is done to a guest unasked");
    assert_eq!(told(&story, 1), (ConvergencePolicy::Throttle, 0, true));
    let set = |story: &mut Story, index: usize, convergence| {
        let change = Change { convergence: Some(convergence), ..Change::default() };
        story.client(ClientOrder::ChangeMigration { id: ids[index], change }).map(drop)
    };
    for index in [0, 1] {
        set(&mut story, index, Convergence::LongerPause { longest_ms: 2_000 }).unwrap();
        assert_eq!(told(&story, index), (ConvergencePolicy::LongerPause, 2_000, index == 1));
    }
    assert_eq!(set(&mut story, 0, Convergence::Throttle), Err(Rejection::CannotThrottle { id: ids[0] }));
    assert_eq!(told(&story, 0).0, ConvergencePolicy::LongerPause, "as it was");
    set(&mut story, 1, Convergence::Throttle).unwrap();
    assert_eq!(told(&story, 1), (ConvergencePolicy::Throttle, 0, true));
}

#[test]
fn a_drain_counts_who_has_left_and_its_end_cancels_what_waits() {
    let mut story = Story::new(2);
    let spot = Spot::Site(site("a"));
    story.client(ClientOrder::Drain { spot: spot.clone(), to: None, priority: 70 }).unwrap();
    let ids = [MigrationId::generate(), MigrationId::generate()];
    let moves = ids.iter().zip(&story.vms).map(|(id, vm)| DrainMove { id: *id, vm: *vm, site: site("b") }).collect();
    story.tell(Order::QueueDrain { spot: spot.clone(), moves });
    assert!(ids.iter().all(|id| story.state.migrations[id].terms.priority == 70));
    story.admit(&ids[..1]);
    story.arrive(ids[0]);
    assert_eq!(story.state.schedule.drain(&spot).unwrap().moved, 1);
    story.client(ClientOrder::Undrain { spot: spot.clone() }).unwrap();
    assert!(matches!(story.phase(ids[1]), Phase::Cancelled { .. }));
    let again = story.client(ClientOrder::Undrain { spot: spot.clone() }).unwrap_err();
    assert_eq!(again.to_string(), "site \"a\" is not being drained");
    story.tell(Order::QueueDrain { spot, moves: vec![DrainMove { id: ids[1], vm: story.vms[1], site: site("b") }] });
    assert!(matches!(story.phase(ids[1]), Phase::Cancelled { .. }), "an order that came late");
}

#[test]
fn terms_and_changes_from_before_there_was_convergence_are_still_read() {
    let longer = Convergence::LongerPause { longest_ms: 2_000 };
    let terms = Terms { convergence: longer, priority: 80, ..Terms::default() };
    let mut old = serde_json::to_value(&terms).unwrap();
    assert_eq!(serde_json::from_value::<Terms>(old.clone()).unwrap(), terms);
    assert!(old.as_object_mut().unwrap().remove("convergence").is_some());
    assert_eq!(serde_json::from_value::<Terms>(old).unwrap(), Terms { convergence: Convergence::Wait, ..terms });
    let change: Change = serde_json::from_str(r#"{"priority":80,"rate_bps":null,"paused":null}"#).unwrap();
    assert_eq!(change, Change { priority: Some(80), ..Change::default() });
}

#[test]
fn what_versions_without_a_queue_wrote_is_still_read() {
    let mut story = Story::new(1);
    let old = format!(
        r#"{{"CreateMigration":{{"id":"{}","vm":"{}","site":"b","traceparent":""}}}}"#,
        MigrationId::generate(),
        story.vms[0]
    );
    story.client(serde_json::from_str(&old).unwrap()).unwrap();
    let begun = story.state.migrations.values().next().unwrap();
    assert_eq!((&begun.phase, &begun.terms), (&RUNNING, &Terms::default()), "it begins at once");
    let mut old = serde_json::to_value(&story.state).unwrap();
    old.as_object_mut().unwrap().remove("schedule");
    for migration in old["migrations"].as_object_mut().unwrap().values_mut() {
        let fields = migration.as_object_mut().unwrap();
        assert!(fields.remove("terms").is_some() && fields.remove("started_unix_ms").is_some());
    }
    for vm in old["vms"].as_object_mut().unwrap().values_mut() {
        assert!(vm["spec"].as_object_mut().unwrap().remove("anti_affinity").is_some());
    }
    let read: State = serde_json::from_value(old).unwrap();
    assert_eq!(read.schedule.limits, Limits::default());
    assert_eq!(read.vms, story.state.vms);
}
