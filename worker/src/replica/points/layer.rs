//! What a migration writes in place, behind an undo file.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError};

use super::apply::old_content;
use super::error::PointError;
use super::format::{HEAD_BYTES, Head, Kind};
use super::group::{Core, Group, Inner, disk_error, file_error};
use super::log_reader::{Fault, Log};
use super::log_writer::LogWriter;
use super::ranges::Segments;
use super::record::{Phase, Record};
use crate::replica::store::BLOCK_BYTES;

/// Where the old content of a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Zero,
    /// In the record at `at` of the file, whose content begins at `offset` of the disk.
    Data {
        at: u64,
        offset: u64,
    },
}

/// The layer as the group sees it.
#[derive(Debug)]
pub(super) struct OpenLayer {
    id: u64,
    log: LogWriter,
    batch: u64,
    /// What the end of the file holds is unknown: nothing more may be changed.
    broken: bool,
}

/// The layer as readers see it: what has been saved, by number of the disk.
#[derive(Debug)]
pub(super) struct LayerView {
    pub(super) log: Log,
    pub(super) saved: Vec<Segments<Place>>,
}

/// A change in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// Bytes are written.
    Write {
        /// The disk.
        disk: &'a str,
        /// Place, in bytes.
        offset: u64,
        /// What is written.
        data: &'a [u8],
    },
    /// A range becomes zeros, and a hole.
    Zero {
        /// The disk.
        disk: &'a str,
        /// Place, in bytes.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// Writes the replica in place, over its newest point. Dropping it decides nothing: the layer stays open until it is undone
/// or kept, and is undone when the group is opened again.
#[derive(Debug)]
pub struct Layer {
    inner: Arc<Inner>,
    id: u64,
}

impl Group {
    /// Opens the layer. A journal that was begun is discarded, and a committed point is put in place first.
    ///
    /// # Errors
    /// [`PointError::Empty`] without points: a replica without points is written as it is. [`PointError::LayerOpen`];
    /// [`PointError::Damaged`]; as [`Self::apply`].
    pub fn open_layer(&self) -> Result<Layer, PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        inner.apply(&mut core)?;
        let mut record = core.sound()?.ok_or(PointError::Empty)?.clone();
        if record.phase == Phase::Layer {
            return Err(PointError::LayerOpen);
        }
        inner.discard(&mut core)?;
        let file = record.layer();
        let mut log = inner.create_log(&mut core, file)?;
        log.sync().map_err(file_error("sync", &file.name()))?;
        inner.sync_folder()?;
        let view = LayerView {
            log: Log::of_writer(log.file(), log.header()),
            saved: inner.medium.disks.iter().map(|_| Segments::default()).collect(),
        };
        // Points may have been given up for room since.
        if let Some(now) = &core.record {
            record = now.clone();
        }
        record.phase = Phase::Layer;
        inner.save(&mut core, Some(record))?;
        inner.shared.write().unwrap_or_else(PoisonError::into_inner).layer = Some(view);
        let id = core.next_id();
        core.layer = Some(OpenLayer { id, log, batch: 0, broken: false });
        Ok(Layer { inner: inner.clone(), id })
    }

    /// Undoes the open layer, whoever holds it: the replica is its newest point again, in content and size, whether a layer is open or not.
    ///
    /// # Errors
    /// As [`Layer::undo`].
    pub fn undo_layer(&self) -> Result<(), PointError> {
        let mut core = self.inner.core();
        self.inner.check(&core)?;
        self.inner.undo_layer(&mut core)?;
        self.inner.fit_disks(&core)
    }
}

impl Layer {
    /// Carries out changes in order. What was there before is on stable storage before the first of them is in place; what
    /// the layer has saved before is not saved again.
    ///
    /// # Errors
    /// [`PointError::Hostile`] and [`PointError::NoDisk`] for a change outside the disks; [`PointError::NoSpace`]: none of the
    /// changes is in place, and the layer goes on. [`PointError::Disk`]: some may be. [`PointError::LayerClosed`]; a file
    /// failed: only undoing is left.
    pub fn change(&self, changes: &[Change<'_>]) -> Result<(), PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        let mut open = core.layer.take_if(|open| open.id == self.id).ok_or(PointError::LayerClosed)?;
        let changed = inner.change(&mut core, &mut open, changes);
        core.layer = Some(open);
        changed
    }

    /// Writes bytes; one change on its own.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn write(&self, disk: &str, offset: u64, data: &[u8]) -> Result<(), PointError> {
        self.change(&[Change::Write { disk, offset, data }])
    }

