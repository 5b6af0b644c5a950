//! Orders about disks in the pure model, and what workers are told of them.

#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use pageport_controller::link::assignment::assignment;
use pageport_controller::link::observation::{Observations, Observed};
use pageport_controller::link::reconcile::{Now, reconcile};
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::protection::Placement;
use pageport_controller::model::state::{Power, Replica, Worker};
use pageport_controller::model::{Answer, Command, Order, Rejection, Spec, State, Terms, apply, takeover};
use pageport_ownership::controller::Fact;
use pageport_ownership::{Evidence, Proof};
use pageport_proto::v1;
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};
use tokio::time::Instant;

const GIB: u64 = 1 << 30;
const TERMS: Terms = Terms { rpo_ms: 30_000, keep_points: 10, quiesce: false };

fn site(name: &str) -> SiteName {
    name.parse().unwrap()
}

fn worker(site: &str) -> WorkerName {
    format!("worker-{site}").parse().unwrap()
}

/// A VM that runs at site a.
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
        let disk = |name: &str| v1::DiskSpec { name: name.into(), path: format!("/{name}.raw"), ..Default::default() };
        let spec = v1::VmSpec {
            name: "web".into(),
            memory_bytes: 64 << 20,
            vcpus: 1,
            disks: vec![disk("root"), disk("data")],
            ..v1::VmSpec::default()
        };
        let spec = Box::new(Spec::try_from(spec).unwrap());
        story.client(ClientOrder::DefineVm { id: story.id, spec, worker: worker("a") }).unwrap();
        story.client(ClientOrder::SetPower { vm: story.id, power: Power::Run }).unwrap();
        let (owner, own) = story.state.vms[&story.id].ownership.owner();
        let evidence = Evidence { worker: owner.clone(), fact: Fact::Acquired(own) };
        story.apply(Order::Evidence { vm: story.id, evidence }).unwrap();
        story
    }

    fn apply(&mut self, order: Order) -> Result<Answer, Rejection> {
        apply(&mut self.state, Command { now_unix_ms: 20_000, order })
    }

    fn client(&mut self, order: ClientOrder) -> Result<Answer, Rejection> {
        self.apply(Order::Client { request: RequestId::generate(), order })
    }

    fn resize(&mut self, disk: &str, size_bytes: u64) -> Result<Answer, Rejection> {
        self.client(ClientOrder::ResizeDisk { vm: self.id, disk: disk.to_owned(), size_bytes })
    }

    fn add(&mut self, disk: &str, path: &str) -> Result<Answer, Rejection> {
        let (disk, path) = (disk.to_owned(), path.to_owned());
        self.client(ClientOrder::AddDisk { vm: self.id, disk, path, size_bytes: GIB })
    }

    /// Protected at a site, with a first point.
    fn protect(&mut self, at: &str) {
        let order = ClientOrder::Protect {
            vm: self.id,
            site: site(at),
            worker: worker(at),
            terms: TERMS,
            at: Placement::default(),
        };
        self.client(order).unwrap();
        let protect_seq = self.seq(at);
        self.apply(Order::ReachedPoint { vm: self.id, site: site(at), protect_seq }).unwrap();
    }

    fn seq(&self, at: &str) -> u64 {
        self.replica(at).protection.unwrap().seq
    }

    fn replica(&self, at: &str) -> &Replica {
        &self.state.vms[&self.id].replicas[&site(at)]
    }

    fn seeded(&mut self, at: &str) {
        let seed_seq = self.replica(at).seed_seq;
        self.apply(Order::SeedEnded { vm: self.id, site: site(at), seed_seq, failure: None }).unwrap();
    }

    fn move_to(&mut self, at: &str) -> Result<Answer, Rejection> {
        let (id, traceparent) = (MigrationId::generate(), String::new());
        self.client(ClientOrder::CreateMigration { id, vm: self.id, site: site(at), traceparent })
    }

    fn holds(&mut self, at: &str, disks: usize) {
        let (vm, protect_seq) = (self.id, self.seq(at));
        self.apply(Order::HoldsDisks { vm, site: site(at), protect_seq, disks }).unwrap();
    }

    /// What the reports of these workers make the controllers propose.
    fn proposed(&self, reports: Vec<v1::WorkerReport>) -> Vec<Order> {
        let (instant, mut observations) = (Instant::now(), Observations::default());
        for report in reports {
            let name = report.worker.parse().unwrap();
            let observed = Observed { report: Arc::new(report), at: instant, at_unix_ms: 0, assigned: None };
            observations.put(name, observed);
        }
        let orders = reconcile(
            &self.state,
            &observations,
            Now { instant, unix_ms: 0, older_leases_out: std::time::Duration::ZERO },
        );
        let about_disks = |order: &Order| matches!(order, Order::DiskMade { .. } | Order::HoldsDisks { .. });
        orders.into_iter().filter(about_disks).collect()
    }

    fn seed(&mut self, at: &str) {
        self.client(ClientOrder::SeedReplica { vm: self.id, site: site(at), worker: worker(at) }).unwrap();
    }

    /// What the VM's worker is told of its disks.
    fn told(&self) -> Vec<v1::DiskSpec> {
        assignment(&self.state, &worker("a")).vms[0].spec.clone().unwrap().disks
    }
}

