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
//!
//! | module | what |
//! |---|---|
//! | `ready` | the six steps |
//! | `members` | the other members: how far they are, how they change, who leads instead |
//! | `error` | why a node cannot go on |

mod error;
mod members;
mod ready;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_proto::StoreId;
use prost_011::Message as _;
use raft::eraftpb::Message;
use raft::{Config, RawNode, SnapshotStatus, StateRole};
use tokio::sync::oneshot;

pub use self::error::NodeError;
use super::disk::Disk;
use super::membership::{ChangeError, Membership, TurnedAway};
use super::pending::{Proposals, Reads};
use super::storage::LogStorage;
use super::{ConsensusError, Delivered, Input, Status, log};
use crate::model::{Outcome, State};

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
}
