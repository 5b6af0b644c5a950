//! The core: one loop that owns the [`Node`], on a thread of its own because it waits for the disk.
//!
//! Gives the node time and inputs, and publishes what it has applied and where it stands. A disk that fails ends it.

use std::path::PathBuf;
use std::sync::Arc;

use raft::eraftpb::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::disk::FileDisk;
use super::membership::Membership;
use super::node::{Node, NodeConfig, NodeError, Outlet, TICK};
use super::peers::Peers;
use super::storage::{LogError, LogStorage};
use super::way_out::WayOut;
use super::{Consensus, Input, Status};
use crate::model::State;

/// Inputs taken in before the disk is asked.
const MAX_INPUTS: usize = 512;
const QUEUE: usize = 1024;

/// Why the core ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The log cannot be opened.
    #[error("open the replicated log")]
    Open(#[source] LogError),
    /// What it promised and what it acknowledged may be forgotten: it must not take part.
    #[error("the data of controller {id} in {} is damaged, and it does not start. The way out {}", folder.display(), WayOut(*id))]
    Damaged {
        /// This node.
        id: u64,
        /// Where its data is.
        folder: PathBuf,
        /// What was found.
        #[source]
        source: LogError,
    },
    /// There is no room to start.
    #[error("the disk is full: make room at {} and start this controller again", folder.display())]
    Full {
        /// Where its data is.
        folder: PathBuf,
        /// What was not possible.
        #[source]
        source: LogError,
    },
    /// It could not go on.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The thread could not be started.
    #[error("start the thread of the replicated log")]
    Thread(#[source] std::io::Error),
    /// The thread ended without a word.
    #[error("the thread of the replicated log panicked")]
    Panicked,
}

impl CoreError {
    fn open(config: &CoreConfig, source: LogError) -> Self {
        let folder = config.folder.clone();
        match source.is_damage() {
            true => Self::Damaged { id: config.id, folder, source },
            false if source.is_full() => Self::Full { folder, source },
            false => Self::Open(source),
        }
    }

    /// Will it end the same way whenever it is started again?
    pub fn is_final(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Node(error) => {
                use NodeError::{OlderGeneration, OtherStore, Removed};
                matches!(error, Removed { .. } | OtherStore { .. } | OlderGeneration { .. })
            }
            Self::Open(_) | Self::Full { .. } | Self::Thread(_) | Self::Panicked => false,
        }
    }
}

/// What the core needs to know.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// This node.
    pub id: u64,
    /// The members, as long as log and snapshot do not say who they are.
    pub first: Membership,
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
    let opened = LogStorage::open(&config.folder, config.first.clone());
    let (storage, state) = opened.map_err(|source| CoreError::open(config, source))?;
    let store = storage.store();
    let mut peers = peers.of_store(store);
    peers.of_generation(state.generation);
    let (published, state_watch) = watch::channel(Arc::new(state.clone()));
    let settings =
        NodeConfig { id: config.id, snapshot_every: config.snapshot_every, keep_entries: config.keep_entries };
    let (members, members_watch) = watch::channel(storage.membership().clone());
    let node = Node::new(&settings, storage, state, Outside { peers, published, members })?;
    let (status, status_watch) = watch::channel(node.status());
    let consensus =
        Consensus { inbox: inbox.sender, status: status_watch, state: state_watch, membership: members_watch, store };
    let core = Core { node, inbox: inbox.receiver, status };
    let (done, ended) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("raft".to_owned())
        .spawn(move || {
            let result = runtime.block_on(core.run(stop));
            // Nobody listens when the process is already ending.
            let _ = done.send(result.map_err(CoreError::from));
        })
        .map_err(CoreError::Thread)?;
    Ok((consensus, ended))
}

struct Core {
    node: Node<FileDisk, Outside>,
    inbox: mpsc::Receiver<Input>,
    status: watch::Sender<Status>,
}

impl Core {
    async fn run(mut self, stop: CancellationToken) -> Result<(), NodeError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                _ = ticks.tick() => self.node.tick(),
                input = self.inbox.recv() => {
                    let Some(input) = input else { return Ok(()) };
                    self.node.take(input);
                    for _ in 1..MAX_INPUTS {
                        let Ok(input) = self.inbox.try_recv() else { break };
                        self.node.take(input);
                    }
                }
            }
            self.node.settle()?;
            let now = self.node.status();
            self.status.send_if_modified(|status| std::mem::replace(status, now) != now);
        }
    }
}

/// Where the core's words go.
struct Outside {
    peers: Peers,
    published: watch::Sender<Arc<State>>,
    members: watch::Sender<Arc<Membership>>,
}

impl Outlet for Outside {
    fn send(&mut self, messages: Vec<Message>) {
        self.peers.send(messages);
    }

    fn publish(&mut self, state: &Arc<State>) {
        self.peers.of_generation(state.generation);
        self.published.send_replace(state.clone());
    }

    fn regroup(&mut self, membership: &Arc<Membership>) {
        self.peers.follow(membership);
        self.members.send_replace(membership.clone());
    }
}
