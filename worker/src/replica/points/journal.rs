//! The journal of the point that is being received.

use std::sync::Arc;

use super::digest::ChangeDigest;
use super::error::PointError;
use super::format::{FileId, FileKind, HEAD_BYTES, Head, Kind, SEAL_RECORD_BYTES};
use super::group::{Core, Group, Inner, file_error};
use super::log_writer::LogWriter;
use super::record::{Phase, Record};
use super::{Lineage, MAX_DISK_BYTES, MAX_POINTS, PointInfo};
use crate::replica::serve::MAX_WRITE_BYTES;

/// The journal as the group sees it.
#[derive(Debug)]
pub(super) struct OpenJournal {
    id: u64,
    pub(super) log: LogWriter,
    digest: ChangeDigest,
    /// Sizes of the disks at this point, by number.
    sizes: Vec<u64>,
}

/// Receives the changes of one point. May be used from several threads: only the order within a disk counts.
///
/// After an error the journal is closed and its file is gone; so it is when this is dropped without a commit.
#[derive(Debug)]
pub struct JournalWriter {
    inner: Arc<Inner>,
    id: u64,
    point: u64,
}

impl Group {
    /// Begins to receive a point: the one after the newest, of the same lineage; or any of any lineage if there is none. A
    /// journal that was begun before is discarded, and a committed point that is not in place yet is put in place.
    ///
    /// # Errors
    /// [`PointError::NotNext`], [`PointError::LayerOpen`], [`PointError::Damaged`]; as [`Self::apply`].
    pub fn begin(&self, lineage: Lineage, number: u64) -> Result<JournalWriter, PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        inner.apply(&mut core)?;
        let mut sizes: Vec<_> = inner.medium.disks.iter().map(|(_, disk)| disk.size_bytes()).collect();
        if let Some(record) = core.sound()? {
            let newest = record.newest().unwrap_or_default();
            if record.phase == Phase::Layer {
                return Err(PointError::LayerOpen);
            }
            if record.lineage != lineage || newest.checked_add(1) != Some(number) {
                let newest = format!("{newest} of lineage {}", record.lineage);
                return Err(PointError::NotNext { asked: number, asked_lineage: lineage, newest });
            }
            // A disk that was added since is nothing yet.
            sizes = inner.medium.disks.iter().map(|(name, _)| record.disks.get(name).copied().unwrap_or(0)).collect();
        }
        inner.discard(&mut core)?;
        let file = FileId { kind: FileKind::Journal, lineage, point: number };
        let log = inner.create_log(&mut core, file)?;
        let id = core.next_id();
        core.journal = Some(OpenJournal { id, log, digest: ChangeDigest::default(), sizes });
        Ok(JournalWriter { inner: inner.clone(), id, point: number })
    }

    /// Makes the received point the newest: when this returns, it is never lost. [`Self::apply`] must follow, and is made up
    /// for if it does not. From then on the `keep` newest points are kept, at most [`MAX_POINTS`].
    ///
    /// # Errors
    /// [`PointError::Digest`] when something else arrived than `expected`; [`PointError::JournalClosed`];
    /// [`PointError::NoSpace`]; a file failed: the journal is discarded. After [`PointError::Store`] whether the point is
    /// committed is found by opening the group again.
    pub fn commit(
        &self,
        journal: &JournalWriter,
        info: PointInfo,
        expected: [u8; 32],
        keep: usize,
    ) -> Result<(), PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        let mut open = inner.take(&mut core, journal.id)?;
        let sealed = inner.seal(&mut core, &mut open, info, expected);
        let name = open.log.id.name();
        if let Err(error) = sealed {
            inner.remove_file(&mut core, &name)?;
            return Err(error);
        }
        let lineage = open.log.id.lineage;
        let sizes = inner.medium.disks.iter().map(|(name, _)| name.clone()).zip(open.sizes);
        let (mut points, held) =
            core.record.as_ref().map(|record| (record.points.clone(), record.held.clone())).unwrap_or_default();
        points.push(info);
        let keep = keep.clamp(1, MAX_POINTS);
        let record = Record {
            lineage,
            points,
            keep,
            held,
            disks: sizes.collect(),
            order: inner.medium.order(),
            phase: Phase::Committed,
            damaged: None,
            lost: None,
        };
        inner.save(&mut core, Some(record))
    }
}

impl Inner {
    fn take(&self, core: &mut Core, id: u64) -> Result<OpenJournal, PointError> {
        core.journal.take_if(|open| open.id == id).ok_or(PointError::JournalClosed)
    }

    /// Discards the open journal, if there is one.
    pub(super) fn discard(&self, core: &mut Core) -> Result<(), PointError> {
        match core.journal.take() {
            Some(open) => self.remove_file(core, &open.log.id.name()),
            None => Ok(()),
        }
    }

