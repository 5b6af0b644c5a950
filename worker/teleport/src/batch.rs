//! The batch under way in the encoder: items in, operations, content and digest out.
//!
//! ```text
//! verbatim ──────────────────────▶ content (joined until a record follows)
//! record ─ zero? ─ content, pending ─ 16 of them hashed ─ next block? ─ in the index? ─ else literal ─▶ operation, transcript
//! ```
//! Guarantees: a page is hashed once, and copied once. The content holds every byte that operations do not imply, also
//! of pages that lie in the replica, since a fallback needs them. Never exceeds the limits of a batch.

use crate::counts::PageCounts;
use crate::digest::{BatchDigest, Transcript};
use crate::index::{BlockLookup, BlockRef, KEPT_MEMORY};
use crate::page::{PAGE_SIZE, PageHash, ZERO_PAGE_HASH, is_zero};
use crate::qemu::{BlockName, Item, PageContent, PageRecord, RecordHeader};
use crate::wire::OpsError;
use crate::wire::limits::{BATCH_LITERAL_TARGET, BATCH_OPS_TARGET, BATCH_RAW_TARGET};
use crate::wire::ops::{Class, OpsReader, OpsWriter, Segment};

/// What a batch came to.
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) raw_length: u32,
    pub(crate) digest: BatchDigest,
    pub(crate) counts: PageCounts,
    pub(crate) ops: Vec<u8>,
    pub(crate) content: Vec<u8>,
}

/// A stretch of a batch's content.
#[derive(Debug)]
pub(crate) struct Stretch<'a> {
    pub(crate) bytes: &'a [u8],
    /// It is to be sent.
    pub(crate) literal: bool,
    /// It is pages that lie on no disk.
    pub(crate) of_memory: bool,
}

impl Closed {
    /// The stretches of the content that are to be sent or lie on no disk, in order.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = Result<Stretch<'_>, OpsError>> {
        let mut reader = OpsReader::new(&self.ops, self.raw_length);
        let mut rest = &self.content[..];
        std::iter::from_fn(move || {
            loop {
                let (length, literal, of_memory) = match reader.segment() {
                    Err(error) => return Some(Err(error)),
                    Ok(None) => return None,
                    Ok(Some(Segment::Verbatim { length })) => (length, true, false),
                    Ok(Some(Segment::Run(run))) => match run.class {
                        Class::Fill(_) | Class::Zero => (0, false, false),
                        Class::Literal => (run.count * PAGE_SIZE, true, true),
                        Class::Extent(at) => (run.count * PAGE_SIZE, false, at.disk == KEPT_MEMORY),
                    },
                };
                let (bytes, back) = rest.split_at(length);
                rest = back;
                if literal || of_memory {
                    return Some(Ok(Stretch { bytes, literal, of_memory }));
                }
            }
        })
    }
}

/// More than the operations of one record take, in bytes.
const RECORD_OPS_MAX: usize = 512;

/// A page whose bytes are in the content, and of which nothing is known yet.
#[derive(Debug)]
struct Pending {
    page: u64,
    /// The block, where the record names it.
    block: Option<Box<[u8]>>,
}

impl Pending {
    fn of(header: RecordHeader<'_>) -> Self {
        let block = match header.block {
            BlockName::Same => None,
            BlockName::Named(name) => Some(name.into()),
        };
        Self { page: header.page, block }
    }

    fn header(&self) -> RecordHeader<'_> {
        RecordHeader { page: self.page, block: self.block.as_deref().map_or(BlockName::Same, BlockName::Named) }
    }
}