    /// Makes a range zeros; one change on its own.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn zero(&self, disk: &str, offset: u64, length: u64) -> Result<(), PointError> {
        self.change(&[Change::Zero { disk, offset, length }])
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// [`PointError::Disk`].
    pub fn flush(&self) -> Result<(), PointError> {
        self.inner.flush_disks()
    }

    /// Takes everything back: the replica is its newest point again.
    ///
    /// # Errors
    /// A file or disk failed: the layer is still open, and [`Group::undo_layer`] may be tried again.
    /// [`PointError::Damaged`] when the undo file is damaged: the replica is a mixture. [`PointError::LayerClosed`].
    pub fn undo(self) -> Result<(), PointError> {
        let mut core = self.closing()?;
        self.inner.undo_layer(&mut core)?;
        self.inner.fit_disks(&core)
    }

    /// Keeps everything, on stable storage, and forgets the points: the replica is somebody's disk now.
    ///
    /// # Errors
    /// [`PointError::LayerClosed`]; the worker's store or a disk failed.
    pub fn keep(self) -> Result<(), PointError> {
        let mut core = self.closing()?;
        self.inner.forget(&mut core)
    }

    fn closing(&self) -> Result<std::sync::MutexGuard<'_, Core>, PointError> {
        let core = self.inner.core();
        self.inner.check(&core)?;
        let ours = core.layer.as_ref().is_some_and(|open| open.id == self.id);
        if ours { Ok(core) } else { Err(PointError::LayerClosed) }
    }
}

