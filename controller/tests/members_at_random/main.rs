//! Members that come and go and hand leadership over, while machines crash, lose their disks or wait for them, and messages get lost, in
//! virtual time, from seeds.
//!
//! What must hold: one leader per term, one state per place in the log, one membership per entry that made it, nothing applied that is
//! not committed; what clients were answered is as if each order and each read had happened at one moment between its question and its
//! answer ([`history`]); and once all that are members run and hear each other they agree, on a state that has all that was answered.

#![allow(clippy::unwrap_used, missing_docs)]

mod history;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use history::{Did, History};
use pageport_controller::consensus::disk::{Change, Disk, DiskError};
use pageport_controller::consensus::membership::{Member, Membership, Order, Quorum, TurnedAway};
use pageport_controller::consensus::node::{ELECTION_TICKS, Node, NodeConfig, NodeError, Outlet};
use pageport_controller::consensus::storage::LogStorage;
use pageport_controller::consensus::{ConsensusError, Delivered, Input};
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::{self, Command, State};
use pageport_proto::{RequestId, SiteName, StoreId};
use prost_011::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::oneshot;

/// What clients write and read: caps of links to so many sites.
const KEYS: usize = 3;
/// A disk keeps its node waiting for so many steps at most.
const STALL: usize = 400;
const STEPS: usize = 4_000;
const SEEDS: u64 = 60;
/// Steps in which everything is to come to rest.
const REST: usize = 40_000;

#[derive(Default)]
struct Contents {
    map: BTreeMap<Vec<u8>, Vec<u8>>,
    snapshot: Option<Vec<u8>>,
}

/// Outlives its node.
#[derive(Clone, Default)]
struct MemoryDisk(Rc<RefCell<Contents>>);

impl MemoryDisk {
    /// The newest entry of the log; 0: there is none.
    fn last(&self) -> u64 {
        let contents = self.0.borrow();
        let newest = contents.map.keys().filter_map(|key| key.strip_prefix(b"log/")).max();
        newest.and_then(|index| index.try_into().ok()).map_or(0, u64::from_be_bytes)
    }
}

