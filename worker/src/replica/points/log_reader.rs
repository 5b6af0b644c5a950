//! Reads journals and undo files, and trusts none of them.

use std::io;
use std::sync::Arc;

use super::error::PointError;
use super::format::{FileId, HEAD_BYTES, HEADER_BYTES, Head, Kind, SEAL_BYTES};
use super::group::file_error;
use super::medium::{Folder, PointFile};
use crate::replica::serve::MAX_WRITE_BYTES;

/// Looked through at a time for a mark, in bytes.
const SCAN_BYTES: usize = 256 << 10;

/// Why a file cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// The system failed; trying again may help.
    Io(io::Error),
    /// The file is not what was written.
    Damaged(&'static str),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it is cut off"),
            io::ErrorKind::NotFound => Self::Damaged("it is missing"),
            _ => Self::Io(error),
        }
    }
}

impl Fault {
    /// Says what is damaged, or that the system failed.
    pub(super) fn damage(self, file: FileId) -> Result<String, PointError> {
        match self {
            Self::Io(source) => Err(file_error("read", &file.name())(source)),
            Self::Damaged(why) => Ok(format!("{} is damaged: {why}", file.name())),
        }
    }
}

/// A record and its place in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) head: Head,
}

impl Entry {
    /// The first byte of the disk after the record's range.
    pub(super) fn end(&self) -> u64 {
        self.head.offset.saturating_add(self.head.length)
    }
}

/// A file that can be read.
#[derive(Debug, Clone)]
pub(super) struct Log {
    file: Arc<dyn PointFile>,
    header: [u8; HEADER_BYTES],
    length: u64,
}

impl Log {
    /// Opens a file and checks its header.
    pub(super) fn open(folder: &dyn Folder, id: FileId) -> Result<Self, Fault> {
        let file = folder.open(&id.name())?;
        let mut header = [0; HEADER_BYTES];
        file.read_at(0, &mut header)?;
        if !id.fits(&header) {
            return Err(Fault::Damaged("its header is not that of the file that should be here"));
        }
        let length = file.len()?;
        Ok(Self { file, header, length })
    }

    /// A file that is still being written, for reading what is in it so far.
    pub(super) fn of_writer(file: Arc<dyn PointFile>, header: [u8; HEADER_BYTES]) -> Self {
        Self { file, header, length: u64::MAX }
    }

    /// Walks through a sealed file in order. What it calls back for is proven only when it returns `Ok`; payloads are proven
    /// by [`Self::payload`].
    pub(super) fn walk(&self, mut each: impl FnMut(Entry)) -> Result<(), Fault> {
        let mut heads = blake3::Hasher::new();
        heads.update(&self.header);
        let mut count = 0;
        let mut at = HEADER_BYTES as u64;
        loop {
            let head = self.head(at)?.ok_or(Fault::Damaged("it holds a record of no known kind"))?;
            let entry = Entry { at, head };
            match head.kind {
                Kind::Seal => {
                    let whole = (head.offset, head.length) == (count, at);
                    let last = at + HEAD_BYTES as u64 + u64::from(head.stored) == self.length;
                    let good = head.stored as usize == SEAL_BYTES && whole && last;
                    if !good || self.stored(entry)? != heads.finalize().as_bytes() {
                        return Err(Fault::Damaged("its seal does not fit"));
                    }
                    return Ok(());
                }
                Kind::Mark => return Err(Fault::Damaged("it holds a record that belongs into another kind of file")),
                Kind::Data | Kind::Zero | Kind::Resize => each(entry),
            }
            heads.update(&head.encode());
            count += 1;
            at = self.after(entry)?;
        }
    }

