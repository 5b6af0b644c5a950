//! What the source knows of a VM's replica at one peer: the digest of every block, and the state they belong to.
//!
//! ```text
//!   session, round, move ─▶ ReplicaView ─▶ account ─▶ index ─▶ file of each disk, mapped
//!   encoder ◀── index() ──────┘                        └─▶ hash table, in memory
//! ```
//! - [`views`]: the views of all VMs, and their files.
//! - [`account`]: the index, the states and the attempt under way.
//! - [`file`], [`format`], [`medium`]: the files.
//!
//! A session that finds the replica still at the [`ReplicaState`] that the view remembers needs no digests from the peer; any other
//! session starts from the digests that the peer sends. The state after a recovery point outlives both workers, so a view that was
//! settled at a point is good after a restart.
//!
//! An *attempt* is a set of changes that the peer keeps or drops as a whole: an increment until it is committed, a move until the VM has
//! changed hands. What the view knew before stays as it was, in the files too, until the attempt is kept.

mod account;
mod file;
mod format;
mod medium;
#[cfg(test)]
mod tests;
mod views;

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pageport_teleport::BlockDigest;
use pageport_teleport::index::{BlockLookup, BlockRef, IndexError};

use account::Account;
pub use account::AttemptId;
pub use views::Views;

/// Names the content of a replica at its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaState {
    /// Differs after each opening, or names the lineage of recovery points; 0: nothing is known.
    pub instance: u64,
    /// Counts the changes since, or the points.
    pub version: u64,
}

/// Shared by the disk sessions, which keep it, and by the encoder, which asks it.
#[derive(Debug, Default)]
pub struct ReplicaView {
    account: RwLock<Account>,
}

impl ReplicaView {
    /// What the view last knew of a disk's replica.
    pub fn state(&self, disk: u16) -> ReplicaState {
        self.read().state(disk)
    }

    /// The same, for a disk of this name and size: of another, or of one that has grown, nothing is known.
    pub fn state_of(&self, disk: u16, name: &str, size_bytes: u64) -> ReplicaState {
        self.read().state_of(disk, name, size_bytes)
    }

    /// The peer has confirmed a change, after which the replica is at `state`.
    ///
    /// # Errors
    /// The change is not on the disk.
    pub fn confirm(&self, disk: u16, state: ReplicaState, change: Confirmed<'_>) -> Result<(), IndexError> {
        self.write().confirm(disk, state, change)
    }

    /// Starts over with a disk that is all zeros, as far as the peer has not said otherwise yet. Waits for stable storage.
    ///
    /// # Errors
    /// The disk is larger than can be indexed.
    pub fn start_over(&self, disk: u16, name: &str, size_bytes: u64) -> Result<(), IndexError> {
        self.write().start_over(disk, name, size_bytes)
    }

    /// The peer has read these blocks of its files: what was known of them otherwise is corrected. Tells of how many. Not within an attempt.
    ///
    /// # Errors
    /// They are not on the disk.
    pub fn correct(&self, disk: u16, first_block: u64, found: &[BlockDigest]) -> Result<u64, IndexError> {
        self.write().correct(BlockRef { disk, block: first_block }, found)
    }

    /// The disk is of this name and size now. One that has grown keeps what is known of it; what is new is zeros. Reads and writes all of it then, and waits
    /// for stable storage. Sessions of the disk must not be open.
    ///
    /// # Errors
    /// The disk is larger than can be indexed.
    pub fn grow(&self, disk: u16, name: &str, size_bytes: u64) -> Result<(), IndexError> {
        self.write().grow(disk, name, size_bytes)
    }

    /// These blocks are about to change at the peer: until it confirms, nothing is known of them.
    ///
    /// # Errors
    /// They are not on the disk.
    pub fn forget_blocks(&self, disk: u16, first_block: u64, blocks: u64) -> Result<(), IndexError> {
        self.write().forget_blocks(BlockRef { disk, block: first_block }, blocks)
    }

    /// From now on changes are an attempt, until [`Self::keep`] or [`Self::roll_back`]. Sessions must be open already, and change
    /// nothing yet. An earlier attempt that nobody ended is dropped. Waits for stable storage.
    pub fn begin_attempt(&self) -> AttemptId {
        self.write().begin_attempt()
    }

    /// The peer has kept what was done in `attempt`, or in place; its replicas of the VM's `disks` disks are all at `state`. No session
    /// may be open. Waits for stable storage.
    pub fn keep(&self, attempt: Option<AttemptId>, state: ReplicaState, disks: u16) {
        self.write().keep(attempt, state, disks);
    }

    /// The peer has dropped the attempt: the view knows again what it knew before. No session may be open.
    pub fn roll_back(&self, attempt: AttemptId) {
        self.write().roll_back(attempt);
    }

    /// What a change left half-known makes of the view: the next session asks the peer for everything.
    pub fn distrust(&self, disk: u16) {
        self.write().set_state(disk, ReplicaState::default());
    }

    /// The peer does not hold what the view says: whatever becomes of the attempt, the next session asks for everything.
    pub fn refute(&self, disk: u16) {
        self.write().give_up(disk);
    }

    /// Whether the peer surely holds this digest at this block.
    pub fn holds(&self, disk: u16, block: u64, digest: &BlockDigest) -> bool {
        self.read().seen().holds(BlockRef { disk, block }, digest)
    }

    /// A block of this disk in which the peer surely holds this digest, if one is known.
    pub fn elsewhere(&self, disk: u16, digest: &BlockDigest) -> Option<u64> {
        self.read().seen().find(digest).filter(|found| found.disk == disk).map(|found| found.block)
    }

    /// Whether the peer surely holds zeros in all these blocks.
    pub fn holds_zeros(&self, disk: u16, first_block: u64, blocks: u64) -> bool {
        let account = self.read();
        let seen = account.seen();
        (first_block..first_block + blocks).all(|block| seen.holds(BlockRef { disk, block }, &BlockDigest::ZERO))
    }

    /// The index, for the encoder; hold it for one push at most.
    pub fn index(&self) -> IndexGuard<'_> {
        IndexGuard(self.read())
    }

    /// Different contents that can be found, and the bytes of memory that the view takes besides its files.
    pub fn size(&self) -> (usize, usize) {
        self.read().size()
    }

    fn read(&self) -> RwLockReadGuard<'_, Account> {
        self.account.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Account> {
        self.account.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The index as it is while this is held.
#[derive(Debug)]
pub struct IndexGuard<'a>(RwLockReadGuard<'a, Account>);

impl IndexGuard<'_> {
    /// What is known of a block: nothing, or its digest.
    pub fn get(&self, at: BlockRef) -> Option<BlockDigest> {
        self.0.seen().get(at)
    }
}

impl BlockLookup for IndexGuard<'_> {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        self.0.seen().find(digest)
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        self.0.seen().holds(at, digest)
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
