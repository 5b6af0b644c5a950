//! The operations of a batch: how its stretch of QEMU's stream is rebuilt.
//!
//! Each is a varint `value << 4 | code`, some with more behind it. Pages follow on each other: a run starts at the page
//! after the last one, its records are of the same block as the one before. All of that starts anew with each batch.
//!
//! | code | operation | value | then | takes from the literals |
//! |---|---|---|---|---|
//! | 0 | bytes that are no page | length - 1 | | the bytes |
//! | 1 | records of zero pages | count - 1 | | |
//! | 2 | records of pages of one byte | count - 1 | the byte | |
//! | 3 | pages sent in full, all zero | count - 1 | | |
//! | 4 | pages | count - 1 | | the pages |
//! | 5 | pages that lie in the replica | count - 1 | zigzag varint: first block, from the end of the extent before | |
//! | 6 | seek | zigzag: pages to skip | | |
//! | 7 | the next record names its block | length of the name | the name | |
//! | 8 | the next extents are of another disk | its number | | |
//!
//! Guarantees of the reader: the segments it gives make up exactly the raw length that was announced, so every count is
//! bounded by it; pages and blocks are within their limits. It does not look at literals or replicas.

use super::limits::{DISK_BLOCKS_MAX, GUEST_PAGES_MAX};
use super::varint;
use crate::index::BlockRef;
use crate::page::PAGE_SIZE;
use crate::qemu::{BlockName, RecordHeader};

const VERBATIM: u8 = 0;
const ZERO_RECORDS: u8 = 1;
const FILL_RECORDS: u8 = 2;
const ZERO_PAGES: u8 = 3;
const LITERAL_PAGES: u8 = 4;
const EXTENT: u8 = 5;
const SEEK: u8 = 6;
const NAME: u8 = 7;
const DISK: u8 = 8;

/// What is wrong with the operations of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpsError {
    /// A code without meaning.
    #[error("unknown operation {code}")]
    Unknown {
        /// The code.
        code: u8,
    },
    /// The operations end within one.
    #[error("they end within an operation")]
    Truncated,
    /// They stand for more or fewer bytes than was announced.
    #[error("they do not make up the {raw_length} bytes announced")]
    RawLength {
        /// What was announced.
        raw_length: u32,
    },
    /// A page beyond what can be addressed.
    #[error("a page beyond any ram block")]
    Page,
    /// A block beyond what can be referred to.
    #[error("a block beyond any disk")]
    Block,
    /// A name that no record follows, or that is too long.
    #[error("a block name out of place")]
    Name,
}

/// How the pages of a run are rebuilt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// From a record with this byte.
    Fill(u8),
    /// Zeros, sent in full by QEMU.
    Zero,
    /// From the literals.
    Literal,
    /// From the replica; the first page from this block, the next ones from those behind it.
    Extent(BlockRef),
}

/// A stretch of the batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Segment<'a> {
    /// Bytes that are no page.
    Verbatim { length: usize },
    /// Consecutive pages of one class.
    Run(Run<'a>),
}

/// Consecutive pages of one class; only the first may name its block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) first: RecordHeader<'a>,
    pub(crate) count: usize,
    pub(crate) class: Class,
}

impl<'a> Run<'a> {
    pub(crate) fn headers(&self) -> impl Iterator<Item = RecordHeader<'a>> + use<'a> {
        let RecordHeader { page, block } = self.first;
        (0..self.count as u64).map(move |place| RecordHeader {
            page: page + place,
            block: if place == 0 { block } else { BlockName::Same },
        })
    }
}

/// Writes operations, joining what can be joined.
#[derive(Debug, Default)]
pub(crate) struct OpsWriter {
    bytes: Vec<u8>,
    open: Option<(Class, usize)>,
    next_page: u64,
    next_block: u64,
    disk: u16,
}

impl OpsWriter {
    /// Bytes so far; the open run is not counted.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn verbatim(&mut self, length: usize) {
        self.close_run();
        if length > 0 {
            self.head(VERBATIM, length as u64 - 1);
        }
    }

    pub(crate) fn record(&mut self, header: RecordHeader<'_>, class: Class) {
        if let BlockName::Named(name) = header.block {
            self.close_run();
            self.head(NAME, name.len() as u64);
            self.bytes.extend_from_slice(name);
        }
        if header.page != self.next_page {
            self.close_run();
            self.head(SEEK, varint::zigzag(header.page.wrapping_sub(self.next_page) as i64));
        }
        self.next_page = header.page + 1;
        match &mut self.open {
            Some((open, count)) if follows(*open, *count, class) => *count += 1,
            _ => {
                self.close_run();
                self.open = Some((class, 1));
            }
        }
    }

    /// All operations.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.close_run();
        self.bytes
    }

    fn close_run(&mut self) {
        let Some((class, count)) = self.open.take() else { return };
        let value = count as u64 - 1;
        match class {
            Class::Fill(0) => self.head(ZERO_RECORDS, value),
            Class::Fill(fill) => {
                self.head(FILL_RECORDS, value);
                self.bytes.push(fill);
            }
            Class::Zero => self.head(ZERO_PAGES, value),
            Class::Literal => self.head(LITERAL_PAGES, value),
            Class::Extent(at) => {
                if at.disk != self.disk {
                    self.head(DISK, u64::from(at.disk));
                    self.disk = at.disk;
                }
                self.head(EXTENT, value);
                varint::write(varint::zigzag(at.block.wrapping_sub(self.next_block) as i64), &mut self.bytes);
                self.next_block = at.block + count as u64;
            }
        }
    }

    fn head(&mut self, code: u8, value: u64) {
        varint::write(value << 4 | u64::from(code), &mut self.bytes);
    }
}

