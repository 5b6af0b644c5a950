//! [`Node`]: one member of the cluster as a state machine: time and inputs in, messages and applied states out.
//!
//! Each `Ready` is handled in this order:
//! ```text
//!  1 send messages()            (a leader's appends: they need not wait for its own disk)
//!  2 install a snapshot, if one came: file, then log, then state
//!  3 persist entries and hard state, one batch, synced
//!  4 send persisted_messages()  (votes and acknowledgements: only what is on disk may be promised)
//!  5 apply committed entries, publish the state, then answer the proposers; a change of the members is made durable before
//!    this node acts on it
//!  6 advance; the same for what that brings
//! ```
//! Guarantees: nothing is promised before it is durable, nothing answered before it is applied and published. A disk
//! that fails ends the node: what it holds is unknown until it is opened again. Reads no clock and waits for nothing but its
//! disk: [`super::core`] drives it in the daemon, the simulator drives it in its own time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType, Message};
use raft::{Config, RawNode, SnapshotStatus, StateRole};
use tokio::sync::oneshot;

use super::disk::Disk;
use super::membership::{Change, ChangeError, Membership, Order, Plan, TurnedAway};
use super::pending::{Proposals, Reads};
use super::snapshot::{self, SnapshotError};
use super::standing::{Peer, Role, Standing, TransferError};
use super::storage::{LogError, LogStorage, Place};
use super::way_out::WayOut;
use super::{ConsensusError, Delivered, Input, Status, log};
use crate::model::{Command, Outcome, State, apply};

/// Raft's unit of time.
pub const TICK: Duration = Duration::from_millis(100);
/// A follower that hears nothing for this many ticks (to twice as many) stands for election.
pub const ELECTION_TICKS: usize = 10;
const HEARTBEAT_TICKS: usize = 2;
/// A read round without an answer for this many ticks is asked again.
const READ_PATIENCE_TICKS: u64 = 5;
const MAX_MESSAGE_BYTES: u64 = 1 << 20;
const MAX_INFLIGHT_MESSAGES: usize = 256;
const MAX_UNCOMMITTED_BYTES: u64 = 16 << 20;

