//! A node and its fellow members: who they are, how far they are, how they change, and who leads instead.

use std::sync::Arc;

use prost_011::Message as _;
use raft::eraftpb::{ConfChange, Entry};
use tokio::sync::oneshot;

use super::{Node, NodeError, Outlet, TICK};
use crate::consensus::ConsensusError;
use crate::consensus::disk::Disk;
use crate::consensus::membership::{Change, ChangeError, Membership, Order, Plan};
use crate::consensus::standing::{Peer, Role, Standing, TransferError};

impl<D: Disk, O: Outlet> Node<D, O> {
    /// How far the others are, as far as this node, which leads, knows.
    pub(super) fn standing(&self) -> Standing {
        let raft = &self.raft.raft;
        let learners = &raft.prs().conf().learners();
        let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        let peers = others.map(|(id, progress)| Peer {
            id: *id,
            role: if learners.contains(id) { Role::Learner } else { Role::Voter },
            matched: progress.matched,
            silent: self.heard.get(id).map(|at| TICK * (self.ticks - at)),
        });
        Standing { leader: raft.id, last: raft.raft_log.last_index(), peers: peers.collect() }
    }

    /// Whoever was heard is known by its store from then on.
    pub(super) fn note_stores(&mut self) {
        if !self.may_change() {
            return;
        }
        if let Some(change) = self.raft.store().membership().news_of(&self.stores)
            && let Err(error) = self.propose_members(&change)
        {
            tracing::debug!(%error, "a member's store is not noted yet");
        }
    }

    pub(super) fn change(&mut self, order: &Order, answer: oneshot::Sender<Result<Arc<Membership>, ChangeError>>) {
        match self.propose_change(order) {
            Ok(Some(index)) => self.changes.wait(index, self.raft.raft.term, answer),
            Ok(None) => drop(answer.send(Ok(self.raft.store().membership().clone()))),
            Err(error) => drop(answer.send(Err(error))),
        }
    }

    /// The entry that will make the change; [`None`]: it is so already.
    fn propose_change(&mut self, order: &Order) -> Result<Option<u64>, ChangeError> {
        if !self.leads() {
            return Err(ConsensusError::NotLeader.into());
        }
        if !self.may_change() {
            return Err(ChangeError::Busy);
        }
        let Plan::Propose(change) = self.raft.store().membership().plan(order, &self.standing())? else {
            return Ok(None);
        };
        self.propose_members(&change).map(Some)
    }

    /// One change at a time. Also all of a former leader's entries must be applied: one of them may be a change.
    fn may_change(&self) -> bool {
        self.leads() && !self.raft.raft.has_pending_conf() && self.raft.raft.commit_to_current_term()
    }

    fn propose_members(&mut self, change: &Change) -> Result<u64, ChangeError> {
        let encoded = change.encode()?;
        self.raft.propose_conf_change(vec![], encoded).map_err(|error| {
            tracing::debug!(%error, "a change of the members was not proposed");
            ConsensusError::NotLeader
        })?;
        tracing::info!(?change, "changing the members");
        Ok(self.raft.raft.raft_log.last_index())
    }

    pub(super) fn transfer_leadership(&mut self, to: Option<u64>) -> Result<u64, TransferError> {
        if !self.leads() {
            return Err(ConsensusError::NotLeader.into());
        }
        let heir = self.standing().heir(to)?;
        if heir != self.raft.raft.id {
            tracing::info!(to = heir, "handing leadership over");
            self.raft.transfer_leader(heir);
        }
        Ok(heir)
    }

    pub(super) fn apply_change(&mut self, entry: &Entry) -> Result<(), NodeError> {
        let waiting = self.changes.take(entry.index, entry.term);
        let index = entry.index;
        let change = ConfChange::decode(entry.data.as_ref());
        let change = change.map_err(|source| NodeError::MembersDamaged { index, source })?;
        // A node that starts again has its members from disk: they are newer than the state that it builds up again.
        if index > self.raft.store().membership().index {
            let next = self.raft.store().membership().after(index, &change);
            let next = next.map_err(|source| NodeError::Members { index, source })?;
            self.raft.apply_conf_change(&change).map_err(NodeError::Start)?;
            self.raft.mut_store().keep_membership(next)?;
            self.regroup()?;
        }
        if let Some(waiting) = waiting {
            drop(waiting.send(Ok(self.raft.store().membership().clone())));
        }
        Ok(())
    }

    pub(super) fn regroup(&mut self) -> Result<(), NodeError> {
        let membership = self.raft.store().membership().clone();
        let (voters, learners) = (membership.voters.keys(), membership.learners.keys());
        tracing::info!(index = membership.index, ?voters, ?learners, "members");
        self.heard.retain(|id, _| membership.get(*id).is_some());
        self.outlet.regroup(&membership);
        let id = self.raft.raft.id;
        if membership.removed.contains(&id) { Err(NodeError::Removed { id }) } else { Ok(()) }
    }
}
