//! The whole state as one file: `snapshot`, replaced at once, with a checksum.
//!
//! ```text
//!   "PPSNAP1\n"  crc32 of the rest (u32, big-endian)  JSON of Snapshot
//! ```
//! Guarantees: the file is the old or the new one, never a mixture (write beside, fsync, rename, fsync the folder), and
//! damage is noticed when it is read.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::membership::Membership;
use crate::model::State;

const MAGIC: &[u8; 8] = b"PPSNAP1\n";
const FILE: &str = "snapshot";
const FILE_BESIDE: &str = "snapshot.new";

/// The state up to and including one entry.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The entry.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Who the controllers were at that entry; [`None`] in snapshots of versions that had it in the configuration alone.
    #[serde(default)]
    pub membership: Option<Membership>,
    /// The state.
    pub state: State,
}

/// Why a snapshot could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system said no.
    #[error("{operation} the snapshot {}", path.display())]
    File {
        /// `read`, `write` or `replace`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The bytes are not what was written.
    #[error("the snapshot is damaged")]
    Damaged,
    /// The bytes are no state of this version.
    #[error("decode the snapshot: is it of a newer version?")]
    Decode(#[source] serde_json::Error),
    /// The state cannot be written as JSON.
    #[error("encode the snapshot")]
    Encode(#[source] serde_json::Error),
}

impl SnapshotError {
    /// Are the bytes not what was written?
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged)
    }
}

/// To bytes, for the file and for peers.
///
/// # Errors
/// [`SnapshotError::Encode`].
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, SnapshotError> {
    let body = serde_json::to_vec(snapshot).map_err(SnapshotError::Encode)?;
    let mut bytes = Vec::with_capacity(MAGIC.len() + 4 + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&crc32fast::hash(&body).to_be_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// From bytes.
///
/// # Errors
/// [`SnapshotError::Damaged`] or [`SnapshotError::Decode`].
pub fn decode(bytes: &[u8]) -> Result<Snapshot, SnapshotError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(SnapshotError::Damaged)?;
    let (sum, body) = rest.split_first_chunk::<4>().ok_or(SnapshotError::Damaged)?;
    if crc32fast::hash(body) != u32::from_be_bytes(*sum) {
        return Err(SnapshotError::Damaged);
    }
    serde_json::from_slice(body).map_err(SnapshotError::Decode)
}

/// Replaces the file in `folder`.
///
/// # Errors
/// [`SnapshotError::File`]: the old file stands.
pub fn replace(folder: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let beside = folder.join(FILE_BESIDE);
    let fail = |operation| {
        let path = beside.clone();
        move |source| SnapshotError::File { operation, path, source }
    };
    let mut file = File::create(&beside).map_err(fail("write"))?;
    if let Err(source) = file.write_all(bytes).and_then(|()| file.sync_all()) {
        // A part of a file is of no use, and the room may be needed.
        let _ = fs::remove_file(&beside);
        return Err(fail("write")(source));
    }
    fs::rename(&beside, folder.join(FILE)).map_err(fail("replace"))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail("replace"))
}

/// Removes what a crash left of files that were being written.
///
/// # Errors
/// [`SnapshotError::File`].
pub fn clean_up(folder: &Path) -> Result<(), SnapshotError> {
    for file in [FILE_BESIDE, super::shipping::FILE] {
        let path = folder.join(file);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(SnapshotError::File { operation: "clean up", path, source });
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Where the snapshot of `folder` lies.
pub fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Reads the file in `folder`; [`None`] when there is none yet. Damage is found by [`decode`].
///
/// # Errors
/// [`SnapshotError::File`].
pub fn read(folder: &Path) -> Result<Option<Vec<u8>>, SnapshotError> {
    let path = path(folder);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SnapshotError::File { operation: "read", path, source }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let snapshot = Snapshot { index: 7, term: 2, membership: Some(Membership::default()), state: State::default() };
        let good = encode(&snapshot).unwrap();
        assert_eq!(decode(&good).unwrap(), snapshot);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
        assert!(decode(&good[..10]).is_err());
    }

    #[test]
    fn the_newest_snapshot_is_the_one_that_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap().is_none());
        for index in [1, 2] {
            let snapshot = Snapshot { index, ..Snapshot::default() };
            replace(folder.path(), &encode(&snapshot).unwrap()).unwrap();
            let bytes = read(folder.path()).unwrap().unwrap();
            assert_eq!(decode(&bytes).unwrap(), snapshot);
        }
    }
}
