//! A file of the worker's own, mapped for reading: as large as it must be, and in memory only as far as the system likes.
//!
//! ```text
//!   bytes()     ◀── map of the whole file, shared, read-only ─┐
//!   write_at()  ──▶ pwrite ──────────────────────────────────▶ page cache ─▶ file        sync() waits for it
//! ```
//! Exists because a map has no safe constructor: the file behind it could change or shrink while it is looked at. Here it cannot:
//! - the file is opened here by its path, never handed out, and locked (`flock`), so no other worker has it;
//! - it is written only through `&mut self`, when nobody can hold what [`Mapped::bytes`] has lent;
//! - its length is set before it is mapped and never again; a write past the end is refused.
//!
//! Nothing is written through the map. So a full disk is an error of [`Mapped::write_at`], whatever the file system does when it is asked
//! to set space aside, and never a signal. What remains is what no map can exclude: somebody with the worker's rights who disregards the
//! lock, and a device that cannot read the file; the latter ends the process with `SIGBUS`, so read a file once with
//! [`Mapped::read_at`], which returns an error, before its map is trusted.
//!
//! Does not know what the file holds.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use memmap2::Mmap;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// An open file and its map.
#[derive(Debug)]
pub struct Mapped {
    file: File,
    map: Mmap,
}

impl Mapped {
    /// Makes a file of `length` bytes that read as zeros and take no space, in place of one that has this path.
    ///
    /// # Errors
    /// The system's, or `InvalidInput` for a length of 0.
    pub fn create(path: &Path, length: u64) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            // An older map keeps its file, which has no name any more.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.try_lock()?;
        file.set_len(length)?;
        Self::map(file)
    }

    /// Opens a file as it is.
    ///
    /// # Errors
    /// The system's, `WouldBlock` when another process has it, or `InvalidInput` when it is empty or no file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        file.try_lock()?;
        Self::map(file)
    }

    fn map(file: File) -> io::Result<Self> {
        let about = file.metadata()?;
        if !about.is_file() || about.len() == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty file, or none, cannot be mapped"));
        }
        // SAFETY: the map is of this file's whole present length, which nothing changes: this type has no way to, its `file` never
        // leaves it, and the exclusive lock that is held keeps other workers out. The bytes change only in `write_at` and `discard`,
        // which need `&mut self`, so no slice of `bytes` is alive then.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { file, map })
    }

    /// All of the file, as it is now. Looking at it may read from the device.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Reads exactly `into.len()` bytes with a system call.
    ///
    /// # Errors
    /// The system's, or `UnexpectedEof` past the end.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Writes; [`Self::bytes`] shows it at once.
    ///
    /// # Errors
    /// The system's, such as a full disk, or `InvalidInput` past the end.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    /// Makes a range read as zeros and gives its space back; where the file system cannot, nothing happens.
    ///
    /// # Errors
    /// The system's, or `InvalidInput` past the end.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.file.as_fd(), hole, offset.cast_signed(), length.cast_signed()) {
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// The system's; what is on stable storage is unknown then.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.map.len() as u64 => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "past the end of a mapped file")),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_written_is_seen_in_the_map_and_in_the_file_and_nothing_extends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut mapped = Mapped::create(&path, 10_000).unwrap();
        assert!(mapped.bytes() == [0; 10_000]);
        mapped.write_at(4_090, b"across a page").unwrap();
        assert_eq!(&mapped.bytes()[4_090..][..13], b"across a page");
        let past = mapped.write_at(9_999, b"ab").unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(mapped.write_at(u64::MAX, b"ab").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        mapped.sync().unwrap();
        drop(mapped);

        let again = Mapped::open(&path).unwrap();
        assert_eq!(again.bytes().len(), 10_000);
        let mut read = [0; 13];
        again.read_at(4_090, &mut read).unwrap();
        assert_eq!(&read, b"across a page");
    }

    #[test]
    fn only_one_has_a_file_open_and_one_made_anew_leaves_the_older_map_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut older = Mapped::create(&path, 100).unwrap();
        older.write_at(0, b"older").unwrap();
        assert_eq!(Mapped::open(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let newer = Mapped::create(&path, 50).unwrap();
        assert_eq!((older.bytes().len(), &older.bytes()[..5]), (100, b"older".as_slice()));
        assert_eq!(newer.bytes(), [0; 50]);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert_eq!(Mapped::open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(Mapped::create(&path, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Mapped::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(Mapped::create(&folder.path().join("no").join("folder"), 1).is_err());
    }

    #[test]
    fn space_is_taken_by_what_is_written_and_given_back() {
        const LENGTH: u64 = 1 << 24;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut mapped = Mapped::create(&path, LENGTH).unwrap();
        let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(taken(), 0);
        mapped.write_at(0, &[1; 1 << 20]).unwrap();
        mapped.sync().unwrap();
        let full = taken();
        assert!((1 << 20..2 << 20).contains(&full), "{full}");
        mapped.discard(0, 1 << 20).unwrap();
        assert!(taken() < full);
        assert!(mapped.bytes().iter().all(|byte| *byte == 0));
        assert!(mapped.discard(LENGTH, 1).is_err());
    }
}
