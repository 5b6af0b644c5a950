//! What the source knows of a VM's replica at one peer: the digest of every block, and the state they belong to.
//!
//! It lives as long as the worker. A session that finds the replica still at the [`ReplicaState`] that the view
//! remembers needs no digests from the peer; any other session starts from the digests that the peer sends.
//!
//! An *attempt* is a set of changes that the peer keeps or drops as a whole: an increment until it is committed, a move until the VM has
//! changed hands. What the view knew before is kept as long, and comes back if the peer drops them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pageport_proto::VmId;
use pageport_teleport::BlockDigest;
use pageport_teleport::index::{BlockIndex, BlockLookup as _, BlockRef, IndexError};

use super::store::BLOCK_BYTES;

/// Names the content of a replica at its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaState {
    /// Differs after each opening; 0: nothing is known.
    pub instance: u64,
    /// Counts the changes since.
    pub version: u64,
}

#[derive(Debug, Default)]
struct Inner {
    index: BlockIndex,
    /// By number of the disk.
    states: Vec<ReplicaState>,
    /// What the attempt under way has replaced, oldest first.
    attempt: Option<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    states: Vec<ReplicaState>,
    replaced: Vec<Run>,
}

/// Neighbours of which the same was known.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: BlockRef,
    blocks: u64,
    known: Option<BlockDigest>,
}

impl Attempt {
    fn remember(&mut self, at: BlockRef, known: Option<BlockDigest>) {
        match self.replaced.last_mut() {
            Some(run)
                if run.first.disk == at.disk && run.first.block + run.blocks == at.block && run.known == known =>
            {
                run.blocks += 1;
            }
            _ => self.replaced.push(Run { first: at, blocks: 1, known }),
        }
    }
}

/// The views of all replicas that this worker's VMs have elsewhere.
#[derive(Debug, Default)]
pub struct Views {
    all: Mutex<HashMap<(VmId, String), Arc<ReplicaView>>>,
}

impl Views {
    /// The view of a VM's replica at a peer.
    pub fn of(&self, vm: VmId, peer: &str) -> Arc<ReplicaView> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry((vm, peer.to_owned())).or_default().clone()
    }

    /// Forgets a VM that has left, or that is gone.
    pub fn forget(&self, vm: VmId) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _), _| *of != vm);
    }
}

/// Shared by the disk sessions, which keep it, and by the encoder, which asks it.
#[derive(Debug, Default)]
pub struct ReplicaView {
    inner: RwLock<Inner>,
}

impl ReplicaView {
    /// What the view last knew of a disk's replica.
    pub fn state(&self, disk: u16) -> ReplicaState {
        self.read().states.get(usize::from(disk)).copied().unwrap_or_default()
    }

    /// The same, for a disk of this size: of one that has grown nothing is known any more.
    pub fn state_of(&self, disk: u16, size_bytes: u64) -> ReplicaState {
        let inner = self.read();
        let same = inner.index.blocks(disk) == Some(size_bytes.div_ceil(BLOCK_BYTES));
        let state = inner.states.get(usize::from(disk)).copied().unwrap_or_default();
        if same { state } else { ReplicaState::default() }
    }

    /// The peer has confirmed a change, after which the replica is at `state`.
    pub fn confirm(&self, disk: u16, state: ReplicaState, change: Confirmed<'_>) -> Result<(), IndexError> {
        let mut inner = self.write();
        match change {
            Confirmed::Nothing => {}
            Confirmed::Zero { first_block, blocks } => {
                inner.index.zero(BlockRef { disk, block: first_block }, blocks)?;
            }
            Confirmed::Digests { first_block, digests } => {
                for (block, digest) in (first_block..).zip(digests) {
                    inner.index.set(BlockRef { disk, block }, *digest)?;
                }
            }
        }
        inner.set_state(disk, state);
        Ok(())
    }

    /// Starts over with a disk that is all zeros, as far as the peer has not said otherwise yet.
    pub fn start_over(&self, disk: u16, size_bytes: u64) -> Result<(), IndexError> {
        let mut inner = self.write();
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        inner.index.add_disk(disk, blocks)?;
        inner.set_state(disk, ReplicaState::default());
        inner.index.zero(BlockRef { disk, block: 0 }, blocks)
    }

    /// These blocks are about to change at the peer: until it confirms, nothing is known of them.
    pub fn forget_blocks(&self, disk: u16, first_block: u64, blocks: u64) -> Result<(), IndexError> {
        let mut inner = self.write();
        let Inner { index, attempt, .. } = &mut *inner;
        if let Some(attempt) = attempt {
            for block in first_block..first_block.saturating_add(blocks) {
                let at = BlockRef { disk, block };
                attempt.remember(at, index.get(at));
            }
        }
        index.clear(BlockRef { disk, block: first_block }, blocks)
    }

    /// From now on what is replaced is remembered, until [`Self::keep`] or [`Self::roll_back`].
    pub fn begin_attempt(&self) {
        let mut inner = self.write();
        inner.attempt = Some(Attempt { states: inner.states.clone(), replaced: vec![] });
    }

    /// The peer has kept the attempt, and all its replicas are at `state`.
    pub fn keep(&self, state: ReplicaState) {
        let mut inner = self.write();
        inner.attempt = None;
        inner.states.fill(state);
    }

