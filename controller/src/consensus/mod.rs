//! Agreement among the controllers: TiKV `raft` under one task that owns the node.
//!
//! ```text
//!   propose / read / step ──▶ inbox ──▶ core (its own thread): node (RawNode) ──▶ storage ──▶ disk (sled + snapshot file)
//!                                        │    │
//!            peers (tonic) ◀── messages ─┘    └──▶ apply ──▶ published state, answers to proposers
//! ```
//! | module | what |
//! |---|---|
//! | [`core`] | the loop that gives the node time and inputs |
//! | [`node`] | one member as a state machine: `Ready` handled in the documented order |
//! | [`storage`] | log, hard state and configuration on a disk |
//! | [`disk`] | what is needed of stable storage: the durable store and a file |
//! | [`snapshot`] | the whole state as one checksummed file |
//! | [`membership`] | who the controllers are, and what may be changed about it: pure |
//! | [`standing`] | how far the members are, and who may lead instead: pure |
//! | [`pending`] | who waits for which entry or read |
//! | [`way_out`] | what to do about a controller that cannot go on, for people |
//! | [`peers`] | raft messages over tonic as opaque bytes |
//! | [`shipping`] | snapshots in parts |
//! | [`log`] | raft's own log lines into tracing |
//!
//! Guarantees: a command that was answered is on stable storage at a majority and applied once, in the same order
//! everywhere; a read sees every command that was answered before it began; every wait has a deadline. Members change one
//! at a time while everything goes on; the configuration says only who they were at first.

pub mod core;
pub mod disk;
pub mod log;
pub mod membership;
pub mod node;
pub mod peers;
pub mod pending;
pub mod shipping;
pub mod snapshot;
pub mod standing;
pub mod storage;
pub mod way_out;

use std::sync::Arc;
use std::time::Duration;

use pageport_proto::StoreId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::model::{Command, Outcome, State};
use membership::{ChangeError, Membership, TurnedAway};
use standing::{Standing, TransferError};

/// Longest wait for a command to be committed.
pub const PROPOSE_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait for a quorum round before a read.
pub const READ_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait until another node leads. Raft gives a transfer up after [`node::ELECTION_TICKS`], and the leader goes on.
pub const TRANSFER_WITHIN: Duration = Duration::from_secs(5);
/// Largest encoded command: an entry must fit into a value of the store.
pub const MAX_COMMAND_BYTES: usize = 60 * 1024;

/// Why agreement was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    /// Only the leader takes commands and answers reads.
    #[error("this controller is not the leader")]
    NotLeader,
    /// Leadership or the deadline was lost in between: whether the command takes effect is unknown.
    #[error("the outcome of the command is unknown: repeat it with the same request id")]
    Unknown,
    /// No quorum in time.
    #[error("no quorum of controllers answered within {} s", READ_WITHIN.as_secs())]
    NoQuorum,
    /// Above [`MAX_COMMAND_BYTES`].
    #[error("a command of {bytes} bytes is above the limit of {MAX_COMMAND_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Cannot be written as JSON.
    #[error("encode a command")]
    Encode(#[source] serde_json::Error),
    /// The process ends.
    #[error("this controller is stopping")]
    Stopped,
}

/// Where this node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// This node.
    pub id: u64,
    /// The leader as far as this node knows.
    pub leader: Option<u64>,
    /// This node leads and has applied all that was committed before it did.
    pub serving: bool,
    /// Raft's term.
    pub term: u64,
    /// Newest entry known to be committed.
    pub committed: u64,
    /// Newest entry applied here.
    pub applied: u64,
}

