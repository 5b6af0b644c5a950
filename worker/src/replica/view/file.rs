//! The digests of one disk's replica in a file that outlives the worker.
//!
//! ```text
//!   create ─▶ dirty ──settle(S)──▶ sync, clean at S ──first change──▶ dirty, sync ─▶ changes … ──settle(S')──▶ …
//!                                         │                             │
//!                       open after a crash: S, as it is         open: cannot be used
//! ```
//! Guarantees: a file that opens with a state holds exactly what it was settled with at that state. The header says *dirty* on stable
//! storage before the first change, and *clean* only after all changes are there; and the sum in the header tells a file that a device
//! has not kept as it was told to. Does not know whether the state is still that of the replica: who opens a session compares it.

use std::io;
use std::ops::Range;

use pageport_teleport::BlockDigest;
use pageport_teleport::index::{DigestStore, PART_BLOCKS, PartKind, StoreFailed};

use super::ReplicaState;
use super::format::{
    Clean, FormatError, HEADER_BYTES, Header, KINDS_AT, PART_BYTES, Sum, digests_at, file_bytes, kind_from_byte,
    kind_to_byte, parts,
};
use super::medium::Medium;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system's.
    #[error("read or write the index file")]
    Io(#[from] io::Error),
    /// Its content.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// An open file.
#[derive(Debug)]
pub(super) struct IndexFile {
    medium: Box<dyn Medium>,
    /// As on the medium.
    header: Header,
    kinds: Vec<PartKind>,
    sum: Sum,
    digests_at: u64,
}

impl IndexFile {
    /// Makes an empty file of nothing known, in a medium of zeros with [`Self::length`]. It is dirty until it is settled.
    pub(super) fn create(medium: Box<dyn Medium>, name: &str, blocks: u64) -> Result<Self, FileError> {
        let header = Header { name: name.to_owned(), blocks, clean: None };
        let kinds = vec![PartKind::Unknown; parts(blocks) as usize];
        let mut file = Self { medium, header, kinds, sum: Sum::default(), digests_at: digests_at(blocks) };
        file.write_header(None)?;
        Ok(file)
    }

    /// Length of a file for a disk of this size.
    pub(super) fn length(blocks: u64) -> u64 {
        file_bytes(blocks)
    }

    /// Opens a file, which is read through once; says which state it belongs to.
    pub(super) fn open(medium: Box<dyn Medium>) -> Result<(Self, ReplicaState), FileError> {
        let damaged = |what| FormatError::Damaged { what };
        let length = medium.bytes().len() as u64;
        if length < KINDS_AT {
            return Err(damaged("it is cut").into());
        }
        let mut header = [0; HEADER_BYTES];
        medium.read_at(0, &mut header)?;
        let header = Header::decode(&header)?;
        let Clean { state, sum } = header.clean.ok_or(FormatError::Dirty)?;
        if length != file_bytes(header.blocks) {
            return Err(damaged("its length does not fit the disk's size").into());
        }
        let mut kinds = vec![0; parts(header.blocks) as usize];
        medium.read_at(KINDS_AT, &mut kinds)?;
        let kinds: Option<Vec<_>> = kinds.into_iter().map(kind_from_byte).collect();
        let kinds = kinds.ok_or(damaged("a part is of no kind"))?;
        let digests_at = digests_at(header.blocks);
        let file = Self { medium, header, kinds, sum, digests_at };
        if file.counted()? != sum { Err(damaged("its sum is wrong").into()) } else { Ok((file, state)) }
    }

    /// The disk's name and size in blocks.
    pub(super) fn disk(&self) -> (&str, u64) {
        (&self.header.name, self.header.blocks)
    }

    /// Everything written so far is what the replica holds at this state.
    pub(super) fn settle(&mut self, state: ReplicaState) -> Result<(), FileError> {
        let clean = Some(Clean { state, sum: self.sum });
        if self.header.clean == clean {
            return Ok(());
        }
        if self.header.clean.is_none() {
            self.medium.sync()?;
        }
        self.write_header(clean)
    }

    /// On stable storage when it returns.
    fn write_header(&mut self, clean: Option<Clean>) -> Result<(), FileError> {
        self.header.clean = clean;
        let unfit =
            || io::Error::new(io::ErrorKind::InvalidInput, "the disk's name or size does not fit an index file");
        let bytes = self.header.encode().ok_or_else(unfit)?;
        self.medium.write_at(0, &bytes)?;
        Ok(self.medium.sync()?)
    }

    /// The sum, by reading everything: errors of the device come up here, and not where the map is looked at.
    fn counted(&self) -> Result<Sum, FileError> {
        let mut sum = Sum::default();
        let mut digests = vec![0; PART_BYTES as usize];
        for (part, kind) in (0..).zip(&self.kinds) {
            sum.add_kind(part, *kind);
            if *kind == PartKind::Digests {
                self.medium.read_at(self.digests_at + part * PART_BYTES, &mut digests)?;
                let (digests, _) = digests.as_chunks::<{ BlockDigest::LENGTH }>();
                for (block, digest) in (part * PART_BLOCKS as u64..).zip(digests) {
                    sum.add_digest(block, BlockDigest(*digest));
                }
            }
        }
        Ok(sum)
    }

    fn place(&self, block: u64) -> u64 {
        self.digests_at + block * BlockDigest::LENGTH as u64
    }

    /// Before any change.
    fn touch(&mut self) -> Result<(), FileError> {
        if self.header.clean.is_some() { self.write_header(None) } else { Ok(()) }
    }

    fn set_kinds(&mut self, parts: Range<u32>, kind: PartKind) -> Result<(), FileError> {
        for part in parts.clone() {
            let place =
                self.kinds.get_mut(part as usize).ok_or(FormatError::Damaged { what: "a part past its end" })?;
            let before = std::mem::replace(place, kind);
            self.sum.take_kind(part.into(), before);
            self.sum.add_kind(part.into(), kind);
            if before == PartKind::Digests {
                let first = u64::from(part) * PART_BLOCKS as u64;
                for block in first..first + PART_BLOCKS as u64 {
                    let digest = self.stored(block);
                    self.sum.take_digest(block, digest);
                }
                if kind != PartKind::Digests {
                    self.medium.discard(self.place(first), PART_BYTES)?;
                }
            }
        }
        self.medium.write_at(KINDS_AT + u64::from(parts.start), &vec![kind_to_byte(kind); parts.len()])?;
        Ok(())
    }

    fn write_digests(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), FileError> {
        let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.0).collect();
        self.medium.write_at(self.place(first_block), &bytes)?;
        Ok(())
    }

    fn begin(&mut self, part: u32, content: BlockDigest) -> Result<(), FileError> {
        self.touch()?;
        self.set_kinds(part..part + 1, PartKind::Digests)?;
        let first = u64::from(part) * PART_BLOCKS as u64;
        (first..first + PART_BLOCKS as u64).for_each(|block| self.sum.add_digest(block, content));
        self.write_digests(first, &[content; PART_BLOCKS])
    }

    fn change(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), FileError> {
        self.touch()?;
        for (block, digest) in (first_block..).zip(digests) {
            let before = self.stored(block);
            self.sum.take_digest(block, before);
            self.sum.add_digest(block, *digest);
        }
        self.write_digests(first_block, digests)
    }

    fn stored(&self, block: u64) -> BlockDigest {
        let bytes = self.medium.bytes().get(self.place(block) as usize..);
        bytes.and_then(|bytes| bytes.first_chunk()).map_or(BlockDigest::UNKNOWN, |digest| BlockDigest(*digest))
    }

    fn told(&self, outcome: Result<(), FileError>) -> Result<(), StoreFailed> {
        outcome.map_err(|error| {
            let error = crate::error::with_causes(&error);
            tracing::warn!(disk = self.header.name, error, "the index file cannot be written");
            StoreFailed
        })
    }
}

impl DigestStore for IndexFile {
    fn kind(&self, part: u32) -> PartKind {
        self.kinds.get(part as usize).copied().unwrap_or(PartKind::Unknown)
    }

    fn digest(&self, block: u64) -> BlockDigest {
        match self.kind((block / PART_BLOCKS as u64) as u32) {
            PartKind::Digests => self.stored(block),
            _ => BlockDigest::UNKNOWN,
        }
    }

    fn begin_part(&mut self, part: u32, content: BlockDigest) -> Result<(), StoreFailed> {
        let outcome = self.begin(part, content);
        self.told(outcome)
    }

    fn end_parts(&mut self, parts: Range<u32>, kind: PartKind) -> Result<(), StoreFailed> {
        let outcome = self.touch().and_then(|()| self.set_kinds(parts, kind));
        self.told(outcome)
    }

    fn write(&mut self, first_block: u64, digests: &[BlockDigest]) -> Result<(), StoreFailed> {
        let outcome = self.change(first_block, digests);
        self.told(outcome)
    }

    /// The map is the system's memory, and goes when the system needs it.
    fn memory_bytes(&self) -> usize {
        self.kinds.capacity() * size_of::<PartKind>()
    }
}
