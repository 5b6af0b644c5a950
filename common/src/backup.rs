//! The file of a backup, whatever is in it.
//!
//! ```text
//!   "PPBACKUP"  version (u32)  crc32 of the content (u32)  its length (u64)  content        numbers are big-endian
//! ```
//! It crosses connections in parts: [`parts`], [`Assembly`].
//!
//! Guarantees: [`open`] gives what [`seal`] was given, or says what is wrong; a file is written whole or not at all.

mod parts;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use self::parts::{Assembly, Misfit, parts};

/// The one version that there is.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"PPBACKUP";
const HEADER_BYTES: usize = 24;

/// Why a file is no backup that can be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// Another file.
    #[error("this is no backup of Pageport's controllers")]
    Foreign,
    /// Of a newer version.
    #[error("this backup has version {version}, and this program reads version {VERSION}: use the one that made it")]
    Version {
        /// Which.
        version: u32,
    },
    /// Cut off.
    #[error("this backup has {found} bytes of {expected}: its end is missing")]
    Short {
        /// What there is.
        found: u64,
        /// What there should be.
        expected: u64,
    },
    /// Changed.
    #[error("this backup is damaged: its checksum does not fit; use another one")]
    Damaged,
}

/// The file with this content.
pub fn seal(content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    bytes.extend_from_slice(&crc32fast::hash(content).to_be_bytes());
    bytes.extend_from_slice(&(content.len() as u64).to_be_bytes());
    bytes.extend_from_slice(content);
    bytes
}

/// The content of a file.
///
/// # Errors
/// [`BackupError`].
pub fn open(bytes: &[u8]) -> Result<&[u8], BackupError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(BackupError::Foreign)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(BackupError::Foreign)?;
    let version = u32::from_be_bytes(*version);
    if version != VERSION {
        return Err(BackupError::Version { version });
    }
    let (sum, rest) = rest.split_first_chunk::<4>().ok_or(BackupError::Foreign)?;
    let (length, content) = rest.split_first_chunk::<8>().ok_or(BackupError::Foreign)?;
    let (found, expected) = (content.len() as u64, u64::from_be_bytes(*length));
    match crc32fast::hash(content) == u32::from_be_bytes(*sum) {
        _ if found < expected => Err(BackupError::Short { found, expected }),
        true if found == expected => Ok(content),
        _ => Err(BackupError::Damaged),
    }
}

/// Writes a file that appears whole or not at all, and only its owner may read.
///
/// # Errors
/// The file system's; a file that is there is kept unless `replace`.
pub fn write(path: &Path, bytes: &[u8], replace: bool) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if !replace && path.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let beside = PathBuf::from(format!("{}.part", path.display()));
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        // A part of a backup is of no use.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_opened_and_what_is_changed_or_cut_is_not() {
        let good = seal(b"all that is known");
        assert_eq!(open(&good), Ok(&b"all that is known"[..]));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(open(&bad).is_err(), "byte {at}");
            assert!(open(&good[..at]).is_err(), "{at} bytes");
        }
        assert_eq!(open(&good[..30]), Err(BackupError::Short { found: 6, expected: 17 }));
        assert!(open(&[&good[..], b"x"].concat()).is_err());
    }

    #[test]
    fn a_file_is_replaced_only_when_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backup");
        write(&path, b"one", false).unwrap();
        assert_eq!(write(&path, b"two", false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        write(&path, b"two", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(write(&folder.path().join("nowhere/backup"), b"one", false).is_err());
    }
}
