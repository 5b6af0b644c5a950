//! What the header of a qcow2 file says, as far as it decides whether the file can be used: pure.
//!
//! ```text
//!  0 magic · 4 version · 8 backing offset · 16 backing length · 20 cluster bits · 24 size · 32 encryption · 60 snapshots
//!  72 incompatible features · 100 header length (version 3; version 2: 72 bytes) · extensions: type u32, length u32, bytes, to 8 bytes
//! ```
//! Big-endian. Refuses what would be lost or be read wrongly when the disk is copied to a raw replica. The bytes come from a file that anybody may
//! have made: every offset is checked.

use super::Format;

/// How much of a file its header may take, in bytes.
pub const HEAD_BYTES: usize = 64 << 10;
/// How each begins.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION_2_BYTES: usize = 72;
/// QEMU's own limit for the path of a backing file.
const MAX_BACKING_BYTES: usize = 1023;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
/// Dirty, corrupt, external data file, compression type, extended L2 entries.
const KNOWN_FEATURES: u64 = 0b1_1111;
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why a qcow2 file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is something else.
    #[error(
        "it is not a qcow2 file: `qemu-img info` shows what it is, and `format` in the vm's definition must say so"
    )]
    Magic,
    /// A newer one, or a very old one.
    #[error("it is of version {version} of qcow2; 2 and 3 can be used")]
    Version {
        /// As it says.
        version: u32,
    },
    /// Its header ends early.
    #[error("its header is cut or damaged: restore it from a copy")]
    Cut,
    /// Encrypted.
    #[error("it is encrypted, and a replica would not be: decrypt it with `qemu-img convert` first")]
    Encrypted,
    /// It has states besides the newest.
    #[error(
        "it holds {count} internal snapshots, which a replica cannot hold: delete them with `qemu-img snapshot -d NAME IMAGE`"
    )]
    Snapshots {
        /// How many.
        count: u32,
    },
    /// Its data lies elsewhere.
    #[error("its data lies in another file: make it one file with `qemu-img convert -O qcow2` first")]
    DataFile,
    /// QEMU has found it damaged.
    #[error("it is marked as corrupt: repair it with `qemu-img check -r all IMAGE`, or restore it")]
    Corrupt,
    /// It needs a newer QEMU than this knows.
    #[error("it uses features that are not known here ({features:#x}): convert it with `qemu-img convert -O qcow2`")]
    Features {
        /// Bits that are not known.
        features: u64,
    },
    /// It does not say what backs it.
    #[error(
        "it does not say which format its backing file {backing:?} has, and that is not guessed: \
         `qemu-img rebase -u -b {backing} -F FORMAT IMAGE` says so"
    )]
    BackingFormat {
        /// The backing file, as it is named.
        backing: String,
    },
    /// A format that cannot be used.
    #[error(
        "its backing file {backing:?} is of format {format:?}; raw and qcow2 can be used: convert it with `qemu-img convert`"
    )]
    BackingFormatUnknown {
        /// The backing file, as it is named.
        backing: String,
        /// As it says.
        format: String,
    },
    /// Not a file of this host.
    #[error(
        "it is backed by {backing:?}, which is not a file of this host: copy it here, and `qemu-img rebase` the image onto it"
    )]
    BackingPlace {
        /// As it is named.
        backing: String,
    },
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk.
    pub size_bytes: u64,
    /// What is read where the file itself holds nothing.
    pub backing: Option<Backing>,
}

/// A backing file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// As it is named: absolute, or beside the file that names it.
    pub path: String,
    /// What its bytes mean.
    pub format: Format,
}