impl Disk for MemoryDisk {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.0.borrow().map.get(key.as_bytes()).cloned())
    }

    fn scan(&self, prefix: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>, DiskError> {
        let contents = self.0.borrow();
        let found = contents.map.iter().filter(|(key, _)| key.starts_with(prefix.as_bytes()));
        Ok(found.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&mut self, changes: Vec<Change>) -> Result<(), DiskError> {
        let map = &mut self.0.borrow_mut().map;
        for change in changes {
            match change {
                Change::Put { key, value } => drop(map.insert(key, value)),
                Change::Remove(key) => drop(map.remove(&key)),
            }
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.0.borrow().snapshot.clone())
    }

    fn replace_snapshot(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.0.borrow_mut().snapshot = Some(bytes.to_vec());
        Ok(())
    }
}

#[derive(Default)]
struct Outbox {
    messages: Vec<Message>,
    membership: Arc<Membership>,
}

impl Outlet for Outbox {
    fn send(&mut self, messages: Vec<Message>) {
        self.messages.extend(messages);
    }

    fn publish(&mut self, _: &Arc<State>) {}

    fn regroup(&mut self, membership: &Arc<Membership>) {
        self.membership = membership.clone();
    }
}

/// A message, and what goes with it from peer to peer.
struct Letter {
    message: Message,
    store: StoreId,
    to_store: Option<StoreId>,
}

struct Machine {
    disk: MemoryDisk,
    store: StoreId,
    /// As it last knew it, running or not.
    membership: Arc<Membership>,
    first: Membership,
    node: Option<Node<MemoryDisk, Outbox>>,
    election_ticks: usize,
    seen: (u64, Option<u64>),
    /// It knows that nobody listens to it any more.
    over: bool,
    /// Its disk was lost.
    wiped: bool,
    /// Until this step its node waits for its disk, and does nothing.
    stalled_until: u64,
}

impl Machine {
    fn stalls(&self, now: u64) -> bool {
        now < self.stalled_until
    }
}

type Answer<T> = oneshot::Receiver<Result<T, ConsensusError>>;

struct World {
    random: u64,
    machines: BTreeMap<u64, Machine>,
    messages: Vec<Letter>,
    leaders: BTreeMap<u64, u64>,
    states: BTreeMap<u64, Arc<State>>,
    memberships: BTreeMap<u64, Arc<Membership>>,
    now: u64,
    history: History,
    writes: Vec<(usize, Answer<model::Outcome>)>,
    reads: Vec<(usize, Answer<Arc<State>>)>,
    transfers: u64,
    orders: u64,
    wipes: u64,
}

fn link(key: usize) -> (SiteName, SiteName) {
    ("a".parse().unwrap(), format!("s{key}").parse().unwrap())
}

fn member(id: u64) -> Member {
    Member::new(id, "a".parse().unwrap(), format!("192.0.2.{id}:7400"))
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            machines: BTreeMap::new(),
            messages: vec![],
            leaders: BTreeMap::new(),
            states: BTreeMap::new(),
            memberships: BTreeMap::new(),
            now: 0,
            history: History::default(),
            writes: vec![],
            reads: vec![],
            transfers: 0,
            orders: 0,
            wipes: 0,
        };
        for id in 1..=3 {
            world.install(id, Membership::first([1, 2, 3].map(member)));
        }
        world
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % limit as u64) as usize
    }

    fn install(&mut self, id: u64, first: Membership) {
        let machine = Machine {
            disk: MemoryDisk::default(),
            store: StoreId::generate(),
            membership: Arc::default(),
            first,
            node: None,
            election_ticks: ELECTION_TICKS,
            seen: (0, None),
            over: false,
            wiped: false,
            stalled_until: 0,
        };
        self.machines.insert(id, machine);
        self.start(id);
    }

    fn start(&mut self, id: u64) {
        let machine = self.machines.get_mut(&id).unwrap();
        if machine.over {
            return;
        }
        let opened = LogStorage::open_on(machine.disk.clone(), machine.first.clone(), machine.store);
        let (storage, state) = opened.unwrap();
        let config = NodeConfig { id, snapshot_every: 12, keep_entries: 4 };
        match Node::new(&config, storage, state, Outbox::default()) {
            Ok(node) => machine.node = Some(node),
            Err(NodeError::Removed { .. }) => machine.over = true,
            Err(error) => panic!("{error}"),
        }
        self.touch(id, |_| ());
    }

    /// Does something with a node that runs, lets it settle, and looks at it.
    fn touch(&mut self, id: u64, what: impl FnOnce(&mut Node<MemoryDisk, Outbox>)) {
        let fresh = ELECTION_TICKS + self.below(ELECTION_TICKS);
        let machine = self.machines.get_mut(&id).unwrap();
        let Some(node) = &mut machine.node else { return };
        what(node);
        node.set_election_ticks(machine.election_ticks);
        let settled = node.settle();
        let status = node.status();
        if (status.term, status.leader) != machine.seen {
            machine.seen = (status.term, status.leader);
            machine.election_ticks = fresh;
        }
        node.set_election_ticks(machine.election_ticks);
        let (state, membership) = (node.state().clone(), node.outlet().membership.clone());
        let letter = |message: Message| {
            let to_store = membership.get(message.to).and_then(|(member, _)| member.store);
            Letter { message, store: machine.store, to_store }
        };
        self.messages.extend(node.outlet().messages.drain(..).map(letter));
        machine.membership = membership.clone();
        match settled {
            Ok(()) => {}
            Err(NodeError::Removed { .. } | NodeError::OtherStore { .. }) => {
                (machine.node, machine.over) = (None, true)
            }
            Err(error) => panic!("node {id}: {error}"),
        }
        if status.leader == Some(id) {
            let leader = *self.leaders.entry(status.term).or_insert(id);
            assert_eq!(leader, id, "two leaders in term {}", status.term);
        }
        assert!(status.applied <= status.committed, "node {id} applied what is not committed: {status:?}");
        let there = self.states.entry(status.applied).or_insert_with(|| state.clone());
        assert_eq!(*there, state, "two states at entry {}", status.applied);
        if !membership.is_unknown() {
            let there = self.memberships.entry(membership.index).or_insert_with(|| membership.clone());
            assert_eq!(*there, membership, "two memberships of entry {}", membership.index);
        }
    }

    fn any(&mut self, down: bool) -> Option<u64> {
        let ids: Vec<u64> = self
            .machines
            .iter()
            .filter(|(_, it)| it.node.is_none() == down && !it.over && !it.stalls(self.now))
            .map(|(id, _)| *id)
            .collect();
        (!ids.is_empty()).then(|| ids[self.below(ids.len())])
    }

    fn leader(&self) -> Option<u64> {
        let serves = |(id, machine): (&u64, &Machine)| {
            machine.node.as_ref().filter(|node| node.status().serving).map(|node| (node.status().term, *id))
        };
        self.machines.iter().filter_map(serves).max().map(|(_, id)| id)
    }

    fn deliver(&mut self) {
        if self.messages.is_empty() {
            return;
        }
        let at = self.below(self.messages.len());
        let letter = self.messages.swap_remove(at);
        let Letter { message, store, to_store } = &letter;
        let (from, to, store) = (message.from, message.to, *store);
        if self.machines.get(&to).is_some_and(|machine| machine.stalls(self.now)) {
            // It waits before the node does.
            return self.messages.push(letter);
        }
        let Some(receiver) = self.machines.get(&to).filter(|machine| machine.node.is_some()) else {
            return self.tell_fate(&letter, Delivered::No);
        };
        let (refused, other) = (receiver.membership.turns_away(from, Some(store)), receiver.store);
        // As the peers of the product do.
        if let Some(why) = refused {
            if self.machines[&from].store == store {
                self.touch(from, |node| node.take(Input::TurnedAway { by: to, why }));
            }
            return;
        }
        if to_store.is_some_and(|known| known != other) {
            return self.touch(to, |node| node.take(Input::TurnedAway { by: from, why: TurnedAway::OtherStore }));
        }
        let message = message.encode_to_vec();
        self.touch(to, |node| node.take(Input::Step { message, store: Some(store) }));
        self.tell_fate(&letter, Delivered::Yes);
    }

    fn lose(&mut self) {
        if !self.messages.is_empty() {
            let letter = self.messages.swap_remove(0);
            self.tell_fate(&letter, Delivered::No);
        }
    }

    /// Raft sends nothing more to whom it has sent a snapshot until it hears of it.
    fn tell_fate(&mut self, Letter { message, .. }: &Letter, delivered: Delivered) {
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let peer = message.to;
            self.touch(message.from, |node| node.take(Input::SnapshotSent { peer, delivered }));
        }
    }

    /// Some node that takes itself for the leader: not always the newest.
    fn a_leader(&mut self) -> Option<u64> {
        let serves = |machine: &Machine| {
            machine.node.as_ref().is_some_and(|node| node.status().leader == Some(node.status().id))
        };
        let ids: Vec<u64> = self.machines.iter().filter(|(_, machine)| serves(machine)).map(|(id, _)| *id).collect();
        (!ids.is_empty()).then(|| ids[self.below(ids.len())])
    }

    fn write(&mut self) {
        let Some(leader) = self.a_leader() else { return };
        self.orders += 1;
        let (cap_bps, key) = (self.orders, self.below(KEYS));
        let (from, to) = link(key);
        let order = model::Order::Client {
            request: RequestId::generate(),
            order: ClientOrder::SetLinkCap { from, to, cap_bps },
        };
        let command = serde_json::to_vec(&Command { now_unix_ms: 0, order }).unwrap();
        let (answer, answered) = oneshot::channel();
        self.writes.push((self.history.asked(key, Did::Write(cap_bps), self.now), answered));
        self.touch(leader, |node| node.take(Input::Propose { command, term: None, answer }));
    }

    fn read(&mut self) {
        let Some(leader) = self.a_leader() else { return };
        let key = self.below(KEYS);
        let (answer, answered) = oneshot::channel();
        self.reads.push((self.history.asked(key, Did::Read(None), self.now), answered));
        self.touch(leader, |node| node.take(Input::Read { answer }));
    }

    /// An operator hands leadership over, to whom it may concern.
    fn transfer(&mut self) {
        let Some(leader) = self.leader() else { return };
        let voters: Vec<u64> = self.machines[&leader].membership.voters.keys().copied().collect();
        let to = Some(voters[self.below(voters.len())]);
        let (answer, mut answered) = oneshot::channel();
        self.touch(leader, |node| node.take(Input::TransferLeadership { to, answer }));
        self.transfers += u64::from(matches!(answered.try_recv(), Ok(Ok(heir)) if heir != leader));
    }

    fn stall(&mut self) {
        if let Some(id) = self.any(false) {
            let until = self.now + self.below(STALL) as u64;
            self.machines.get_mut(&id).unwrap().stalled_until = until;
        }
    }

    fn change(&mut self) {
        let Some(leader) = self.leader() else { return };
        let membership = self.machines.get_mut(&leader).unwrap().node.as_mut().unwrap().outlet().membership.clone();
        let all: Vec<u64> = membership.members().map(|(member, _)| member.id).collect();
        if all.iter().any(|id| self.machines[id].wiped) {
            return self.remove_the_wiped(leader);
        }
        let next = self.machines.len() as u64 + 1;
        let order = match self.below(4) {
            0 if all.len() < 5 && next < 12 => {
                self.install(next, Membership::default());
                Order::Add(member(next))
            }
            1 if membership.voters.len() > 2 => Order::Remove { id: all[self.below(all.len())], quorum: Quorum::Keep },
            _ => match membership.learners.keys().next() {
                Some(id) => Order::Promote(*id),
                None => return,
            },
        };
        let (answer, _answered) = oneshot::channel();
        self.touch(leader, |node| node.take(Input::Change { order, answer }));
    }

    /// A disk is lost, and the machine started again as it was first installed. One at a time: what two of three had may be gone.
    fn wipe(&mut self) {
        let Some(leader) = self.leader() else { return };
        let members = self.machines[&leader].membership.clone();
        if members.voters.len() <= 2 {
            return;
        }
        let applied = self.machines[&leader].node.as_ref().unwrap().status().applied;
        let ids: Vec<u64> = members.members().map(|(member, _)| member.id).collect();
        let id = ids[self.below(ids.len())];
        // Who listens to whom is certain once everyone knows every store.
        let knows = |machine: &Machine| machine.membership.get(id).is_some_and(|(member, _)| member.store.is_some());
        let settled = ids.iter().all(|member| {
            let machine = &self.machines[member];
            // A change that is under way could leave two, of whom one has lost its disk.
            let nothing_under_way = machine.disk.last() <= applied;
            knows(machine) && !machine.wiped && machine.membership == members && nothing_under_way
        });
        if !settled {
            return;
        }
        self.wipes += 1;
        let machine = self.machines.get_mut(&id).unwrap();
        (machine.disk, machine.store, machine.node) = (MemoryDisk::default(), StoreId::generate(), None);
        (machine.wiped, machine.seen) = (true, (0, None));
        self.start(id);
    }

    /// What an operator does about members that have lost their disks.
    fn remove_the_wiped(&mut self, leader: u64) {
        let members = self.machines[&leader].membership.clone();
        let wiped = members.members().find(|(member, _)| self.machines[&member.id].wiped);
        if let Some((member, _)) = wiped {
            let (answer, _answered) = oneshot::channel();
            let order = Order::Remove { id: member.id, quorum: Quorum::Keep };
            self.touch(leader, |node| node.take(Input::Change { order, answer }));
        }
    }

    fn collect(&mut self) {
        use oneshot::error::TryRecvError;
        let (now, history) = (self.now, &mut self.history);
        self.writes.retain_mut(|(call, answered)| match answered.try_recv() {
            Ok(Ok(outcome)) => {
                outcome.unwrap();
                history.answered(*call, now);
                false
            }
            // It never went into the log.
            Ok(Err(ConsensusError::NotLeader)) => {
                history.did_not(*call);
                false
            }
            Ok(Err(_)) | Err(TryRecvError::Closed) => false,
            Err(TryRecvError::Empty) => true,
        });
        self.reads.retain_mut(|(call, answered)| match answered.try_recv() {
            Ok(Ok(state)) => {
                let (from, to) = link(history.key(*call));
                history.saw(*call, state.links.cap_bps(&from, &to), now);
                false
            }
            Ok(Err(_)) | Err(TryRecvError::Closed) => {
                history.did_not(*call);
                false
            }
            Err(TryRecvError::Empty) => true,
        });
    }

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

    fn agree(&mut self, leader: u64) -> bool {
        let node = self.machines.get_mut(&leader).unwrap().node.as_mut().unwrap();
        let (applied, membership) = (node.status().applied, node.outlet().membership.clone());
        membership.members().all(|(member, _)| {
            let node = self.machines.get_mut(&member.id).and_then(|machine| machine.node.as_mut());
            node.is_some_and(|node| node.status().applied == applied && node.outlet().membership == membership)
        })
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
