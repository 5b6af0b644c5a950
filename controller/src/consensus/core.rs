//! The core: one loop that owns the `RawNode`, on a thread of its own because it waits for the disk.
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
//! that fails ends the node: what it holds is unknown until it is opened again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prost_011::Message as _;
use raft::eraftpb::{Entry, EntryType, Message};
use raft::{Config, RawNode, SnapshotStatus, StateRole};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::peers::Peers;
use super::pending::{Proposals, Reads};
use super::snapshot::{self, SnapshotError};
use super::storage::{LogError, LogStorage, Place};
use super::{Consensus, ConsensusError, Delivered, Input, Status, log};
use crate::model::{Command, Outcome, State, apply};

const TICK: Duration = Duration::from_millis(100);
/// A follower that hears nothing for this many ticks (to twice as many) stands for election.
const ELECTION_TICKS: usize = 15;
const HEARTBEAT_TICKS: usize = 3;
/// A read round without an answer for this many ticks is asked again.
const READ_PATIENCE_TICKS: u64 = 5;
const MAX_MESSAGE_BYTES: u64 = 1 << 20;
const MAX_INFLIGHT_MESSAGES: usize = 256;
const MAX_UNCOMMITTED_BYTES: u64 = 16 << 20;
/// Inputs taken in before the disk is asked.
const MAX_INPUTS: usize = 512;
const QUEUE: usize = 1024;

/// Why the core ended.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
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
    /// The thread could not be started.
    #[error("start the thread of the replicated log")]
    Thread(#[source] std::io::Error),
    /// The thread ended without a word.
    #[error("the thread of the replicated log panicked")]
    Panicked,
}

/// What the core needs to know.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// This node.
    pub id: u64,
    /// All members, this node included.
    pub voters: BTreeSet<u64>,
    /// Where log and snapshot lie.
    pub folder: PathBuf,
    /// A snapshot is made after so many entries.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot for peers that are only a little late.
    pub keep_entries: u64,
}

/// The way into a core that is about to start.
#[derive(Debug)]
pub struct Inbox {
    sender: mpsc::Sender<Input>,
    receiver: mpsc::Receiver<Input>,
}

/// Makes the way into the core; peers need it before the core starts.
pub fn inbox() -> Inbox {
    let (sender, receiver) = mpsc::channel(QUEUE);
    Inbox { sender, receiver }
}

impl Inbox {
    /// For those who put something in.
    pub fn sender(&self) -> mpsc::Sender<Input> {
        self.sender.clone()
    }
}

/// Opens the log and starts the core. The receiver gets the reason when it ends.
///
/// # Errors
/// [`CoreError`] when the log cannot be opened.
pub fn start(
    config: &CoreConfig,
    inbox: Inbox,
    peers: Peers,
    stop: CancellationToken,
) -> Result<(Consensus, oneshot::Receiver<Result<(), CoreError>>), CoreError> {
    let (storage, state) = LogStorage::open(&config.folder, config.voters.iter().copied().collect())?;
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
        batch_append: true,
        ..Config::default()
    };
    let node = RawNode::new(&raft_config, storage, &log::logger()).map_err(CoreError::Start)?;
    let state = Arc::new(state);
    let (published, state_watch) = watch::channel(state.clone());
    let (status, status_watch) = watch::channel(Status { id: config.id, applied, ..Status::default() });
    let consensus = Consensus { inbox: inbox.sender, status: status_watch, state: state_watch };
    let core = Core {
        node,
        inbox: inbox.receiver,
        peers,
        state,
        applied,
        proposals: Proposals::default(),
        reads: Reads::default(),
        published,
        status,
        snapshot_every: config.snapshot_every,
        keep_entries: config.keep_entries,
    };
    let (done, ended) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("raft".to_owned())
        .spawn(move || {
            let result = runtime.block_on(core.run(stop));
            // Nobody listens when the process is already ending.
            let _ = done.send(result);
        })
        .map_err(CoreError::Thread)?;
    Ok((consensus, ended))
}

struct Core {
    node: RawNode<LogStorage>,
    inbox: mpsc::Receiver<Input>,
    peers: Peers,
    state: Arc<State>,
    applied: u64,
    proposals: Proposals<Result<Outcome, ConsensusError>>,
    reads: Reads<Result<Arc<State>, ConsensusError>>,
    published: watch::Sender<Arc<State>>,
    status: watch::Sender<Status>,
    snapshot_every: u64,
    keep_entries: u64,
}

