//! [`StoreIdentity`]: which store this is, and whether it is new.
//!
//! ```text
//!   open ─▶ id there, or records of a worker from before there were ids ─▶ Known
//!      └──▶ neither ─▶ New ─▶ what runs here is taken over as after the loss of a store ─▶ id to disk ─▶ first report
//! ```
//! Controllers give no authorisation for a move to a store that is younger than the move: what was refused before it was lost is
//! forgotten.
//!
//! Guarantees: the id is on stable storage before anybody hears it, and not before the restore of what was found is
//! through, so that a crash in between leaves the store new. A copy of an older state of the same store is not noticed.

use pageport_common::store::{Batch, Store, StoreError};
use pageport_proto::StoreId;
use pageport_proto::ids::ParseIdError;

const KEY: &str = "store-id";

/// Why the store's identity is not known.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The store failed.
    #[error("read or write the id of the worker's store")]
    Store(#[from] StoreError),
    /// The id is damaged.
    #[error("the id of the worker's store is damaged")]
    Damaged(#[from] ParseIdError),
}

/// Was this store here before?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreAge {
    /// Yes.
    Known,
    /// No: it was made just now. If there was another, it is lost.
    New,
}

/// Which store this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreIdentity {
    /// Its id, fresh for one that is new.
    pub id: StoreId,
    /// Was it here before?
    pub age: StoreAge,
}

impl StoreIdentity {
    /// Looks into the store; writes nothing.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn of(store: &Store) -> Result<Self, IdentityError> {
        if let Some(text) = store.get(KEY)? {
            let id = String::from_utf8_lossy(&text).parse()?;
            return Ok(Self { id, age: StoreAge::Known });
        }
        let age = if store.scan("")?.is_empty() { StoreAge::New } else { StoreAge::Known };
        Ok(Self { id: StoreId::generate(), age })
    }

    /// Returns when the id is on stable storage.
    ///
    /// # Errors
    /// [`IdentityError::Store`].
    pub fn settle(&self, store: &Store) -> Result<(), IdentityError> {
        let mut batch = Batch::default();
        batch.put(KEY, self.id.to_string());
        Ok(store.commit(batch)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_new_until_its_id_is_settled_and_keeps_it_then() {
        let folder = tempfile::tempdir().unwrap();
        let first = {
            let store = Store::open(folder.path()).unwrap();
            let first = StoreIdentity::of(&store).unwrap();
            assert_eq!((first.age, StoreIdentity::of(&store).unwrap().age), (StoreAge::New, StoreAge::New));
            first.settle(&store).unwrap();
            first
        };
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(StoreIdentity::of(&store).unwrap(), StoreIdentity { age: StoreAge::Known, ..first });
        let other = tempfile::tempdir().unwrap();
        assert_ne!(StoreIdentity::of(&Store::open(other.path()).unwrap()).unwrap().id, first.id);
    }

    #[test]
    fn a_store_with_records_from_before_there_were_ids_is_not_new() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut batch = Batch::default();
        batch.put("own/x", "{}");
        store.commit(batch).unwrap();
        assert_eq!(StoreIdentity::of(&store).unwrap().age, StoreAge::Known);
    }
}
