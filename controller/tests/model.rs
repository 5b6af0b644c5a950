//! The pure model: determinism, rejections without effect, and rules that hold after any sequence of commands.

#![allow(clippy::unwrap_used, missing_docs)]

use pageport_controller::model::command::{ClientOrder, Halt};
use pageport_controller::model::migration::{Phase, Record};
use pageport_controller::model::protection::Placement;
use pageport_controller::model::schedule::{Change, DrainMove, Spot};
use pageport_controller::model::state::{Power, ReplicaPhase, Worker};
use pageport_controller::model::{Answer, Command, Order, Spec, State, Terms, apply};
use pageport_ownership::{Epoch, Evidence, controller::Fact};
use pageport_proto::v1;
use pageport_proto::{MigrationId, RequestId, VmId, WorkerName};
use proptest::prelude::*;

const SITES: [&str; 3] = ["a", "b", "c"];

fn uuid<T: std::str::FromStr<Err: std::fmt::Debug>>(kind: u8, number: u8) -> T {
    format!("00000000-0000-7000-8000-0000000{kind:02x}0{number:02x}").parse().unwrap()
}

fn vm(number: u8) -> VmId {
    uuid(1, number)
}

fn worker(index: usize) -> WorkerName {
    format!("worker-{}", SITES[index]).parse().unwrap()
}

fn spec(number: u8) -> Box<Spec> {
    let spec = v1::VmSpec {
        name: format!("vm-{number}"),
        memory_bytes: 64 << 20,
        vcpus: 1,
        disks: vec![v1::DiskSpec { name: "root".into(), path: "/x.raw".into(), ..v1::DiskSpec::default() }],
        ..v1::VmSpec::default()
    };
    Box::new(Spec::try_from(spec).unwrap())
}

fn client_order() -> impl Strategy<Value = ClientOrder> {
    let site = |index: usize| SITES[index].parse().unwrap();
    (0..14_u8, 0..2_u8, 0..3_usize, 0..6_u8).prop_map(move |(kind, number, index, move_number)| match kind {
        0 => ClientOrder::DefineVm { id: vm(number), spec: spec(number), worker: worker(index) },
        1 => ClientOrder::SetPower { vm: vm(number), power: if index == 0 { Power::Stop } else { Power::Run } },
        2 => ClientOrder::SeedReplica { vm: vm(number), site: site(index), worker: worker(index) },
        3 => ClientOrder::DeleteReplica { vm: vm(number), site: site(index) },
        4 => ClientOrder::CancelMigration { id: uuid(2, move_number) },
        5 if move_number == 0 => ClientOrder::DeleteVm { vm: vm(number) },
        6 => ClientOrder::Protect {
            vm: vm(number),
            site: site(index),
            worker: worker(index),
            terms: Terms { rpo_ms: 30_000, keep_points: 1 + u32::from(move_number), quiesce: false },
            at: Placement::default(),
        },
        7 if move_number == 0 => ClientOrder::Unprotect { vm: vm(number), site: site(index) },
        8 if move_number == 0 => {
            ClientOrder::SetLinkCap { from: site(index), to: site(usize::from(number)), cap_bps: 1_000_000 }
        }
        9 | 10 => ClientOrder::QueueMigration {
            id: uuid(2, move_number),
            vm: vm(number),
            site: site(index),
            traceparent: String::new(),
            terms: Box::default(),
            admitted: (index == 0).then_some(u64::from(move_number)),
        },
        11 => ClientOrder::ChangeMigration {
            id: uuid(2, move_number),
            change: Change { priority: Some(move_number), paused: Some(index == 0), ..Change::default() },
        },
        12 if move_number < 2 => ClientOrder::Drain { spot: Spot::Site(site(index)), to: None, priority: 50 },
        12 => ClientOrder::Undrain { spot: Spot::Site(site(index)) },
        _ => ClientOrder::CreateMigration {
            id: uuid(2, move_number),
            vm: vm(number),
            site: site(index),
            traceparent: String::new(),
        },
    })
}

fn order() -> impl Strategy<Value = Order> {
    let fact = (0..4_u8, 1..8_u64).prop_map(|(kind, epoch)| {
        let epoch = Epoch::from_raw(epoch);
        match kind {
            0 => Fact::Revoked(epoch),
            1 => Fact::Released(epoch),
            2 => Fact::Refused(epoch),
            _ => Fact::Acquired(epoch),
        }
    });
    prop_oneof![
        6 => (0..40_u8, client_order())
            .prop_map(|(number, order)| Order::Client { request: uuid::<RequestId>(3, number), order }),
        3 => (0..2_u8, 0..3_usize, fact).prop_map(|(number, index, fact)| Order::Evidence {
            vm: vm(number),
            evidence: Evidence { worker: worker(index), fact },
        }),
        2 => (0..2_u8, 0..3_usize, 1..6_u64).prop_map(|(number, index, seed_seq)| Order::SeedEnded {
            vm: vm(number),
            site: SITES[index].parse().unwrap(),
            seed_seq,
            failure: None,
        }),
        2 => (0..2_u8, 0..3_usize, 1..6_u64).prop_map(|(number, index, protect_seq)| Order::ReachedPoint {
            vm: vm(number),
            site: SITES[index].parse().unwrap(),
            protect_seq,
        }),
        1 => (0..6_u8).prop_map(|number| Order::MigrationRecord {
            id: uuid(2, number),
            record: Record(Box::new(v1::MigrationRecord { total_time_ms: 7, ..v1::MigrationRecord::default() })),
        }),
        1 => (0..6_u8).prop_map(|number| Order::MigrationComplete { id: uuid(2, number) }),
        1 => (0..6_u8, 0..3_usize)
            .prop_map(|(number, index)| Order::MigrationEnded { id: uuid(2, number), worker: worker(index) }),
        1 => (0..6_u8)
            .prop_map(|number| Order::MigrationFailing { id: uuid(2, number), reason: "link lost".into() }),
        1 => (0..2_u8, 0..3_u64).prop_map(|(number, power_seq)| {
            Order::VmHalted { vm: vm(number), power_seq, cause: Halt::Crashed, problem: "gone".into() }
        }),
        1 => (0..2_u8).prop_map(|number| Order::ForgetVm { vm: vm(number) }),
        2 => (0..6_u8, 0..12_u64).prop_map(|(number, seq)| Order::Admit { ids: vec![uuid(2, number)], seq }),
        1 => (0..6_u8).prop_map(|number| Order::GiveUp { id: uuid(2, number), reason: "too late".into() }),
        1 => (0..2_u8, 0..3_usize, 0..6_u8).prop_map(|(number, index, move_number)| Order::QueueDrain {
            spot: Spot::Site(SITES[index].parse().unwrap()),
            moves: vec![DrainMove {
                id: uuid(2, move_number),
                vm: vm(number),
                site: SITES[(index + 1) % SITES.len()].parse().unwrap(),
            }],
        }),
    ]
}