/// The batch under way.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    ops: OpsWriter,
    content: Vec<u8>,
    /// The last pages of the content.
    pending: Vec<Pending>,
    transcript: Transcript,
    counts: PageCounts,
    raw_length: usize,
    literal_length: usize,
    /// Bytes at the end of the content that no operation covers yet.
    verbatim: usize,
    /// Where the next page lies if it follows on the last one that was found; kept from batch to batch.
    expected: Option<BlockRef>,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.raw_length == 0
    }

    /// Whether it should be closed before anything is added. One that is full is settled.
    pub(crate) fn is_full(&mut self, index: &dyn BlockLookup) -> bool {
        let pending = self.pending.len();
        if self.raw_length >= BATCH_RAW_TARGET
            || self.literal_length + pending * PAGE_SIZE >= BATCH_LITERAL_TARGET
            || self.ops.len() + pending * RECORD_OPS_MAX >= BATCH_OPS_TARGET
        {
            self.settle(index);
        }
        self.raw_length >= BATCH_RAW_TARGET
            || self.literal_length >= BATCH_LITERAL_TARGET
            || self.ops.len() >= BATCH_OPS_TARGET
    }

    /// Takes in an item. Gives back what did not fit: close the batch, then add that.
    pub(crate) fn add<'a>(&mut self, item: Item<'a>, index: &dyn BlockLookup) -> Option<Item<'a>> {
        match item {
            Item::Page(record) => {
                self.record(&record, index);
                None
            }
            Item::Verbatim(bytes) => {
                self.settle(index);
                let room = (BATCH_RAW_TARGET.saturating_sub(self.raw_length))
                    .min(BATCH_LITERAL_TARGET.saturating_sub(self.literal_length));
                let (front, back) = bytes.split_at(bytes.len().min(room));
                self.content.extend_from_slice(front);
                self.verbatim += front.len();
                self.raw_length += front.len();
                self.literal_length += front.len();
                (!back.is_empty()).then_some(Item::Verbatim(back))
            }
        }
    }

    fn record(&mut self, record: &PageRecord<'_>, index: &dyn BlockLookup) {
        self.close_verbatim();
        self.raw_length += record.length();
        let header = record.header;
        match record.content {
            PageContent::Fill(fill) => {
                self.settle(index);
                self.counts.zero += 1;
                self.transcript.fill(header, fill);
                self.ops.record(header, Class::Fill(fill));
            }
            PageContent::Bytes(page) if is_zero(page) => {
                self.settle(index);
                self.counts.zero += 1;
                self.transcript.page(header, &ZERO_PAGE_HASH);
                self.ops.record(header, Class::Zero);
            }
            PageContent::Bytes(page) => {
                self.content.extend_from_slice(page);
                self.pending.push(Pending::of(header));
                if self.pending.len() == PageHash::AT_ONCE {
                    self.settle(index);
                }
            }
        }
    }

    /// Finds out what the pending pages are. To be called before the batch is closed.
    pub(crate) fn settle(&mut self, index: &dyn BlockLookup) {
        let pending = std::mem::take(&mut self.pending);
        let start = self.content.len() - pending.len() * PAGE_SIZE;
        let (pages, _) = self.content[start..].as_chunks::<PAGE_SIZE>();
        let hashes = PageHash::of_each(pages);
        for (pending, hash) in pending.iter().zip(&hashes) {
            self.transcript.page(pending.header(), hash);
            let class = self.class_of(hash, index);
            self.ops.record(pending.header(), class);
        }
        // Its memory serves the next ones.
        self.pending = pending;
        self.pending.clear();
    }

    fn class_of(&mut self, hash: &PageHash, index: &dyn BlockLookup) -> Class {
        let digest = hash.digest();
        let found = self.expected.filter(|at| index.holds(*at, &digest)).or_else(|| index.find(&digest));
        match found {
            Some(at) => {
                self.expected = Some(at.next());
                self.counts.teleported += 1;
                Class::Extent(at)
            }
            None => {
                self.counts.literal += 1;
                self.literal_length += PAGE_SIZE;
                Class::Literal
            }
        }
    }

    fn close_verbatim(&mut self) {
        if self.verbatim > 0 {
            self.ops.verbatim(self.verbatim);
            self.transcript.verbatim(&self.content[self.content.len() - self.verbatim..]);
            self.verbatim = 0;
        }
    }

    /// What it came to; an empty batch is under way again.
    pub(crate) fn close(&mut self) -> Closed {
        debug_assert!(self.pending.is_empty(), "a batch is settled before it is closed");
        self.close_verbatim();
        let raw_length = std::mem::take(&mut self.raw_length) as u32;
        self.literal_length = 0;
        Closed {
            raw_length,
            digest: self.transcript.finish(),
            counts: std::mem::take(&mut self.counts),
            ops: std::mem::take(&mut self.ops).finish(),
            content: std::mem::take(&mut self.content),
        }
    }
}
