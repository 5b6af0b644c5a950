//! The scheduler keeps to its limits whatever is asked, and nobody waits for ever.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use pageport_controller::scheduler::evacuate::{Leaver, evacuate};
use pageport_controller::scheduler::fleet::{Guest, Host, Limits, Line, Nic, Predecessor, Queued, Running};
use pageport_controller::scheduler::plan::{AGEING_MS, DEFAULT_PRIORITY, OVERDUE_POINTS, URGENT_MS};
use pageport_controller::scheduler::rates::{FLOOR_BPS, shares};
use pageport_controller::scheduler::wait::Resource;
use pageport_controller::scheduler::{Decision, Fleet, GivenUp, Wait, Window, plan};
use pageport_proto::{MigrationId, SiteName, VmId, WorkerName};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;
const DAY_MS: i64 = 86_400_000;
const SITES: usize = 3;
const HOSTS: usize = 6;

fn uuid<T: std::str::FromStr<Err: std::fmt::Debug>>(kind: u8, number: usize) -> T {
    format!("{kind:08x}-0000-7000-8000-{number:012x}").parse().unwrap()
}

fn vm(number: usize) -> VmId {
    uuid(1, number)
}

fn id(number: usize) -> MigrationId {
    uuid(2, number)
}

fn site(number: usize) -> SiteName {
    format!("s{}", number % SITES).parse().unwrap()
}

/// Two at each site.
fn worker(number: usize) -> WorkerName {
    format!("w{}", number % HOSTS).parse().unwrap()
}

fn host(number: usize) -> Host {
    Host { site: site(number), memory_bytes: 64 * GIB, connected: true, guarded: true, drained: false }
}

fn guest(number: usize, at: usize) -> Guest {
    Guest {
        name: format!("vm{number}"),
        worker: worker(at),
        memory_bytes: GIB,
        apart: BTreeSet::new(),
        fences_itself: false,
        shared: BTreeSet::new(),
    }
}

fn queued(number: usize, to: usize) -> Queued {
    Queued {
        vm: vm(number),
        to: Ok(worker(to)),
        ordered_unix_ms: 0,
        priority: DEFAULT_PRIORITY,
        deadline_unix_ms: None,
        window: None,
        after: BTreeMap::new(),
        paused: false,
    }
}

/// `vms` guests at worker 0, of which all are to go to worker 1.
fn fleet(vms: usize, per_worker: u32, per_link: u32) -> Fleet {
    Fleet {
        limits: Limits { per_worker, per_link, memory_percent: 100 },
        hosts: (0..HOSTS).map(|number| (worker(number), host(number))).collect(),
        lines: BTreeMap::new(),
        guests: (0..vms).map(|number| (vm(number), guest(number, 0))).collect(),
        resting: BTreeSet::new(),
        running: BTreeMap::new(),
        queued: (0..vms).map(|number| (id(number), queued(number, 1))).collect(),
    }
}

fn admitted(decisions: &BTreeMap<MigrationId, Decision>) -> Vec<MigrationId> {
    decisions.iter().filter(|(_, decision)| **decision == Decision::Admit).map(|(id, _)| *id).collect()
}

/// What is admitted runs.
fn begin(fleet: &mut Fleet, decisions: &BTreeMap<MigrationId, Decision>) {
    for id in admitted(decisions) {
        let queued = fleet.queued.remove(&id).unwrap();
        let from = fleet.guests[&queued.vm].worker.clone();
        fleet.running.insert(id, Running { vm: queued.vm, from, to: queued.to.unwrap() });
    }
}

fn end(fleet: &mut Fleet, id: MigrationId) {
    let ended = fleet.running.remove(&id).unwrap();
    fleet.guests.get_mut(&ended.vm).unwrap().worker = ended.to;
    for queued in fleet.queued.values_mut() {
        if let Some(predecessor) = queued.after.get_mut(&id) {
            *predecessor = Predecessor::Completed;
        }
    }
}

fn wait(fleet: &Fleet, now: i64, number: usize) -> Wait {
    match plan(fleet, now).remove(&id(number)).unwrap() {
        Decision::Wait(wait) => wait,
        other => panic!("it does not wait: {other:?}"),
    }
}