/// What goes into the core.
#[derive(Debug)]
pub enum Input {
    /// A command and who waits for it.
    Propose {
        /// Encoded.
        command: Vec<u8>,
        /// The only term in which it may go into the log.
        term: Option<u64>,
        /// Gets the outcome.
        answer: oneshot::Sender<Result<Outcome, ConsensusError>>,
    },
    /// A read that must see everything answered so far.
    Read {
        /// Gets the state.
        answer: oneshot::Sender<Result<Arc<State>, ConsensusError>>,
    },
    /// Another node is to lead.
    TransferLeadership {
        /// Which; [`None`]: the one that is the most up to date.
        to: Option<u64>,
        /// Gets who was asked to take over, which is this node itself if it was named.
        answer: oneshot::Sender<Result<u64, TransferError>>,
    },
    /// How far the members are.
    Inspect {
        /// Gets the leader's view.
        answer: oneshot::Sender<Result<Standing, ConsensusError>>,
    },
    /// Other members.
    Change {
        /// Which change.
        order: membership::Order,
        /// Gets the members after it.
        answer: oneshot::Sender<Result<Arc<Membership>, ChangeError>>,
    },
    /// A peer listens to this node no more.
    TurnedAway {
        /// Who.
        by: u64,
        /// Why.
        why: TurnedAway,
    },
    /// A message of a peer, as it came.
    Step {
        /// Encoded.
        message: Vec<u8>,
        /// The peer's store, if it said.
        store: Option<StoreId>,
    },
    /// A message could not be sent.
    Unreachable {
        /// To whom.
        peer: u64,
    },
    /// A snapshot was sent, or could not be.
    SnapshotSent {
        /// To whom.
        peer: u64,
        /// Whether it went out.
        delivered: Delivered,
    },
}

/// Did it go out?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// What a proposer is answered.
type Answered = Result<Outcome, ConsensusError>;

/// What became of a command whose answer was waited for.
fn outcome_of(waited: Result<Result<Answered, oneshot::error::RecvError>, tokio::time::error::Elapsed>) -> Answered {
    match waited {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) | Err(_) => Err(ConsensusError::Unknown),
    }
}

/// The way to the core, for everyone else.
#[derive(Debug, Clone)]
pub struct Consensus {
    inbox: mpsc::Sender<Input>,
    status: watch::Receiver<Status>,
    state: watch::Receiver<Arc<State>>,
    membership: watch::Receiver<Arc<Membership>>,
    store: StoreId,
}

impl Consensus {
    /// Commits and applies a command.
    ///
    /// # Errors
    /// [`ConsensusError`]; only [`ConsensusError::Unknown`] leaves open whether the command takes effect.
    pub async fn propose(&self, command: &Command) -> Result<Outcome, ConsensusError> {
        self.propose_when(command, None).await
    }

    /// Like [`Consensus::propose`], for a command that rests on what this node knows as the leader of this term.
    ///
    /// # Errors
    /// [`ConsensusError::NotLeader`] when the term is over.
    pub async fn propose_in_term(&self, command: &Command, term: u64) -> Result<Outcome, ConsensusError> {
        self.propose_when(command, Some(term)).await
    }

    /// Commits and applies commands in this order, without waiting for one before the next is on its way: as many as come
    /// together cost one round. Each gets an outcome of its own, and one that fails holds none of the others up.
    pub async fn propose_all(&self, commands: &[Command]) -> Vec<Result<Outcome, ConsensusError>> {
        let mut waiting = Vec::with_capacity(commands.len());
        for command in commands {
            waiting.push(self.submit(command, None).await);
        }
        let deadline = tokio::time::Instant::now() + PROPOSE_WITHIN;
        let mut outcomes = Vec::with_capacity(waiting.len());
        for submitted in waiting {
            outcomes.push(match submitted {
                Ok(answered) => outcome_of(tokio::time::timeout_at(deadline, answered).await),
                Err(error) => Err(error),
            });
        }
        outcomes
    }

    async fn propose_when(&self, command: &Command, term: Option<u64>) -> Result<Outcome, ConsensusError> {
        let answered = self.submit(command, term).await?;
        outcome_of(tokio::time::timeout(PROPOSE_WITHIN, answered).await)
    }

    /// Hands a command in; its outcome comes later, if at all.
    async fn submit(
        &self,
        command: &Command,
        term: Option<u64>,
    ) -> Result<oneshot::Receiver<Answered>, ConsensusError> {
        let command = serde_json::to_vec(command).map_err(ConsensusError::Encode)?;
        if command.len() > MAX_COMMAND_BYTES {
            return Err(ConsensusError::TooLarge { bytes: command.len() });
        }
        let (answer, answered) = oneshot::channel();
        self.put(Input::Propose { command, term, answer }).await?;
        Ok(answered)
    }

