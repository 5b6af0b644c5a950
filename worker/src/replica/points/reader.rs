//! Reads a point: first what later points have undone, then what an open layer has saved, then the replica.
//!
//! A reader stays right while later points are put in place and pruned: each undo file is shown to all readers before the
//! first byte of its point is written in place, and a reader holds the files that it needs open.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::PointError;
use super::format::{FileId, Kind, LAYER_FILE};
use super::group::{Core, Group, Inner, Shared, disk_error};
use super::layer::Place;
use super::lease::LeaseEnd;
use super::log_reader::{Entry, Fault, Log};
use super::ranges::Segments;
use super::record::Record;

/// Where a reader finds what the replica no longer holds.
#[derive(Debug)]
pub(super) struct ReaderIndex {
    disk: u16,
    /// The point whose lease it ends with.
    leased: Option<u64>,
    size_bytes: Option<u64>,
    logs: Vec<(FileId, Log)>,
    /// With the number of the file in `logs`.
    places: Segments<(u32, Place)>,
}

impl ReaderIndex {
    /// The point whose lease it ends with; [`None`]: it needs none.
    pub(super) fn leased_point(&self) -> Option<u64> {
        self.leased
    }

    /// Puts an undo file behind those that are there; where both hold something, the earlier wins.
    fn extend(&mut self, id: FileId, log: &Log, entries: &[Entry]) {
        if self.logs.iter().any(|(known, _)| *known == id) {
            return;
        }
        let number = self.logs.len() as u32;
        self.logs.push((id, log.clone()));
        for Entry { at, head } in entries.iter().filter(|entry| entry.head.disk == self.disk) {
            let place = match head.kind {
                Kind::Data => Place::Data { at: *at, offset: head.offset },
                Kind::Zero => Place::Zero,
                Kind::Resize => {
                    self.size_bytes.get_or_insert(head.offset);
                    continue;
                }
                Kind::Seal | Kind::Mark => continue,
            };
            self.places.fill(head.offset, head.offset.saturating_add(head.length), (number, place));
        }
    }
}

/// Reads one disk as it was at one point.
#[derive(Debug)]
pub struct PointReader {
    inner: Arc<Inner>,
    id: u64,
    point: u64,
    disk: u16,
    size_bytes: u64,
    /// The record that was read last: reads in a row would decompress it again and again.
    last: Mutex<Option<LastRead>>,
}

/// File, place, content.
type LastRead = (FileId, u64, Arc<Vec<u8>>);

/// Why a part could not be read.
enum Failed {
    Undo { file: FileId, fault: Fault },
    Other(PointError),
}

impl Group {
    /// Opens a disk as it was at a point, for a short time: what is pruned meanwhile stays on the disk unaccounted until the reader is
    /// dropped. What lasts takes a [lease](Self::lease). A committed point that is not in place yet is put in place first.
    ///
    /// # Errors
    /// [`PointError::NoPoint`]; [`PointError::NoDisk`], also for one that was added after the point; [`PointError::Lost`] when an undo file is damaged; as [`Self::apply`].
    pub fn reader(&self, point: u64, disk: &str) -> Result<PointReader, PointError> {
        self.open_reader(point, disk, false)
    }

    pub(super) fn open_reader(&self, point: u64, disk: &str, leased: bool) -> Result<PointReader, PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        inner.apply(&mut core)?;
        let number = inner.disk_number(disk)?;
        let there = |record: &&Record| match leased {
            true => record.held.iter().any(|held| held.point.number == point),
            false => record.find(point).is_some(),
        };
        let record = core.record.as_ref().filter(there);
        let record = record.ok_or(PointError::NoPoint { number: point })?.clone();
        let leased = leased.then_some(point);
        let mut index =
            ReaderIndex { disk: number, leased, size_bytes: None, logs: Vec::new(), places: Segments::default() };
        for id in record.undo_files().into_iter().filter(|id| id.point > point) {
            match inner.load(id) {
                Ok((log, entries)) => index.extend(id, &log, &entries),
                Err(fault) => return Err(inner.lose(&mut core, id, fault)),
            }
        }
        let size_bytes = index.size_bytes.or(record.disks.get(disk).copied()).filter(|size| *size > 0);
        let size_bytes = size_bytes.ok_or_else(|| PointError::NoDisk { disk: disk.to_owned() })?;
        let id = core.next_id();
        inner.shared.write().unwrap_or_else(PoisonError::into_inner).readers.insert(id, index);
        Ok(PointReader { inner: inner.clone(), id, point, disk: number, size_bytes, last: Mutex::default() })
    }
}