#[test]
fn one_order_on_an_idle_fleet_begins_at_once() {
    assert_eq!(plan(&fleet(1, 1, 1), 0), BTreeMap::from([(id(0), Decision::Admit)]));
}

#[test]
fn slots_are_given_by_priority_then_deadline_then_age_and_the_others_say_for_what_they_wait() {
    let mut fleet = fleet(4, 8, 1);
    fleet.queued.get_mut(&id(2)).unwrap().priority = 60;
    assert_eq!(admitted(&plan(&fleet, 0)), [id(2)]);
    fleet.queued.get_mut(&id(3)).unwrap().deadline_unix_ms = Some(URGENT_MS);
    assert_eq!(admitted(&plan(&fleet, 0)), [id(3)], "it is urgent");
    fleet.queued.get_mut(&id(3)).unwrap().deadline_unix_ms = Some(10 * URGENT_MS);
    fleet.queued.get_mut(&id(2)).unwrap().priority = DEFAULT_PRIORITY;
    assert_eq!(admitted(&plan(&fleet, 0)), [id(3)], "the only one with a deadline");
    fleet.queued.remove(&id(3));
    fleet.queued.get_mut(&id(1)).unwrap().ordered_unix_ms = -1;
    assert_eq!(admitted(&plan(&fleet, 0)), [id(1)], "the oldest");
    let busy = wait(&fleet, 0, 0).to_string();
    assert_eq!(busy, "waits for the link from \"s0\" to \"s1\", which carries 1 migrations, as many as it may");
}

#[test]
fn who_waits_for_a_slot_is_not_overtaken_there_and_others_are_not_held_up() {
    let mut fleet = fleet(3, 8, 8);
    // Worker 1 is full; the link takes one more.
    fleet.limits.per_worker = 1;
    fleet.guests.get_mut(&vm(0)).unwrap().worker = worker(3);
    fleet.running.insert(id(9), Running { vm: vm(7), from: worker(2), to: worker(1) });
    fleet.guests.insert(vm(7), guest(7, 2));
    fleet.queued.get_mut(&id(2)).unwrap().to = Ok(worker(4));
    assert_eq!(wait(&fleet, 0, 0), Wait::WorkerBusy { worker: worker(1), limit: 1 });
    assert_eq!(admitted(&plan(&fleet, 0)), [id(2)], "to another worker over the same link");
    // Once it has waited long enough it keeps its turn at the link, too.
    let late = OVERDUE_POINTS * AGEING_MS;
    for number in [1, 2] {
        fleet.queued.get_mut(&id(number)).unwrap().ordered_unix_ms = late;
    }
    let link = Resource::Link(site(0), site(1));
    assert_eq!(wait(&fleet, late, 2), Wait::Behind { vm: "vm0".into(), resource: link });
}

#[test]
fn a_move_waits_for_its_window_and_for_what_comes_first() {
    let mut fleet = fleet(3, 8, 8);
    let window: Window = "22:00-06:00".parse().unwrap();
    fleet.queued.get_mut(&id(0)).unwrap().window = Some(window);
    let after = BTreeMap::from([(id(1), Predecessor::Pending { vm: "vm1".into() })]);
    fleet.queued.get_mut(&id(2)).unwrap().after = after;
    fleet.queued.get_mut(&id(1)).unwrap().paused = true;
    let noon = 12 * 3_600_000;
    assert_eq!(wait(&fleet, noon, 0).to_string(), "waits for its window, 22:00-06:00 UTC");
    assert_eq!(wait(&fleet, noon, 1), Wait::Paused);
    assert_eq!(wait(&fleet, noon, 2), Wait::After { id: id(1), vm: "vm1".into() });
    assert_eq!(admitted(&plan(&fleet, noon + DAY_MS / 2)), [id(0)]);
    fleet.queued.get_mut(&id(2)).unwrap().after.insert(id(1), Predecessor::Failed);
    let failed = Decision::GiveUp(GivenUp::Predecessor { id: id(1) });
    assert_eq!(plan(&fleet, noon)[&id(2)], failed);
}