fn with_workers() -> State {
    let mut state = State::default();
    for (index, site) in SITES.iter().enumerate() {
        let known = Worker::at(site.parse().unwrap());
        let order = Order::RegisterWorker { name: worker(index), worker: known };
        apply(&mut state, Command { now_unix_ms: 0, order }).unwrap();
    }
    state
}

/// What must hold in every state.
fn check(before: &State, after: &State) {
    for (id, vm) in &after.vms {
        if let Some(earlier) = before.vms.get(id) {
            assert!(vm.ownership.last() >= earlier.ownership.last(), "an epoch was given twice");
            assert!(vm.ownership.owner().1 >= earlier.ownership.owner().1, "ownership went back in time");
        }
        assert!(vm.ownership.owner().1 <= vm.ownership.last());
        let open = after.migrations.values().filter(|migration| migration.vm == *id && !migration.is_over());
        let (queued, open): (Vec<_>, Vec<_>) = open.partition(|migration| migration.phase == Phase::Queued);
        assert!(queued.len() <= 1, "two orders for one VM");
        assert_eq!(
            open.iter().map(|migration| migration.id).collect::<Vec<_>>(),
            vm.migration.into_iter().collect::<Vec<_>>()
        );
        let home = after.site_of_vm(vm).unwrap();
        assert!(!vm.replicas.contains_key(home), "a replica at the VM's own site");
        for (site, replica) in &vm.replicas {
            let Some(protection) = replica.protection else { continue };
            assert!(protection.seq <= after.protect_seq, "a number that was never given");
            assert_ne!(replica.phase, ReplicaPhase::Mixed, "a protected replica can always be brought back");
            assert!(!vm.removals.contains_key(site), "protected and removed");
        }
    }
    for (id, migration) in &after.migrations {
        if before.migrations.get(id).is_some_and(|earlier| earlier.is_over()) {
            assert!(migration.is_over(), "an ended migration began again");
        }
        let begun = before.migrations.get(id).is_some_and(|earlier| earlier.epoch != Epoch::ZERO);
        assert!(!begun || migration.phase != Phase::Queued, "it was let begin, and waits again");
    }
}

proptest! {
    #[test]
    fn every_node_gets_the_same_state_and_the_same_answers(orders in prop::collection::vec(order(), 1..120)) {
        let mut one = with_workers();
        let mut other = with_workers();
        for (at, order) in orders.into_iter().enumerate() {
            let command = Command { now_unix_ms: at as i64, order };
            // As it travels: through the log, and at one node through a snapshot.
            let logged: Command = serde_json::from_slice(&serde_json::to_vec(&command).unwrap()).unwrap();
            prop_assert_eq!(&logged, &command);
            let before = one.clone();
            let answer = apply(&mut one, command);
            let theirs = apply(&mut other, logged);
            prop_assert_eq!(&answer, &theirs);
            prop_assert_eq!(&one, &other);
            if answer.is_err() {
                prop_assert_eq!(&one, &before, "a rejected command changed something");
            }
            check(&before, &one);
            other = serde_json::from_slice(&serde_json::to_vec(&other).unwrap()).unwrap();
        }
    }
}

#[test]
fn a_repeated_request_gets_its_old_answer_and_changes_nothing() {
    let mut state = with_workers();
    let define = |id: u8| Command {
        now_unix_ms: 0,
        order: Order::Client {
            request: uuid(3, 1),
            order: ClientOrder::DefineVm { id: vm(id), spec: spec(0), worker: worker(0) },
        },
    };
    let first = apply(&mut state, define(1)).unwrap();
    let before = state.clone();
    assert_eq!(apply(&mut state, define(2)), Ok(first.clone()));
    assert_eq!((state, first), (before.clone(), Answer::Vm(vm(1))));
    let mut state = before;
    let other = ClientOrder::CancelMigration { id: uuid::<MigrationId>(2, 1) };
    let reused =
        apply(&mut state, Command { now_unix_ms: 0, order: Order::Client { request: uuid(3, 1), order: other } });
    assert!(reused.unwrap_err().to_string().contains("already used"));
}