    fn seal(
        &self,
        core: &mut Core,
        open: &mut OpenJournal,
        info: PointInfo,
        expected: [u8; 32],
    ) -> Result<(), PointError> {
        let number = open.log.id.point;
        if info.number != number {
            return Err(PointError::Hostile { what: "a commit of another point than was begun" });
        }
        if open.digest.finish() != expected {
            return Err(PointError::Digest { number });
        }
        self.make_room(core, SEAL_RECORD_BYTES)?;
        open.log.seal();
        self.note_length(core, open.log.id, open.log.length());
        self.with_room(core, &mut open.log, LogWriter::write_out)?;
        open.log.sync().map_err(file_error("sync", &open.log.id.name()))?;
        self.sync_folder()
    }

    fn append(
        &self,
        journal: &JournalWriter,
        payload: &[u8],
        head: impl FnOnce(&mut OpenJournal) -> Result<Head, PointError>,
    ) -> Result<(), PointError> {
        let mut core = self.core();
        self.check(&core)?;
        let mut open = self.take(&mut core, journal.id)?;
        let appended = head(&mut open).and_then(|head| {
            self.make_room(&mut core, (HEAD_BYTES + payload.len()) as u64 + SEAL_RECORD_BYTES)?;
            open.log.append(head, payload);
            self.note_length(&mut core, open.log.id, open.log.length());
            self.with_room(&mut core, &mut open.log, LogWriter::spill)
        });
        if appended.is_err() {
            self.remove_file(&mut core, &open.log.id.name())?;
        } else {
            core.journal = Some(open);
        }
        appended
    }
}

impl JournalWriter {
    /// The number of the point.
    pub fn number(&self) -> u64 {
        self.point
    }

    /// Takes a write of `raw_length` bytes, which come as one zstd frame.
    ///
    /// # Errors
    /// [`PointError::Hostile`] when the bytes do not decompress to their length, are more than [`MAX_WRITE_BYTES`], or lie
    /// outside the disk; [`PointError::NoDisk`]; [`PointError::JournalClosed`]; [`PointError::NoSpace`]; a file failed.
    pub fn write(&self, disk: &str, offset: u64, raw_length: u32, zstd: &[u8]) -> Result<(), PointError> {
        let number = self.number_of(disk)?;
        let raw = match decompress(raw_length as usize, zstd) {
            Ok(raw) => raw,
            Err(what) => return self.refuse(what),
        };
        self.inner.append(self, zstd, |open| {
            open.inside(number, offset, raw.len() as u64)?;
            open.digest.data(disk, offset, &raw);
            Ok(Head::new(Kind::Data, number, offset, raw.len() as u64))
        })
    }

    /// Takes a range that becomes zeros.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, disk: &str, offset: u64, length: u64) -> Result<(), PointError> {
        let number = self.number_of(disk)?;
        self.inner.append(self, &[], |open| {
            open.inside(number, offset, length)?;
            open.digest.zero(disk, offset, length);
            Ok(Head::new(Kind::Zero, number, offset, length))
        })
    }

    /// The disk has grown to `size_bytes`; comes before the writes into what is new.
    ///
    /// # Errors
    /// [`PointError::Hostile`] when it would shrink, or be larger than [`MAX_DISK_BYTES`]; else as [`Self::write`].
    pub fn resize(&self, disk: &str, size_bytes: u64) -> Result<(), PointError> {
        let number = self.number_of(disk)?;
        self.inner.append(self, &[], |open| {
            let size = open.sizes.get_mut(usize::from(number));
            let size = size.filter(|size| (**size..=MAX_DISK_BYTES).contains(&size_bytes));
            let size = size.ok_or(PointError::Hostile { what: "a disk that shrinks, or is too large" })?;
            let before = std::mem::replace(size, size_bytes);
            open.digest.resize(disk, size_bytes);
            Ok(Head::new(Kind::Resize, number, size_bytes, before))
        })
    }

    fn number_of(&self, disk: &str) -> Result<u16, PointError> {
        self.inner.disk_number(disk).inspect_err(|_| self.close())
    }

    fn refuse(&self, what: &'static str) -> Result<(), PointError> {
        self.close();
        Err(PointError::Hostile { what })
    }

    fn close(&self) {
        let mut core = self.inner.core();
        if let Ok(open) = self.inner.take(&mut core, self.id) {
            // What is left over is deleted when the group is opened.
            let _ = self.inner.remove_file(&mut core, &open.log.id.name());
        }
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        self.close();
    }
}

impl OpenJournal {
    fn inside(&self, disk: u16, offset: u64, length: u64) -> Result<(), PointError> {
        let size = self.sizes.get(usize::from(disk)).copied().unwrap_or_default();
        match offset.checked_add(length) {
            Some(end) if end <= size && length > 0 => Ok(()),
            _ => Err(PointError::Hostile { what: "a change that is empty, or ends past the end of the disk" }),
        }
    }
}

fn decompress(length: usize, zstd: &[u8]) -> Result<Vec<u8>, &'static str> {
    if length > MAX_WRITE_BYTES {
        return Err("a write above the limit");
    }
    // A frame may be padded without end; what is stored must be bounded by what is written.
    if zstd.len() > zstd::zstd_safe::compress_bound(length) {
        return Err("a write that is larger compressed than it can be");
    }
    let raw = zstd::bulk::decompress(zstd, length).ok().filter(|raw| raw.len() == length);
    raw.ok_or("a write that does not decompress to its length")
}