#[test]
fn a_deadline_that_has_passed_ends_the_order_and_says_what_it_waited_for() {
    let mut fleet = fleet(1, 8, 8);
    let order = fleet.queued.get_mut(&id(0)).unwrap();
    (order.deadline_unix_ms, order.window) = (Some(1000), Some("22:00-23:00".parse().unwrap()));
    assert!(matches!(plan(&fleet, 999)[&id(0)], Decision::Wait(_)));
    let Decision::GiveUp(why) = &plan(&fleet, 1000)[&id(0)] else { panic!() };
    assert_eq!(why.to_string(), "it had not begun by its deadline; at the end: waits for its window, 22:00-23:00 UTC");
}

#[test]
fn the_target_must_be_there_have_memory_and_no_vm_of_the_same_group() {
    let with = |change: &dyn Fn(&mut Fleet)| {
        let mut fleet = fleet(1, 8, 8);
        change(&mut fleet);
        wait(&fleet, 0, 0).to_string()
    };
    let target = |fleet: &mut Fleet, change: &dyn Fn(&mut Host)| change(fleet.hosts.get_mut(&worker(1)).unwrap());
    let away = with(&|fleet| target(fleet, &|host| host.connected = false));
    assert_eq!(away, "waits for worker \"w1\", which is not connected");
    let drained = with(&|fleet| target(fleet, &|host| host.drained = true));
    assert_eq!(drained, "waits because worker \"w1\" is being drained: undrain it, or cancel the move");
    let full = with(&|fleet| target(fleet, &|host| host.memory_bytes = GIB / 2));
    assert_eq!(full, "waits for memory on worker \"w1\": the vm needs 1024 MiB, 512 MiB are free");
    let unguarded = with(&|fleet| {
        target(fleet, &|host| host.guarded = false);
        fleet.guests.get_mut(&vm(0)).unwrap().fences_itself = true;
    });
    assert!(unguarded.starts_with("waits for a guard on worker \"w1\""), "{unguarded}");
    let apart = with(&|fleet| {
        let there = Guest { apart: BTreeSet::from(["db".to_owned()]), ..guest(8, 1) };
        fleet.guests.insert(vm(8), there);
        fleet.guests.get_mut(&vm(0)).unwrap().apart.insert("db".into());
    });
    assert_eq!(apart, "waits because vm \"vm8\" is on worker \"w1\", and both are in anti-affinity group \"db\"");
    let nic = |bridge: &str| BTreeSet::from([Nic { bridge: bridge.into(), mac: "52:54:00:12:34:56".into() }]);
    let alike = with(&|fleet| {
        // At another worker of the target's site.
        fleet.guests.insert(vm(8), Guest { shared: nic("br0"), ..guest(8, 1 + SITES) });
        fleet.guests.get_mut(&vm(0)).unwrap().shared = nic("br0");
    });
    let expected =
        "waits because vm \"vm8\" at site \"s1\" has the same MAC address, 52:54:00:12:34:56, on bridge br0: stop it";
    assert!(alike.starts_with(expected), "{alike}");
    let mut apart = fleet(1, 8, 8);
    apart.guests.get_mut(&vm(0)).unwrap().shared = nic("br0");
    for (number, at, bridge) in [(8, 1, "br1"), (9, 2, "br0")] {
        apart.guests.insert(vm(number), Guest { shared: nic(bridge), ..guest(number, at) });
    }
    assert_eq!(admitted(&plan(&apart, 0)), [id(0)], "on another bridge, or at another site, they do not meet");
    let still = with(&|fleet| fleet.queued.get_mut(&id(0)).unwrap().to = Err("it has no replica there".into()));
    assert_eq!(still, "waits until it can move: it has no replica there");
    let mut gone = fleet(1, 8, 8);
    gone.guests.clear();
    assert_eq!(plan(&gone, 0)[&id(0)], Decision::GiveUp(GivenUp::Gone));
}