    /// The peer has dropped the attempt: the view knows again what it knew before. No session may be open.
    pub fn roll_back(&self) -> Result<(), IndexError> {
        let mut inner = self.write();
        let Some(attempt) = inner.attempt.take() else { return Ok(()) };
        for run in attempt.replaced.iter().rev() {
            match run.known {
                None => inner.index.clear(run.first, run.blocks)?,
                Some(BlockDigest::ZERO) => inner.index.zero(run.first, run.blocks)?,
                Some(digest) => {
                    for block in run.first.block..run.first.block + run.blocks {
                        inner.index.set(BlockRef { block, ..run.first }, digest)?;
                    }
                }
            }
        }
        inner.states = attempt.states;
        Ok(())
    }

    /// What a change left half-known makes of the view: the next session asks the peer for everything.
    pub fn distrust(&self, disk: u16) {
        self.write().set_state(disk, ReplicaState::default());
    }

    /// The peer does not hold what the view says: whatever becomes of the attempt, the next session asks for everything.
    pub fn refute(&self, disk: u16) {
        let mut inner = self.write();
        inner.set_state(disk, ReplicaState::default());
        if let Some(attempt) = &mut inner.attempt
            && let Some(state) = attempt.states.get_mut(usize::from(disk))
        {
            *state = ReplicaState::default();
        }
    }

    /// Whether the peer surely holds this digest at this block.
    pub fn holds(&self, disk: u16, block: u64, digest: &BlockDigest) -> bool {
        self.read().index.get(BlockRef { disk, block }).is_some_and(|known| known == *digest)
    }

    /// A block of this disk in which the peer surely holds this digest, if one is known.
    pub fn elsewhere(&self, disk: u16, digest: &BlockDigest) -> Option<u64> {
        self.read().index.find(digest).filter(|found| found.disk == disk).map(|found| found.block)
    }

    /// Whether the peer surely holds zeros in all these blocks.
    pub fn holds_zeros(&self, disk: u16, first_block: u64, blocks: u64) -> bool {
        let inner = self.read();
        (first_block..first_block + blocks)
            .all(|block| inner.index.get(BlockRef { disk, block }) == Some(BlockDigest::ZERO))
    }

    /// The index, for the encoder; hold it for one push at most.
    pub fn index(&self) -> impl std::ops::Deref<Target = BlockIndex> + '_ {
        IndexGuard(self.read())
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn set_state(&mut self, disk: u16, state: ReplicaState) {
        let place = usize::from(disk);
        if self.states.len() <= place {
            self.states.resize(place + 1, ReplicaState::default());
        }
        self.states[place] = state;
    }
}

struct IndexGuard<'a>(RwLockReadGuard<'a, Inner>);

impl std::ops::Deref for IndexGuard<'_> {
    type Target = BlockIndex;

    fn deref(&self) -> &BlockIndex {
        &self.0.index
    }
}

/// What a confirmed request changed.
#[derive(Debug, Clone, Copy)]
pub enum Confirmed<'a> {
    /// Nothing that the view follows.
    Nothing,
    /// Whole blocks became zeros.
    Zero {
        /// The first of them.
        first_block: u64,
        /// How many.
        blocks: u64,
    },
    /// Whole blocks have this content.
    Digests {
        /// The first of them.
        first_block: u64,
        /// One each.
        digests: &'a [BlockDigest],
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_in_flight_is_neither_held_nor_referred_to() {
        use pageport_teleport::index::BlockLookup;
        let view = ReplicaView::default();
        view.start_over(0, 16 * BLOCK_BYTES).unwrap();
        assert!(view.holds_zeros(0, 0, 16));
        let digest = BlockDigest([7; 16]);
        let state = ReplicaState { instance: 1, version: 1 };
        view.confirm(0, state, Confirmed::Digests { first_block: 3, digests: &[digest] }).unwrap();
        assert!(view.holds(0, 3, &digest) && view.index().find(&digest).is_some());
        view.forget_blocks(0, 3, 1).unwrap();
        assert!(!view.holds(0, 3, &digest) && view.index().find(&digest).is_none());
        assert!(!view.holds_zeros(0, 0, 16));
        assert_eq!(view.state(0), state);
    }

    proptest::proptest! {
        #[test]
        fn an_attempt_that_is_dropped_leaves_no_trace(
            before in proptest::collection::vec((0u64..32, 1u64..6, 0u8..4), 0..20),
            attempt in proptest::collection::vec((0u64..32, 1u64..6, 0u8..4), 0..20),
        ) {
            const BLOCKS: u64 = 40;
            let view = ReplicaView::default();
            view.start_over(0, BLOCKS * BLOCK_BYTES).unwrap();
            let known = |view: &ReplicaView| -> Vec<_> {
                (0..BLOCKS).map(|block| view.index().get(BlockRef { disk: 0, block })).collect()
            };
            let change = |(first_block, blocks, content): (u64, u64, u8), version| {
                view.forget_blocks(0, first_block, blocks).unwrap();
                let state = ReplicaState { instance: 7, version };
                let digests = vec![BlockDigest([content; 16]); blocks as usize];
                match content {
                    0 => {}
                    1 => view.confirm(0, state, Confirmed::Zero { first_block, blocks }).unwrap(),
                    _ => view.confirm(0, state, Confirmed::Digests { first_block, digests: &digests }).unwrap(),
                }
            };
            for (version, step) in (1..).zip(before) {
                change(step, version);
            }
            let (held, state) = (known(&view), view.state(0));
            view.begin_attempt();
            for (version, step) in (100..).zip(attempt) {
                change(step, version);
            }
            view.roll_back().unwrap();
            proptest::prop_assert_eq!(known(&view), held);
            proptest::prop_assert_eq!(view.state(0), state);
        }
    }
}
