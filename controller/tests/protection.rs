//! Protection in the pure model and in what workers are told: which orders are taken in which phase, what a report changes, and
//! how protection turns round when the VM changes its place.

#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use pageport_controller::link::assignment::assignment;
use pageport_controller::link::observation::{Observations, Observed};
use pageport_controller::link::reconcile::{Now, reconcile};
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::protection::{
    Placement, Places, Point, TermsError, valid_cap, valid_places, valid_pool,
};
use pageport_controller::model::state::{Power, Replica, ReplicaPhase, Worker};
use pageport_controller::model::{Answer, Command, Order, Rejection, Spec, State, Terms, apply, takeover};
use pageport_ownership::controller::Fact;
use pageport_ownership::{Evidence, Proof};
use pageport_proto::v1;
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};
use tokio::time::Instant;

const TERMS: Terms = Terms { rpo_ms: 30_000, keep_points: 10, quiesce: false };

fn site(name: &str) -> SiteName {
    name.parse().unwrap()
}

fn worker(site: &str) -> WorkerName {
    format!("worker-{site}").parse().unwrap()
}

/// A VM that runs at site a, which its worker has confirmed; workers at a, b and c.
struct Story {
    state: State,
    id: VmId,
}

impl Story {
    fn new() -> Self {
        let mut state = State::default();
        for name in ["a", "b", "c"] {
            state.workers.insert(worker(name), Worker::at(site(name)));
        }
        let mut story = Self { state, id: VmId::generate() };
        let spec = v1::VmSpec {
            name: "web".into(),
            memory_bytes: 64 << 20,
            vcpus: 1,
            disks: vec![v1::DiskSpec { name: "root".into(), path: "/x.raw".into(), ..v1::DiskSpec::default() }],
            on_isolation: v1::IsolationPolicy::SelfFence.into(),
            ..v1::VmSpec::default()
        };
        let spec = Box::new(Spec::try_from(spec).unwrap());
        story.client(ClientOrder::DefineVm { id: story.id, spec, worker: worker("a") }).unwrap();
        story.client(ClientOrder::SetPower { vm: story.id, power: Power::Run }).unwrap();
        story.confirm();
        story
    }

    /// Protected at site b, with a first point.
    fn protected() -> Self {
        let mut story = Self::new();
        story.protect("b").unwrap();
        story.reach("b");
        story
    }

    fn apply(&mut self, order: Order) -> Result<Answer, Rejection> {
        apply(&mut self.state, Command { now_unix_ms: 20_000, order })
    }

    fn client(&mut self, order: ClientOrder) -> Result<Answer, Rejection> {
        self.apply(Order::Client { request: RequestId::generate(), order })
    }

    fn protect(&mut self, at: &str) -> Result<Answer, Rejection> {
        let order = ClientOrder::Protect {
            vm: self.id,
            site: site(at),
            worker: worker(at),
            terms: TERMS,
            at: Placement::default(),
        };
        self.client(order)
    }

    fn unprotect(&mut self, at: &str) -> Result<Answer, Rejection> {
        self.client(ClientOrder::Unprotect { vm: self.id, site: site(at) })
    }

    fn scrub(&mut self, at: &str) -> Result<Answer, Rejection> {
        self.client(ClientOrder::Scrub { vm: self.id, site: site(at) })
    }

    fn seed(&mut self, at: &str) -> Result<Answer, Rejection> {
        self.client(ClientOrder::SeedReplica { vm: self.id, site: site(at), worker: worker(at) })
    }

    fn seeded(&mut self, at: &str) {
        let seed_seq = self.replica(at).seed_seq;
        self.apply(Order::SeedEnded { vm: self.id, site: site(at), seed_seq, failure: None }).unwrap();
    }

    fn reach(&mut self, at: &str) {
        let protect_seq = self.seq(at);
        self.apply(Order::ReachedPoint { vm: self.id, site: site(at), protect_seq }).unwrap();
    }

    fn begin_move(&mut self, to: &str) -> Result<MigrationId, Rejection> {
        let id = MigrationId::generate();
        let order = ClientOrder::CreateMigration { id, vm: self.id, site: site(to), traceparent: String::new() };
        self.client(order).map(|_| id)
    }

