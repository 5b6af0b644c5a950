//! What of an open recovery point outlives the worker: enough to open it again.

use std::net::SocketAddr;

use pageport_common::store::{Batch, Store};
use pageport_proto::VmId;
use serde::{Deserialize, Serialize};

use super::DrillError;

const PREFIX: &str = "export/";

/// An export that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VM.
    pub vm: VmId,
    /// The point's number.
    pub point: u64,
    /// What the exports' names begin with.
    pub name: String,
    /// When it was opened: milliseconds since 1970, by this host's clock.
    pub opened_unix_ms: i64,
    /// When it ends at the latest.
    pub until_unix_ms: i64,
    /// Where it listens besides its socket.
    pub listen: Option<SocketAddr>,
}

impl Record {
    /// All of them; those that cannot be read are dropped, and said.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn all(store: &Store) -> Result<Vec<Self>, DrillError> {
        let (mut found, mut damaged) = (vec![], Batch::default());
        for (key, text) in store.scan(PREFIX)? {
            match serde_json::from_slice(&text) {
                Ok(record) => found.push(record),
                Err(error) => {
                    tracing::warn!(%error, "what was noted of an open recovery point is damaged");
                    damaged.remove(key);
                }
            }
        }
        store.commit(damaged)?;
        Ok(found)
    }

    /// Returns when it is on stable storage.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn write(&self, store: &Store) -> Result<(), DrillError> {
        let mut batch = Batch::default();
        batch.put(key(self.vm, self.point), serde_json::to_vec(self)?);
        Ok(store.commit(batch)?)
    }

    /// Removes it, there or not.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn remove(&self, store: &Store) -> Result<(), DrillError> {
        let mut batch = Batch::default();
        batch.remove(key(self.vm, self.point));
        Ok(store.commit(batch)?)
    }
}

fn key(vm: VmId, point: u64) -> String {
    format!("{PREFIX}{vm}/{point}")
}
