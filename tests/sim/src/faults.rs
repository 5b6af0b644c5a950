//! What goes wrong, and when: drawn from the seed. At the end everything is healed.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::controller::Machine;
use crate::disk::Failure;
use crate::executor::ProcessId;
use crate::hypervisor::Cause;
use crate::invariant::Fact;
use crate::worker::Host;
use crate::world::{Clock, World};

/// What can be struck.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct Faults {
    /// The world.
    pub world: Rc<World>,
    /// Controllers.
    pub machines: Vec<Rc<Machine>>,
    /// Hosts.
    pub hosts: Vec<Rc<Host>>,
    /// Endpoints of each site.
    pub sites: Vec<Vec<usize>>,
    /// No new ones once this is set.
    pub done: Cell<bool>,
}

impl Faults {
    /// Strikes now and then.
    pub async fn run(self: Rc<Self>) {
        let world = &self.world;
        let gap_ms = *world.pick(&[600, 2000, 6000]).unwrap_or(&2000);
        while !self.done.get() {
            Clock::WORLD.sleep(world, Duration::from_millis(world.between(gap_ms / 4, gap_ms * 2))).await;
            if !self.done.get() {
                self.strike();
            }
        }
    }

    fn say(&self, what: &str) {
        self.world.tell(&Fact::Fault { what });
    }

    fn later(&self, low_ms: u64, high_ms: u64, action: impl FnOnce() + 'static) {
        let at_us = self.world.executor.now_us() + self.world.between(low_ms, high_ms) * 1000;
        self.world.executor.at(at_us, action);
    }

    fn strike(&self) {
        let world = &self.world;
        let (Some(machine), Some(host)) = (world.pick(&self.machines).cloned(), world.pick(&self.hosts).cloned())
        else {
            return;
        };
        match world.between(0, 40) / 4 {
            0 => {
                self.say(&format!("controller {} is killed", machine.id));
                machine.kill();
                self.later(100, 6000, move || machine.start());
            }
            1 => machine.fail_at(Failure { writes: world.between(0, 20), written: world.one_in(2) }),
            2 => self.freeze(&format!("controller {}", machine.id), machine.process()),
            3 => {
                self.say(&format!("worker {} is killed", host.name));
                host.kill_worker();
                self.later(50, 6000, move || host.start());
            }
            4 => self.freeze(&format!("worker {}", host.name), host.process()),
            5 => {
                self.say(&format!("host of {} loses power", host.name));
                host.power_off();
                self.later(500, 12_000, move || host.start());
            }
            6 => {
                let vms = host.hypervisors.vms();
                if let Some(qemu) = world.pick(&vms).and_then(|vm| host.hypervisors.find(*vm)) {
                    self.say(&format!("qemu of vm {} at {} is killed", qemu.vm, host.name));
                    host.hypervisors.end(&qemu, Cause::Struck);
                }
            }
            7 => self.isolate(host.endpoint),
            8 => self.split(),
            9 => self.heal(),
            _ => {
                self.say(&format!("worker {} loses its store", host.name));
                host.lose_store();
                self.later(50, 6000, move || host.start());
            }
        }
    }

    fn freeze(&self, what: &str, process: Option<ProcessId>) {
        let Some(process) = process else { return };
        self.say(&format!("{what} is stopped"));
        let executor = self.world.executor.clone();
        executor.freeze(process);
        self.later(100, 9000, move || executor.thaw(process));
    }

    fn isolate(&self, endpoint: usize) {
        let world = self.world.clone();
        let way = world.between(0, 2);
        let only_controllers = world.one_in(2);
        self.say(&format!("endpoint {endpoint} is cut off ({way}, {only_controllers})"));
        let controllers = self.machines.len();
        for other in world.network.endpoints().filter(|other| *other != endpoint) {
            if only_controllers && other >= controllers {
                continue;
            }
            if way != 1 {
                world.network.cut(endpoint, other);
            }
            if way != 0 {
                world.network.cut(other, endpoint);
            }
        }
        self.later(500, 12_000, move || world.network.heal());
    }

    fn split(&self) {
        let world = self.world.clone();
        let one = world.between(0, self.sites.len() as u64 - 1) as usize;
        let way = world.between(0, 2);
        self.say(&format!("site {one} is cut off ({way})"));
        for inside in &self.sites[one] {
            for outside in self.sites.iter().enumerate().filter(|(site, _)| *site != one).flat_map(|(_, ends)| ends) {
                if way != 1 {
                    world.network.cut(*inside, *outside);
                }
                if way != 0 {
                    world.network.cut(*outside, *inside);
                }
            }
        }
        self.later(500, 12_000, move || world.network.heal());
    }

    fn heal(&self) {
        self.say("links are whole");
        self.world.network.heal();
    }
}
