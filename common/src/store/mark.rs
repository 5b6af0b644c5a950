//! [`Mark`]: the number of the newest batch that was on stable storage, in a file of its own.
//!
//! ```text
//!   number (u64, big-endian)  crc32 of it (u32, big-endian)
//! ```
//! Guarantees: the file is there, on stable storage, before the first batch is; it never names a batch that was not on stable
//! storage. It is not synced with each batch, which would double what a commit costs: after a power loss it may name an
//! older one, and what is damaged behind that goes unnoticed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const FILE: &str = "newest-batch";
const FILE_BESIDE: &str = "newest-batch.new";
const BYTES: usize = 12;

/// Why the mark is of no use.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// The file system said no.
    #[error("read or write {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{} is damaged: whether the store beside it is whole cannot be told", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// It was there once.
    #[error("{} is missing: whether the store beside it is whole cannot be told", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

impl MarkError {
    /// Is it not what was written?
    pub fn is_damage(&self) -> bool {
        match self {
            Self::File { .. } => false,
            Self::Damaged { .. } | Self::Missing { .. } => true,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
    file: File,
    newest: u64,
}

fn encode(number: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&crc32fast::hash(&number.to_be_bytes()).to_be_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<u64> {
    let number = u64::from_be_bytes(*bytes.first_chunk::<8>()?);
    (bytes == encode(number)).then_some(number)
}

/// There is one or there is none, never a part of one.
fn create(folder: &Path, path: &Path) -> Result<(), MarkError> {
    let fail = |source| MarkError::File { path: path.to_owned(), source };
    let beside = folder.join(FILE_BESIDE);
    let mut file = File::create(&beside).map_err(fail)?;
    file.write_all(&encode(0)).and_then(|()| file.sync_all()).map_err(fail)?;
    fs::rename(&beside, path).map_err(fail)
}

impl Mark {
    /// Opens the mark of the store in `folder`, whose newest batch is `found`. A store without numbered batches gets one.
    ///
    /// # Errors
    /// [`MarkError`].
    pub fn open(folder: &Path, found: u64) -> Result<Self, MarkError> {
        let path = folder.join(FILE);
        let fail = |source| MarkError::File { path: path.clone(), source };
        match path.try_exists().map_err(fail)? {
            false if found == 0 => create(folder, &path)?,
            false => return Err(MarkError::Missing { path }),
            true => {}
        }
        let bytes = fs::read(&path).map_err(fail)?;
        let newest = decode(&bytes).ok_or_else(|| MarkError::Damaged { path: path.clone() })?;
        let file = File::options().write(true).open(&path).map_err(fail)?;
        Ok(Self { path, file, newest })
    }

    /// The newest batch that it names.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// This batch is on stable storage, and all before it.
    ///
    /// # Errors
    /// [`MarkError::File`].
    pub fn reached(&mut self, number: u64) -> Result<(), MarkError> {
        if number <= self.newest {
            return Ok(());
        }
        self.newest = number;
        self.file.write_all_at(&encode(number), 0).map_err(|source| MarkError::File { path: self.path.clone(), source })
    }
}
