//! The bytes of journals and undo files.
//!
//! ```text
//!  header, 40 bytes   magic "PPPT" · version u16 · kind u8 · 0 · lineage u64 · point u64 · nonce u64 · checksum [8]
//!  record, 40 bytes   kind u8 · 0 · disk u16 · stored u32 · offset u64 · length u64 · checksum [16]
//!    and `stored` bytes of payload
//! ```
//! | kind | offset | length | payload |
//! |---|---|---|---|
//! | 1 data | place | raw bytes | one zstd frame |
//! | 2 zero | place | bytes | |
//! | 3 resize | new size of the disk | size before | |
//! | 4 seal | count of records | bytes before it | BLAKE3 over the header and the 40 bytes of each record |
//! | 5 mark | batch | 0 | |
//!
//! Little-endian. Disks are numbered in the order of their names, and those that were added later after them: the group's record says how. A record's checksum is BLAKE3 over the file's header, the
//! record's place in the file, its first 24 bytes and its payload: a record is good in one place of one file only. A
//! mark follows the batch that it names and is written after that batch is on stable storage.

use super::Lineage;

pub(super) const HEADER_BYTES: usize = 40;
pub(super) const HEAD_BYTES: usize = 40;
/// Digest in a seal.
pub(super) const SEAL_BYTES: usize = 32;
/// What a seal takes in a file.
pub(super) const SEAL_RECORD_BYTES: u64 = (HEAD_BYTES + SEAL_BYTES) as u64;
const MAGIC: [u8; 4] = *b"PPPT";
const VERSION: u16 = 1;
const SUMMED_BYTES: usize = 24;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Journal = 1,
    Undo = 2,
    Layer = 3,
}

/// The undo file of a layer; there is one at most.
pub(super) const LAYER_FILE: &str = "layer.undo";

/// Which file of which history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    pub(super) kind: FileKind,
    pub(super) lineage: Lineage,
    pub(super) point: u64,
}

impl FileId {
    pub(super) fn name(&self) -> String {
        match self.kind {
            FileKind::Journal => format!("{}.journal", self.point),
            FileKind::Undo => format!("{}.undo", self.point),
            FileKind::Layer => LAYER_FILE.to_owned(),
        }
    }

    pub(super) fn encode(&self, nonce: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&VERSION.to_le_bytes());
        header[6] = self.kind as u8;
        header[8..16].copy_from_slice(&self.lineage.get().to_le_bytes());
        header[16..24].copy_from_slice(&self.point.to_le_bytes());
        header[24..32].copy_from_slice(&nonce.to_le_bytes());
        let sum = blake3::hash(&header[..32]);
        header[32..].copy_from_slice(&sum.as_bytes()[..8]);
        header
    }

    /// Whether this is the header of that file, whatever its nonce.
    pub(super) fn fits(&self, header: &[u8; HEADER_BYTES]) -> bool {
        *header == self.encode(u64_at(header, 24))
    }
}

/// What a record does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Data = 1,
    Zero = 2,
    Resize = 3,
    Seal = 4,
    Mark = 5,
}

/// A record without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) disk: u16,
    pub(super) stored: u32,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) checksum: [u8; 16],
}

impl Head {
    pub(super) fn new(kind: Kind, disk: u16, offset: u64, length: u64) -> Self {
        Self { kind, disk, stored: 0, offset, length, checksum: [0; 16] }
    }

    /// With length and checksum of the payload, as the record at `at` of the file with `header`.
    pub(super) fn with_payload(mut self, header: &[u8; HEADER_BYTES], at: u64, payload: &[u8]) -> Self {
        self.stored = payload.len() as u32;
        self.checksum = self.sum(header, at, payload);
        self
    }

    pub(super) fn is_good(&self, header: &[u8; HEADER_BYTES], at: u64, payload: &[u8]) -> bool {
        self.stored as usize == payload.len() && self.checksum == self.sum(header, at, payload)
    }

    pub(super) fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[0] = self.kind as u8;
        head[2..4].copy_from_slice(&self.disk.to_le_bytes());
        head[4..8].copy_from_slice(&self.stored.to_le_bytes());
        head[8..16].copy_from_slice(&self.offset.to_le_bytes());
        head[16..24].copy_from_slice(&self.length.to_le_bytes());
        head[SUMMED_BYTES..].copy_from_slice(&self.checksum);
        head
    }

    /// `None`: no record of this version.
    pub(super) fn decode(head: &[u8; HEAD_BYTES]) -> Option<Self> {
        let kind = match head[0] {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::Resize,
            4 => Kind::Seal,
            5 => Kind::Mark,
            _ => return None,
        };
        let mut checksum = [0; 16];
        checksum.copy_from_slice(&head[SUMMED_BYTES..]);
        (head[1] == 0).then_some(Self {
            kind,
            disk: u16::from_le_bytes([head[2], head[3]]),
            stored: u32::from_le_bytes([head[4], head[5], head[6], head[7]]),
            offset: u64_at(head, 8),
            length: u64_at(head, 16),
            checksum,
        })
    }

    fn sum(&self, header: &[u8; HEADER_BYTES], at: u64, payload: &[u8]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header).update(&at.to_le_bytes()).update(&self.encode()[..SUMMED_BYTES]).update(payload);
        let mut sum = [0; 16];
        sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        sum
    }
}

fn u64_at(bytes: &[u8; 40], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_header_and_record() {
        let id = FileId { kind: FileKind::Undo, lineage: Lineage::from_u64(0x0102_0304_0506_0708).unwrap(), point: 9 };
        let header = id.encode(0xaa);
        assert_eq!(
            hex(&header[..32]),
            concat!("50505054", "0100", "02", "00", "0807060504030201", "0900000000000000", "aa00000000000000")
        );
        assert!(id.fits(&header));
        assert!(!FileId { point: 8, ..id }.fits(&header));
        let head = Head::new(Kind::Data, 3, 4096, 8192).with_payload(&header, 40, b"xyz");
        assert_eq!(
            hex(&head.encode()[..24]),
            concat!("01", "00", "0300", "03000000", "0010000000000000", "0020000000000000")
        );
        assert_eq!(Head::decode(&head.encode()), Some(head));
        assert!(head.is_good(&header, 40, b"xyz"));
        assert!(!head.is_good(&header, 41, b"xyz"), "a record is good in one place only");
        assert!(!head.is_good(&id.encode(0xab), 40, b"xyz"), "and in one file only");
    }
}
