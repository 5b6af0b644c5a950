//! What must be sent so that the replica holds what was written: decided block by block, by digest.
//!
//! ```text
//!   block ─▶ held at its place? ─yes─▶ nothing
//!              └─no─▶ zero? ─yes─▶ Zero
//!                       └─no─▶ held elsewhere on the disk? ─yes─▶ Copy (digests only)
//!                                                           └─no─▶ Write (bytes)
//! ```
//! Guarantees: a block that is to change is forgotten in the view before its step is returned; a copy names only blocks that hold that
//! content when the destination gets to it, provided that steps are sent in the order in which they were planned. The destination
//! checks the digests all the same.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pageport_teleport::{BlockDigest, PAGE_SIZE};

use super::blocks::Blocks;
use super::in_flight::{InFlight, Number};
use super::serve::MAX_WRITE_BYTES;
use super::store::BLOCK_BYTES;
use super::view::ReplicaView;

/// Most blocks of one step.
const STEP_BLOCKS: usize = MAX_WRITE_BYTES / PAGE_SIZE;

/// What the destination is to do.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) action: Action,
    /// What the view learns when it is done.
    pub(super) learned: Learned,
    /// Among those in flight; [`None`]: it changes nothing.
    pub(super) number: Option<Number>,
}

/// A change of the replica.
#[derive(Debug)]
pub(super) enum Action {
    Write {
        offset: u64,
        data: Bytes,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    /// `data`, whose blocks have these digests, lies at `from_offset` already.
    Copy {
        offset: u64,
        from_offset: u64,
        data: Bytes,
        digests: Vec<BlockDigest>,
    },
    Flush,
}

impl Action {
    /// The blocks that it changes, whole or in part.
    pub(super) fn blocks(&self) -> Range<u64> {
        let (offset, length) = match self {
            Self::Write { offset, data } | Self::Copy { offset, data, .. } => (*offset, data.len() as u64),
            Self::Zero { offset, length } => (*offset, *length),
            Self::Flush => return 0..0,
        };
        offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES)
    }

    /// Bytes of the disk that it carries.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Write { data, .. } | Self::Copy { data, .. } => data.len() as u64,
            Self::Zero { .. } | Self::Flush => 0,
        }
    }
}

#[derive(Debug)]
pub(super) enum Learned {
    Nothing,
    /// All its whole blocks are zeros.
    Zero,
    Digests {
        first_block: u64,
        digests: Vec<BlockDigest>,
    },
}

/// Where the destination looks for what it is to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopiesFrom {
    /// In the replica as all changes so far have made it: they are written in place.
    Now,
    /// In the replica as it was when the session began: changes are kept elsewhere until they are committed.
    Before,
}

/// Plans one session's changes of one disk.
#[derive(Debug)]
pub(super) struct Planner {
    view: Arc<ReplicaView>,
    disk: u16,
    size_bytes: u64,
    in_flight: Arc<Mutex<InFlight>>,
    /// What the session has changed; [`None`]: it does not matter.
    changed: Option<Blocks>,
}

/// What becomes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Held,
    Zero,
    /// The block that has its content.
    Elsewhere(u64),
    New,
}

impl Fate {
    /// Whether `next`, `distance` blocks behind, belongs to the same step.
    fn goes_on(self, next: Self, distance: usize) -> bool {
        match (self, next) {
            (Self::Elsewhere(from), Self::Elsewhere(next)) => from + distance as u64 == next,
            (this, next) => this == next,
        }
    }
}

impl Planner {
    pub(super) fn new(view: Arc<ReplicaView>, disk: u16, size_bytes: u64, copies: CopiesFrom) -> Self {
        let changed = match copies {
            CopiesFrom::Now => None,
            CopiesFrom::Before => Some(Blocks::new(size_bytes)),
        };
        Self { view, disk, size_bytes, in_flight: Arc::default(), changed }
    }

    /// The changes that were planned and are not acknowledged yet.
    pub(super) fn in_flight(&self) -> Arc<Mutex<InFlight>> {
        self.in_flight.clone()
    }