impl PointReader {
    /// Size of the disk at that point, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads exactly `into.len()` bytes.
    ///
    /// # Errors
    /// [`PointError::Hostile`] past the end; [`PointError::Gone`]; [`PointError::Lost`] when an undo file is damaged;
    /// [`PointError::Damaged`] when a layer's is; a file or disk failed.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PointError> {
        let end = offset.checked_add(into.len() as u64).filter(|end| *end <= self.size_bytes);
        let end = end.ok_or(PointError::Hostile { what: "a read past the end of the disk" })?;
        let read = {
            let shared = self.inner.shared.read().unwrap_or_else(PoisonError::into_inner);
            self.read_from(&shared, offset, end, into)
        };
        read.map_err(|failed| match failed {
            Failed::Other(error) => error,
            Failed::Undo { file, fault } => self.lose(file, fault),
        })
    }

    fn read_from(&self, shared: &Shared, offset: u64, end: u64, mut into: &mut [u8]) -> Result<(), Failed> {
        let gone = || Failed::Other(PointError::Gone { number: self.point });
        let index = shared.readers.get(&self.id).ok_or_else(gone)?;
        for part in index.places.parts(offset, end) {
            let (piece, rest) = into.split_at_mut((part.end - part.start) as usize);
            into = rest;
            match part.value {
                None => self.read_newest(shared, part.start, piece)?,
                Some((_, Place::Zero)) => piece.fill(0),
                Some((log, Place::Data { at, offset })) => {
                    let (file, log) = index.logs.get(log as usize).ok_or_else(gone)?;
                    let raw = self.payload(*file, log, at).map_err(|fault| Failed::Undo { file: *file, fault })?;
                    copy_from(&raw, part.start - offset, piece).map_err(|fault| Failed::Undo { file: *file, fault })?;
                }
            }
        }
        Ok(())
    }

    /// Reads the newest point: what the layer has saved, else the replica.
    fn read_newest(&self, shared: &Shared, offset: u64, mut into: &mut [u8]) -> Result<(), Failed> {
        let Some((name, disk)) = self.inner.disk(self.disk) else { return Ok(()) };
        let whole = Segments::default();
        let saved = shared.layer.as_ref().and_then(|view| view.saved.get(usize::from(self.disk)));
        for part in saved.unwrap_or(&whole).parts(offset, offset + into.len() as u64) {
            let (piece, rest) = into.split_at_mut((part.end - part.start) as usize);
            into = rest;
            match (part.value, &shared.layer) {
                (Some(Place::Zero), _) => piece.fill(0),
                (Some(Place::Data { at, offset }), Some(view)) => {
                    let copied = view.log.payload_at(at).and_then(|raw| copy_from(&raw, part.start - offset, piece));
                    copied.map_err(|fault| Failed::Other(layer_damage(fault)))?;
                }
                _ => disk.read(part.start, piece).map_err(|error| Failed::Other(disk_error("read", name)(error)))?,
            }
        }
        Ok(())
    }

    fn payload(&self, file: FileId, log: &Log, at: u64) -> Result<Arc<Vec<u8>>, Fault> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, place, raw)) = &*last
            && (*of, *place) == (file, at)
        {
            return Ok(raw.clone());
        }
        let raw = Arc::new(log.payload_at(at)?);
        *last = Some((file, at, raw.clone()));
        Ok(raw)
    }

    fn lose(&self, file: FileId, fault: Fault) -> PointError {
        let mut core = self.inner.core();
        // Only if these are still the points that were read.
        let current = self.inner.shared.read().unwrap_or_else(PoisonError::into_inner).readers.contains_key(&self.id)
            && core.record.as_ref().is_some_and(|record| record.undo_files().contains(&file));
        if current {
            return self.inner.lose(&mut core, file, fault);
        }
        fault.damage(file).map_or_else(|error| error, |reason| PointError::Lost { reason })
    }
}

impl Drop for PointReader {
    fn drop(&mut self) {
        self.inner.shared.write().unwrap_or_else(PoisonError::into_inner).readers.remove(&self.id);
    }
}

impl Inner {
    pub(super) fn has_readers(&self) -> bool {
        !self.shared.read().unwrap_or_else(PoisonError::into_inner).readers.is_empty()
    }

    fn load(&self, id: FileId) -> Result<(Log, Vec<Entry>), Fault> {
        let log = Log::open(&*self.medium.folder, id)?;
        let entries = log.entries()?;
        Ok((log, entries))
    }

    /// Shows the undo file of a point to all open readers, before the first byte of the point is put in place.
    pub(super) fn show_readers(&self, core: &mut Core, record: &Record, newest: u64) -> Result<(), PointError> {
        if !self.has_readers() {
            return Ok(());
        }
        let id = record.undo(newest);
        match self.load(id) {
            Ok((log, entries)) => {
                let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
                shared.readers.values_mut().for_each(|reader| reader.extend(id, &log, &entries));
                Ok(())
            }
            Err(fault) => {
                let reason = fault.damage(id)?;
                self.close_readers(&LeaseEnd::Lost { reason: reason.clone() });
                self.lose_before(core, newest, &reason)
            }
        }
    }

    fn lose(&self, core: &mut Core, file: FileId, fault: Fault) -> PointError {
        let lost = fault.damage(file).and_then(|reason| {
            self.lose_before(core, file.point, &reason)?;
            Ok(PointError::Lost { reason })
        });
        lost.unwrap_or_else(|error| error)
    }
}

fn copy_from(raw: &[u8], start: u64, into: &mut [u8]) -> Result<(), Fault> {
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    let from = start.checked_add(into.len()).and_then(|end| raw.get(start..end));
    into.copy_from_slice(from.ok_or(Fault::Damaged("a record is shorter than it was"))?);
    Ok(())
}

fn layer_damage(fault: Fault) -> PointError {
    match fault {
        Fault::Io(source) => PointError::File { what: "read", file: LAYER_FILE.to_owned(), source },
        Fault::Damaged(why) => PointError::Damaged { reason: format!("layer.undo is damaged: {why}") },
    }
}