    fn evidence(&mut self, of: WorkerName, fact: Fact) {
        self.apply(Order::Evidence { vm: self.id, evidence: Evidence { worker: of, fact } }).unwrap();
    }

    /// The owner has acted on its newest epoch.
    fn confirm(&mut self) {
        let (owner, own) = self.state.vms[&self.id].ownership.owner();
        self.evidence(owner.clone(), Fact::Acquired(own));
    }

    fn arrive(&mut self, id: MigrationId) {
        let (to, epoch) = (self.state.migrations[&id].to.worker.clone(), self.state.migrations[&id].epoch);
        self.evidence(to, Fact::Acquired(epoch));
        // The figures are not waited for.
        self.apply(Order::MigrationComplete { id }).unwrap();
    }

    fn replica(&self, at: &str) -> &Replica {
        &self.state.vms[&self.id].replicas[&site(at)]
    }

    fn seq(&self, at: &str) -> u64 {
        self.replica(at).protection.unwrap().seq
    }

    fn replications(&self, of: &str) -> Vec<v1::ReplicationAssignment> {
        assignment(&self.state, &worker(of)).replications
    }

    /// What reports of the owner's replication call for.
    fn orders(&self, report: &v1::ReplicationReport) -> Vec<Order> {
        let mut observations = Observations::default();
        let (instant, reporter) = (Instant::now(), worker("a"));
        let known = &self.state.workers[&reporter];
        let report = v1::WorkerReport {
            site: known.site.to_string(),
            replications: vec![report.clone()],
            ..v1::WorkerReport::default()
        };
        observations.put(reporter, Observed { report: Arc::new(report), at: instant, at_unix_ms: 0, assigned: None });
        let orders = reconcile(
            &self.state,
            &observations,
            Now { instant, unix_ms: 0, older_leases_out: std::time::Duration::ZERO },
        );
        orders.into_iter().filter(|order| matches!(order, Order::ReachedPoint { .. })).collect()
    }

    fn take_over(
        &mut self,
        proof: impl FnOnce(&Self) -> Proof<WorkerName>,
        point: Option<Point>,
    ) -> Result<Answer, Rejection> {
        let last = self.state.vms[&self.id].ownership.last();
        let proof = proof(self);
        self.apply(Order::TakeOver(takeover::Order {
            vm: self.id,
            site: site("b"),
            worker: worker("b"),
            last,
            proof,
            seen: "silent".into(),
            ordered_by: None,
            point,
        }))
    }

    fn leases_out(&self) -> Proof<WorkerName> {
        let last = self.state.vms[&self.id].ownership.last();
        Proof::LeasesOut { workers: vec![worker("a"), worker("b")], last }
    }
}

fn refused(outcome: Result<Answer, Rejection>, part: &str) {
    let rejection = outcome.unwrap_err().to_string();
    assert!(rejection.contains(part), "{rejection}");
}

#[test]
fn terms_are_validated_at_the_edge_and_what_is_left_out_gets_its_default() {
    let terms = |rpo_ms, keep_points| Terms::try_from(v1::Protection { rpo_ms, keep_points, quiesce: false });
    assert_eq!(terms(0, 0), Ok(TERMS));
    assert_eq!(terms(5_000, 1).map(|terms| (terms.rpo_ms, terms.keep_points)), Ok((5_000, 1)));
    assert!(terms(86_400_000, 256).is_ok());
    let quiesced = v1::Protection { quiesce: true, ..v1::Protection::default() };
    assert_eq!(Terms::try_from(quiesced), Ok(Terms { quiesce: true, ..TERMS }));
    assert!(v1::Protection::from(Terms { quiesce: true, ..TERMS }).quiesce);
    let before = serde_json::json!({ "rpo_ms": 30_000, "keep_points": 10 });
    assert_eq!(serde_json::from_value::<Terms>(before).unwrap(), TERMS, "an order of an earlier version");
    for rpo_ms in [4_999, 86_400_001] {
        assert_eq!(terms(rpo_ms, 1), Err(TermsError::Rpo { rpo_ms }));
    }
    assert_eq!(terms(0, 257), Err(TermsError::KeepPoints { keep_points: 257 }));
    assert_eq!((valid_cap(0), valid_cap(100_000)), (Ok(0), Ok(100_000)));
    assert_eq!(valid_cap(99_999), Err(TermsError::Cap { cap_bps: 99_999 }));
}