    /// All records of a sealed file.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, Fault> {
        let mut entries = Vec::new();
        self.walk(|entry| entries.push(entry))?;
        Ok(entries)
    }

    /// The records of a layer's undo file: those whose batch reached stable storage, and perhaps some more.
    ///
    /// A batch that is torn never reached it, so nothing of that batch was written in place. One that is followed by its
    /// mark, or a later one, did: then the file is damaged.
    pub(super) fn layer_entries(&self) -> Result<Vec<Entry>, Fault> {
        let mut entries = Vec::new();
        let mut batch = 1;
        let mut at = HEADER_BYTES as u64;
        while at < self.length {
            let entry = match self.checked(at) {
                Ok(entry) => entry,
                Err(Fault::Damaged(_)) if !self.has_mark(at, batch)? => break,
                Err(Fault::Damaged(_)) => {
                    return Err(Fault::Damaged("a record that was on stable storage is not good"));
                }
                Err(fault) => return Err(fault),
            };
            match entry.head.kind {
                Kind::Mark => batch = entry.head.offset + 1,
                _ => entries.push(entry),
            }
            at = self.after(entry)?;
        }
        Ok(entries)
    }

    /// The raw bytes of a data record.
    pub(super) fn payload(&self, entry: Entry) -> Result<Vec<u8>, Fault> {
        let length = usize::try_from(entry.head.length).unwrap_or(usize::MAX);
        if length > MAX_WRITE_BYTES || entry.head.kind != Kind::Data {
            return Err(Fault::Damaged("it holds a record that is too large"));
        }
        let stored = self.stored(entry)?;
        let raw = zstd::bulk::decompress(&stored, length).ok().filter(|raw| raw.len() == length);
        raw.ok_or(Fault::Damaged("a record does not decompress to its length"))
    }

    /// The data record at a place.
    pub(super) fn payload_at(&self, at: u64) -> Result<Vec<u8>, Fault> {
        let head = self.head(at)?.ok_or(Fault::Damaged("it holds a record of no known kind"))?;
        self.payload(Entry { at, head })
    }

    fn head(&self, at: u64) -> Result<Option<Head>, Fault> {
        let mut head = [0; HEAD_BYTES];
        self.file.read_at(at, &mut head)?;
        Ok(Head::decode(&head))
    }

    fn checked(&self, at: u64) -> Result<Entry, Fault> {
        let head = self.head(at)?.ok_or(Fault::Damaged("it holds a record of no known kind"))?;
        let entry = Entry { at, head };
        self.stored(entry)?;
        Ok(entry)
    }

    fn stored(&self, entry: Entry) -> Result<Vec<u8>, Fault> {
        let length = entry.head.stored as usize;
        if length > max_stored_bytes() {
            return Err(Fault::Damaged("it holds a record that is too large"));
        }
        let mut stored = vec![0; length];
        self.file.read_at(entry.at + HEAD_BYTES as u64, &mut stored)?;
        if !entry.head.is_good(&self.header, entry.at, &stored) {
            return Err(Fault::Damaged("a record does not fit its checksum"));
        }
        Ok(stored)
    }

    fn after(&self, entry: Entry) -> Result<u64, Fault> {
        let next = entry.at + HEAD_BYTES as u64 + u64::from(entry.head.stored);
        if next > self.length { Err(Fault::Damaged("it is cut off")) } else { Ok(next) }
    }

    /// Whether a good mark of this batch or a later one lies anywhere after `from`.
    fn has_mark(&self, from: u64, batch: u64) -> Result<bool, Fault> {
        let mut chunk = Vec::new();
        let mut start = from;
        while start + (HEAD_BYTES as u64) <= self.length {
            // Overlaps the next chunk, so that no mark is cut in two.
            chunk.resize((self.length - start).min((SCAN_BYTES + HEAD_BYTES) as u64) as usize, 0);
            self.file.read_at(start, &mut chunk)?;
            for (at, bytes) in (start..).zip(chunk.windows(HEAD_BYTES)) {
                let mut head = [0; HEAD_BYTES];
                head.copy_from_slice(bytes);
                let mark = Head::decode(&head).filter(|head| head.kind == Kind::Mark && head.offset >= batch);
                if mark.is_some_and(|mark| mark.is_good(&self.header, at, &[])) {
                    return Ok(true);
                }
            }
            start += (chunk.len() - HEAD_BYTES + 1) as u64;
        }
        Ok(false)
    }
}

/// The most bytes that zstd makes of the largest write.
fn max_stored_bytes() -> usize {
    zstd::zstd_safe::compress_bound(MAX_WRITE_BYTES)
}
