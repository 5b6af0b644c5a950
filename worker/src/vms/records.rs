//! What this worker keeps of each VM on stable storage, as JSON.
//!
//! | key | value |
//! |---|---|
//! | `own/<vm>` | its ownership record |
//! | `whose/<vm>` | whose the newest epoch in that record is, where it is another worker and known |
//! | `policy/<vm>` | what happens to it when this worker is cut off: must be known before the controllers are heard again |

use pageport_common::store::{Batch, Store, StoreError};
use pageport_ownership::{Policy, Record};
use pageport_proto::VmId;
use serde::Serialize;
use serde::de::DeserializeOwned;

const PREFIX: &str = "own/";
const WHOSE_PREFIX: &str = "whose/";
const POLICY_PREFIX: &str = "policy/";

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The store failed.
    #[error("the ownership record of vm {vm}")]
    Store {
        /// The VM.
        vm: VmId,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The store failed before any record was read.
    #[error("list the ownership records")]
    List(#[source] StoreError),
    /// The record is damaged.
    #[error("the ownership record of vm {vm} is damaged")]
    Damaged {
        /// The VM.
        vm: VmId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// VMs that have a record.
pub(super) fn all(store: &Store) -> Result<Vec<VmId>, RecordError> {
    let pairs = store.scan(PREFIX).map_err(RecordError::List)?;
    let id_of = |key: Vec<u8>| std::str::from_utf8(key.get(PREFIX.len()..)?).ok()?.parse().ok();
    Ok(pairs.into_iter().filter_map(|(key, _)| id_of(key)).collect())
}

/// What is on stable storage about a VM.
pub(super) fn read(store: &Store, vm: VmId) -> Result<Option<Record>, RecordError> {
    get(store, vm, &key(vm))
}

/// Returns when the record is on stable storage, with whose its newest epoch is (empty: this worker's, or not known).
pub(super) fn write(store: &Store, vm: VmId, record: &Record, whose: &str) -> Result<(), RecordError> {
    let text = serde_json::to_vec(record).map_err(|source| RecordError::Damaged { vm, source })?;
    let mut batch = Batch::default();
    batch.put(key(vm), text);
    match whose {
        "" => batch.remove(whose_key(vm)),
        whose => batch.put(whose_key(vm), whose),
    }
    store.commit(batch).map_err(|source| RecordError::Store { vm, source })
}

/// Whose the newest epoch in the record is; empty: not another worker's, or not known.
pub(super) fn read_whose(store: &Store, vm: VmId) -> Result<String, RecordError> {
    let found = store.get(whose_key(vm)).map_err(|source| RecordError::Store { vm, source })?;
    Ok(found.map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default())
}

/// The policy that was noted.
pub(super) fn read_policy(store: &Store, vm: VmId) -> Result<Option<Policy>, RecordError> {
    get(store, vm, &policy_key(vm))
}

/// Returns when the policy is on stable storage.
pub(super) fn write_policy(store: &Store, vm: VmId, policy: Policy) -> Result<(), RecordError> {
    put(store, vm, &policy_key(vm), &policy)
}

/// Removes what is kept of a VM that is gone from the fleet.
pub(super) fn remove(store: &Store, vm: VmId) -> Result<(), RecordError> {
    let mut batch = Batch::default();
    batch.remove(key(vm));
    batch.remove(whose_key(vm));
    batch.remove(policy_key(vm));
    store.commit(batch).map_err(|source| RecordError::Store { vm, source })
}

fn get<T: DeserializeOwned>(store: &Store, vm: VmId, key: &str) -> Result<Option<T>, RecordError> {
    let found = store.get(key).map_err(|source| RecordError::Store { vm, source })?;
    let parse = |text: Vec<u8>| serde_json::from_slice(&text);
    found.map(parse).transpose().map_err(|source| RecordError::Damaged { vm, source })
}

fn put<T: Serialize>(store: &Store, vm: VmId, key: &str, value: &T) -> Result<(), RecordError> {
    let text = serde_json::to_vec(value).map_err(|source| RecordError::Damaged { vm, source })?;
    let mut batch = Batch::default();
    batch.put(key, text);
    store.commit(batch).map_err(|source| RecordError::Store { vm, source })
}

fn key(vm: VmId) -> String {
    format!("{PREFIX}{vm}")
}

fn whose_key(vm: VmId) -> String {
    format!("{WHOSE_PREFIX}{vm}")
}

fn policy_key(vm: VmId) -> String {
    format!("{POLICY_PREFIX}{vm}")
}