#[test]
fn protection_makes_a_replica_that_is_complete_from_its_first_point_on_and_no_seed() {
    let mut story = Story::new();
    assert_eq!(story.protect("b"), Ok(Answer::Replica(story.id, site("b"))));
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeding);
    let told = assignment(&story.state, &worker("a"));
    assert!(told.seeds.is_empty(), "replication makes the first copy");
    assert_eq!(told.replications.len(), 1);
    story.reach("b");
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeded);
}

#[test]
fn only_a_point_under_the_newest_order_completes_a_replica() {
    let mut story = Story::new();
    story.protect("b").unwrap();
    let newest = v1::RecoveryPoint { number: 1, ..v1::RecoveryPoint::default() };
    let report = |protect_seq, newest| v1::ReplicationReport {
        vm_id: story.id.to_string(),
        to_site: "b".into(),
        protect_seq,
        status: Some(v1::ReplicationStatus { newest, ..v1::ReplicationStatus::default() }),
        wan_bytes: 0,
    };
    let (old, pointless, good) = (report(7, Some(newest)), report(1, None), report(1, Some(newest)));
    assert_eq!(story.orders(&old), []);
    assert_eq!(story.orders(&pointless), []);
    let orders = story.orders(&good);
    assert_eq!(orders, [Order::ReachedPoint { vm: story.id, site: site("b"), protect_seq: 1 }]);
    story.apply(orders[0].clone()).unwrap();
    assert_eq!(story.orders(&good), [], "it is proposed once");
    // Other terms are another order; the replica stays complete.
    story.protect("b").unwrap();
    assert_eq!((story.seq("b"), story.replica("b").phase.clone()), (2, ReplicaPhase::Seeded));
    story.apply(Order::ReachedPoint { vm: story.id, site: site("b"), protect_seq: 1 }).unwrap();
}

fn places(path: &str) -> Places {
    valid_places(vec![v1::DiskPlace { disk: "root".into(), path: path.into() }]).unwrap()
}

#[test]
fn a_replica_is_placed_before_it_is_there_and_not_moved_afterwards() {
    let mut story = Story::new();
    let at = |story: &Story, disk: &str, path: &str| {
        let at = Placement { places: Places::from([(disk.to_owned(), path.to_owned())]), pool: None };
        ClientOrder::Protect { vm: story.id, site: site("b"), worker: worker("b"), terms: TERMS, at }
    };
    refused(story.client(at(&story, "ghost", "/dev/sdb")), "has no disk \"ghost\"");
    story.client(at(&story, "root", "/dev/sdb")).unwrap();
    story.unprotect("b").unwrap();
    refused(story.seed("b"), "where a seed does not make one");
    // Nothing is there yet: the operator may think better of it.
    story.client(at(&story, "root", "/dev/sdc")).unwrap();
    let told = assignment(&story.state, &worker("a")).replications.remove(0).places;
    assert_eq!(told, [v1::DiskPlace { disk: "root".into(), path: "/dev/sdc".into() }]);
    story.reach("b");
    refused(story.client(at(&story, "root", "/dev/sdd")), "pageportctl replica delete web --site b");
    story.client(at(&story, "root", "/dev/sdc")).unwrap();
    story.protect("b").unwrap();
    assert_eq!(assignment(&story.state, &worker("a")).replications[0].places.len(), 1);
    story.unprotect("b").unwrap();
    story.seed("b").unwrap();
    story.client(ClientOrder::DeleteReplica { vm: story.id, site: site("b") }).unwrap();
    assert!(story.state.vms[&story.id].places.is_empty());
}

