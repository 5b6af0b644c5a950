//! Rebuilds a batch's stretch of QEMU's stream from its operations.
//!
//! [`Plan::of`] goes through the operations once and says what they take, before anything is allocated or read; then
//! [`rebuild`] goes through them again. Guarantees: the bytes are given only if their digest is the one announced. A
//! replica that cannot be read is a replica that differs.

use std::io;

use crate::counts::PageCounts;
use crate::decoder::ReplicaRead;
use crate::digest::{BatchSummary, Transcript};
use crate::index::{BlockRef, KEPT_MEMORY};
use crate::page::{BlockDigest, PAGE_SIZE, Page, PageHash, ZERO_PAGE, ZERO_PAGE_HASH};
use crate::wire::OpsError;
use crate::wire::ops::{Class, OpsReader, Run, Segment};

/// Blocks read from the replica at a time.
const READ_BLOCKS: usize = 256;

/// What a batch takes; its operations are sound.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) literal_length: usize,
    pub(crate) counts: PageCounts,
    /// Pages that lie on no disk.
    pub(crate) memory_pages: usize,
}

impl Plan {
    pub(crate) fn of(ops: &[u8], raw_length: u32) -> Result<Self, OpsError> {
        let mut reader = OpsReader::new(ops, raw_length);
        let mut plan = Self::default();
        while let Some(segment) = reader.segment()? {
            match segment {
                Segment::Verbatim { length } => plan.literal_length += length,
                Segment::Run(Run { class, count, .. }) => {
                    let pages = count as u64;
                    match class {
                        Class::Fill(_) | Class::Zero => plan.counts.zero += pages,
                        Class::Extent(at) => {
                            plan.counts.teleported += pages;
                            plan.memory_pages += if at.disk == KEPT_MEMORY { count } else { 0 };
                        }
                        Class::Literal => {
                            plan.memory_pages += count;
                            plan.counts.literal += pages;
                            plan.literal_length += count * PAGE_SIZE;
                        }
                    }
                }
            }
        }
        Ok(plan)
    }
}

/// What a rebuilt batch came to.
#[derive(Debug)]
pub(crate) enum Rebuilt {
    /// The bytes that the source digested, and the digests of its pages that lie on no disk.
    Verified(Vec<u8>, Vec<BlockDigest>),
    /// Something else, or a replica that could not be read.
    Differs,
}

/// Stands for the replica where none may be read.
#[derive(Debug)]
pub(crate) struct NoReplica;

impl ReplicaRead for NoReplica {
    fn read(&mut self, _: BlockRef, _: u32, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Rebuilds a batch whose operations were planned and whose literals are as long as they take.
pub(crate) fn rebuild(
    ops: &[u8],
    summary: &BatchSummary,
    mut literals: &[u8],
    replica: &mut dyn ReplicaRead,
    transcript: &mut Transcript,
    scratch: &mut Vec<u8>,
) -> Result<Rebuilt, OpsError> {
    let mut reader = OpsReader::new(ops, summary.raw_length);
    let mut rebuilt = Writer { transcript, bytes: Vec::with_capacity(summary.raw_length as usize), of_memory: vec![] };
    while let Some(segment) = reader.segment()? {
        match segment {
            Segment::Verbatim { length } => {
                let (front, back) = literals.split_at(length);
                literals = back;
                rebuilt.transcript.verbatim(front);
                rebuilt.bytes.extend_from_slice(front);
            }
            Segment::Run(run) => match run.class {
                Class::Fill(fill) => run.headers().for_each(|header| {
                    rebuilt.transcript.fill(header, fill);
                    header.write_fill(fill, &mut rebuilt.bytes);
                }),
                Class::Zero => run.headers().for_each(|header| {
                    rebuilt.transcript.page(header, &ZERO_PAGE_HASH);
                    header.write_page(&mut rebuilt.bytes);
                    rebuilt.bytes.extend_from_slice(&ZERO_PAGE);
                }),
                Class::Literal => {
                    let (front, back) = literals.split_at(run.count * PAGE_SIZE);
                    literals = back;
                    rebuilt.pages(&run, 0, front, true);
                }
                Class::Extent(at) => {
                    if !rebuilt.extent(&run, at, replica, scratch) {
                        rebuilt.transcript.finish();
                        return Ok(Rebuilt::Differs);
                    }
                }
            },
        }
    }
    let Writer { transcript, bytes, of_memory } = rebuilt;
    let agrees = transcript.finish() == summary.digest;
    Ok(if agrees { Rebuilt::Verified(bytes, of_memory) } else { Rebuilt::Differs })
}

/// A batch being rebuilt.
struct Writer<'a> {
    transcript: &'a mut Transcript,
    bytes: Vec<u8>,
    of_memory: Vec<BlockDigest>,
}

impl Writer<'_> {
    /// Writes pages of a run, from the one at `skip` on, whose contents stand one behind the other.
    fn pages(&mut self, run: &Run<'_>, skip: usize, content: &[u8], of_memory: bool) {
        let (pages, _): (&[Page], _) = content.as_chunks::<PAGE_SIZE>();
        let hashes = pages.chunks(PageHash::AT_ONCE).flat_map(PageHash::of_each);
        for ((header, page), hash) in run.headers().skip(skip).zip(pages).zip(hashes) {
            self.transcript.page(header, &hash);
            if of_memory {
                self.of_memory.push(hash.digest());
            }
            header.write_page(&mut self.bytes);
            self.bytes.extend_from_slice(page);
        }
    }

    /// Writes a run of pages from the replica; false if it cannot be read.
    fn extent(&mut self, run: &Run<'_>, at: BlockRef, replica: &mut dyn ReplicaRead, scratch: &mut Vec<u8>) -> bool {
        scratch.resize(READ_BLOCKS * PAGE_SIZE, 0);
        let mut done = 0;
        while done < run.count {
            let count = READ_BLOCKS.min(run.count - done);
            let into = &mut scratch[..count * PAGE_SIZE];
            let from = BlockRef { block: at.block + done as u64, ..at };
            if replica.read(from, count as u32, into).is_err() {
                return false;
            }
            self.pages(run, done, into, at.disk == KEPT_MEMORY);
            done += count;
        }
        true
    }
}
