//! [`World`]: the machines, what is on its way between them, and what must hold of them whenever a node has done something.

use std::collections::BTreeMap;
use std::sync::Arc;

use pageport_controller::consensus::membership::{Member, Membership, TurnedAway};
use pageport_controller::consensus::node::{ELECTION_TICKS, Node, NodeError};
use pageport_controller::consensus::{ConsensusError, Delivered, Input};
use pageport_controller::model::{self, State};
use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::oneshot;

use crate::history::History;
use crate::machine::{Machine, MemoryDisk, Outbox};

/// A message, and what goes with it from peer to peer.
struct Letter {
    message: Message,
    store: StoreId,
    to_store: Option<StoreId>,
}

type Answer<T> = oneshot::Receiver<Result<T, ConsensusError>>;

pub struct World {
    random: u64,
    pub machines: BTreeMap<u64, Machine>,
    messages: Vec<Letter>,
    leaders: BTreeMap<u64, u64>,
    states: BTreeMap<u64, Arc<State>>,
    pub memberships: BTreeMap<u64, Arc<Membership>>,
    pub now: u64,
    pub history: History,
    pub writes: Vec<(usize, Answer<model::Outcome>)>,
    pub reads: Vec<(usize, Answer<Arc<State>>)>,
    pub transfers: u64,
    pub orders: u64,
    pub wipes: u64,
}

pub fn member(id: u64) -> Member {
    Member::new(id, "a".parse().unwrap(), format!("192.0.2.{id}:7400"))
}

impl World {
    pub fn new(seed: u64) -> Self {
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

    pub fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % limit as u64) as usize
    }

    pub fn install(&mut self, id: u64, first: Membership) {
        self.machines.insert(id, Machine::new(first));
        self.start(id);
    }

    pub fn start(&mut self, id: u64) {
        let machine = self.machines.get_mut(&id).unwrap();
        if machine.over {
            return;
        }
        machine.start(id);
        self.touch(id, |_| ());
    }

    /// Does something with a node that runs, lets it settle, and looks at it.
    pub fn touch(&mut self, id: u64, what: impl FnOnce(&mut Node<MemoryDisk, Outbox>)) {
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

    pub fn any(&mut self, down: bool) -> Option<u64> {
        let ids: Vec<u64> = self
            .machines
            .iter()
            .filter(|(_, it)| it.node.is_none() == down && !it.over && !it.stalls(self.now))
            .map(|(id, _)| *id)
            .collect();
        (!ids.is_empty()).then(|| ids[self.below(ids.len())])
    }

    pub fn leader(&self) -> Option<u64> {
        let serves = |(id, machine): (&u64, &Machine)| {
            machine.node.as_ref().filter(|node| node.status().serving).map(|node| (node.status().term, *id))
        };
        self.machines.iter().filter_map(serves).max().map(|(_, id)| id)
    }

    pub fn deliver(&mut self) {
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

    pub fn lose(&mut self) {
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

    pub fn agree(&mut self, leader: u64) -> bool {
        let node = self.machines.get_mut(&leader).unwrap().node.as_mut().unwrap();
        let (applied, membership) = (node.status().applied, node.outlet().membership.clone());
        membership.members().all(|(member, _)| {
            let node = self.machines.get_mut(&member.id).and_then(|machine| machine.node.as_mut());
            node.is_some_and(|node| node.status().applied == applied && node.outlet().membership == membership)
        })
    }
}
