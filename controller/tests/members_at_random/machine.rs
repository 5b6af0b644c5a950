//! One machine: a disk that outlives its node, and the node, which talks into an outbox.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use pageport_controller::consensus::disk::{Change, Disk, DiskError};
use pageport_controller::consensus::membership::Membership;
use pageport_controller::consensus::node::{ELECTION_TICKS, Node, NodeConfig, NodeError, Outlet};
use pageport_controller::consensus::storage::LogStorage;
use pageport_controller::model::State;
use pageport_proto::StoreId;
use raft::eraftpb::Message;

#[derive(Default)]
struct Contents {
    map: BTreeMap<Vec<u8>, Vec<u8>>,
    snapshot: Option<Vec<u8>>,
}

/// Outlives its node.
#[derive(Clone, Default)]
pub struct MemoryDisk(Rc<RefCell<Contents>>);

impl MemoryDisk {
    /// The newest entry of the log; 0: there is none.
    pub fn last(&self) -> u64 {
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
pub struct Outbox {
    pub messages: Vec<Message>,
    pub membership: Arc<Membership>,
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

pub struct Machine {
    pub disk: MemoryDisk,
    pub store: StoreId,
    /// As it last knew it, running or not.
    pub membership: Arc<Membership>,
    pub first: Membership,
    pub node: Option<Node<MemoryDisk, Outbox>>,
    pub election_ticks: usize,
    pub seen: (u64, Option<u64>),
    /// It knows that nobody listens to it any more.
    pub over: bool,
    /// Its disk was lost.
    pub wiped: bool,
    /// Until this step its node waits for its disk, and does nothing.
    pub stalled_until: u64,
}

impl Machine {
    /// One that is switched off, with an empty disk.
    pub fn new(first: Membership) -> Self {
        Self {
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
        }
    }

    /// Starts its node from what is on the disk, unless that was removed.
    pub fn start(&mut self, id: u64) {
        let opened = LogStorage::open_on(self.disk.clone(), self.first.clone(), self.store);
        let (storage, state) = opened.unwrap();
        let config = NodeConfig { id, snapshot_every: 12, keep_entries: 4 };
        match Node::new(&config, storage, state, Outbox::default()) {
            Ok(node) => self.node = Some(node),
            Err(NodeError::Removed { .. }) => self.over = true,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn stalls(&self, now: u64) -> bool {
        now < self.stalled_until
    }
}
