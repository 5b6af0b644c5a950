//! Writes a journal or undo file, record by record.

use std::io;
use std::sync::Arc;

use super::format::{FileId, HEAD_BYTES, HEADER_BYTES, Head, Kind};
use super::medium::{Folder, PointFile};

/// Collected before it is written, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// A file that is being written.
#[derive(Debug)]
pub(super) struct LogWriter {
    pub(super) id: FileId,
    file: Arc<dyn PointFile>,
    header: [u8; HEADER_BYTES],
    /// Of which the file has what is not in the buffer.
    length: u64,
    buffer: Vec<u8>,
    count: u64,
    heads: blake3::Hasher,
}

impl LogWriter {
    /// Makes the file anew, with nothing but its header.
    pub(super) fn create(folder: &dyn Folder, id: FileId) -> io::Result<Self> {
        let header = id.encode(rand::random());
        let file = folder.create(&id.name())?;
        let mut heads = blake3::Hasher::new();
        heads.update(&header);
        Ok(Self { id, file, header, length: HEADER_BYTES as u64, buffer: header.to_vec(), count: 0, heads })
    }

    pub(super) fn file(&self) -> Arc<dyn PointFile> {
        self.file.clone()
    }

    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        self.header
    }

    /// Length of the file once everything is written.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Appends a record; returns its place. May stay in memory until [`Self::sync`].
    pub(super) fn append(&mut self, head: Head, payload: &[u8]) -> u64 {
        let at = self.length;
        let head = head.with_payload(&self.header, at, payload).encode();
        self.heads.update(&head);
        self.buffer.extend_from_slice(&head);
        self.buffer.extend_from_slice(payload);
        self.length += (HEAD_BYTES + payload.len()) as u64;
        self.count += 1;
        at
    }

    /// Writes what has been collected, if it is much. May be called again after an error.
    pub(super) fn spill(&mut self) -> io::Result<()> {
        if self.buffer.len() >= BUFFER_BYTES { self.write_out() } else { Ok(()) }
    }

    /// Writes what has been collected. May be called again after an error.
    pub(super) fn write_out(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.file.write_at(self.length - self.buffer.len() as u64, &self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Everything appended so far reaches stable storage.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.write_out()?;
        self.file.sync()
    }

    /// Appends the last record of a file.
    pub(super) fn seal(&mut self) {
        let digest = self.heads.finalize();
        let (count, length) = (self.count, self.length);
        self.append(Head::new(Kind::Seal, 0, count, length), digest.as_bytes());
    }

    /// Takes back what was appended after `length`, which must be the end of a record. The file cannot be sealed after.
    pub(super) fn rewind(&mut self, length: u64) -> io::Result<()> {
        let written = self.length - self.buffer.len() as u64;
        if length >= written {
            self.buffer.truncate((length - written) as usize);
        } else {
            self.buffer.clear();
            self.length = written;
            self.file.truncate(length)?;
        }
        self.length = length;
        Ok(())
    }
}