#[test]
fn a_size_that_was_ordered_reaches_the_worker_and_only_grows() {
    let mut story = Story::new();
    assert_eq!(story.told().iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(story.resize("data", 2 * GIB), Ok(Answer::Vm(story.id)));
    assert_eq!(story.told().iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [0, 2 * GIB]);
    assert_eq!(story.resize("data", 2 * GIB), Ok(Answer::Vm(story.id)));
    let shrinks = story.resize("data", GIB).unwrap_err();
    assert!(shrinks.to_string().contains("cannot be made smaller"), "{shrinks}");
    let unknown = story.resize("dta", GIB).unwrap_err();
    assert!(unknown.to_string().ends_with("it has: root, data"), "{unknown}");
    for size_bytes in [0, 4095, GIB + 512, (8 << 40) + 4096, u64::MAX] {
        assert_eq!(story.resize("root", size_bytes), Err(Rejection::DiskSize { size_bytes }));
    }
}

#[test]
fn nothing_is_ordered_while_a_move_or_a_seed_has_begun_with_what_was_there() {
    let mut story = Story::new();
    story.seed("b");
    let seeding = story.resize("root", GIB).unwrap_err();
    assert!(matches!(seeding, Rejection::BeingSeeded { .. }), "{seeding}");
    let seed_seq = story.state.vms[&story.id].replicas[&site("b")].seed_seq;
    story.apply(Order::SeedEnded { vm: story.id, site: site("b"), seed_seq, failure: None }).unwrap();
    story.resize("root", GIB).unwrap();
    let (id, traceparent) = (MigrationId::generate(), String::new());
    story.client(ClientOrder::CreateMigration { id, vm: story.id, site: site("b"), traceparent }).unwrap();
    let moving = story.resize("root", 2 * GIB).unwrap_err();
    assert!(matches!(moving, Rejection::AlreadyMigrating { .. }), "{moving}");
}

#[test]
fn a_protected_vm_grows_also_during_its_first_copy() {
    let mut story = Story::new();
    let order = ClientOrder::Protect {
        vm: story.id,
        site: site("b"),
        worker: worker("b"),
        terms: TERMS,
        at: Placement::default(),
    };
    story.client(order).unwrap();
    story.resize("root", GIB).unwrap();
}

#[test]
fn a_disk_that_is_added_has_a_place_of_its_own_and_is_made_once() {
    let mut story = Story::new();
    story.add("logs", "").unwrap();
    story.add("mail", "/images/mail.raw").unwrap();
    let told = story.told();
    let [.., logs, mail] = &told[..] else { panic!("{told:?}") };
    assert_eq!((logs.port, logs.size_bytes, logs.create, logs.path.as_str()), (1, GIB, true, ""));
    assert_eq!((mail.port, mail.create, mail.path.as_str()), (2, true, "/images/mail.raw"));
    story.apply(Order::DiskMade { vm: story.id, disk: "logs".to_owned() }).unwrap();
    assert_eq!(story.told().iter().map(|disk| disk.create).collect::<Vec<_>>(), [false, false, false, true]);
    story.resize("logs", 2 * GIB).unwrap();
    assert_eq!(story.told()[2].size_bytes, 2 * GIB);
}

#[test]
fn what_cannot_be_added_is_refused_and_changes_nothing() {
    let mut story = Story::new();
    let before = story.told();
    let mut refused = |disk: &str, path: &str, words: &str| {
        let error = story.add(disk, path).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(story.told(), before);
    };
    refused("root", "", "another disk");
    refused("Root", "", "a-z, 0-9");
    refused("a-very-long-disk-name-x", "", "a-z, 0-9");
    refused("logs", "logs.raw", "absolute");
    refused("logs", "/root.raw", "image of another disk");
    story.seed("b");
    assert!(matches!(story.add("logs", ""), Err(Rejection::BeingSeeded { .. })));
    story.seeded("b");
    for number in 3..=8 {
        story.add(&format!("disk-{number}"), "").unwrap();
    }
    let full = story.add("one-more", "").unwrap_err().to_string();
    assert!(full.contains("no place for another disk"), "{full}");
    story.move_to("b").unwrap_err();
}

#[test]
fn a_vm_moves_only_to_a_replica_that_holds_all_disks() {
    let mut story = Story::new();
    story.protect("b");
    story.seed("c");
    story.seeded("c");
    story.add("logs", "").unwrap();
    for at in ["b", "c"] {
        let lacks = story.move_to(at).unwrap_err();
        assert!(matches!(lacks, Rejection::LacksDisk { .. }), "{lacks}");
    }
    // A point of the disks that were there before changes nothing; nor does one under an older order.
    story.holds("b", 2);
    assert!(story.replica("b").lacks.contains("logs"));
    let protect_seq = story.seq("b") + 1;
    story.apply(Order::HoldsDisks { vm: story.id, site: site("b"), protect_seq, disks: 3 }).unwrap();
    assert!(story.replica("b").lacks.contains("logs"));
    story.holds("b", 3);
    assert!(story.replica("b").lacks.is_empty());
    story.seed("c");
    story.seeded("c");
    assert!(story.replica("c").lacks.is_empty());
    story.move_to("b").unwrap();
    assert!(matches!(story.add("more", ""), Err(Rejection::AlreadyMigrating { .. })));
}

#[test]
fn who_takes_over_without_a_disk_makes_it_anew_and_where_it_likes() {
    for (holds, create) in [(2, true), (3, false)] {
        let mut story = Story::new();
        story.protect("b");
        story.add("logs", "/images/logs.raw").unwrap();
        story.apply(Order::DiskMade { vm: story.id, disk: "logs".to_owned() }).unwrap();
        story.holds("b", holds);
        let order = takeover::Order {
            vm: story.id,
            site: site("b"),
            worker: worker("b"),
            last: story.state.vms[&story.id].ownership.last(),
            proof: Proof::Override { who: "op".into(), reason: "gone".into() },
            seen: String::new(),
            ordered_by: None,
            point: None,
        };
        story.client(ClientOrder::Resolve(order)).unwrap();
        let told = assignment(&story.state, &worker("b")).vms[0].spec.clone().unwrap().disks;
        assert_eq!((told[2].create, told[2].path.is_empty()), (create, create), "{holds}");
        assert!(story.replica("a").lacks.is_empty());
    }
}

fn report_of(story: &Story, at: &str, disks: &[&str], newest_disks: u32) -> v1::WorkerReport {
    let own = story.state.vms[&story.id].ownership.owner().1.raw();
    let record = v1::OwnershipRecord { kind: v1::ownership_record::Kind::Own.into(), own, epoch: 0, seen: own };
    let status = |name: &&str| v1::DiskStatus { name: (*name).into(), size_bytes: GIB };
    let vm = v1::VmReport {
        vm_id: story.id.to_string(),
        record: Some(record),
        disks: disks.iter().map(status).collect(),
        ..Default::default()
    };
    let newest = v1::RecoveryPoint { number: 4, disks: newest_disks, ..Default::default() };
    let replication = v1::ReplicationReport {
        vm_id: story.id.to_string(),
        to_site: "b".into(),
        protect_seq: story.seq("b"),
        status: Some(v1::ReplicationStatus { newest: Some(newest), ..Default::default() }),
        ..Default::default()
    };
    v1::WorkerReport {
        worker: worker(at).to_string(),
        site: at.into(),
        vms: vec![vm],
        replications: vec![replication],
        ..Default::default()
    }
}

#[test]
fn the_owners_reports_say_that_a_disk_is_made_and_that_a_point_holds_it() {
    let mut story = Story::new();
    story.protect("b");
    story.add("logs", "").unwrap();
    let proposed = |disks: &[&str], newest| story.proposed(vec![report_of(&story, "a", disks, newest)]);
    assert_eq!(proposed(&["root", "data"], 2), []);
    let made = || Order::DiskMade { vm: story.id, disk: "logs".to_owned() };
    assert_eq!(proposed(&["root", "data", "logs"], 2), [made()]);
    let (vm, protect_seq) = (story.id, story.seq("b"));
    let held = Order::HoldsDisks { vm, site: site("b"), protect_seq, disks: 3 };
    assert_eq!(proposed(&["root", "data", "logs"], 3), [made(), held]);
    // Another worker's word counts for nothing.
    assert_eq!(story.proposed(vec![report_of(&story, "c", &["root", "data", "logs"], 3)]), []);
}
