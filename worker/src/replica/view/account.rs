//! The account of one replica: the index, the states, and the attempt under way; see [`super`] for what they mean.
//!
//! ```text
//!   outside an attempt:  change ─▶ index (its file is dirty until a state is settled)
//!   within an attempt:   change ─▶ changes beside the index ──keep──▶ index, settled at the new state
//!                                                           └─drop──▶ nothing
//! ```
//! Guarantees: an index file is clean at a state only while it holds what the replica holds at that state; a file that fails is given
//! up, with a warning, and its disk goes on in memory as one of which nothing is known.

use pageport_teleport::BlockDigest;
use pageport_teleport::index::{
    BlockIndex, BlockRef, Changed, Changes, DigestStore, HeapDigests, IndexError, PART_BLOCKS, PartKind, StoreFailed,
};

use super::file::IndexFile;
use super::medium::Shelf;
use super::{Confirmed, ReplicaState};
use crate::replica::store::BLOCK_BYTES;

/// Names an attempt, so that only who began it ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptId(u64);

#[derive(Debug, Default)]
pub(super) struct Account {
    index: BlockIndex<Digests>,
    /// By number.
    disks: Vec<Disk>,
    attempt: Option<Attempt>,
    attempts: u64,
    /// Where the index files lie; [`None`]: in memory only.
    shelf: Option<Box<dyn Shelf>>,
}

#[derive(Debug, Clone, Default)]
struct Disk {
    name: String,
    state: ReplicaState,
    /// What was known was given up: only digests from the peer make it known again.
    lost: bool,
}

#[derive(Debug)]
struct Attempt {
    id: AttemptId,
    states: Vec<ReplicaState>,
    changes: Changes,
}

/// Where the digests of a disk lie.
#[derive(Debug)]
enum Digests {
    Heap(HeapDigests),
    File(IndexFile),
}

impl Account {
    /// With what the files of an earlier worker say.
    pub(super) fn load(shelf: Box<dyn Shelf>) -> Self {
        let mut account = Self::default();
        let listed = shelf.list().unwrap_or_else(|error| {
            tracing::warn!(%error, "index files cannot be listed");
            vec![]
        });
        for disk in listed {
            if let Err(error) = account.load_disk(&*shelf, disk) {
                tracing::warn!(disk, error, "an index file is of no use: the next session asks for digests");
                remove(&*shelf, disk);
            }
        }
        account.shelf = Some(shelf);
        account
    }

    fn load_disk(&mut self, shelf: &dyn Shelf, disk: u16) -> Result<(), String> {
        let medium = shelf.open(disk).map_err(|error| error.to_string())?;
        let (file, state) = IndexFile::open(medium).map_err(|error| crate::error::with_causes(&error))?;
        let (name, blocks) = (file.disk().0.to_owned(), file.disk().1);
        self.index.add_disk_in(disk, blocks, Digests::File(file)).map_err(|error| error.to_string())?;
        *self.disk_mut(disk) = Disk { name, state, lost: false };
        Ok(())
    }

    pub(super) fn state(&self, disk: u16) -> ReplicaState {
        self.disks.get(usize::from(disk)).map(|disk| disk.state).unwrap_or_default()
    }

    pub(super) fn state_of(&self, disk: u16, name: &str, size_bytes: u64) -> ReplicaState {
        let named = self.disks.get(usize::from(disk)).is_some_and(|disk| disk.name == name);
        let same = named && self.index.blocks(disk) == Some(size_bytes.div_ceil(BLOCK_BYTES));
        if same { self.state(disk) } else { ReplicaState::default() }
    }

    pub(super) fn set_state(&mut self, disk: u16, state: ReplicaState) {
        self.disk_mut(disk).state = state;
    }