impl Header {
    /// Reads the beginning of a file, of up to [`HEAD_BYTES`].
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn parse(head: &[u8]) -> Result<Self, HeaderError> {
        if head.get(..MAGIC.len()) != Some(&MAGIC) {
            return Err(HeaderError::Magic);
        }
        let version = u32_at(head, 4)?;
        let length = match version {
            2 => VERSION_2_BYTES,
            3 => usize::try_from(u32_at(head, 100)?).map_err(|_| HeaderError::Cut)?,
            version => return Err(HeaderError::Version { version }),
        };
        let features = if version == 2 { 0 } else { u64_at(head, 72)? };
        match (u32_at(head, 32)?, u32_at(head, 60)?) {
            _ if features & DATA_FILE != 0 => return Err(HeaderError::DataFile),
            _ if features & CORRUPT != 0 => return Err(HeaderError::Corrupt),
            _ if features & !KNOWN_FEATURES != 0 => {
                return Err(HeaderError::Features { features: features & !KNOWN_FEATURES });
            }
            (0, 0) => {}
            (0, count) => return Err(HeaderError::Snapshots { count }),
            _ => return Err(HeaderError::Encrypted),
        }
        let place = usize::try_from(u64_at(head, 8)?).map_err(|_| HeaderError::Cut)?;
        let named = usize::try_from(u32_at(head, 16)?).map_err(|_| HeaderError::Cut)?;
        let backing = match place {
            0 => None,
            _ if named == 0 => None,
            _ if named > MAX_BACKING_BYTES => return Err(HeaderError::Cut),
            _ => Some(backing(bytes_at(head, place, named)?, extension(head, length, place)?)?),
        };
        Ok(Self { size_bytes: u64_at(head, 24)?, backing })
    }
}

fn backing(name: &[u8], format: Option<&[u8]>) -> Result<Backing, HeaderError> {
    let backing = String::from_utf8_lossy(name).into_owned();
    // As QEMU tells a protocol: a colon before the first slash.
    let local = std::str::from_utf8(name).is_ok() && !backing.split('/').next().unwrap_or_default().contains(':');
    if !local || backing.contains('\0') {
        return Err(HeaderError::BackingPlace { backing });
    }
    let Some(format) = format else { return Err(HeaderError::BackingFormat { backing }) };
    let format = String::from_utf8_lossy(format).into_owned();
    match Format::parse(&format) {
        Some(format) => Ok(Backing { path: backing, format }),
        None => Err(HeaderError::BackingFormatUnknown { backing, format }),
    }
}

/// The extension that says the format of the backing file. Extensions end at the latest where that one's name begins.
fn extension(head: &[u8], mut at: usize, end: usize) -> Result<Option<&[u8]>, HeaderError> {
    while at.checked_add(8).is_some_and(|next| next <= end) {
        let (kind, length) = (u32_at(head, at)?, u32_at(head, at + 4)? as usize);
        match kind {
            0 => return Ok(None),
            BACKING_FORMAT => return bytes_at(head, at + 8, length).map(Some),
            _ => {
                at = length
                    .checked_next_multiple_of(8)
                    .and_then(|length| length.checked_add(at + 8))
                    .ok_or(HeaderError::Cut)?
            }
        }
    }
    Ok(None)
}

fn bytes_at(head: &[u8], at: usize, length: usize) -> Result<&[u8], HeaderError> {
    let end = at.checked_add(length).ok_or(HeaderError::Cut)?;
    head.get(at..end).ok_or(HeaderError::Cut)
}

fn u32_at(head: &[u8], at: usize) -> Result<u32, HeaderError> {
    let (bytes, _) = bytes_at(head, at, 4)?.split_first_chunk().ok_or(HeaderError::Cut)?;
    Ok(u32::from_be_bytes(*bytes))
}