#[test]
fn a_pool_is_chosen_before_the_replica_is_there_and_stays_with_the_site_until_it_is_deleted() {
    let mut story = Story::new();
    let at = |story: &Story, pool: &str| {
        let at = Placement { places: Places::new(), pool: valid_pool(pool).unwrap() };
        ClientOrder::Protect { vm: story.id, site: site("b"), worker: worker("b"), terms: TERMS, at }
    };
    story.client(at(&story, "hdd")).unwrap();
    // Nothing is there yet: the operator may think better of it, but a seed would not know of it.
    story.client(at(&story, "ssd")).unwrap();
    story.unprotect("b").unwrap();
    refused(story.seed("b"), "in a pool, where a seed does not make one");
    story.client(at(&story, "")).unwrap();
    story.reach("b");
    assert_eq!(story.replications("a")[0].pool, "ssd");
    refused(story.client(at(&story, "hdd")), "lies in pool \"ssd\": it is not moved");
    refused(story.client(at(&story, "default")), "pageportctl replica delete web --site b");
    story.client(at(&story, "ssd")).unwrap();
    // Also while the VM lives there, and when that becomes a replica again.
    for (to, back) in [("b", "a"), ("a", "b")] {
        let id = story.begin_move(to).unwrap();
        story.arrive(id);
        let told = story.replications(to).remove(0);
        assert_eq!((told.to_site.as_str(), told.pool.as_str()), (back, if back == "b" { "ssd" } else { "" }));
    }
    let copy: State = serde_json::from_slice(&serde_json::to_vec(&story.state).unwrap()).unwrap();
    assert_eq!(copy, story.state);
    story.unprotect("b").unwrap();
    story.client(ClientOrder::DeleteReplica { vm: story.id, site: site("b") }).unwrap();
    assert!(story.state.vms[&story.id].pools.is_empty());
}

#[test]
fn a_replica_that_was_made_without_a_pool_lies_in_the_default_one() {
    let mut story = Story::protected();
    let at = |story: &Story, pool: &str| {
        let at = Placement { places: Places::new(), pool: valid_pool(pool).unwrap() };
        ClientOrder::Protect { vm: story.id, site: site("b"), worker: worker("b"), terms: TERMS, at }
    };
    refused(story.client(at(&story, "ssd")), "lies in pool \"default\"");
    story.client(at(&story, "default")).unwrap();
    assert!(valid_pool("Fast One").unwrap_err().to_string().contains("use 1 to 40 of a-z"));
}

#[test]
fn an_order_from_before_there_were_pools_is_read() {
    let order = ClientOrder::Protect {
        vm: VmId::generate(),
        site: site("b"),
        worker: worker("b"),
        terms: TERMS,
        at: Placement { places: places("/dev/sdb"), pool: None },
    };
    let mut old = serde_json::to_value(&order).unwrap();
    assert_eq!(old["Protect"]["places"]["root"], "/dev/sdb");
    let fields = old["Protect"].as_object_mut().unwrap();
    fields.remove("pool").unwrap();
    assert_eq!(serde_json::from_value::<ClientOrder>(old.clone()).unwrap(), order);
    old["Protect"].as_object_mut().unwrap().remove("places").unwrap();
    let without = serde_json::from_value::<ClientOrder>(old).unwrap();
    assert!(matches!(without, ClientOrder::Protect { at, .. } if at == Placement::default()));
}