impl Inner {
    fn change(&self, core: &mut Core, open: &mut OpenLayer, changes: &[Change<'_>]) -> Result<(), PointError> {
        if open.broken {
            return Err(PointError::LayerClosed);
        }
        let changes: Vec<_> = changes.iter().map(|change| self.place(change)).collect::<Result<_, _>>()?;
        let before = open.log.length();
        let saved = match self.save_old(core, open, &changes) {
            Ok(saved) => saved,
            Err(error) => {
                open.broken |= open.log.rewind(before).is_err();
                self.note_length(core, open.log.id, open.log.length());
                return Err(error);
            }
        };
        if open.log.length() > before {
            if let Err(error) = open.log.sync() {
                open.broken = true;
                return Err(file_error("sync", &open.log.id.name())(error));
            }
            open.batch += 1;
            let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
            let view = shared.layer.as_mut().map(|view| view.saved.as_mut_slice()).unwrap_or_default();
            for (number, start, end, place) in saved {
                if let Some(disk) = view.get_mut(usize::from(number)) {
                    disk.fill(start, end, place);
                }
            }
        }
        let batch_bytes = open.log.length() - before;
        for change in &changes {
            self.carry_out(change)?;
        }
        if batch_bytes > 0 {
            open.log.append(Head::new(Kind::Mark, 0, open.batch, 0), &[]);
            self.note_length(core, open.log.id, open.log.length());
            // A mark only helps to find damage. One that fails is written with the next batch.
            let _ = open.log.write_out();
        }
        Ok(())
    }

    /// Writes what the changes are about to replace into the undo file, as far as it is not there yet.
    fn save_old(
        &self,
        core: &mut Core,
        open: &mut OpenLayer,
        changes: &[Placed<'_>],
    ) -> Result<Vec<(u16, u64, u64, Place)>, PointError> {
        let mut saved = Vec::new();
        let mut fresh: BTreeMap<u16, Segments<Place>> = BTreeMap::new();
        for change in changes {
            let Some((name, disk)) = self.disk(change.disk) else { continue };
            // Whole blocks, so that small writes side by side are saved once. What lies past the newest point's end is cut off.
            let start = change.offset - change.offset % BLOCK_BYTES;
            let size_bytes = core.record.as_ref().and_then(|record| record.disks.get(name)).copied();
            let end = change.end.next_multiple_of(BLOCK_BYTES).min(size_bytes.unwrap_or_default());
            if start >= end {
                continue;
            }
            let fresh = fresh.entry(change.disk).or_default();
            for (start, end) in self.not_saved(change.disk, start, end) {
                for part in fresh.parts(start, end).into_iter().filter(|part| part.value.is_none()) {
                    let mut at = part.start;
                    while at < part.end {
                        let old = old_content(&**disk, change.disk, at, part.end);
                        let (head, payload) = old.map_err(disk_error("read", name))?;
                        self.make_room(core, (payload.len() + 2 * HEAD_BYTES) as u64)?;
                        let record = open.log.append(head, &payload);
                        self.note_length(core, open.log.id, open.log.length());
                        self.with_room(core, &mut open.log, LogWriter::spill)?;
                        let place = match head.kind {
                            Kind::Data => Place::Data { at: record, offset: at },
                            _ => Place::Zero,
                        };
                        let end = at + head.length;
                        fresh.fill(at, end, place);
                        saved.push((change.disk, at, end, place));
                        at = end;
                    }
                }
            }
        }
        self.with_room(core, &mut open.log, LogWriter::write_out)?;
        Ok(saved)
    }

    fn not_saved(&self, disk: u16, start: u64, end: u64) -> Vec<(u64, u64)> {
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner);
        let saved = shared.layer.as_ref().and_then(|view| view.saved.get(usize::from(disk)));
        let parts = saved.map(|saved| saved.parts(start, end)).unwrap_or_default();
        parts.into_iter().filter(|part| part.value.is_none()).map(|part| (part.start, part.end)).collect()
    }

    fn place<'a>(&self, change: &Change<'a>) -> Result<Placed<'a>, PointError> {
        let (name, offset, length, data) = match *change {
            Change::Write { disk, offset, data } => (disk, offset, data.len() as u64, Some(data)),
            Change::Zero { disk, offset, length } => (disk, offset, length, None),
        };
        let disk = self.disk_number(name)?;
        // Of the file: a disk that has grown since the newest point is written where it has grown, too.
        let size = self.disk(disk).map_or(0, |(_, file)| file.size_bytes());
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(Placed { disk, offset, end, data }),
            _ => Err(PointError::Hostile { what: "a change that ends past the end of the disk" }),
        }
    }

    fn carry_out(&self, change: &Placed<'_>) -> Result<(), PointError> {
        let Some((name, disk)) = self.disk(change.disk) else { return Ok(()) };
        let done: io::Result<()> = match change.data {
            Some(data) => disk.write(change.offset, data),
            None => disk.zero(change.offset, change.end - change.offset),
        };
        done.map_err(disk_error("write", name))
    }

    /// Writes the undo file back. Damage is no error here: it is in the record.
    pub(super) fn undo_layer(&self, core: &mut Core) -> Result<(), PointError> {
        let open = |record: &Record| record.phase == Phase::Layer && record.damaged.is_none();
        let Some(record) = core.record.clone().filter(open) else { return Ok(()) };
        let file = record.layer();
        let undone = self.in_place(core, |inner| {
            let log = Log::open(&*inner.medium.folder, file)?;
            inner.write_back(&log, &log.layer_entries()?)
        })?;
        // Points may have been given up for room meanwhile.
        let Some(mut record) = core.record.clone() else { return Ok(()) };
        match undone.map_err(|fault: Fault| fault.damage(file)) {
            Ok(()) => {
                self.flush_disks()?;
                record.phase = Phase::Settled;
                self.save(core, Some(record))?;
                self.sweep(core)?;
            }
            Err(damage) => {
                record.points.clear();
                self.damaged(core, record, damage?)?;
            }
        }
        core.layer = None;
        self.shared.write().unwrap_or_else(PoisonError::into_inner).layer = None;
        Ok(())
    }
}

/// A change that lies inside its disk.
#[derive(Debug)]
struct Placed<'a> {
    disk: u16,
    offset: u64,
    end: u64,
    data: Option<&'a [u8]>,
}