fn u64_at(head: &[u8], at: usize) -> Result<u64, HeaderError> {
    let (bytes, _) = bytes_at(head, at, 8)?.split_first_chunk().ok_or(HeaderError::Cut)?;
    Ok(u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header of version 3 with a backing file, as `qemu-img create -b base.raw -F raw` writes it.
    fn golden() -> Vec<u8> {
        let mut head = vec![0; 1024];
        head[..4].copy_from_slice(&MAGIC);
        head[4..8].copy_from_slice(&3u32.to_be_bytes());
        head[8..16].copy_from_slice(&0x210u64.to_be_bytes());
        head[16..20].copy_from_slice(&8u32.to_be_bytes());
        head[20..24].copy_from_slice(&16u32.to_be_bytes());
        head[24..32].copy_from_slice(&(96u64 << 20).to_be_bytes());
        head[100..104].copy_from_slice(&0x70u32.to_be_bytes());
        // The names of features come first, and are passed over.
        head[0x70..0x78].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 5]);
        head[0x80..0x88].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        head[0x88..0x8b].copy_from_slice(b"raw");
        head[0x210..0x218].copy_from_slice(b"base.raw");
        head
    }

    fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, HeaderError> {
        let mut head = golden();
        change(&mut head);
        Header::parse(&head)
    }

    #[test]
    fn a_header_says_its_size_and_what_backs_it() {
        let backing = Some(Backing { path: "base.raw".into(), format: Format::Raw });
        assert_eq!(Header::parse(&golden()), Ok(Header { size_bytes: 96 << 20, backing }));
        let alone = changed(|head| head[8..20].fill(0)).unwrap();
        assert_eq!(alone.backing, None);
    }

    #[test]
    fn version_2_has_a_shorter_header() {
        let two = changed(|head| {
            head[7] = 2;
            head.copy_within(0x80..0x90, 72);
        });
        assert_eq!(two.unwrap().backing.unwrap().format, Format::Raw);
    }

    #[test]
    fn what_a_replica_could_not_hold_is_refused() {
        let refused = |at: usize, byte: u8| changed(|head| head[at] = byte).unwrap_err();
        assert_eq!(refused(0, b'X'), HeaderError::Magic);
        assert_eq!(refused(7, 1), HeaderError::Version { version: 1 });
        assert_eq!(refused(35, 1), HeaderError::Encrypted);
        assert_eq!(refused(35, 2), HeaderError::Encrypted);
        assert_eq!(refused(63, 3), HeaderError::Snapshots { count: 3 });
        assert_eq!(refused(79, 0b10), HeaderError::Corrupt);
        assert_eq!(refused(79, 0b100), HeaderError::DataFile);
        assert_eq!(refused(79, 0b10_0000), HeaderError::Features { features: 0b10_0000 });
        assert!(changed(|head| head[79] = 0b1_1001).is_ok(), "dirty, compressed with zstd, extended entries");
    }

    #[test]
    fn what_backs_it_must_be_a_file_of_a_format_that_it_names() {
        let named = |name: &[u8; 8]| changed(|head| head[0x210..0x218].copy_from_slice(name)).unwrap_err();
        assert_eq!(named(b"nbd://ab"), HeaderError::BackingPlace { backing: "nbd://ab".into() });
        assert_eq!(named(b"json:{}{"), HeaderError::BackingPlace { backing: "json:{}{".into() });
        assert_eq!(named(b"/a\0b/cde"), HeaderError::BackingPlace { backing: "/a\0b/cde".into() });
        assert!(changed(|head| head[0x210..0x218].copy_from_slice(b"/a:b/c:d")).is_ok());
        let unsaid = changed(|head| head[0x80..0x84].fill(0));
        assert_eq!(unsaid, Err(HeaderError::BackingFormat { backing: "base.raw".into() }));
        let vmdk = changed(|head| head[0x88..0x8b].copy_from_slice(b"vdi"));
        assert!(matches!(vmdk, Err(HeaderError::BackingFormatUnknown { format, .. }) if format == "vdi"));
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(at in 0usize..1024, bytes in prop::collection::vec(any::<u8>(), 0..16), cut in 0usize..1024) {
            let mut head = golden();
            let end = (at + bytes.len()).min(head.len());
            head[at..end].copy_from_slice(&bytes[..end - at]);
            let _ = Header::parse(&head);
            let _ = Header::parse(&head[..cut]);
        }
    }
}
