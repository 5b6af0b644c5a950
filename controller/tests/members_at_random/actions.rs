//! What clients, operators and disks do to a world.

use pageport_controller::consensus::membership::{Membership, Order, Quorum};
use pageport_controller::consensus::{ConsensusError, Input};
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::{self, Command};
use pageport_proto::{RequestId, SiteName, StoreId};
use tokio::sync::oneshot;

use crate::history::Did;
use crate::machine::{Machine, MemoryDisk};
use crate::world::{World, member};

/// What clients write and read: caps of links to so many sites.
pub const KEYS: usize = 3;
/// A disk keeps its node waiting for so many steps at most.
const STALL: usize = 400;

pub fn link(key: usize) -> (SiteName, SiteName) {
    ("a".parse().unwrap(), format!("s{key}").parse().unwrap())
}

impl World {
    /// Some node that takes itself for the leader: not always the newest.
    fn a_leader(&mut self) -> Option<u64> {
        let serves = |machine: &Machine| {
            machine.node.as_ref().is_some_and(|node| node.status().leader == Some(node.status().id))
        };
        let ids: Vec<u64> = self.machines.iter().filter(|(_, machine)| serves(machine)).map(|(id, _)| *id).collect();
        (!ids.is_empty()).then(|| ids[self.below(ids.len())])
    }

    pub fn write(&mut self) {
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

    pub fn read(&mut self) {
        let Some(leader) = self.a_leader() else { return };
        let key = self.below(KEYS);
        let (answer, answered) = oneshot::channel();
        self.reads.push((self.history.asked(key, Did::Read(None), self.now), answered));
        self.touch(leader, |node| node.take(Input::Read { answer }));
    }

    /// An operator hands leadership over, to whom it may concern.
    pub fn transfer(&mut self) {
        let Some(leader) = self.leader() else { return };
        let voters: Vec<u64> = self.machines[&leader].membership.voters.keys().copied().collect();
        let to = Some(voters[self.below(voters.len())]);
        let (answer, mut answered) = oneshot::channel();
        self.touch(leader, |node| node.take(Input::TransferLeadership { to, answer }));
        self.transfers += u64::from(matches!(answered.try_recv(), Ok(Ok(heir)) if heir != leader));
    }

    pub fn stall(&mut self) {
        if let Some(id) = self.any(false) {
            let until = self.now + self.below(STALL) as u64;
            self.machines.get_mut(&id).unwrap().stalled_until = until;
        }
    }

    pub fn change(&mut self) {
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
    pub fn wipe(&mut self) {
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
    pub fn remove_the_wiped(&mut self, leader: u64) {
        let members = self.machines[&leader].membership.clone();
        let wiped = members.members().find(|(member, _)| self.machines[&member.id].wiped);
        if let Some((member, _)) = wiped {
            let (answer, _answered) = oneshot::channel();
            let order = Order::Remove { id: member.id, quorum: Quorum::Keep };
            self.touch(leader, |node| node.take(Input::Change { order, answer }));
        }
    }

    pub fn collect(&mut self) {
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
}
