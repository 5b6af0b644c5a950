//! [`Joined`]: which controllers this worker hears, after they were restored from a backup.
//!
//! ```text
//!   assignment of a newer generation ─▶ deaf to all others (on disk) ─▶ moves before their commit point given up ─▶ reported as joined
//! ```
//! Restored controllers do not know what the lost ones did last, and some of those may still run. A worker that has joined takes
//! nothing from them any more: no assignment, no grant, no authorisation, no lease. Nor from others that were restored from the same backup: of
//! two such clusters each worker joins the one that it hears first, and neither learns who owns the VMs before all workers have joined it.
//!
//! Guarantees: what it is deaf to is on stable storage before it is; it reports that it has joined only after every VM has.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageport_common::store::{Batch, Store, StoreError};
use pageport_ownership::Epoch;
use pageport_proto::RestorationId;

const KEY: &str = "generation";
/// The number comes first, in so many bytes; the restoration follows as text, unless it is not known.
const NUMBER_BYTES: usize = 4;

/// Why the generation is not known.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The store failed.
    #[error("read or write the generation of the controllers")]
    Store(#[from] StoreError),
    /// It cannot be read.
    #[error("the generation of the controllers is damaged in this worker's store")]
    Damaged,
}

/// Controllers that belong together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Generation {
    /// How often they were restored.
    pub number: u32,
    /// By which restore; [`None`]: by none, or an earlier version has noted the number alone.
    pub restoration: Option<RestorationId>,
}

impl Generation {
    /// As it came with what controllers said.
    pub fn said(number: u32, restoration_id: &str) -> Self {
        Self { number, restoration: restoration_id.parse().ok() }
    }

    fn to_bytes(self) -> Vec<u8> {
        let restoration = self.restoration.map(|restoration| restoration.to_string()).unwrap_or_default();
        [&self.number.to_be_bytes()[..], restoration.as_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (number, restoration) = bytes.split_first_chunk::<NUMBER_BYTES>()?;
        let restoration = match restoration {
            [] => None,
            text => Some(std::str::from_utf8(text).ok()?.parse().ok()?),
        };
        Some(Self { number: u32::from_be_bytes(*number), restoration })
    }

    /// Does whoever has joined this hear those?
    fn hears(self, those: Self) -> bool {
        let same = self.restoration.is_none() || self.restoration == those.restoration;
        those.number > self.number || (those.number == self.number && same)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Joined {
    store: Arc<Store>,
    heard: Mutex<Generation>,
    reported: Mutex<Generation>,
}

impl Joined {
    /// As it stands in the store.
    ///
    /// # Errors
    /// [`GenerationError`].
    pub fn of(store: Arc<Store>) -> Result<Self, GenerationError> {
        let newest = match store.get(KEY)? {
            Some(bytes) => Generation::from_bytes(&bytes).ok_or(GenerationError::Damaged)?,
            None => Generation::default(),
        };
        Ok(Self { store, heard: Mutex::new(newest), reported: Mutex::new(newest) })
    }

    /// Are these controllers heard?
    pub fn hears(&self, those: Generation) -> bool {
        locked(&self.heard).hears(those)
    }

    /// Were these restored as often as those that this worker hears? Then only one of the two may have been.
    pub fn is_as_new(&self, those: Generation) -> bool {
        those.number == locked(&self.heard).number
    }

    /// May this worker begin a move that was ordered under this epoch?
    pub fn follows(&self, epoch: Epoch) -> bool {
        epoch.generation() >= u64::from(locked(&self.heard).number)
    }

    /// What this worker has joined.
    pub fn reported(&self) -> Generation {
        *locked(&self.reported)
    }

    /// Hears no others from now on than these, and newer ones. Have every VM join then, and [`Joined::settle`].
    ///
    /// # Errors
    /// [`GenerationError::Store`]: nothing has changed.
    pub fn hear(&self, these: Generation) -> Result<(), GenerationError> {
        let mut heard = locked(&self.heard);
        if *heard != these && heard.hears(these) {
            let mut batch = Batch::default();
            batch.put(KEY, these.to_bytes());
            self.store.commit(batch)?;
            *heard = these;
        }
        Ok(())
    }

    /// Every VM has joined.
    pub fn settle(&self, these: Generation) {
        *locked(&self.reported) = these;
    }
}

fn locked(generation: &Mutex<Generation>) -> MutexGuard<'_, Generation> {
    generation.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(number: u32, restoration: RestorationId) -> Generation {
        Generation { number, restoration: Some(restoration) }
    }

    #[test]
    fn a_worker_that_has_joined_is_deaf_to_all_others_that_are_no_newer_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = [(); 2].map(|()| RestorationId::generate());
        {
            let joined = Joined::of(Arc::new(Store::open(folder.path()).unwrap())).unwrap();
            assert!(joined.hears(Generation::default()) && joined.follows(Epoch::new(0, 7)));
            joined.hear(of(2, one)).unwrap();
            assert!(!joined.hears(Generation::default()) && joined.hears(of(2, one)));
            assert_eq!(joined.reported(), Generation::default());
            assert!(!joined.follows(Epoch::new(1, 7)) && joined.follows(Epoch::new(2, 1)));
            joined.settle(of(2, one));
            assert_eq!(joined.reported(), of(2, one));
            joined.hear(of(1, one)).unwrap();
            joined.hear(of(2, other)).unwrap();
        }
        let joined = Joined::of(Arc::new(Store::open(folder.path()).unwrap())).unwrap();
        assert_eq!(joined.reported(), of(2, one));
        assert!(!joined.hears(of(1, one)) && !joined.hears(of(2, other)) && joined.hears(of(3, other)));
        assert!(joined.is_as_new(of(2, other)) && !joined.is_as_new(of(1, one)));
    }

    #[test]
    fn a_number_alone_from_an_earlier_version_takes_the_restoration_that_is_heard_first() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(folder.path()).unwrap());
        let mut batch = Batch::default();
        batch.put(KEY, 1_u32.to_be_bytes());
        store.commit(batch).unwrap();
        let joined = Joined::of(store).unwrap();
        assert_eq!(joined.reported(), Generation { number: 1, restoration: None });
        let [one, other] = [(); 2].map(|()| RestorationId::generate());
        joined.hear(of(1, one)).unwrap();
        assert!(joined.hears(of(1, one)) && !joined.hears(of(1, other)));
    }

    #[test]
    fn what_is_no_generation_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(folder.path()).unwrap());
        for damaged in [&b"\0\0"[..], b"\0\0\0\x01no uuid"] {
            let mut batch = Batch::default();
            batch.put(KEY, damaged);
            store.commit(batch).unwrap();
            assert!(matches!(Joined::of(store.clone()), Err(GenerationError::Damaged)));
        }
    }
}