/// Whether a page of `class` continues an open run of `count` pages.
fn follows(open: Class, count: usize, class: Class) -> bool {
    match (open, class) {
        (Class::Extent(first), Class::Extent(at)) => first.disk == at.disk && first.block + count as u64 == at.block,
        (open, class) => open == class,
    }
}

/// Reads the operations of a batch.
#[derive(Debug)]
pub(crate) struct OpsReader<'a> {
    rest: &'a [u8],
    raw_length: u32,
    raw_left: u64,
    name: Option<&'a [u8]>,
    next_page: u64,
    next_block: u64,
    disk: u16,
}

impl<'a> OpsReader<'a> {
    pub(crate) fn new(ops: &'a [u8], raw_length: u32) -> Self {
        let raw_left = u64::from(raw_length);
        Self { rest: ops, raw_length, raw_left, name: None, next_page: 0, next_block: 0, disk: 0 }
    }

    /// The next segment; nothing once they made up the raw length.
    pub(crate) fn segment(&mut self) -> Result<Option<Segment<'a>>, OpsError> {
        while !self.rest.is_empty() {
            let head = self.number()?;
            let (value, code) = (head >> 4, (head & 0xf) as u8);
            let class = match code {
                VERBATIM => {
                    if self.name.is_some() {
                        return Err(OpsError::Name);
                    }
                    let length = self.spend(value + 1, 1, 0)?;
                    return Ok(Some(Segment::Verbatim { length }));
                }
                SEEK => {
                    self.next_page = moved(self.next_page, value, GUEST_PAGES_MAX).ok_or(OpsError::Page)?;
                    continue;
                }
                NAME => {
                    let length = u8::try_from(value).map_err(|_| OpsError::Name)?;
                    let name = self.take(usize::from(length))?;
                    if self.name.replace(name).is_some() {
                        return Err(OpsError::Name);
                    }
                    continue;
                }
                DISK => {
                    self.disk = u16::try_from(value).map_err(|_| OpsError::Block)?;
                    continue;
                }
                ZERO_RECORDS => Class::Fill(0),
                FILL_RECORDS => Class::Fill(self.take(1)?[0]),
                ZERO_PAGES => Class::Zero,
                LITERAL_PAGES => Class::Literal,
                EXTENT => {
                    let delta = self.number()?;
                    let block = moved(self.next_block, delta, DISK_BLOCKS_MAX).ok_or(OpsError::Block)?;
                    Class::Extent(BlockRef { disk: self.disk, block })
                }
                code => return Err(OpsError::Unknown { code }),
            };
            return self.run(value + 1, class).map(Some);
        }
        match (self.raw_left, self.name) {
            (0, None) => Ok(None),
            (0, Some(_)) => Err(OpsError::Name),
            _ => Err(self.wrong_length()),
        }
    }

    fn run(&mut self, count: u64, class: Class) -> Result<Segment<'a>, OpsError> {
        let block = self.name.take().map_or(BlockName::Same, BlockName::Named);
        let first = RecordHeader { page: self.next_page, block };
        let body = if matches!(class, Class::Fill(_)) { 1 } else { PAGE_SIZE };
        let header = RecordHeader { page: 0, block: BlockName::Same }.length();
        let count = self.spend(count, header + body, first.length() - header)?;
        self.next_page += count as u64;
        if self.next_page > GUEST_PAGES_MAX {
            return Err(OpsError::Page);
        }
        if let Class::Extent(at) = class {
            self.next_block = at.block + count as u64;
            if self.next_block > DISK_BLOCKS_MAX {
                return Err(OpsError::Block);
            }
        }
        Ok(Segment::Run(Run { first, count, class }))
    }

    /// Takes `count` times `each` and `once` more from the raw length, which bounds the count.
    fn spend(&mut self, count: u64, each: usize, once: usize) -> Result<usize, OpsError> {
        let cost = count.checked_mul(each as u64).and_then(|cost| cost.checked_add(once as u64));
        self.raw_left = cost.and_then(|cost| self.raw_left.checked_sub(cost)).ok_or(self.wrong_length())?;
        Ok(count as usize)
    }

    fn wrong_length(&self) -> OpsError {
        OpsError::RawLength { raw_length: self.raw_length }
    }

    fn number(&mut self) -> Result<u64, OpsError> {
        varint::read(&mut self.rest).ok_or(OpsError::Truncated)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], OpsError> {
        let (front, back) = self.rest.split_at_checked(length).ok_or(OpsError::Truncated)?;
        self.rest = back;
        Ok(front)
    }
}

/// `from` moved by a zigzag difference, if it stays within `limit`.
fn moved(from: u64, delta: u64, limit: u64) -> Option<u64> {
    from.checked_add_signed(varint::unzigzag(delta)).filter(|to| *to <= limit)
}

/// The operations with every extent turned into literal pages.
pub(crate) fn all_literal(ops: &[u8], raw_length: u32) -> Result<Vec<u8>, OpsError> {
    let mut reader = OpsReader::new(ops, raw_length);
    let mut writer = OpsWriter::default();
    while let Some(segment) = reader.segment()? {
        match segment {
            Segment::Verbatim { length } => writer.verbatim(length),
            Segment::Run(run) => {
                let class = if matches!(run.class, Class::Extent(_)) { Class::Literal } else { run.class };
                run.headers().for_each(|header| writer.record(header, class));
            }
        }
    }
    Ok(writer.finish())
}
