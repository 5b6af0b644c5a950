//! What this worker keeps of each VM on stable storage, as JSON.
//!
//! | key | value |
//! |---|---|
//! | `own/<vm>` | its ownership record |
//! | `whose/<vm>` | whose the newest epoch in that record is, where it is another worker and known |
//! | `policy/<vm>` | what happens to it when this worker is cut off: must be known before the controllers are heard again |
//! | `spec/<vm>` | its definition (protobuf): for controllers that were restored from a backup which is older than the VM |

use pageport_common::store::{Batch, Store, StoreError};
use pageport_ownership::{Policy, Record};
use pageport_proto::VmId;
use pageport_proto::v1::VmSpec;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

const PREFIX: &str = "own/";
const WHOSE_PREFIX: &str = "whose/";
const POLICY_PREFIX: &str = "policy/";
const SPEC_PREFIX: &str = "spec/";

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

/// The definition that was kept; [`None`] also for one that cannot be read: nothing of this host depends on it.
pub(super) fn read_spec(store: &Store, vm: VmId) -> Result<Option<VmSpec>, RecordError> {
    let found = store.get(spec_key(vm)).map_err(|source| RecordError::Store { vm, source })?;
    Ok(found.and_then(|bytes| VmSpec::decode(&bytes[..]).ok()))
}

/// Returns when this definition is on stable storage.
pub(super) fn keep_spec(store: &Store, vm: VmId, spec: &VmSpec) -> Result<(), RecordError> {
    if read_spec(store, vm)?.as_ref() == Some(spec) {
        return Ok(());
    }
    let mut batch = Batch::default();
    batch.put(spec_key(vm), spec.encode_to_vec());
    store.commit(batch).map_err(|source| RecordError::Store { vm, source })
}

/// Removes what is kept of a VM that is gone from the fleet.
pub(super) fn remove(store: &Store, vm: VmId) -> Result<(), RecordError> {
    let mut batch = Batch::default();
    batch.remove(key(vm));
    batch.remove(whose_key(vm));
    batch.remove(policy_key(vm));
    batch.remove(spec_key(vm));
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

fn spec_key(vm: VmId) -> String {
    format!("{SPEC_PREFIX}{vm}")
}