#[test]
fn a_budget_admits_as_many_as_get_enough_of_it() {
    let mut fleet = fleet(4, 8, 8);
    let line = Line { budget_bps: 3 * FLOOR_BPS, reserved_bps: FLOOR_BPS, migrations: 0 };
    fleet.lines.insert((site(0), site(1)), line);
    assert_eq!(admitted(&plan(&fleet, 0)), [id(0), id(1)]);
    let expected = Wait::LinkFull { from: site(0), to: site(1), running: 2, budget_bps: line.budget_bps };
    assert_eq!(wait(&fleet, 0, 3), expected);
}

#[derive(Debug, Clone)]
struct Asked {
    at: usize,
    to: usize,
    gib: u64,
    priority: u8,
    group: Option<u8>,
    window: bool,
    after: Option<usize>,
    lasts: usize,
}

fn asked() -> impl Strategy<Value = Asked> {
    let place = (0..HOSTS, 0..HOSTS).prop_filter("another site", |(at, to)| at % SITES != to % SITES);
    let terms = (0..=100u8, prop::option::of(0..3u8), any::<bool>(), prop::option::of(0..20usize), 1..4usize);
    (place, 1..24u64, terms).prop_map(|((at, to), gib, (priority, group, window, after, lasts))| Asked {
        at,
        to,
        gib,
        priority,
        group,
        window,
        after,
        lasts,
    })
}

fn of(asked: &[Asked], limits: (u32, u32), budget_bps: u64) -> Fleet {
    let mut fleet = fleet(0, limits.0, limits.1);
    for from in 0..SITES {
        for to in (0..SITES).filter(|to| *to != from) {
            let line = Line { budget_bps, reserved_bps: budget_bps / 5, migrations: 0 };
            fleet.lines.insert((site(from), site(to)), line);
        }
    }
    for (number, asked) in asked.iter().enumerate() {
        let apart = asked.group.map(|group| group.to_string()).into_iter().collect();
        fleet.guests.insert(vm(number), Guest { memory_bytes: asked.gib * GIB, apart, ..guest(number, asked.at) });
        let earlier = asked.after.filter(|other| *other < number);
        let after = earlier.map(|other| (id(other), Predecessor::Pending { vm: format!("vm{other}") }));
        let order = Queued {
            priority: asked.priority,
            window: asked.window.then(|| "22:00-06:00".parse().unwrap()),
            after: after.into_iter().collect(),
            ..queued(number, asked.to)
        };
        fleet.queued.insert(id(number), order);
    }
    fleet
}

/// What must hold of whatever runs. Hosts that were too full, or groups that were together, before anything moved are nobody's fault.
fn check(fleet: &Fleet, newly: &[MigrationId]) {
    let count = |of: &dyn Fn(&Running) -> bool| fleet.running.values().filter(|running| of(running)).count();
    for name in fleet.hosts.keys() {
        let taking_part = count(&|running| running.from == *name || running.to == *name);
        assert!(taking_part <= fleet.limits.per_worker as usize, "{name}: {taking_part}");
    }
    let site_of = |worker: &WorkerName| fleet.hosts[worker].site.clone();
    for ((from, to), line) in &fleet.lines {
        let over: BTreeMap<_, _> = fleet
            .running
            .iter()
            .filter(|(_, running)| site_of(&running.from) == *from && site_of(&running.to) == *to)
            .map(|(id, _)| (*id, 0))
            .collect();
        assert!(over.len() <= fleet.limits.per_link as usize, "{from} to {to}");
        if line.budget_bps > 0 {
            let sent: u64 = shares(line, &over).values().sum();
            assert!(sent <= line.budget_bps - line.reserved_bps, "{from} to {to}: {sent} bit/s");
            assert!(over.len() <= 1 || shares(line, &over).values().all(|share| *share >= FLOOR_BPS));
        }
    }
    for id in newly {
        let Running { vm, to, .. } = &fleet.running[id];
        let comes = |other: &VmId| fleet.running.values().any(|running| running.vm == *other && running.to == *to);
        let at = |other: &VmId, guest: &Guest| guest.worker == *to || comes(other);
        let there: Vec<_> = fleet.guests.iter().filter(|(other, guest)| at(other, guest)).collect();
        let memory: u64 = there.iter().map(|(_, guest)| guest.memory_bytes).sum();
        assert!(memory <= fleet.hosts[to].memory_bytes, "{to} has {memory} bytes of VMs");
        for group in &fleet.guests[vm].apart {
            let of_group = there.iter().filter(|(_, guest)| guest.apart.contains(group)).count();
            assert_eq!(of_group, 1, "group {group} at {to}");
        }
    }
    let vms: BTreeSet<_> = fleet.running.values().map(|running| running.vm).collect();
    assert_eq!(vms.len(), fleet.running.len(), "a VM moves once at a time");
}

