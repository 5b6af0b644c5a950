//! What an index file touches outside itself: its bytes and its folder; and the host's own of each.
//!
//! The seam is here so that tests can end the power after every single step, and lose any part of what was not synced.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;

use pageport_mapped::Mapped;

/// The bytes of a file. A write shows at once, and is on stable storage after [`Self::sync`] at the latest.
pub(super) trait Medium: Debug + Send + Sync {
    /// Mapped: looking at them may read from the device.
    fn bytes(&self) -> &[u8];
    /// Reads exactly `into.len()` bytes, with an error where they cannot be read.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Gives space back; what the range reads as from then on is undefined.
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
}

/// The folder of one view: a file for each disk, named by its number.
pub(super) trait Shelf: Debug + Send + Sync {
    fn list(&self) -> io::Result<Vec<u16>>;
    /// A file of zeros, in place of one that there was.
    fn create(&self, disk: u16, length: u64) -> io::Result<Box<dyn Medium>>;
    fn open(&self, disk: u16) -> io::Result<Box<dyn Medium>>;
    /// Deletes a file, there or not.
    fn remove(&self, disk: u16) -> io::Result<()>;
}

impl Medium for Mapped {
    fn bytes(&self) -> &[u8] {
        Self::bytes(self)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Self::read_at(self, offset, into)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        Self::write_at(self, offset, data)
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        Self::discard(self, offset, length)
    }

    fn sync(&mut self) -> io::Result<()> {
        Self::sync(self)
    }
}

/// A folder of the host; made when it is first needed. Its names need not survive a power loss: what is lost is asked for again, and what
/// comes back says itself what it is.
#[derive(Debug)]
pub(super) struct HostShelf(pub(super) PathBuf);

impl HostShelf {
    fn path(&self, disk: u16) -> PathBuf {
        self.0.join(disk.to_string())
    }
}

impl Shelf for HostShelf {
    fn list(&self) -> io::Result<Vec<u16>> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    fn create(&self, disk: u16, length: u64) -> io::Result<Box<dyn Medium>> {
        std::fs::create_dir_all(&self.0)?;
        Ok(Box::new(Mapped::create(&self.path(disk), length)?))
    }

    fn open(&self, disk: u16) -> io::Result<Box<dyn Medium>> {
        Ok(Box::new(Mapped::open(&self.path(disk))?))
    }

    fn remove(&self, disk: u16) -> io::Result<()> {
        match std::fs::remove_file(self.path(disk)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