#[test]
fn a_place_is_a_plain_absolute_path() {
    assert_eq!(places("/dev/vg0/web").into_iter().next(), Some(("root".into(), "/dev/vg0/web".into())));
    let named = |path: &str| v1::DiskPlace { disk: "root".into(), path: path.into() };
    for wrong in ["", "dev/sdb", "/dev/vg0/../sda", "/dev/a\0b"] {
        assert!(matches!(valid_places(vec![named(wrong)]), Err(TermsError::Place { .. })), "{wrong:?}");
    }
    let twice = valid_places(vec![named("/dev/sdb"), named("/dev/sdc")]);
    assert!(matches!(twice, Err(TermsError::TwoPlaces { .. })), "{twice:?}");
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_reason() {
    let mut story = Story::new();
    refused(story.protect("a"), "already runs at site \"a\"");
    let elsewhere = ClientOrder::Protect {
        vm: story.id,
        site: site("b"),
        worker: worker("c"),
        terms: TERMS,
        at: Placement::default(),
    };
    refused(story.client(elsewhere), "worker \"worker-c\" is unknown");
    let nobody = ClientOrder::Protect {
        vm: VmId::generate(),
        site: site("b"),
        worker: worker("b"),
        terms: TERMS,
        at: Placement::default(),
    };
    refused(story.client(nobody), "is unknown");
    refused(story.unprotect("b"), "is not protected at site \"b\"");

    story.protect("b").unwrap();
    refused(story.seed("b"), "is kept up to date already");
    let delete = ClientOrder::DeleteReplica { vm: story.id, site: site("b") };
    refused(story.client(delete.clone()), "run \"pageportctl unprotect web --site b\" first");
    story.unprotect("b").unwrap();
    story.client(delete).unwrap();
    refused(story.protect("b"), "is still being removed");

    story.client(ClientOrder::SetPower { vm: story.id, power: Power::Stop }).unwrap();
    story.client(ClientOrder::DeleteVm { vm: story.id }).unwrap();
    refused(story.protect("c"), "is unknown");
}

#[test]
fn an_unprotected_replica_stays_as_it_is_at_its_newest_point_or_counts_as_failed_without_one() {
    let mut story = Story::protected();
    story.unprotect("b").unwrap();
    assert_eq!((story.replica("b").phase.clone(), story.replica("b").protection), (ReplicaPhase::Seeded, None));
    assert!(story.replications("a").is_empty());
    story.protect("b").unwrap();
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeding);
    story.unprotect("b").unwrap();
    assert!(
        matches!(&story.replica("b").phase, ReplicaPhase::Failed { reason } if reason.contains("first recovery point"))
    );
    // It can be seeded by hand then.
    story.seed("b").unwrap();
    story.seeded("b");
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeded);
}

#[test]
fn the_end_of_a_seed_that_protection_took_over_from_completes_nothing() {
    let mut story = Story::new();
    story.seed("b").unwrap();
    story.protect("b").unwrap();
    story.seeded("b");
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeding);
}

#[test]
fn a_move_to_a_protected_replica_needs_a_point_and_never_mixes_it() {
    let mut story = Story::new();
    story.protect("b").unwrap();
    refused(story.begin_move("b").map(Answer::Migration), "has no recovery point yet");
    story.reach("b");
    let id = story.begin_move("b").unwrap();
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeded);
    refused(story.unprotect("b"), "is already migrating");
    refused(story.protect("c"), "is already migrating");
    assert_eq!(story.replications("a").len(), 1, "the worker decides what it does of it during a move");
    let epoch = story.state.migrations[&id].epoch;
    story.evidence(worker("a"), Fact::Revoked(epoch));
    assert_eq!(story.replica("b").phase, ReplicaPhase::Seeded, "it is brought back to its newest point");
    story.take_over(Story::leases_out, None).unwrap();
}

