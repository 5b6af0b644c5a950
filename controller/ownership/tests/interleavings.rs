//! Every interleaving of two workers and the controllers' register, with loss, duplication and reordering of every
//! message and with crashes of workers and hypervisors: never two running, and never stuck.
//!
//! A message, once said, may arrive at any later time, any number of times, or never. Crashes are bounded.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use pageport_ownership::{
    Effect, Epoch, Event, Evidence, Guest, Message, Nonce, Owner, Ownership, Record, Volatile, controller, emits,
    needs_grant, worker_step,
};

const MOVES: usize = 2;
const WORKER_CRASHES: u8 = 1;
const QEMU_CRASHES: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Host {
    record: Record,
    volatile: Volatile,
    /// Effects that were let out and not yet carried out; lost when the worker crashes.
    due: Vec<Effect>,
    next_nonce: u64,
    worker_crashes: u8,
    qemu_crashes: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Said {
    Peer(usize, Message),
    Register(usize, controller::Fact),
    Worker(usize, Event),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    hosts: [Host; 2],
    register: Ownership<usize>,
    cancelled: bool,
    moves: usize,
    said: BTreeSet<Said>,
}

fn event_of(message: Message) -> Event {
    match message {
        Message::Ready(e) => Event::Ready(e),
        Message::Release(e) => Event::Release(e),
        Message::Revoked(e) => Event::Revoked(e),
        Message::Refused(e) => Event::Refused(e),
        Message::Acquired(e) => Event::Acquired(e),
    }
}

impl World {
    fn start() -> Self {
        let host = |record, guest| Host {
            record,
            volatile: Volatile { guest, ..Volatile::default() },
            due: vec![],
            next_nonce: 0,
            worker_crashes: 0,
            qemu_crashes: 0,
        };
        let one = Epoch::ZERO.next();
        let mut world = Self {
            hosts: [host(Record::Own { own: one, seen: one }, Guest::Running), host(Record::UNKNOWN, Guest::Absent)],
            register: Ownership::first(0),
            cancelled: false,
            moves: 0,
            said: BTreeSet::new(),
        };
        world.speak();
        world
    }

    /// Everything that anyone says in this state joins what may arrive.
    fn speak(&mut self) {
        for worker in 0..2 {
            let host = &self.hosts[worker];
            for message in emits(&host.record, &host.volatile) {
                self.said.insert(Said::Peer(1 - worker, message));
            }
            for fact in controller::facts(&host.record) {
                self.said.insert(Said::Register(worker, fact));
            }
            let (owner, own) = self.register.owner();
            let owner = if *owner == worker { Owner::Me } else { Owner::Other };
            self.said.insert(Said::Worker(worker, Event::Owned { epoch: own, owner }));
        }
        if let Ownership::Migrating { from, to, epoch, released, refused, .. } = self.register {
            self.said.insert(Said::Worker(from, Event::Authorise(epoch)));
            if self.cancelled {
                self.said.insert(Said::Worker(from, Event::Cancel(epoch)));
            }
            if released {
                self.said.insert(Said::Worker(to, Event::Release(epoch)));
            }
            if refused {
                self.said.insert(Said::Worker(from, Event::Refused(epoch)));
            }
        }
    }

    fn handle(&self, worker: usize, event: Event) -> Self {
        let mut next = self.clone();
        let host = &mut next.hosts[worker];
        let step = worker_step(&host.record, &host.volatile, event);
        if let Some(record) = step.record {
            assert!(record.seen() >= host.record.seen(), "{:?} then {record:?} on {event:?}", host.record);
            host.record = record;
        }
        host.volatile = step.volatile;
        host.due.extend(step.effects);
        host.due.dedup();
        next.speak();
        next
    }

    /// Carries out the oldest effect.
    fn carry_out(&self, worker: usize) -> Self {
        let mut next = self.clone();
        let effect = next.hosts[worker].due.remove(0);
        let guest = next.hosts[worker].volatile.guest;
        let may_run = matches!(next.hosts[worker].record, Record::Own { .. });
        match effect {
            Effect::Resume if may_run && guest != Guest::Absent => next.handle(worker, Event::Resumed),
            Effect::Boot if may_run && guest == Guest::Absent => next.handle(worker, Event::Resumed),
            Effect::Resume | Effect::Boot => next,
            Effect::Arm | Effect::Disarm => next,
            Effect::Pause => {
                next.hosts[worker].volatile.guest = Guest::Paused;
                next
            }
            Effect::KillGuest | Effect::DropImage => next.handle(worker, Event::QemuGone),
            Effect::LoadImage(epoch) => next.handle(worker, Event::Loaded(epoch)),
        }
    }

    fn successors(&self) -> Vec<Self> {
        let mut next = vec![];
        for said in &self.said {
            match *said {
                Said::Peer(to, message) => next.push(self.handle(to, event_of(message))),
                Said::Worker(to, event) => next.push(self.handle(to, event)),
                Said::Register(worker, fact) => {
                    if let Some(register) = self.register.step(&Evidence { worker, fact }) {
                        let mut world = Self { register, cancelled: false, ..self.clone() };
                        world.speak();
                        next.push(world);
                    }
                }
            }
        }
        for worker in 0..2 {
            let host = &self.hosts[worker];
            if !host.due.is_empty() {
                next.push(self.carry_out(worker));
            }
            if host.volatile.guest == Guest::Running && matches!(host.record, Record::Prepared { .. }) {
                next.push(self.handle(worker, Event::Paused));
            }
            if host.volatile.question.is_none() && host.next_nonce < 4 {
                next.extend(self.ask(worker));
            }
            if let Record::Replica { .. } = host.record
                && let Some(epoch) = self.register.authorised(&worker)
            {
                next.push(self.handle(worker, Event::Refuse(epoch)));
            }
            if host.worker_crashes < WORKER_CRASHES {
                let mut world = self.clone();
                world.hosts[worker].worker_crashes += 1;
                world.hosts[worker].due.clear();
                next.push(world.handle(worker, Event::Restarted(host.volatile.guest)));
            }
            if host.qemu_crashes < QEMU_CRASHES && host.volatile.guest != Guest::Absent {
                let mut world = self.clone();
                world.hosts[worker].qemu_crashes += 1;
                next.push(world.handle(worker, Event::QemuGone));
            }
        }
        if self.moves < MOVES {
            let to = 1 - *self.register.owner().0;
            if let Some(register) = self.register.order(to) {
                let mut world = Self { register, moves: self.moves + 1, ..self.clone() };
                world.speak();
                next.push(world);
            }
        }
        if matches!(self.register, Ownership::Migrating { .. }) && !self.cancelled {
            let mut world = Self { cancelled: true, ..self.clone() };
            world.speak();
            next.push(world);
        }
        next
    }

    /// The worker asks what it needs; the answer may arrive late, or after a crash.
    fn ask(&self, worker: usize) -> Option<Self> {
        let host = &self.hosts[worker];
        let nonce = Nonce(host.next_nonce);
        let loads = self.register.authorised(&worker).filter(|epoch| *epoch > host.record.seen());
        let reply = match (self.register.grantable(&worker), loads) {
            (Some(own), _) if needs_grant(&host.record, &host.volatile, true, Some(own)) => Event::Grant { nonce, own },
            (_, Some(epoch)) if host.volatile.guest == Guest::Absent => Event::AuthReply { nonce, epoch },
            _ => return None,
        };
        let mut next = self.handle(worker, Event::Asked(nonce));
        next.hosts[worker].next_nonce += 1;
        next.said.insert(Said::Worker(worker, reply));
        Some(next)
    }

    fn running(&self) -> usize {
        self.hosts.iter().filter(|host| host.volatile.guest == Guest::Running).count()
    }
}

#[test]
fn no_interleaving_runs_two_and_each_can_still_reach_running() {
    const LIMIT: usize = 150_000;
    let start = World::start();
    let mut ids = HashMap::from([(start.clone(), 0_usize)]);
    let mut predecessors: Vec<Vec<usize>> = vec![vec![]];
    let mut expanded = vec![];
    let mut good = vec![];
    let mut queue = VecDeque::from([start]);
    while let Some(world) = queue.pop_front() {
        let id = ids[&world];
        assert!(world.running() <= 1, "two are running: {world:#?}");
        if world.running() == 1 && matches!(world.register, Ownership::Owned { .. }) {
            good.push(id);
        }
        if ids.len() >= LIMIT {
            // Beyond the limit safety alone is checked: a state that was not expanded counts as able to go on.
            good.push(id);
            continue;
        }
        expanded.push(id);
        for next in world.successors() {
            let fresh = ids.len();
            let next_id = *ids.entry(next.clone()).or_insert_with(|| {
                predecessors.push(vec![]);
                queue.push_back(next);
                fresh
            });
            predecessors[next_id].push(id);
        }
    }
    let mut live: HashSet<usize> = good.iter().copied().collect();
    while let Some(id) = good.pop() {
        for before in &predecessors[id] {
            if live.insert(*before) {
                good.push(*before);
            }
        }
    }
    let stuck = ids.iter().find(|(_, id)| !live.contains(*id));
    assert!(stuck.is_none(), "stuck: {:#?}", stuck.map(|(world, _)| world));
    assert!(expanded.len() > 1_000, "the model explored {} states only", expanded.len());
}
