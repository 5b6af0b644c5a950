//! The bytes of an index file, and of its header.
//!
//! | at | what |
//! |---|---|
//! | 0 | header, 512 bytes: one sector, so that a write of it is whole or not at all |
//! | 4096 | one byte a part of 1024 blocks: 0 unknown, 1 zero, 2 digests |
//! | from the next multiple of 4096 | 16 bytes a block, by place; only parts of digests take space |
//!
//! | at in the header | bytes | what |
//! |---|---|---|
//! | 0 | 16 | `pageport index 1` |
//! | 16 | 8 | 1: clean, 0: dirty |
//! | 24 | 8 | the disk's size in blocks |
//! | 32 | 8 + 8 | the state of the replica: instance, version |
//! | 48 | 16 | sum over all that follows the header: [`Sum`] |
//! | 64 | 1 + 63 | length of the disk's name, and the name |
//! | 496 | 16 | BLAKE3 of what stands before it |
//!
//! Numbers are little-endian.

use pageport_teleport::BlockDigest;
use pageport_teleport::index::{PART_BLOCKS, PartKind};

use super::ReplicaState;

/// Also names the version: another is another file.
const MAGIC: &[u8; 16] = b"pageport index 1";
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 512;
const CHECKED_BYTES: usize = HEADER_BYTES - 16;
const NAME_BYTES: usize = 63;
/// Where the kinds of the parts begin.
pub(super) const KINDS_AT: u64 = 4096;
/// Bytes of a part's digests.
pub(super) const PART_BYTES: u64 = (PART_BLOCKS * BlockDigest::LENGTH) as u64;
/// Beyond all disks that an index can have; keeps sums of bytes in range.
const BLOCKS_MAX: u64 = 1 << 32;

/// Why bytes are not the header of a file that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not an index file, or of another version.
    #[error("it is no index file of this version")]
    Foreign,
    /// A checksum is wrong, or a value cannot be.
    #[error("it is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// It was being changed.
    #[error("it was being changed when the worker ended")]
    Dirty,
}

/// What a file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: String,
    pub(super) blocks: u64,
    /// [`None`]: it is being changed.
    pub(super) clean: Option<Clean>,
}

/// What is true of a file that is not being changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clean {
    pub(super) state: ReplicaState,
    pub(super) sum: Sum,
}