proptest! {
    #[test]
    fn no_limit_is_exceeded_windows_and_order_are_kept_and_it_is_deterministic(
        asked in prop::collection::vec(asked(), 1..20),
        limits in (1..4u32, 1..4u32),
        budget_bps in prop::option::of(FLOOR_BPS / 2..8 * FLOOR_BPS),
    ) {
        let mut fleet = of(&asked, limits, budget_bps.unwrap_or_default());
        let mut ends: BTreeMap<MigrationId, usize> = BTreeMap::new();
        let mut completed = BTreeSet::new();
        // A day in steps of an hour.
        for step in 0..24usize {
            let now = i64::try_from(step).unwrap() * 3_600_000;
            for id in ends.iter().filter(|(_, at)| **at <= step).map(|(id, _)| *id).collect::<Vec<_>>() {
                ends.remove(&id);
                completed.insert(id);
                end(&mut fleet, id);
            }
            let decisions = plan(&fleet, now);
            prop_assert_eq!(&decisions, &plan(&fleet.clone(), now));
            prop_assert_eq!(decisions.len(), fleet.queued.len(), "each has its decision");
            for id in admitted(&decisions) {
                let order = &fleet.queued[&id];
                prop_assert!(order.window.is_none() || !(6..22).contains(&step), "{} o'clock", step);
                prop_assert!(order.after.keys().all(|earlier| completed.contains(earlier)));
                let number = (0..asked.len()).find(|number| self::id(*number) == id).unwrap();
                ends.insert(id, step + asked[number].lasts);
            }
            let newly = admitted(&decisions);
            begin(&mut fleet, &decisions);
            check(&fleet, &newly);
        }
    }

    #[test]
    fn who_waits_for_slots_alone_begins_whatever_is_ordered_after_it(
        priority in 0..=100u8,
        per_link in 1..3u32,
        lasts in 1..5usize,
        targets in prop::collection::vec(0..2usize, 1..8),
    ) {
        // There are always more orders of the highest priority, over the same link or to the same worker; ours needs a slot at both.
        let mut fleet = fleet(0, per_link, per_link);
        fleet.guests.insert(vm(0), guest(0, 0));
        fleet.queued.insert(id(0), Queued { priority, ..queued(0, 1) });
        let mut ends: BTreeMap<MigrationId, usize> = BTreeMap::new();
        let mut others = (1..).zip(targets.iter().cycle());
        let latest = usize::try_from(OVERDUE_POINTS).unwrap() + 20 * lasts;
        let mut begun = false;
        for minute in 0..=latest {
            let now = i64::try_from(minute).unwrap() * AGEING_MS;
            for id in ends.iter().filter(|(_, at)| **at <= minute).map(|(id, _)| *id).collect::<Vec<_>>() {
                ends.remove(&id);
                let ended = fleet.running.remove(&id).unwrap();
                fleet.guests.remove(&ended.vm);
            }
            while fleet.queued.len() < 8 {
                let (number, target) = others.next().unwrap();
                let (at, to) = [(2, 1), (3, 4)][*target];
                fleet.guests.insert(vm(number), Guest { memory_bytes: 0, ..guest(number, at) });
                fleet.queued.insert(id(number), Queued { priority: 100, ordered_unix_ms: now, ..queued(number, to) });
            }
            let decisions = plan(&fleet, now);
            begun = decisions.get(&id(0)) == Some(&Decision::Admit);
            if begun {
                break;
            }
            ends.extend(admitted(&decisions).into_iter().map(|id| (id, minute + lasts)));
            begin(&mut fleet, &decisions);
        }
        prop_assert!(begun, "it still waits: {:?}", plan(&fleet, 0).get(&id(0)));
    }
}