    /// Plans a write; `digests` are [`digests_of`] it.
    pub(super) fn write(&mut self, offset: u64, data: &Bytes, digests: &[BlockDigest]) -> io::Result<Vec<Step>> {
        let mut steps = Vec::new();
        let (head, tail) = ends_of_whole_blocks(offset, data.len());
        let first_block = (offset + head as u64) / BLOCK_BYTES;
        self.part_of_block(offset, data.slice(..head), &mut steps)?;
        let fates = self.fates(first_block, digests);
        let mut at = 0;
        while at < fates.len() {
            let ahead = fates[at..].iter().enumerate().take(STEP_BLOCKS);
            let blocks = ahead.take_while(|(distance, next)| fates[at].goes_on(**next, *distance)).count();
            let block = first_block + at as u64;
            let data = data.slice(head + at * PAGE_SIZE..head + (at + blocks) * PAGE_SIZE);
            let offset = block * BLOCK_BYTES;
            let digests = || digests[at..at + blocks].to_vec();
            let learned = || Learned::Digests { first_block: block, digests: digests() };
            let step = match fates[at] {
                Fate::Held => None,
                Fate::Zero => Some((Action::Zero { offset, length: data.len() as u64 }, Learned::Zero)),
                Fate::Elsewhere(from) => {
                    let from_offset = from * BLOCK_BYTES;
                    Some((Action::Copy { offset, from_offset, data, digests: digests() }, learned()))
                }
                Fate::New => Some((Action::Write { offset, data }, learned())),
            };
            if let Some((action, learned)) = step {
                steps.push(self.step(action, learned)?);
            }
            at += blocks;
        }
        self.part_of_block(offset + tail as u64, data.slice(tail..), &mut steps)?;
        Ok(steps)
    }

    /// Plans a write of zeros.
    pub(super) fn zero(&mut self, offset: u64, length: u64) -> io::Result<Vec<Step>> {
        const ZEROS: &[u8] = &[0; PAGE_SIZE];
        let mut steps = Vec::new();
        let end = offset + length;
        let first_whole = offset.div_ceil(BLOCK_BYTES);
        let end_whole = (end / BLOCK_BYTES).max(first_whole);
        let head_end = end.min(first_whole * BLOCK_BYTES);
        self.part_of_block(offset, Bytes::from_static(&ZEROS[..(head_end - offset) as usize]), &mut steps)?;
        let mut block = first_whole;
        while block < end_whole {
            if self.view.holds_zeros(self.disk, block, 1) {
                block += 1;
                continue;
            }
            let differing = (block..end_whole).take_while(|block| !self.view.holds_zeros(self.disk, *block, 1));
            let blocks = differing.count() as u64;
            let action = Action::Zero { offset: block * BLOCK_BYTES, length: blocks * BLOCK_BYTES };
            steps.push(self.step(action, Learned::Zero)?);
            block += blocks;
        }
        let tail_start = end_whole * BLOCK_BYTES;
        if end > tail_start && tail_start >= offset {
            self.part_of_block(tail_start, Bytes::from_static(&ZEROS[..(end - tail_start) as usize]), &mut steps)?;
        }
        Ok(steps)
    }

    fn fates(&self, first_block: u64, digests: &[BlockDigest]) -> Vec<Fate> {
        let written = first_block..first_block + digests.len() as u64;
        let mut fates: Vec<Fate> = Vec::with_capacity(digests.len());
        for (block, digest) in (first_block..).zip(digests) {
            let fate = if self.view.holds(self.disk, block, digest) {
                Fate::Held
            } else if *digest == BlockDigest::ZERO {
                Fate::Zero
            } else {
                // Copies are long where the one before goes on.
                let next = match fates.last() {
                    Some(Fate::Elsewhere(from)) => Some(from + 1),
                    _ => None,
                };
                let next = next.filter(|from| self.view.holds(self.disk, *from, digest));
                let from = next.or_else(|| self.view.elsewhere(self.disk, digest));
                let from = from.filter(|from| self.may_copy(*from) && !written.contains(from));
                from.map_or(Fate::New, Fate::Elsewhere)
            };
            fates.push(fate);
        }
        fates
    }

    fn may_copy(&self, block: u64) -> bool {
        let whole = (block + 1) * BLOCK_BYTES <= self.size_bytes;
        whole && !self.changed.as_ref().is_some_and(|changed| changed.noted(block))
    }

    /// A part of a block is always sent; of the block as a whole nothing is known afterwards.
    fn part_of_block(&mut self, offset: u64, data: Bytes, steps: &mut Vec<Step>) -> io::Result<()> {
        if !data.is_empty() {
            steps.push(self.step(Action::Write { offset, data }, Learned::Nothing)?);
        }
        Ok(())
    }

