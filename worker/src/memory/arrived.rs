//! Which pages the old place of a VM has kept, by digest: at the new place.

use std::collections::HashMap;

use pageport_proto::MigrationId;
use pageport_teleport::{BlockDigest, BlockLookup, BlockRef, KEPT_MEMORY};

/// The pages of the migration that brought a VM here.
#[derive(Debug, Default)]
pub struct Arrived {
    migration: Option<MigrationId>,
    source: String,
    /// By number; of some the digest is not known.
    digests: Vec<Option<BlockDigest>>,
    /// Of equal pages, the last.
    numbers: HashMap<BlockDigest, u32>,
}

impl Arrived {
    /// Those of this migration, from this worker; none yet.
    pub fn of(migration: MigrationId, source: &str) -> Self {
        Self { migration: Some(migration), source: source.to_owned(), ..Self::default() }
    }

    /// The next pages.
    pub fn add(&mut self, pages: &[Option<BlockDigest>]) {
        for digest in pages {
            // A guest of 16 TiB has that many pages.
            let Ok(number) = u32::try_from(self.digests.len()) else { return };
            self.digests.push(*digest);
            if let Some(digest) = digest {
                self.numbers.insert(*digest, number);
            }
        }
    }

    /// The worker that has kept them.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The migration that they came with.
    pub fn migration(&self) -> Option<MigrationId> {
        self.migration
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.digests.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }
}

impl BlockLookup for Arrived {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        self.numbers.get(digest).map(|number| BlockRef { disk: KEPT_MEMORY, block: u64::from(*number) })
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        let held = usize::try_from(at.block).ok().and_then(|number| self.digests.get(number));
        at.disk == KEPT_MEMORY && held.is_some_and(|held| held.as_ref() == Some(digest))
    }
}

/// First what lies on the disks, then what was kept.
#[derive(Debug)]
pub struct Both<'a, D>(pub D, pub Option<&'a Arrived>);

impl<D: BlockLookup> BlockLookup for Both<'_, D> {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        self.0.find(digest).or_else(|| self.1?.find(digest))
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        match self.1 {
            Some(kept) if at.disk == KEPT_MEMORY => kept.holds(at, digest),
            _ => self.0.holds(at, digest),
        }
    }
}
