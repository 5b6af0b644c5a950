//! [`Node`]: one member of the cluster as a state machine: time and inputs in, messages and applied states out.
//!
//! Each `Ready` is handled in this order:
//! ```text
//!  1 send messages()            (a leader's appends: they need not wait for its own disk)
//!  2 install a snapshot, if one came: file, then log, then state
//!  3 persist entries and hard state, one batch, synced
//!  4 send persisted_messages()  (votes and acknowledgements: only what is on disk may be promised)
//!  5 apply committed entries, publish the state, then answer the proposers
//!  6 advance; the same for what that brings
//! ```
//! Guarantees: nothing is promised before it is durable, nothing answered before it is applied and published. A disk
//! that fails ends the node: what it holds is unknown until it is opened again. Reads no clock and waits for nothing but its
//! disk: [`super::core`] drives it in the daemon, the simulator drives it in its own time.

use std::sync::Arc;
use std::time::Duration;

use prost_011::Message as _;
use raft::eraftpb::{Entry, EntryType, Message};
use raft::{Config, RawNode, SnapshotStatus, StateRole};
use tokio::sync::oneshot;

use super::disk::Disk;
use super::pending::{Proposals, Reads};
use super::snapshot::{self, SnapshotError};
use super::storage::{LogError, LogStorage, Place};
use super::{ConsensusError, Delivered, Input, Status, log};
use crate::model::{Command, Outcome, State, apply};

/// Raft's unit of time.
pub const TICK: Duration = Duration::from_millis(100);
/// A follower that hears nothing for this many ticks (to twice as many) stands for election.
pub const ELECTION_TICKS: usize = 15;
const HEARTBEAT_TICKS: usize = 3;
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
    Log(#[from] LogError),
    /// A snapshot that came cannot be used.
    #[error("a peer's snapshot cannot be used")]
    Snapshot(#[from] SnapshotError),
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
}

/// One member of the cluster.
#[allow(missing_debug_implementations, reason = "raft's node has none")]
pub struct Node<D: Disk, O: Outlet> {
    raft: RawNode<LogStorage<D>>,
    outlet: O,
    state: Arc<State>,
    applied: u64,
    proposals: Proposals<Result<Outcome, ConsensusError>>,
    reads: Reads<Result<Arc<State>, ConsensusError>>,
    snapshot_every: u64,
    keep_entries: u64,
}

impl<D: Disk, O: Outlet> Node<D, O> {
    /// Takes up the log where it ends, with the state of its last snapshot.
    ///
    /// # Errors
    /// [`NodeError::Start`].
    pub fn new(config: &NodeConfig, storage: LogStorage<D>, state: State, outlet: O) -> Result<Self, NodeError> {
        let applied = storage.snapshot_place().index;
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
            reads: Reads::default(),
            snapshot_every: config.snapshot_every,
            keep_entries: config.keep_entries,
        })
    }

    /// [`TICK`] has passed.
    pub fn tick(&mut self) {
        self.raft.tick();
        self.reads.tick(READ_PATIENCE_TICKS);
    }

    /// Does all that can be done now. Call it after each [`Node::tick`] and [`Node::take`].
    ///
    /// # Errors
    /// [`NodeError`]: what the disk holds is unknown until it is opened again, and the node must end.
    pub fn settle(&mut self) -> Result<(), NodeError> {
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
            Input::Step { message } => match Message::decode(message.as_slice()) {
                Ok(message) => {
                    if let Err(error) = self.raft.step(message) {
                        tracing::debug!(%error, "a peer's message was not taken");
                    }
                }
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
            if entry.data.is_empty() || entry.get_entry_type() != EntryType::EntryNormal {
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

    fn install(&mut self, snapshot: &raft::eraftpb::Snapshot) -> Result<(), NodeError> {
        let decoded = snapshot::decode(&snapshot.data)?;
        let at = Place { index: decoded.index, term: decoded.term };
        tracing::info!(index = at.index, "taking the leader's snapshot");
        self.raft.mut_store().install(&snapshot.data, at)?;
        self.state = Arc::new(decoded.state);
        self.applied = at.index;
        self.outlet.publish(&self.state);
        Ok(())
    }

    fn make_snapshot_if_due(&mut self) -> Result<(), NodeError> {
        let since = self.applied.saturating_sub(self.raft.store().snapshot_place().index);
        let wanted = self.raft.store().take_snapshot_wanted() && since > 0;
        if since < self.snapshot_every && !wanted {
            return Ok(());
        }
        let (applied, keep) = (self.applied, self.keep_entries);
        let state = self.state.clone();
        self.raft.mut_store().make_snapshot(applied, &state, keep)?;
        tracing::info!(index = applied, entries_kept = self.raft.store().kept(), "snapshot made");
        Ok(())
    }
}