    pub(super) fn seen(&self) -> Changed<'_, impl DigestStore + use<>> {
        Changed { index: &self.index, changes: self.attempt.as_ref().map(|attempt| &attempt.changes) }
    }

    pub(super) fn confirm(&mut self, disk: u16, state: ReplicaState, change: Confirmed<'_>) -> Result<(), IndexError> {
        match change {
            Confirmed::Nothing => {}
            Confirmed::Zero { first_block, blocks } => {
                self.fill(BlockRef { disk, block: first_block }, blocks, BlockDigest::ZERO)?;
            }
            Confirmed::Digests { first_block, digests } => {
                let from = BlockRef { disk, block: first_block };
                self.check(from, digests.len() as u64)?;
                match &mut self.attempt {
                    Some(attempt) => attempt.changes.set_run(from, digests),
                    None => {
                        let outcome = self.index.set_run(from, digests);
                        self.survive(disk, outcome)?;
                    }
                }
            }
        }
        self.set_state(disk, state);
        Ok(())
    }

    /// What is known is what was found. Nothing is written where it was known already.
    pub(super) fn correct(&mut self, from: BlockRef, found: &[BlockDigest]) -> Result<u64, IndexError> {
        self.check(from, found.len() as u64)?;
        let (disk, state) = (from.disk, self.state(from.disk));
        let mut corrected = 0;
        for (block, digest) in (from.block..).zip(found) {
            if self.seen().get(BlockRef { disk, block }) != Some(*digest) {
                let digests = std::slice::from_ref(digest);
                self.confirm(disk, state, Confirmed::Digests { first_block: block, digests })?;
                corrected += 1;
            }
        }
        Ok(corrected)
    }

    pub(super) fn forget_blocks(&mut self, from: BlockRef, blocks: u64) -> Result<(), IndexError> {
        self.fill(from, blocks, BlockDigest::UNKNOWN)
    }

    fn fill(&mut self, from: BlockRef, blocks: u64, digest: BlockDigest) -> Result<(), IndexError> {
        self.check(from, blocks)?;
        let outcome = match &mut self.attempt {
            Some(attempt) => {
                attempt.changes.fill(from, blocks, digest);
                Ok(())
            }
            None if digest == BlockDigest::ZERO => self.index.zero(from, blocks),
            None => self.index.clear(from, blocks),
        };
        self.survive(from.disk, outcome)
    }

    fn check(&self, BlockRef { disk, block }: BlockRef, count: u64) -> Result<(), IndexError> {
        let blocks = self.index.blocks(disk).ok_or(IndexError::NoDisk { disk })?;
        match block.checked_add(count) {
            Some(end) if end <= blocks => Ok(()),
            _ => Err(IndexError::BeyondEnd { disk, block, blocks }),
        }
    }

    /// A disk of zeros whose digests are to come. An attempt under way cannot be kept any more.
    pub(super) fn start_over(&mut self, disk: u16, name: &str, size_bytes: u64) -> Result<(), IndexError> {
        self.attempt = None;
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        // An older file is let go of before its place is taken.
        self.index.remove_disk(disk);
        let digests = self.new_file(disk, name, blocks);
        self.index.add_disk_in(disk, blocks, digests.unwrap_or_else(|| Digests::heap(blocks)))?;
        *self.disk_mut(disk) = Disk { name: name.to_owned(), ..Disk::default() };
        self.fill(BlockRef { disk, block: 0 }, blocks, BlockDigest::ZERO)
    }

    /// A disk of this name has become larger: what is known of it stays, and what is new is zeros at the peer, too. Any other disk is left alone. An
    /// attempt under way cannot be kept any more.
    pub(super) fn grow(&mut self, disk: u16, name: &str, size_bytes: u64) -> Result<(), IndexError> {
        let (before, blocks) = (self.index.blocks(disk), size_bytes.div_ceil(BLOCK_BYTES));
        let named = self.disks.get(usize::from(disk)).is_some_and(|known| known.name == name && !known.lost);
        let Some(before) = before.filter(|before| named && *before < blocks) else { return Ok(()) };
        self.attempt = None;
        let state = self.state(disk);
        let Some(old) = self.index.remove_disk(disk) else { return Ok(()) };
        // In place of the old file, which is read as long as it is held.
        let mut grown = self.new_file(disk, name, blocks).unwrap_or_else(|| Digests::heap(blocks));
        let copied = copy_digests(&old, before, &mut grown);
        self.index.add_disk_in(disk, blocks, grown)?;
        if copied.is_err() {
            self.give_up(disk);
            return Ok(());
        }
        self.fill(BlockRef { disk, block: before }, blocks - before, BlockDigest::ZERO)?;
        if !self.disk_mut(disk).lost {
            self.set_state(disk, state);
            self.settle(disk);
        }
        Ok(())
    }

    fn new_file(&self, disk: u16, name: &str, blocks: u64) -> Option<Digests> {
        let shelf = self.shelf.as_deref()?;
        let created = shelf.create(disk, IndexFile::length(blocks)).map_err(Into::into);
        match created.and_then(|medium| IndexFile::create(medium, name, blocks)) {
            Ok(file) => Some(Digests::File(file)),
            Err(error) => {
                let error = crate::error::with_causes(&error);
                tracing::warn!(
                    disk = name,
                    error,
                    "no index file: what the replica holds is known until the worker ends"
                );
                remove(shelf, disk);
                None
            }
        }
    }

    /// From now on changes are beside the index. What it holds so far is settled.
    pub(super) fn begin_attempt(&mut self) -> AttemptId {
        self.attempts += 1;
        let id = AttemptId(self.attempts);
        let states = self.disks.iter().map(|disk| disk.state).collect();
        self.attempt = Some(Attempt { id, states, changes: Changes::default() });
        (0..self.disks.len() as u16).for_each(|disk| self.settle(disk));
        id
    }

    /// The peer has kept what was done: in the attempt `id`, or in place. Its first `disks` replicas are at `state`, and it has no others.
    pub(super) fn keep(&mut self, id: Option<AttemptId>, state: ReplicaState, disks: u16) {
        let attempt = self.attempt.take();
        let as_begun = attempt.as_ref().map(|attempt| attempt.id) == id;
        for disk in 0..self.disks.len() as u16 {
            if disk >= disks {
                self.forget(disk);
            } else if !as_begun {
                // Somebody has started over meanwhile.
                self.set_state(disk, ReplicaState::default());
            } else {
                if let Some(attempt) = &attempt
                    && attempt.changes.touch(disk)
                {
                    let outcome = attempt.changes.apply(disk, &mut self.index);
                    if let Err(error) = self.survive(disk, outcome) {
                        tracing::warn!(disk, %error, "what the replica holds is not known any more");
                        self.give_up(disk);
                    }
                }
                let lost = self.disk_mut(disk).lost;
                self.set_state(disk, if lost { ReplicaState::default() } else { state });
                self.settle(disk);
            }
        }
    }

    /// The peer has dropped the attempt.
    pub(super) fn roll_back(&mut self, id: AttemptId) {
        if let Some(attempt) = self.attempt.take_if(|attempt| attempt.id == id) {
            for (disk, state) in self.disks.iter_mut().zip(attempt.states) {
                disk.state = if disk.lost { ReplicaState::default() } else { state };
            }
        }
    }

    fn forget(&mut self, disk: u16) {
        self.index.remove_disk(disk);
        *self.disk_mut(disk) = Disk::default();
        if let Some(shelf) = &self.shelf {
            remove(&**shelf, disk);
        }
    }

    /// Makes a disk's file say that it belongs to the disk's state, if that is known.
    fn settle(&mut self, disk: u16) {
        let state = self.state(disk);
        let Some(Digests::File(file)) = self.index.store_mut(disk) else { return };
        if state != ReplicaState::default()
            && let Err(error) = file.settle(state)
        {
            let error = crate::error::with_causes(&error);
            tracing::warn!(disk, error, "the index file cannot be brought to stable storage");
            self.give_up(disk);
        }
    }

    /// A store that has failed ends what is known of its disk, and nothing else.
    fn survive(&mut self, disk: u16, outcome: Result<(), IndexError>) -> Result<(), IndexError> {
        match outcome {
            Err(IndexError::Store { .. }) => {
                self.give_up(disk);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Nothing is known of a disk any more, whatever becomes of an attempt under way: only digests from the peer make it known again.
    pub(super) fn give_up(&mut self, disk: u16) {
        let blocks = self.index.blocks(disk).unwrap_or(0);
        if let Err(error) = self.index.add_disk_in(disk, blocks, Digests::heap(blocks)) {
            tracing::warn!(disk, %error, "nothing can be known of the replica");
        }
        let known = self.disk_mut(disk);
        (known.state, known.lost) = (ReplicaState::default(), true);
        if let Some(shelf) = &self.shelf {
            remove(&**shelf, disk);
        }
    }

    fn disk_mut(&mut self, disk: u16) -> &mut Disk {
        let place = usize::from(disk);
        if self.disks.len() <= place {
            self.disks.resize(place + 1, Disk::default());
        }
        &mut self.disks[place]
    }

    /// Blocks that are known to the index, of all disks, and the bytes of memory that it takes.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.index.len(), self.index.memory_bytes())
    }
}

/// Copies what is known of `blocks` blocks.
fn copy_digests(from: &impl DigestStore, blocks: u64, to: &mut impl DigestStore) -> Result<(), StoreFailed> {
    for part in 0..blocks.div_ceil(PART_BLOCKS as u64) as u32 {
        match from.kind(part) {
            PartKind::Unknown => {}
            PartKind::Zero => to.end_parts(part..part + 1, PartKind::Zero)?,
            PartKind::Digests => {
                let first = u64::from(part) * PART_BLOCKS as u64;
                let end = (first + PART_BLOCKS as u64).min(blocks);
                let digests: Vec<BlockDigest> = (first..end).map(|block| from.digest(block)).collect();
                to.begin_part(part, BlockDigest::UNKNOWN)?;
                to.write(first, &digests)?;
            }
        }
    }
    Ok(())
}

fn remove(shelf: &dyn Shelf, disk: u16) {
    if let Err(error) = shelf.remove(disk) {
        tracing::warn!(disk, %error, "an index file is left behind");
    }
}

impl Digests {
    fn heap(blocks: u64) -> Self {
        Self::Heap(HeapDigests::new(blocks))
    }

    fn store(&self) -> &dyn DigestStore {
        match self {
            Self::Heap(heap) => heap,
            Self::File(file) => file,
        }
    }

    fn store_mut(&mut self) -> &mut dyn DigestStore {
        match self {
            Self::Heap(heap) => heap,
            Self::File(file) => file,
        }
    }
}

impl DigestStore for Digests {
    fn kind(&self, part: u32) -> PartKind {
        self.store().kind(part)
    }

    fn digest(&self, block: u64) -> BlockDigest {
        self.store().digest(block)
    }

    fn begin_part(&mut self, part: u32, content: BlockDigest) -> Result<(), StoreFailed> {
        self.store_mut().begin_part(part, content)
    }

    fn end_parts(&mut self, parts: std::ops::Range<u32>, kind: PartKind) -> Result<(), StoreFailed> {
        self.store_mut().end_parts(parts, kind)
    }

    fn write(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), StoreFailed> {
        self.store_mut().write(first_block, digests)
    }

    fn memory_bytes(&self) -> usize {
        self.store().memory_bytes()
    }
}