impl Core {
    async fn run(mut self, stop: CancellationToken) -> Result<(), CoreError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                _ = ticks.tick() => {
                    self.node.tick();
                    self.reads.tick(READ_PATIENCE_TICKS);
                }
                input = self.inbox.recv() => {
                    let Some(input) = input else { return Ok(()) };
                    self.take(input);
                    for _ in 1..MAX_INPUTS {
                        let Ok(input) = self.inbox.try_recv() else { break };
                        self.take(input);
                    }
                }
            }
            self.start_read_round();
            while self.node.has_ready() {
                self.handle_ready()?;
            }
            self.answer_reads();
            self.make_snapshot_if_due()?;
            self.publish_status();
        }
    }

    fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Propose { command, term, answer } => self.propose(command, term, answer),
            Input::Read { answer } if self.leads() => self.reads.wait(answer),
            // Whoever asked may have stopped waiting: then nobody needs the answer.
            Input::Read { answer } => drop(answer.send(Err(ConsensusError::NotLeader))),
            Input::Step { message } => match Message::decode(message.as_slice()) {
                Ok(message) => {
                    if let Err(error) = self.node.step(message) {
                        tracing::debug!(%error, "a peer's message was not taken");
                    }
                }
                Err(error) => tracing::warn!(%error, "a peer's message is no raft message"),
            },
            Input::Unreachable { peer } => self.node.report_unreachable(peer),
            Input::SnapshotSent { peer, delivered } => {
                let status = match delivered {
                    Delivered::Yes => SnapshotStatus::Finish,
                    Delivered::No => SnapshotStatus::Failure,
                };
                self.node.report_snapshot(peer, status);
            }
        }
    }

    fn propose(
        &mut self,
        command: Vec<u8>,
        term: Option<u64>,
        answer: oneshot::Sender<Result<Outcome, ConsensusError>>,
    ) {
        let in_time = term.is_none_or(|term| term == self.node.raft.term);
        let refused = if self.leads() && in_time {
            self.node.propose(vec![], command).err()
        } else {
            Some(raft::Error::ProposalDropped)
        };
        match refused {
            None => {
                let index = self.node.raft.raft_log.last_index();
                self.proposals.wait(index, self.node.raft.term, answer);
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
            && self.node.raft.commit_to_current_term()
            && let Some(context) = self.reads.start()
        {
            self.node.read_index(context);
        }
    }

    fn answer_reads(&mut self) {
        for answer in self.reads.ready(self.applied) {
            drop(answer.send(Ok(self.state.clone())));
        }
    }

    fn handle_ready(&mut self) -> Result<(), CoreError> {
        let mut ready = self.node.ready();
        if let Some(soft) = ready.ss() {
            let (term, leader) = (self.node.raft.term, soft.leader_id);
            tracing::info!(term, leader, role = ?soft.raft_state, "raft role");
            if soft.raft_state != StateRole::Leader {
                self.step_down();
            }
        }
        for state in ready.take_read_states() {
            self.reads.confirm(&state.request_ctx, state.index);
        }
        self.peers.send(ready.take_messages());
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot())?;
        }
        if let Some(hard) = ready.hs() {
            let hard = hard.clone();
            self.node.mut_store().note_hard(&hard);
        }
        if ready.must_sync() {
            let entries = ready.take_entries();
            self.node.mut_store().persist(&entries)?;
        }
        self.peers.send(ready.take_persisted_messages());
        self.apply(ready.take_committed_entries())?;
        let mut light = self.node.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.node.mut_store().note_commit(commit);
        }
        self.peers.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.node.advance_apply();
        Ok(())
    }

    /// Whoever waits for this node as a leader learns that it is none.
    fn step_down(&mut self) {
        self.proposals.clear();
        for answer in self.reads.drain() {
            drop(answer.send(Err(ConsensusError::NotLeader)));
        }
    }

    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), CoreError> {
        let mut answers = vec![];
        let mut changed = false;
        for entry in entries {
            let waiting = self.proposals.take(entry.index, entry.term);
            self.applied = entry.index;
            if entry.data.is_empty() || entry.get_entry_type() != EntryType::EntryNormal {
                continue;
            }
            let command: Command = serde_json::from_slice(&entry.data)
                .map_err(|source| CoreError::Decode { index: entry.index, source })?;
            let outcome = apply(Arc::make_mut(&mut self.state), command);
            changed = true;
            if let Some(waiting) = waiting {
                answers.push((waiting, outcome));
            }
        }
        if changed {
            self.published.send_replace(self.state.clone());
        }
        for (waiting, outcome) in answers {
            drop(waiting.send(Ok(outcome)));
        }
        Ok(())
    }

    fn install(&mut self, snapshot: &raft::eraftpb::Snapshot) -> Result<(), CoreError> {
        let decoded = snapshot::decode(&snapshot.data)?;
        let at = Place { index: decoded.index, term: decoded.term };
        tracing::info!(index = at.index, "taking the leader's snapshot");
        self.node.mut_store().install(&snapshot.data, at)?;
        self.state = Arc::new(decoded.state);
        self.applied = at.index;
        self.published.send_replace(self.state.clone());
        Ok(())
    }

    fn make_snapshot_if_due(&mut self) -> Result<(), CoreError> {
        let since = self.applied.saturating_sub(self.node.store().snapshot_place().index);
        let wanted = self.node.store().take_snapshot_wanted() && since > 0;
        if since < self.snapshot_every && !wanted {
            return Ok(());
        }
        let (applied, keep) = (self.applied, self.keep_entries);
        let state = self.state.clone();
        self.node.mut_store().make_snapshot(applied, &state, keep)?;
        tracing::info!(index = applied, entries_kept = self.node.store().kept(), "snapshot made");
        Ok(())
    }

    fn publish_status(&mut self) {
        let raft = &self.node.raft;
        let now = Status {
            id: raft.id,
            leader: Some(raft.leader_id).filter(|leader| *leader != 0),
            serving: self.leads() && raft.commit_to_current_term() && self.applied >= raft.raft_log.committed,
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.applied,
        };
        self.status.send_if_modified(|status| std::mem::replace(status, now) != now);
    }
}
