//! Members that come and go and hand leadership over, while machines crash, lose their disks or wait for them, and messages get lost, in
//! virtual time, from seeds.
//!
//! What must hold: one leader per term, one state per place in the log, one membership per entry that made it, nothing applied that is
//! not committed; what clients were answered is as if each order and each read had happened at one moment between its question and its
//! answer ([`history`]); and once all that are members run and hear each other they agree, on a state that has all that was answered.

#![allow(clippy::unwrap_used, missing_docs)]

mod actions;
mod history;
mod machine;
mod world;

use actions::{KEYS, link};
use history::Did;
use pageport_controller::consensus::node::Node;
use world::World;

const STEPS: usize = 4_000;
const SEEDS: u64 = 60;
/// Steps in which everything is to come to rest.
const REST: usize = 40_000;

impl World {
    fn step(&mut self) {
        self.now += 1;
        match self.below(1000) {
            0..300 => {
                if let Some(id) = self.any(false) {
                    self.touch(id, Node::tick);
                }
            }
            300..900 => self.deliver(),
            900..920 => self.lose(),
            920..926 => {
                if let Some(id) = self.any(false) {
                    self.machines.get_mut(&id).unwrap().node = None;
                }
            }
            926..940 => {
                if let Some(id) = self.any(true) {
                    self.start(id);
                }
            }
            940..956 => self.write(),
            956..972 => self.read(),
            972..976 => self.stall(),
            976..979 => self.transfer(),
            979 => self.wipe(),
            _ => self.change(),
        }
        self.collect();
    }

    /// Everything runs and is heard.
    fn rest(&mut self) -> Option<u64> {
        for _ in 0..REST {
            self.now += 1;
            if let Some(id) = self.any(true) {
                self.start(id);
            }
            if let Some(id) = self.any(false) {
                self.touch(id, Node::tick);
            }
            for _ in 0..6 {
                self.deliver();
            }
            self.collect();
            if let Some(leader) = self.leader() {
                self.remove_the_wiped(leader);
                if self.agree(leader) {
                    return Some(leader);
                }
            }
        }
        None
    }
}

#[test]
fn members_come_and_go_and_there_is_one_history() {
    let (mut changes, mut wipes, mut transfers, mut answered) = (0, 0, 0, 0);
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        let leader = world.rest().unwrap_or_else(|| panic!("seed {seed}: no agreement"));
        let state = world.machines[&leader].node.as_ref().unwrap().state().clone();
        // As if everyone had read at last, which finds what is lost.
        for key in 0..KEYS {
            let (from, to) = link(key);
            let call = world.history.asked(key, Did::Read(None), world.now);
            world.history.saw(call, state.links.cap_bps(&from, &to), world.now + 1);
        }
        if let Err(call) = world.history.is_linearizable() {
            panic!("seed {seed}: the history has no order in time: {call:?}");
        }
        changes += world.memberships.len();
        wipes += world.wipes;
        transfers += world.transfers;
        answered += world.history.answers();
    }
    assert!(changes > SEEDS as usize * 3, "{changes} memberships: too few to tell");
    assert!(wipes > SEEDS / 4, "{wipes} lost disks: too few to tell");
    assert!(transfers > SEEDS, "{transfers} transfers: too few to tell");
    assert!(answered > SEEDS as usize * 20, "{answered} answers: too few to tell");
}
