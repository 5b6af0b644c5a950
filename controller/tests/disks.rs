//! Orders about disks in the pure model, and what workers are told of them.

#![allow(clippy::unwrap_used, missing_docs)]

use pageport_controller::link::assignment::assignment;
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::state::{Power, Worker};
use pageport_controller::model::{Answer, Command, Order, Rejection, Spec, State, Terms, apply};
use pageport_ownership::Evidence;
use pageport_ownership::controller::Fact;
use pageport_proto::v1;
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};

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
    let order = ClientOrder::Protect { vm: story.id, site: site("b"), worker: worker("b"), terms: TERMS };
    story.client(order).unwrap();
    story.resize("root", GIB).unwrap();
}
