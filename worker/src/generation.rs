//! [`Joined`]: which controllers this worker hears, after they were restored from a backup.
//!
//! ```text
//!   assignment of a newer generation ─▶ deaf to older ones (on disk) ─▶ moves before their commit point given up ─▶ reported as joined
//! ```
//! Restored controllers do not know what the lost ones did last, and some of those may still run. A worker that has joined takes
//! nothing from them any more: no assignment, no grant, no authorisation, no lease.
//!
//! Guarantees: what it is deaf to is on stable storage before it is; it reports that it has joined only after every VM has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pageport_common::store::{Batch, Store, StoreError};
use pageport_ownership::Epoch;

const KEY: &str = "generation";

/// Why the generation is not known.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The store failed.
    #[error("read or write the generation of the controllers")]
    Store(#[from] StoreError),
    /// The number is damaged.
    #[error("the generation of the controllers is damaged in this worker's store")]
    Damaged,
}

/// See the module.
#[derive(Debug)]
pub struct Joined {
    store: Arc<Store>,
    heard: AtomicU32,
    reported: AtomicU32,
}

impl Joined {
    /// As it stands in the store.
    ///
    /// # Errors
    /// [`GenerationError`].
    pub fn of(store: Arc<Store>) -> Result<Self, GenerationError> {
        let newest = match store.get(KEY)? {
            Some(bytes) => {
                let number = <[u8; 4]>::try_from(bytes.as_slice()).map_err(|_| GenerationError::Damaged)?;
                u32::from_be_bytes(number)
            }
            None => 0,
        };
        Ok(Self { store, heard: AtomicU32::new(newest), reported: AtomicU32::new(newest) })
    }

    /// Is a controller of this generation heard?
    pub fn hears(&self, generation: u32) -> bool {
        generation >= self.heard.load(Ordering::SeqCst)
    }

    /// May this worker begin a move that was ordered under this epoch?
    pub fn follows(&self, epoch: Epoch) -> bool {
        epoch.generation() >= u64::from(self.heard.load(Ordering::SeqCst))
    }

    /// What this worker has joined.
    pub fn reported(&self) -> u32 {
        self.reported.load(Ordering::SeqCst)
    }

    /// Hears nothing older than this from now on. Have every VM join then, and [`Joined::settle`].
    ///
    /// # Errors
    /// [`GenerationError::Store`]: nothing has changed.
    pub fn hear(&self, generation: u32) -> Result<(), GenerationError> {
        if generation > self.heard.load(Ordering::SeqCst) {
            let mut batch = Batch::default();
            batch.put(KEY, generation.to_be_bytes());
            self.store.commit(batch)?;
            self.heard.fetch_max(generation, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Every VM has joined.
    pub fn settle(&self, generation: u32) {
        self.reported.fetch_max(generation, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_has_joined_is_deaf_to_older_controllers_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        {
            let joined = Joined::of(Arc::new(Store::open(folder.path()).unwrap())).unwrap();
            assert!(joined.hears(0) && joined.follows(Epoch::new(0, 7)));
            joined.hear(2).unwrap();
            assert_eq!((joined.hears(1), joined.hears(2), joined.reported()), (false, true, 0));
            assert!(!joined.follows(Epoch::new(1, 7)) && joined.follows(Epoch::new(2, 1)));
            joined.settle(2);
            assert_eq!(joined.reported(), 2);
            joined.hear(1).unwrap();
        }
        let joined = Joined::of(Arc::new(Store::open(folder.path()).unwrap())).unwrap();
        assert_eq!((joined.hears(1), joined.hears(3), joined.reported()), (false, true, 2));
    }
}