    /// The state, after a quorum round: it holds every command that was answered before this call.
    ///
    /// # Errors
    /// [`ConsensusError::NotLeader`], [`ConsensusError::NoQuorum`], [`ConsensusError::Stopped`].
    pub async fn read(&self) -> Result<Arc<State>, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        self.put(Input::Read { answer }).await?;
        match tokio::time::timeout(READ_WITHIN, answered).await {
            Ok(Ok(state)) => state,
            Ok(Err(_)) => Err(ConsensusError::Stopped),
            Err(_) => Err(ConsensusError::NoQuorum),
        }
    }

    /// Makes another node lead, and waits until it does. Gives the node that leads and its term.
    ///
    /// # Errors
    /// [`TransferError`]; [`TransferError::NotTaken`] leaves open whether it takes over later.
    pub async fn transfer_leadership(&self, to: Option<u64>) -> Result<(u64, u64), TransferError> {
        let (answer, answered) = oneshot::channel();
        self.put(Input::TransferLeadership { to, answer }).await?;
        let asked = tokio::time::timeout(TRANSFER_WITHIN, answered).await;
        let member = asked.map_err(|_| ConsensusError::NoQuorum)?.map_err(|_| ConsensusError::Stopped)??;
        let mut status = self.status.clone();
        let taken = status.wait_for(|status| status.leader == Some(member));
        let found = match tokio::time::timeout(TRANSFER_WITHIN, taken).await {
            Ok(Ok(status)) => Some(status.term),
            Ok(Err(_)) => return Err(ConsensusError::Stopped.into()),
            Err(_) => None,
        };
        let leader = self.status().leader;
        found.map(|term| (member, term)).ok_or(TransferError::NotTaken { member, within: TRANSFER_WITHIN, leader })
    }

    /// Changes the members, and waits until the change is applied here. Gives the members after it.
    ///
    /// # Errors
    /// [`ChangeError`]; only [`ConsensusError::Unknown`] leaves open whether they change. The same order may be given again.
    pub async fn change(&self, order: membership::Order) -> Result<Arc<Membership>, ChangeError> {
        let (answer, answered) = oneshot::channel();
        self.put(Input::Change { order, answer }).await?;
        match tokio::time::timeout(PROPOSE_WITHIN, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(ConsensusError::Unknown.into()),
        }
    }

    /// How far the members are, as this node, which leads, sees it.
    ///
    /// # Errors
    /// [`ConsensusError::NotLeader`], [`ConsensusError::Stopped`].
    pub async fn standing(&self) -> Result<Standing, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        self.put(Input::Inspect { answer }).await?;
        answered.await.map_err(|_| ConsensusError::Stopped)?
    }

    /// Who the controllers are, as applied here.
    pub fn membership(&self) -> Arc<Membership> {
        self.membership.borrow().clone()
    }

    /// This node's store.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Hands in a peer's message.
    ///
    /// # Errors
    /// [`ConsensusError::Stopped`].
    pub async fn step(&self, message: Vec<u8>, store: Option<StoreId>) -> Result<(), ConsensusError> {
        self.put(Input::Step { message, store }).await
    }

    /// Hands in that a peer listens to this node no more.
    ///
    /// # Errors
    /// [`ConsensusError::Stopped`].
    pub async fn turned_away(&self, by: u64, why: TurnedAway) -> Result<(), ConsensusError> {
        self.put(Input::TurnedAway { by, why }).await
    }

    /// Where this node stands, now.
    pub fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Where this node stands, and changes.
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// The applied state, now, without a quorum round.
    pub fn applied(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// The applied state, and changes.
    pub fn watch_state(&self) -> watch::Receiver<Arc<State>> {
        self.state.clone()
    }

    async fn put(&self, input: Input) -> Result<(), ConsensusError> {
        match tokio::time::timeout(PROPOSE_WITHIN, self.inbox.send(input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(ConsensusError::Stopped),
            Err(_) => Err(ConsensusError::NoQuorum),
        }
    }
}
