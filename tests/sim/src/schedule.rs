//! One schedule: a seed from beginning to end.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use pageport_controller::consensus::membership::{Member, Membership};
use pageport_controller::model::State;
use serde::Serialize;

use crate::calls::Cluster;
use crate::controller::{DRIFT_PPM, Machine, store_of};
use crate::faults::Faults;
use crate::hypervisor::Run;
use crate::invariant::{Fact, Invariants, Violation};
use crate::operator::Operator;
use crate::worker::Host;
use crate::world::{Clock, Flaw, World};

/// Orders and faults come for so long at least.
const TROUBLE_US: (u64, u64) = (8_000_000, 25_000_000);
/// After that everything settles within this.
const SETTLE_US: u64 = 90_000_000;
/// Between two looks whether it has.
const LOOK_US: u64 = 2_000_000;

/// What came of a schedule.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// From which seed.
    pub seed: u64,
    /// What did not hold.
    pub violations: Vec<Violation>,
    /// Of the whole trace.
    pub digest: u64,
    /// How much happened.
    pub facts: u64,
    /// How long it took in its own time.
    pub simulated_ms: u64,
    /// Moves that were ordered, and that ended at the destination.
    pub moves: (usize, usize),
    /// Takeovers.
    pub takeovers: usize,
    /// The trace, if it was asked for.
    #[serde(skip)]
    pub trace: Vec<String>,
}

/// Runs a seed. A panic is a violation like another.
pub fn run(seed: u64, flaw: Flaw, keep_trace: bool) -> Verdict {
    let ran = std::panic::catch_unwind(|| play(seed, flaw, keep_trace));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let what = text.unwrap_or_else(|| "a panic without a word".to_owned());
        Verdict {
            seed,
            violations: vec![Violation { at_us: 0, invariant: "no-panic", what }],
            digest: 0,
            facts: 0,
            simulated_ms: 0,
            moves: (0, 0),
            takeovers: 0,
            trace: vec![],
        }
    })
}

fn play(seed: u64, flaw: Flaw, keep_trace: bool) -> Verdict {
    let controllers = 3;
    let hosts = 2 + usize::from(seed.is_multiple_of(3));
    let world = World::new(seed, flaw, controllers + hosts + 1, Invariants::new(keep_trace));
    let clock = || {
        let half = u64::from(DRIFT_PPM) / 2 * 9 / 10;
        Clock { ppm: world.between(0, 2 * half) as i64 - half as i64, began_us: world.between(1, 1_000_000_000) }
    };
    let ids: Vec<u64> = (1..=controllers as u64).collect();
    let first = Membership::first(ids.iter().filter_map(|id| {
        let site = char::from(b'a' + (*id as u8 - 1)).to_string();
        let member = Member::new(*id, site.parse().ok()?, format!("controller-{id}:7400"));
        Some(Member { store: Some(store_of(*id)), ..member })
    }));
    let machines: Vec<Rc<Machine>> = ids.iter().map(|id| Machine::new(&world, *id, first.clone(), clock())).collect();
    let cluster: Cluster = Rc::new(machines.iter().map(|machine| (machine.id, machine.clone())).collect());
    let host = |number: usize| {
        let letter = char::from(b'a' + number as u8);
        let (name, site) = (format!("{letter}1").parse().ok()?, format!("{letter}").parse().ok()?);
        Some(Host::new(&world, &cluster, name, site, controllers + number, clock()))
    };
    let hosts: Vec<Rc<Host>> = (0..hosts).filter_map(host).collect();
    for machine in &machines {
        machine.meet(machines.iter().filter(|peer| peer.id != machine.id).cloned().collect());
        machine.start();
    }
    for host in &hosts {
        host.meet(&hosts);
        host.start();
    }
    world.network.loss_one_in.set(*world.pick(&[u64::MAX, 100, 20]).unwrap_or(&u64::MAX));
    world.unsafe_times.set(true);

    let people = world.executor.process();
    let operator = Rc::new(Operator {
        world: world.clone(),
        cluster,
        hosts: hosts.clone(),
        endpoint: controllers + hosts.len(),
        done: Cell::new(false),
        leader: Cell::new(1),
        seen: RefCell::new(Arc::new(State::default())),
    });
    let sites = (0..controllers).map(|site| {
        let host = hosts.get(site).map(|host| host.endpoint);
        std::iter::once(site).chain(host).collect()
    });
    let faults = Rc::new(Faults {
        world: world.clone(),
        machines: machines.clone(),
        hosts: hosts.clone(),
        sites: sites.collect(),
        done: Cell::new(false),
    });
    world.executor.spawn(people, operator.clone().run(world.between(1, 3)));
    let (f, e) = (faults.clone(), world.executor.clone());
    world.executor.at(6_000_000, move || e.spawn(people, f.run()));

    let trouble_us = 6_000_000 + world.between(TROUBLE_US.0, TROUBLE_US.1);
    world.executor.run_until(trouble_us);
    faults.done.set(true);
    operator.done.set(true);
    world.unsafe_times.set(false);
    world.network.loss_one_in.set(u64::MAX);
    // What was struck comes back by then, at the latest.
    let healed_us = trouble_us + 15_000_000;
    world.executor.run_until(healed_us);
    world.network.heal();
    let state = settle(&world, &machines, &hosts, healed_us);
    let verdict = {
        let invariants = world.invariants();
        Verdict {
            seed,
            violations: invariants.violations().to_vec(),
            digest: invariants.digest(),
            facts: invariants.facts(),
            simulated_ms: world.executor.now_us() / 1000,
            moves: moves(state.as_deref()),
            takeovers: state.iter().flat_map(|state| state.vms.values()).map(|vm| vm.takeovers.len()).sum(),
            trace: invariants.trace().to_vec(),
        }
    };
    // Who holds whom is a circle: it is opened here.
    for machine in &machines {
        machine.part();
    }
    world.executor.end();
    verdict
}

fn moves(state: Option<&State>) -> (usize, usize) {
    use pageport_controller::model::migration::Phase;
    let all = state.map(|state| state.migrations.len()).unwrap_or_default();
    let done = state.map(|state| {
        state.migrations.values().filter(|migration| matches!(migration.phase, Phase::Completed { .. })).count()
    });
    (all, done.unwrap_or_default())
}

/// Runs until things are as they should be, or for as long as they may take; then that is judged.
fn settle(world: &Rc<World>, machines: &[Rc<Machine>], hosts: &[Rc<Host>], from_us: u64) -> Option<Arc<State>> {
    let mut at_us = from_us;
    loop {
        at_us += LOOK_US;
        world.executor.run_until(at_us);
        let state = machines.iter().find_map(|machine| machine.leads());
        let mut present = vec![];
        let mut running = vec![];
        for host in hosts {
            for vm in host.hypervisors.vms() {
                present.push((host.name.clone(), vm));
                let runs = host.hypervisors.find(vm).is_some_and(|qemu| matches!(qemu.run(), Run::Running { .. }));
                if runs {
                    running.push((host.name.clone(), vm));
                }
            }
        }
        let end = Fact::End { state: state.as_deref(), running: &running, present: &present };
        let last = at_us >= from_us + SETTLE_US;
        if last || world.invariants().would_settle(&end) {
            world.tell(&end);
            return state;
        }
    }
}