impl Header {
    /// [`None`]: the name is too long, or the disk too large.
    pub(super) fn encode(&self) -> Option<[u8; HEADER_BYTES]> {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
        if self.name.len() > NAME_BYTES || self.blocks > BLOCKS_MAX {
            return None;
        }
        put(0, MAGIC);
        put(24, &self.blocks.to_le_bytes());
        if let Some(Clean { state, sum }) = self.clean {
            put(16, &1_u64.to_le_bytes());
            put(32, &state.instance.to_le_bytes());
            put(40, &state.version.to_le_bytes());
            put(48, &sum.0.to_le_bytes());
        }
        put(64, &[self.name.len() as u8]);
        put(65, self.name.as_bytes());
        let checksum = checksum(&bytes);
        bytes[CHECKED_BYTES..].copy_from_slice(&checksum);
        Some(bytes)
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let damaged = |what| FormatError::Damaged { what };
        if !bytes.starts_with(MAGIC) {
            return Err(FormatError::Foreign);
        }
        if bytes[CHECKED_BYTES..] != checksum(bytes) {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let sum = bytes[48..].first_chunk().map_or(0, |word| u128::from_le_bytes(*word));
        let name = bytes.get(65..65 + usize::from(bytes[64].min(NAME_BYTES as u8))).unwrap_or_default();
        let name = str::from_utf8(name).map_err(|_| damaged("the disk's name is no text"))?.to_owned();
        let blocks = number(24);
        if blocks > BLOCKS_MAX {
            return Err(damaged("the disk's size cannot be"));
        }
        let state = ReplicaState { instance: number(32), version: number(40) };
        let clean = (number(16) == 1).then_some(Clean { state, sum: Sum(sum) });
        Ok(Self { name, blocks, clean })
    }
}

fn checksum(header: &[u8; HEADER_BYTES]) -> [u8; 16] {
    let digest = blake3::hash(&header[..CHECKED_BYTES]);
    digest.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Parts of a disk of this size.
pub(super) fn parts(blocks: u64) -> u64 {
    blocks.div_ceil(PART_BLOCKS as u64)
}

/// Where the digests begin.
pub(super) fn digests_at(blocks: u64) -> u64 {
    KINDS_AT + parts(blocks).next_multiple_of(4096)
}

/// Length of the file.
pub(super) fn file_bytes(blocks: u64) -> u64 {
    digests_at(blocks) + parts(blocks) * PART_BYTES
}

pub(super) fn kind_to_byte(kind: PartKind) -> u8 {
    match kind {
        PartKind::Unknown => 0,
        PartKind::Zero => 1,
        PartKind::Digests => 2,
    }
}

pub(super) fn kind_from_byte(byte: u8) -> Option<PartKind> {
    Some(match byte {
        0 => PartKind::Unknown,
        1 => PartKind::Zero,
        2 => PartKind::Digests,
        _ => return None,
    })
}

/// A sum over the kinds of all parts and the digests of all blocks, each weighed by its place. It follows changes without looking at
/// the rest, and tells a file of which some writes are missing: digests are as good as random, so sums of different files differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sum(u128);

impl Sum {
    pub(super) fn add_digest(&mut self, block: u64, digest: BlockDigest) {
        self.0 = self.0.wrapping_add(weighed(block, digest));
    }

    pub(super) fn take_digest(&mut self, block: u64, digest: BlockDigest) {
        self.0 = self.0.wrapping_sub(weighed(block, digest));
    }

    pub(super) fn add_kind(&mut self, part: u64, kind: PartKind) {
        self.0 = self.0.wrapping_add(weighed_kind(part, kind));
    }

    pub(super) fn take_kind(&mut self, part: u64, kind: PartKind) {
        self.0 = self.0.wrapping_sub(weighed_kind(part, kind));
    }
}

fn weighed(block: u64, digest: BlockDigest) -> u128 {
    u128::from_le_bytes(digest.0).wrapping_mul(u128::from(block) * 2 + 1)
}

fn weighed_kind(part: u64, kind: PartKind) -> u128 {
    // Large and odd, so that neighbouring parts differ in all of the sum.
    const SPREAD: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    u128::from(kind_to_byte(kind)).wrapping_mul(SPREAD.wrapping_mul(u128::from(part) * 2 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let state = ReplicaState { instance: 0x1112, version: 7 };
        Header { name: "root".to_owned(), blocks: 3000, clean: Some(Clean { state, sum: Sum(0x0102 << 64) }) }
    }

    #[test]
    fn headers_come_back_and_have_their_fields_in_place() {
        let header = header();
        let bytes = header.encode().unwrap();
        assert_eq!(Header::decode(&bytes), Ok(header.clone()));
        assert_eq!(&bytes[..24], b"pageport index 1\x01\0\0\0\0\0\0\0");
        assert_eq!((&bytes[24..26], &bytes[32..34], bytes[40]), (&[0xb8, 0x0b][..], &[0x12, 0x11][..], 7));
        assert_eq!((&bytes[56..58], &bytes[64..69]), (&[2, 1][..], &b"\x04root"[..]));
        let dirty = Header { clean: None, ..header };
        assert_eq!(Header::decode(&dirty.encode().unwrap()), Ok(dirty));
    }

    #[test]
    fn any_byte_that_is_wrong_is_noticed() {
        let bytes = header().encode().unwrap();
        for at in 0..HEADER_BYTES {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert!(Header::decode(&wrong).is_err(), "byte {at}");
        }
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), Err(FormatError::Foreign));
    }

    #[test]
    fn what_does_not_fit_has_no_header() {
        assert!(Header { name: "x".repeat(63), ..header() }.encode().is_some());
        assert!(Header { name: "x".repeat(64), ..header() }.encode().is_none());
        assert!(Header { blocks: (1 << 32) + 1, ..header() }.encode().is_none());
    }

    #[test]
    fn digests_begin_at_a_page_and_parts_of_them_at_pages() {
        assert_eq!((digests_at(1), file_bytes(1)), (8192, 8192 + 16384));
        assert_eq!(digests_at(4096 * 1024 + 1), 4096 + 8192);
        assert_eq!(file_bytes(1 << 28), 4096 + (1 << 18) + (1 << 32), "4 GiB for 1 TiB");
    }
}
