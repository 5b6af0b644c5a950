//! How far a scrub is, and how the last one ended: durable, so that neither ends with the worker.

use pageport_common::store::{Batch, Store, StoreError};
use pageport_proto::VmId;
use pageport_proto::v1::ScrubStatus;
use serde::{Deserialize, Serialize};

use super::piece::Place;
use crate::clock::unix_ms_now;

/// The scrubs of one replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Under way.
    pub running: Option<Progress>,
    /// The newest that is complete.
    pub last: Option<Progress>,
}

/// One scrub.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Number of the order.
    pub seq: u64,
    /// When it began: milliseconds since 1970, by this host's clock.
    pub started_unix_ms: i64,
    /// When it was complete.
    pub ended_unix_ms: Option<i64>,
    /// What is compared next; [`None`]: nothing is left.
    pub place: Option<Place>,
    /// Bytes of the disks that are behind.
    pub passed_bytes: u64,
    /// Of these, those that were compared: the guest had not written them just before.
    pub compared_bytes: u64,
    /// In all, when it was last looked at.
    pub total_bytes: u64,
    /// Blocks of 4 KiB of the replica that were not what they should be.
    pub different_blocks: u64,
    /// Of these, those that a committed point has put right.
    pub repaired_blocks: u64,
}

impl Record {
    /// The newest order that is known.
    pub fn newest(&self) -> u64 {
        let seq = |progress: &Option<Progress>| progress.as_ref().map_or(0, |progress| progress.seq);
        seq(&self.running).max(seq(&self.last))
    }

    /// What is noted; one that cannot be read counts as none, and is said.
    pub fn read(store: &Store, vm: VmId, site: &str) -> Self {
        let read = || -> Result<Option<Self>, RecordError> {
            let text = store.get(key(vm, site))?;
            Ok(text.map(|text| serde_json::from_slice(&text)).transpose()?)
        };
        read()
            .unwrap_or_else(|error| {
                let error = crate::error::with_causes(&error);
                tracing::warn!(vm_id = %vm, site, error, "how far a scrub was is not known");
                None
            })
            .unwrap_or_default()
    }

    /// Returns when it is on stable storage.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn write(&self, store: &Store, vm: VmId, site: &str) -> Result<(), RecordError> {
        let mut batch = Batch::default();
        batch.put(key(vm, site), serde_json::to_vec(self)?);
        Ok(store.commit(batch)?)
    }

    /// Removes it, there or not.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn remove(store: &Store, vm: VmId, site: &str) -> Result<(), RecordError> {
        let mut batch = Batch::default();
        batch.remove(key(vm, site));
        Ok(store.commit(batch)?)
    }
}

/// Why a record is not read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The worker's store.
    #[error("read or write the record of a scrub")]
    Store(#[from] StoreError),
    /// It is not what was written.
    #[error("the record of a scrub is damaged")]
    Damaged(#[from] serde_json::Error),
}

impl Progress {
    /// Nothing is compared yet.
    pub fn begin(seq: u64) -> Self {
        Self { seq, started_unix_ms: unix_ms_now(), place: Some(Place::default()), ..Self::default() }
    }

    /// Whether nothing is left to compare.
    pub fn is_through(&self) -> bool {
        self.place.is_none()
    }

    /// It is complete.
    pub fn end(&mut self) {
        self.ended_unix_ms = Some(unix_ms_now());
    }
}

impl From<&Progress> for ScrubStatus {
    fn from(progress: &Progress) -> Self {
        Self {
            seq: progress.seq,
            started_unix_ms: progress.started_unix_ms,
            ended_unix_ms: progress.ended_unix_ms.unwrap_or_default(),
            done_bytes: progress.passed_bytes,
            compared_bytes: progress.compared_bytes,
            total_bytes: progress.total_bytes,
            different_blocks: progress.different_blocks,
            repaired_blocks: progress.repaired_blocks,
            problem: String::new(),
        }
    }
}

fn key(vm: VmId, site: &str) -> String {
    format!("scrub/{vm}/{site}")
}