#[test]
fn protection_turns_round_with_the_vm_and_that_of_other_sites_stays() {
    let mut story = Story::protected();
    story.protect("c").unwrap();
    story.reach("c");
    let id = story.begin_move("b").unwrap();
    story.arrive(id);
    assert!(!story.state.vms[&story.id].replicas.contains_key(&site("b")));
    let left = story.replica("a").clone();
    assert_eq!((left.phase, left.protection.unwrap().terms, left.worker), (ReplicaPhase::Seeded, TERMS, worker("a")));
    assert_eq!((story.seq("a"), story.seq("c")), (3, 2));
    let told = story.replications("b");
    assert_eq!(told.iter().map(|order| order.to_site.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    assert!(story.replications("a").is_empty());
    // And back.
    let id = story.begin_move("a").unwrap();
    story.arrive(id);
    assert_eq!((story.seq("b"), story.replica("b").phase.clone()), (4, ReplicaPhase::Seeded));
}

#[test]
fn a_move_to_an_unprotected_replica_protects_nothing() {
    let mut story = Story::protected();
    story.seed("c").unwrap();
    story.seeded("c");
    let id = story.begin_move("c").unwrap();
    story.arrive(id);
    assert_eq!(story.replica("a").protection, None);
    assert_eq!(story.replications("c").len(), 1, "the one at b goes on from the new place");
}

#[test]
fn a_takeover_boots_from_the_newest_point_and_says_so_and_the_old_disk_is_brought_up_to_date() {
    let mut story = Story::protected();
    story.take_over(Story::leases_out, Some(Point { number: 41, taken_unix_ms: 8_000 })).unwrap();
    let vm = &story.state.vms[&story.id];
    let expected = "taken over from worker \"worker-a\" at recovery point 41, which was 12 s old";
    assert!(vm.problem.starts_with(expected), "{}", vm.problem);
    assert_eq!(vm.takeovers[0].point.unwrap().number, 41);
    assert_eq!((story.replica("a").phase.clone(), story.seq("a")), (ReplicaPhase::Outdated, 2));
    assert_eq!(story.replications("b").len(), 1);
    refused(story.begin_move("a").map(Answer::Migration), "has no recovery point yet");
    story.reach("a");
    assert_eq!(story.replica("a").phase, ReplicaPhase::Seeded);
}

#[test]
fn a_disk_that_was_handed_over_goes_back_to_no_point() {
    let mut story = Story::protected();
    let id = story.begin_move("b").unwrap();
    let epoch = story.state.migrations[&id].epoch;
    story.evidence(worker("a"), Fact::Released(epoch));
    story.take_over(Story::leases_out, Some(Point { number: 41, taken_unix_ms: 0 })).unwrap();
    assert_eq!(story.state.vms[&story.id].takeovers[0].point, None);
    assert_eq!(story.seq("a"), 2, "the protection turns round all the same");
}

#[test]
fn a_first_copy_is_nothing_to_boot_from() {
    let mut story = Story::new();
    story.protect("b").unwrap();
    refused(story.take_over(Story::leases_out, None), "has no recovery point yet");
    let forced = |_: &Story| Proof::Override { who: "ann".into(), reason: "all that is left".into() };
    refused(story.take_over(forced, None), "has no recovery point yet");
}

#[test]
fn a_cap_reaches_the_replications_over_its_link_and_no_others() {
    let mut story = Story::protected();
    story.protect("c").unwrap();
    let cap = |from, to, cap_bps| ClientOrder::SetLinkCap { from: site(from), to: site(to), cap_bps };
    assert_eq!(story.client(cap("a", "b", 5_000_000)), Ok(Answer::Done));
    story.client(cap("b", "a", 7_000_000)).unwrap();
    let caps = |story: &Story| story.replications("a").iter().map(|order| order.cap_bps).collect::<Vec<_>>();
    assert_eq!(caps(&story), [5_000_000, 0]);
    story.client(cap("a", "b", 0)).unwrap();
    assert_eq!(caps(&story), [0, 0]);
    refused(story.client(cap("a", "a", 0)), "no link from site \"a\" to itself");
    let copy: State = serde_json::from_slice(&serde_json::to_vec(&story.state).unwrap()).unwrap();
    assert_eq!(copy, story.state);
}

#[test]
fn a_state_from_before_there_was_protection_is_read() {
    let mut story = Story::new();
    story.seed("b").unwrap();
    let mut old = serde_json::to_value(&story.state).unwrap();
    let fields = old.as_object_mut().unwrap();
    fields.remove("protect_seq").unwrap();
    fields.remove("links").unwrap();
    let vm = &mut fields["vms"][story.id.to_string()];
    vm["replicas"]["b"].as_object_mut().unwrap().remove("protection").unwrap();
    assert_eq!(serde_json::from_value::<State>(old).unwrap(), story.state);
}

#[test]
fn a_scrub_is_ordered_of_a_protected_replica_with_a_point_and_each_order_has_a_number_of_its_own() {
    let mut story = Story::new();
    assert!(matches!(story.scrub("b"), Err(Rejection::NotProtected { .. })));
    story.protect("b").unwrap();
    assert!(matches!(story.scrub("b"), Err(Rejection::NoPointYet { .. })));
    story.reach("b");
    assert_eq!(story.replications("a")[0].scrub_seq, 0);
    story.scrub("b").unwrap();
    let first = story.replications("a")[0].scrub_seq;
    assert!(first > story.seq("b"));
    story.scrub("b").unwrap();
    let second = story.replications("a")[0].scrub_seq;
    assert!(second > first);
    story.protect("b").unwrap();
    assert_eq!(story.replications("a")[0].scrub_seq, second, "other terms do not forget it");
    story.reach("b");
    let id = story.begin_move("b").unwrap();
    story.arrive(id);
    assert_eq!(story.replications("b")[0].scrub_seq, 0, "another replica, the other way round");
}