/// A site of two workers and so many VMs, each with a replica at one or two other sites; every tenth has none.
fn site_to_empty(vms: usize) -> (Fleet, Vec<Leaver>) {
    let mut fleet = fleet(0, 4, 4);
    for host in fleet.hosts.values_mut() {
        host.memory_bytes = 16_000 * GIB;
    }
    let leavers = (0..vms).map(|number| {
        let at = [0, 3][number % 2];
        fleet.guests.insert(vm(number), Guest { memory_bytes: (1 + number as u64 % 16) * GIB, ..guest(number, at) });
        let ways = [1, 2, 4, 5].into_iter().filter(|way| number % 10 != 9 && (number + way) % 3 != 0);
        Leaver { vm: vm(number), ways: ways.map(|way| (site(way), Ok(worker(way)))).collect() }
    });
    let leavers = leavers.collect();
    for number in [0, 3] {
        fleet.hosts.get_mut(&worker(number)).unwrap().drained = true;
    }
    (fleet, leavers)
}

#[test]
fn a_site_of_2000_vms_is_planned_and_begun() {
    let (mut fleet, leavers) = site_to_empty(2000);
    let out = evacuate(&fleet, &leavers, None);
    assert_eq!((out.leave.len(), out.stay.len()), (1800, 200));
    assert!(out.stay[0].why.starts_with("it has no replica at another site: run \"pageportctl protect vm"));
    let memory = |vm: &VmId| fleet.guests[vm].memory_bytes;
    assert!(out.leave.is_sorted_by(|one, next| memory(&one.vm) >= memory(&next.vm)), "the largest first");
    let to = |number: usize| {
        out.leave.iter().filter(|leave| leave.to == site(number)).map(|leave| memory(&leave.vm)).sum::<u64>()
    };
    assert!(to(0) == 0 && to(1).abs_diff(to(2)) <= 16 * GIB, "both links carry alike: {} and {}", to(1), to(2));
    for (number, leave) in out.leave.iter().enumerate() {
        fleet.queued.insert(id(number), Queued { vm: leave.vm, to: Ok(leave.worker.clone()), ..queued(number, 1) });
    }
    let decisions = plan(&fleet, 0);
    assert_eq!(decisions.len(), 1800);
    assert_eq!(admitted(&decisions).len(), 8, "both workers have all the slots that they may");
}

#[test]
fn an_evacuation_names_why_a_vm_stays() {
    let (mut fleet, _) = site_to_empty(0);
    for number in 0..5 {
        fleet.guests.insert(vm(number), Guest { apart: BTreeSet::from(["db".into()]), ..guest(number, 0) });
    }
    fleet.hosts.get_mut(&worker(2)).unwrap().connected = false;
    let ways = |ways: &[usize]| ways.iter().map(|way| (site(*way), Ok(worker(*way)))).collect::<BTreeMap<_, _>>();
    let leavers: Vec<_> = [&[1][..], &[1], &[2], &[1, 2], &[]]
        .iter()
        .enumerate()
        .map(|(number, list)| Leaver { vm: vm(number), ways: ways(list) })
        .chain([Leaver { vm: vm(9), ways: ways(&[1]) }])
        .collect();
    let out = evacuate(&fleet, &leavers, None);
    assert_eq!(out.leave.iter().map(|leave| leave.vm).collect::<Vec<_>>(), [vm(0)]);
    let why = |number: usize| out.stay.iter().find(|stay| stay.vm == vm(number)).unwrap().why.clone();
    assert!(why(1).contains("vm \"vm0\"") && why(1).contains("group \"db\""), "{}", why(1));
    assert_eq!(why(2), "to \"s2\": waits for worker \"w2\", which is not connected");
    assert!(why(3).starts_with("to \"s1\": ") && why(3).contains("; to \"s2\": "), "{}", why(3));
    assert!(why(9).contains("does not run"));
    let only = evacuate(&fleet, &leavers, Some(&site(2)));
    assert!(only.leave.is_empty());
    assert!(only.stay.iter().any(|stay| stay.why.contains("no replica at site \"s2\"")), "{only:?}");
}
