//! One record of the RAM section: a page, its address, and how the stream writes them.
//!
//! ```text
//! u64 address | flags   [u8 length, name]        u8 fill │ 4096 bytes
//!                       unless the same block    0x02      0x08
//! ```
//! Guarantees that a record that the parser took apart is written byte for byte as it was.

use crate::page::{PAGE_SIZE, Page};

/// Low bits of a record's first word; the rest is the page's address.
pub(crate) const FLAGS_MASK: u64 = PAGE_SIZE as u64 - 1;
/// A page of one byte repeated, which follows.
pub(crate) const FLAG_ZERO: u64 = 0x02;
/// The total of the block lengths follows: only in the RAM section's start.
pub(crate) const FLAG_MEMORY_SIZE: u64 = 0x04;
/// A page whose bytes follow.
pub(crate) const FLAG_PAGE: u64 = 0x08;
/// The last record of a section.
pub(crate) const FLAG_END: u64 = 0x10;
/// The page is of the block of the record before.
pub(crate) const FLAG_SAME_BLOCK: u64 = 0x20;

/// Bytes of the longest record: address, longest name, page.
pub(crate) const RECORD_LENGTH_MAX: usize = 8 + 1 + u8::MAX as usize + PAGE_SIZE;

/// The block of a page, as the record gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockName<'a> {
    /// That of the record before.
    Same,
    /// By name, of at most 255 bytes.
    Named(&'a [u8]),
}

/// Where a page belongs, as the record says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader<'a> {
    /// Number of the page in its block: the address without its low 12 bits.
    pub page: u64,
    /// The block.
    pub block: BlockName<'a>,
}

impl RecordHeader<'_> {
    /// Writes the header of a record with the flag of its content.
    fn write(&self, flag: u64, into: &mut Vec<u8>) {
        let word = (self.page * PAGE_SIZE as u64) | flag;
        match self.block {
            BlockName::Same => into.extend_from_slice(&(word | FLAG_SAME_BLOCK).to_be_bytes()),
            BlockName::Named(name) => {
                into.extend_from_slice(&word.to_be_bytes());
                into.push(name.len().min(u8::MAX as usize) as u8);
                into.extend_from_slice(name);
            }
        }
    }

    /// Writes the header of a record of a page whose bytes follow.
    pub fn write_page(&self, into: &mut Vec<u8>) {
        self.write(FLAG_PAGE, into);
    }

    /// Writes a record of a page of one repeated byte.
    pub fn write_fill(&self, fill: u8, into: &mut Vec<u8>) {
        self.write(FLAG_ZERO, into);
        into.push(fill);
    }

    /// Bytes that the header takes in the stream.
    pub fn length(&self) -> usize {
        match self.block {
            BlockName::Same => 8,
            BlockName::Named(name) => 8 + 1 + name.len(),
        }
    }
}

/// What a record says of its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageContent<'a> {
    /// One byte repeated; QEMU sends zero pages so.
    Fill(u8),
    /// The bytes.
    Bytes(&'a Page),
}

/// One record of the RAM section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRecord<'a> {
    /// Where the page belongs.
    pub header: RecordHeader<'a>,
    /// Its content.
    pub content: PageContent<'a>,
}

impl PageRecord<'_> {
    /// Writes the record as it stood in the stream.
    pub fn write(&self, into: &mut Vec<u8>) {
        match self.content {
            PageContent::Fill(fill) => self.header.write_fill(fill, into),
            PageContent::Bytes(page) => {
                self.header.write_page(into);
                into.extend_from_slice(page);
            }
        }
    }

    /// Bytes that the record takes in the stream.
    pub fn length(&self) -> usize {
        self.header.length()
            + match self.content {
                PageContent::Fill(_) => 1,
                PageContent::Bytes(_) => PAGE_SIZE,
            }
    }
}