    /// From now on nothing is known of the blocks, whatever is acknowledged of those changes that are in flight.
    fn step(&mut self, action: Action, learned: Learned) -> io::Result<Step> {
        let blocks = action.blocks();
        if let Some(changed) = &mut self.changed {
            changed.note_blocks(blocks.clone());
        }
        // Both at once: what is acknowledged in between would be learned, though it is about to change.
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        let number = Some(in_flight.begin(blocks.clone()));
        self.view.forget_blocks(self.disk, blocks.start, blocks.end - blocks.start).map_err(io::Error::other)?;
        Ok(Step { action, learned, number })
    }
}

/// Digests of the whole blocks of a write.
pub(super) fn digests_of(offset: u64, data: &[u8]) -> Vec<BlockDigest> {
    let (head, tail) = ends_of_whole_blocks(offset, data.len());
    let (blocks, _) = data[head..tail].as_chunks::<PAGE_SIZE>();
    BlockDigest::of_each(blocks)
}

/// Where the whole blocks of a write begin and end in its data.
fn ends_of_whole_blocks(offset: u64, length: usize) -> (usize, usize) {
    let head = ((BLOCK_BYTES - offset % BLOCK_BYTES) % BLOCK_BYTES).min(length as u64) as usize;
    (head, head + (length - head) / PAGE_SIZE * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::view::{Confirmed, ReplicaState};

    const DISK: u16 = 0;

    fn planner_of(blocks: u64, copies: CopiesFrom) -> Planner {
        let view = Arc::new(ReplicaView::default());
        view.start_over(DISK, "root", blocks * BLOCK_BYTES).unwrap();
        Planner::new(view, DISK, blocks * BLOCK_BYTES, copies)
    }

    fn write(planner: &mut Planner, offset: u64, data: &[u8]) -> Vec<Step> {
        planner.write(offset, &Bytes::copy_from_slice(data), &digests_of(offset, data)).unwrap()
    }

    fn acknowledge(planner: &Planner, steps: &[Step]) {
        let state = ReplicaState { instance: 1, version: 1 };
        for step in steps {
            let change = match &step.learned {
                Learned::Nothing => Confirmed::Nothing,
                Learned::Zero => {
                    let blocks = step.action.blocks();
                    Confirmed::Zero { first_block: blocks.start, blocks: blocks.end - blocks.start }
                }
                Learned::Digests { first_block, digests } => Confirmed::Digests { first_block: *first_block, digests },
            };
            planner.view.confirm(DISK, state, change).unwrap();
        }
    }

    /// Carries steps out on a plain buffer, as the destination would; copies come from `before`, or from the buffer itself.
    fn apply(steps: &[Step], replica: &mut [u8], before: Option<&[u8]>) {
        for step in steps {
            match &step.action {
                Action::Write { offset, data } => replica[*offset as usize..][..data.len()].copy_from_slice(data),
                Action::Zero { offset, length } => replica[*offset as usize..][..*length as usize].fill(0),
                Action::Copy { offset, from_offset, data, .. } => {
                    let copied = before.unwrap_or(replica)[*from_offset as usize..][..data.len()].to_vec();
                    assert!(copied == **data, "what is to be copied is not there");
                    replica[*offset as usize..][..data.len()].copy_from_slice(&copied);
                }
                Action::Flush => {}
            }
        }
    }

    /// A block of its own content for each letter.
    fn blocks(letters: &str) -> Vec<u8> {
        letters.bytes().flat_map(|letter| [if letter == b'.' { 0 } else { letter }; PAGE_SIZE]).collect()
    }

    fn shape(steps: &[Step]) -> Vec<String> {
        let at = |offset: &u64| offset / BLOCK_BYTES;
        let count = |data: &Bytes| data.len() / PAGE_SIZE;
        let one = |step: &Step| match &step.action {
            Action::Write { offset, data } => format!("write {} at {}", count(data), at(offset)),
            Action::Zero { offset, length } => format!("zero {} at {}", length / BLOCK_BYTES, at(offset)),
            Action::Copy { offset, from_offset, data, .. } => {
                format!("copy {} from {} to {}", count(data), at(from_offset), at(offset))
            }
            Action::Flush => "flush".to_owned(),
        };
        steps.iter().map(one).collect()
    }

    #[test]
    fn what_the_replica_holds_is_not_sent_again() {
        let mut planner = planner_of(8, CopiesFrom::Now);
        let steps = write(&mut planner, BLOCK_BYTES, &blocks(".abc"));
        assert_eq!(shape(&steps), ["write 3 at 2"], "zeros are held already");
        acknowledge(&planner, &steps);
        assert_eq!(shape(&write(&mut planner, BLOCK_BYTES, &blocks(".abc"))), [""; 0]);
        assert_eq!(shape(&planner.zero(0, 8 * BLOCK_BYTES).unwrap()), ["zero 3 at 2"]);
    }

    #[test]
    fn an_unacknowledged_write_is_sent_again_and_never_copied_from() {
        let mut planner = planner_of(4, CopiesFrom::Now);
        write(&mut planner, 0, &blocks("a"));
        assert_eq!(shape(&write(&mut planner, 0, &blocks("a"))), ["write 1 at 0"]);
        assert_eq!(shape(&write(&mut planner, BLOCK_BYTES, &blocks("a"))), ["write 1 at 1"]);
    }

    #[test]
    fn content_that_lies_elsewhere_is_copied_in_runs() {
        let mut planner = planner_of(16, CopiesFrom::Now);
        let steps = write(&mut planner, 0, &blocks("abcd"));
        acknowledge(&planner, &steps);
        let steps = write(&mut planner, 8 * BLOCK_BYTES, &blocks("xbcd.a"));
        assert_eq!(shape(&steps), ["write 1 at 8", "copy 3 from 1 to 9", "copy 1 from 0 to 13"]);
        assert_eq!(shape(&write(&mut planner, BLOCK_BYTES, &blocks("a"))), ["copy 1 from 0 to 1"]);
        assert_eq!(shape(&write(&mut planner, 0, &blocks("da"))), ["copy 1 from 3 to 0", "write 1 at 1"]);
    }

    #[test]
    fn a_session_whose_changes_are_kept_elsewhere_copies_only_from_what_it_has_not_changed() {
        let mut planner = planner_of(8, CopiesFrom::Now);
        let steps = write(&mut planner, 0, &blocks("ab"));
        acknowledge(&planner, &steps);
        let mut next = Planner::new(planner.view.clone(), DISK, 8 * BLOCK_BYTES, CopiesFrom::Before);
        let steps = write(&mut next, 4 * BLOCK_BYTES, &blocks("c"));
        acknowledge(&next, &steps);
        let steps = write(&mut next, 5 * BLOCK_BYTES, &blocks("ca"));
        assert_eq!(shape(&steps), ["write 1 at 5", "copy 1 from 0 to 6"]);
    }

    proptest::proptest! {
        #[test]
        fn any_sequence_of_writes_leaves_the_replica_equal_to_the_disk(
            steps in proptest::collection::vec((0u64..16 * BLOCK_BYTES, 0usize..3 * PAGE_SIZE, 0u8..5, proptest::bool::ANY), 1..60),
            journalled in proptest::bool::ANY,
            new_session in 0usize..60,
        ) {
            // It ends inside a block.
            let size = 16 * BLOCK_BYTES - 512;
            let copies = if journalled { CopiesFrom::Before } else { CopiesFrom::Now };
            let view = Arc::new(ReplicaView::default());
            view.start_over(DISK, "root", size).unwrap();
            let mut planner = Planner::new(view.clone(), DISK, size, copies);
            let (mut disk, mut replica) = (vec![0; size as usize], vec![0; size as usize]);
            let mut before = replica.clone();
            for (number, (offset, length, fill, aligned)) in steps.into_iter().enumerate() {
                if number == new_session {
                    planner = Planner::new(view.clone(), DISK, size, copies);
                    before.clone_from(&replica);
                }
                let offset = if aligned { offset - offset % BLOCK_BYTES } else { offset.min(size) };
                let length = length.min((size - offset) as usize);
                let steps = if fill == 4 {
                    disk[offset as usize..][..length].fill(0);
                    planner.zero(offset, length as u64).unwrap()
                } else {
                    // Neighbours differ, and contents come again.
                    let data: Vec<u8> = (0..length).map(|at| fill + (at / PAGE_SIZE) as u8 % 2).collect();
                    disk[offset as usize..][..length].copy_from_slice(&data);
                    write(&mut planner, offset, &data)
                };
                apply(&steps, &mut replica, journalled.then_some(&before));
                acknowledge(&planner, &steps);
            }
            proptest::prop_assert!(disk == replica);
        }
    }
}