/// Why a node cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The disk.
    #[error("the replicated log cannot go on")]
    Log(#[source] LogError),
    /// The disk has no room.
    #[error(
        "the disk is full and this controller stops: make room where its data_dir is and start it again; nothing that it acknowledged is lost"
    )]
    Full(#[source] LogError),
    /// A snapshot that came cannot be used.
    #[error("a peer's snapshot cannot be used")]
    Snapshot(#[from] SnapshotError),
    /// This node is no member any more.
    #[error(
        "controller {id} was removed from the cluster (\"pageportctl cluster remove {id}\"): stop its service for good and \
         delete its data_dir; to use this host again add it under another number"
    )]
    Removed {
        /// This node.
        id: u64,
    },
    /// The others know it with another store.
    #[error(
        "controller {id} has lost its data: the others know it with another data_dir. If that one is still there, point data_dir to it. \
         The way out otherwise, {}",
        WayOut(*id)
    )]
    OtherStore {
        /// This node.
        id: u64,
    },
    /// Another cluster has taken its place.
    #[error(
        "controller {id} belongs to a cluster that was given up: the controllers were restored from a backup since. Stop its service, move its data_dir \
         away, and to use this host again add it under a number that the restored ones do not have"
    )]
    OlderGeneration {
        /// This node.
        id: u64,
    },
    /// An entry that changes the members cannot be read.
    #[error("decode entry {index} of the replicated log, which changes the members")]
    Members {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: ChangeError,
    },
    /// An entry that changes the members is damaged.
    #[error("decode entry {index} of the replicated log, which changes the members")]
    MembersDamaged {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: prost_011::DecodeError,
    },
    /// raft refuses its configuration or its log.
    #[error("start raft")]
    Start(#[source] raft::Error),
    /// An entry is no command of this version.
    #[error("decode entry {index} of the replicated log: is this controller older than its peers?")]
    Decode {
        /// The entry.
        index: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl From<LogError> for NodeError {
    fn from(error: LogError) -> Self {
        if error.is_full() { Self::Full(error) } else { Self::Log(error) }
    }
}

/// What a node needs to know besides its log.
#[derive(Debug, Clone, Copy)]
pub struct NodeConfig {
    /// This node.
    pub id: u64,
    /// A snapshot is made after so many entries.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot for peers that are only a little late.
    pub keep_entries: u64,
}

/// Where a node's words go. Neither waits.
pub trait Outlet {
    /// To whom they are for; they may get lost.
    fn send(&mut self, messages: Vec<Message>);

    /// The state has changed; called before those who asked for the change are answered.
    fn publish(&mut self, state: &Arc<State>);

    /// These are the members from now on; called once at the start, then before those who asked for the change are answered.
    fn regroup(&mut self, membership: &Arc<Membership>);
}

/// One member of the cluster.
#[allow(missing_debug_implementations, reason = "raft's node has none")]
pub struct Node<D: Disk, O: Outlet> {
    raft: RawNode<LogStorage<D>>,
    outlet: O,
    state: Arc<State>,
    applied: u64,
    proposals: Proposals<Result<Outcome, ConsensusError>>,
    changes: Proposals<Result<Arc<Membership>, ChangeError>>,
    reads: Reads<Result<Arc<State>, ConsensusError>>,
    snapshot_every: u64,
    keep_entries: u64,
    /// Since the start.
    ticks: u32,
    /// When each member was last heard.
    heard: BTreeMap<u64, u32>,
    /// The stores of this node and of those that were heard.
    stores: BTreeMap<u64, StoreId>,
    /// A peer said so.
    turned_away: Option<TurnedAway>,
}

impl<D: Disk, O: Outlet> Node<D, O> {
    /// Takes up the log where it ends, with the state of its last snapshot.
    ///
    /// # Errors
    /// [`NodeError::Start`], [`NodeError::Removed`].
    pub fn new(config: &NodeConfig, storage: LogStorage<D>, state: State, mut outlet: O) -> Result<Self, NodeError> {
        if storage.membership().removed.contains(&config.id) {
            return Err(NodeError::Removed { id: config.id });
        }
        outlet.regroup(storage.membership());
        let (applied, store) = (storage.snapshot_place().index, storage.store());
        let raft_config = Config {
            id: config.id,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied,
            max_size_per_msg: MAX_MESSAGE_BYTES,
            max_inflight_msgs: MAX_INFLIGHT_MESSAGES,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            check_quorum: true,
            pre_vote: true,
            // raft 0.7.0 would put entries into an append that already waits, also behind a gap if that one is empty: the follower then
            // acknowledges what it does not have, and the leader commits what only it has. The simulator found it.
            batch_append: false,
            ..Config::default()
        };
        let raft = RawNode::new(&raft_config, storage, &log::logger()).map_err(NodeError::Start)?;
        Ok(Self {
            raft,
            outlet,
            state: Arc::new(state),
            applied,
            proposals: Proposals::default(),
            changes: Proposals::default(),
            reads: Reads::default(),
            snapshot_every: config.snapshot_every,
            keep_entries: config.keep_entries,
            ticks: 0,
            heard: BTreeMap::new(),
            stores: BTreeMap::from([(config.id, store)]),
            turned_away: None,
        })
    }

    /// [`TICK`] has passed.
    pub fn tick(&mut self) {
        self.ticks = self.ticks.saturating_add(1);
        self.raft.tick();
        self.reads.tick(READ_PATIENCE_TICKS);
    }

    /// Does all that can be done now. Call it after each [`Node::tick`] and [`Node::take`].
    ///
    /// # Errors
    /// [`NodeError`]: what the disk holds is unknown until it is opened again, and the node must end.
    pub fn settle(&mut self) -> Result<(), NodeError> {
        let id = self.raft.raft.id;
        match self.turned_away {
            Some(TurnedAway::Removed) => return Err(NodeError::Removed { id }),
            Some(TurnedAway::OtherStore) => return Err(NodeError::OtherStore { id }),
            Some(TurnedAway::OlderGeneration) => return Err(NodeError::OlderGeneration { id }),
            None => {}
        }
        self.note_stores();
        self.start_read_round();
        while self.raft.has_ready() {
            self.handle_ready()?;
        }
        self.answer_reads();
        self.make_snapshot_if_due()
    }

    /// Where the node stands.
    pub fn status(&self) -> Status {
        let raft = &self.raft.raft;
        Status {
            id: raft.id,
            leader: Some(raft.leader_id).filter(|leader| *leader != 0),
            serving: self.leads() && raft.commit_to_current_term() && self.applied >= raft.raft_log.committed,
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.applied,
        }
    }

    /// How far the others are, as far as this node, which leads, knows.
    fn standing(&self) -> Standing {
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

    /// The applied state.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Where its words go.
    pub fn outlet(&mut self) -> &mut O {
        &mut self.outlet
    }

    /// Stands for election after this many ticks without a leader, from [`ELECTION_TICKS`] to one less than twice as many. Raft
    /// draws the number anew, by chance, whenever it changes its role: to be foreseeable it must be set after each call.
    pub fn set_election_ticks(&mut self, ticks: usize) {
        self.raft.raft.set_randomized_election_timeout(ticks);
    }

    fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Takes an input in.
    pub fn take(&mut self, input: Input) {
        match input {
            Input::Propose { command, term, answer } => self.propose(command, term, answer),
            Input::Read { answer } if self.leads() => self.reads.wait(answer),
            // Whoever asked may have stopped waiting: then nobody needs the answer.
            Input::Read { answer } => drop(answer.send(Err(ConsensusError::NotLeader))),
            Input::Change { order, answer } => self.change(&order, answer),
            Input::Inspect { answer } => {
                let standing = if self.leads() { Ok(self.standing()) } else { Err(ConsensusError::NotLeader) };
                drop(answer.send(standing));
            }
            Input::TurnedAway { by, why } => {
                tracing::warn!(by, ?why, "a peer listens to this controller no more");
                self.turned_away = Some(why);
            }
            Input::TransferLeadership { to, answer } => drop(answer.send(self.transfer_leadership(to))),
            Input::Step { message, store } => match Message::decode(message.as_slice()) {
                Ok(message) => self.hear(message, store),
                Err(error) => tracing::warn!(%error, "a peer's message is no raft message"),
            },
            Input::Unreachable { peer } => self.raft.report_unreachable(peer),
            Input::SnapshotSent { peer, delivered } => {
                let status = match delivered {
                    Delivered::Yes => SnapshotStatus::Finish,
                    Delivered::No => SnapshotStatus::Failure,
                };
                self.raft.report_snapshot(peer, status);
            }
        }
    }

    fn hear(&mut self, message: Message, store: Option<StoreId>) {
        if self.raft.store().membership().turns_away(message.from, store).is_some() {
            return;
        }
        if self.raft.raft.prs().get(message.from).is_some() {
            self.heard.insert(message.from, self.ticks);
            self.stores.extend(store.map(|store| (message.from, store)));
        }
        if let Err(error) = self.raft.step(message) {
            tracing::debug!(%error, "a peer's message was not taken");
        }
    }

    /// Whoever was heard is known by its store from then on.
    fn note_stores(&mut self) {
        if !self.may_change() {
            return;
        }
        if let Some(change) = self.raft.store().membership().news_of(&self.stores)
            && let Err(error) = self.propose_members(&change)
        {
            tracing::debug!(%error, "a member's store is not noted yet");
        }
    }

    fn propose(
        &mut self,
        command: Vec<u8>,
        term: Option<u64>,
        answer: oneshot::Sender<Result<Outcome, ConsensusError>>,
    ) {
        let in_time = term.is_none_or(|term| term == self.raft.raft.term);
        let refused = if self.leads() && in_time {
            self.raft.propose(vec![], command).err()
        } else {
            Some(raft::Error::ProposalDropped)
        };
        match refused {
            None => {
                let index = self.raft.raft.raft_log.last_index();
                self.proposals.wait(index, self.raft.raft.term, answer);
            }
            Some(error) => {
                tracing::debug!(%error, "a command was not proposed");
                drop(answer.send(Err(ConsensusError::NotLeader)));
            }
        }
    }

    fn change(&mut self, order: &Order, answer: oneshot::Sender<Result<Arc<Membership>, ChangeError>>) {
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

    fn transfer_leadership(&mut self, to: Option<u64>) -> Result<u64, TransferError> {
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

    fn start_read_round(&mut self) {
        // Before its first own entry is committed a leader does not know what is: raft would drop the question.
        if self.leads()
            && self.raft.raft.commit_to_current_term()
            && let Some(context) = self.reads.start()
        {
            self.raft.read_index(context);
        }
    }

    fn answer_reads(&mut self) {
        for answer in self.reads.ready(self.applied) {
            drop(answer.send(Ok(self.state.clone())));
        }
    }

    fn handle_ready(&mut self) -> Result<(), NodeError> {
        let mut ready = self.raft.ready();
        if let Some(soft) = ready.ss() {
            let (term, leader) = (self.raft.raft.term, soft.leader_id);
            tracing::info!(term, leader, role = ?soft.raft_state, "raft role");
            if soft.raft_state != StateRole::Leader {
                self.step_down();
            }
        }
        for state in ready.take_read_states() {
            self.reads.confirm(&state.request_ctx, state.index);
        }
        self.outlet.send(ready.take_messages());
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot())?;
        }
        if let Some(hard) = ready.hs() {
            let hard = hard.clone();
            self.raft.mut_store().note_hard(&hard);
        }
        if ready.must_sync() {
            let entries = ready.take_entries();
            self.raft.mut_store().persist(&entries)?;
        }
        self.outlet.send(ready.take_persisted_messages());
        self.apply(ready.take_committed_entries())?;
        let mut light = self.raft.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.raft.mut_store().note_commit(commit);
        }
        self.outlet.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.raft.advance_apply();
        Ok(())
    }

    /// Whoever waits for this node as a leader learns that it is none.
    fn step_down(&mut self) {
        self.proposals.clear();
        self.changes.clear();
        for answer in self.reads.drain() {
            drop(answer.send(Err(ConsensusError::NotLeader)));
        }
    }

    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), NodeError> {
        let mut answers = vec![];
        let mut changed = false;
        for entry in entries {
            let waiting = self.proposals.take(entry.index, entry.term);
            self.applied = entry.index;
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.apply_change(&entry)?;
                continue;
            }
            if entry.data.is_empty() {
                continue;
            }
            let command: Command = serde_json::from_slice(&entry.data)
                .map_err(|source| NodeError::Decode { index: entry.index, source })?;
            let outcome = apply(Arc::make_mut(&mut self.state), command);
            changed = true;
            if let Some(waiting) = waiting {
                answers.push((waiting, outcome));
            }
        }
        if changed {
            self.outlet.publish(&self.state);
        }
        for (waiting, outcome) in answers {
            drop(waiting.send(Ok(outcome)));
        }
        Ok(())
    }

    fn apply_change(&mut self, entry: &Entry) -> Result<(), NodeError> {
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

    fn regroup(&mut self) -> Result<(), NodeError> {
        let membership = self.raft.store().membership().clone();
        let (voters, learners) = (membership.voters.keys(), membership.learners.keys());
        tracing::info!(index = membership.index, ?voters, ?learners, "members");
        self.heard.retain(|id, _| membership.get(*id).is_some());
        self.outlet.regroup(&membership);
        let id = self.raft.raft.id;
        if membership.removed.contains(&id) { Err(NodeError::Removed { id }) } else { Ok(()) }
    }

    fn install(&mut self, snapshot: &raft::eraftpb::Snapshot) -> Result<(), NodeError> {
        let decoded = snapshot::decode(&snapshot.data)?;
        let at = Place { index: decoded.index, term: decoded.term };
        tracing::info!(index = at.index, "taking the leader's snapshot");
        self.raft.mut_store().install(&snapshot.data, at, decoded.membership)?;
        self.state = Arc::new(decoded.state);
        self.applied = at.index;
        self.outlet.publish(&self.state);
        self.regroup()
    }

    fn make_snapshot_if_due(&mut self) -> Result<(), NodeError> {
        let since = self.applied.saturating_sub(self.raft.store().snapshot_place().index);
        let wanted = self.raft.store().take_snapshot_wanted() && since > 0;
        // The first entry is dropped at once: see `LogStorage::make_snapshot`.
        let begins_at_one = self.applied > 0 && self.raft.store().truncated().index == 0;
        if since < self.snapshot_every && !wanted && !begins_at_one {
            return Ok(());
        }
        let (applied, keep) = (self.applied, self.keep_entries);
        let state = self.state.clone();
        self.raft.mut_store().make_snapshot(applied, &state, keep)?;
        tracing::info!(index = applied, entries_kept = self.raft.store().kept(), "snapshot made");
        Ok(())
    }
}
