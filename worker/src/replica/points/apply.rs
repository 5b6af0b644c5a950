//! Puts a committed point in place, once the way back from it is on stable storage.
//!
//! ```text
//!  committed ─▶ undo written, sealed, synced ─▶ record "applying" ─▶ journal in place, disks synced ─▶ record "settled"
//! ```
//! Each step may be done again after a crash. If there is no room for the undo, the older points are given up.

use std::io;

use super::FOLDER;
use super::error::PointError;
use super::format::{Head, Kind, SEAL_RECORD_BYTES};
use super::group::{Core, Group, Inner, disk_error, file_error};
use super::lease::LeaseEnd;
use super::log_reader::{Entry, Fault, Log};
use super::log_writer::LogWriter;
use super::medium::Disk;
use super::ranges::Ranges;
use super::record::{Phase, Record};
use super::space::is_full;

/// Raw bytes of one record of an undo file: small, as readers decompress records whole.
const UNDO_CHUNK_BYTES: u64 = 256 << 10;
const UNDO_ZSTD_LEVEL: i32 = 1;

/// Why changes could not be put in place.
#[derive(Debug)]
pub(super) enum Stop {
    /// The file that holds them.
    File(Fault),
    /// A disk.
    Disk { name: String, source: io::Error },
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::File(fault)
    }
}

/// What a journal changes, by number of the disk.
#[derive(Debug, Default)]
struct DiskChanges {
    ranges: Ranges,
    /// Sizes before and after, if the disk grows.
    resized: Option<(u64, u64)>,
}

impl Group {
    /// Puts the newest committed point in place, and deletes what is older than is to be kept. Does nothing if it is there
    /// already. Open readers go on reading their points.
    ///
    /// # Errors
    /// [`PointError::NoSpace`], or the worker's store, a file or a disk failed: the point stays committed, and the next call
    /// tries again. [`PointError::Damaged`] when the journal is damaged.
    pub fn apply(&self) -> Result<(), PointError> {
        let mut core = self.inner.core();
        self.inner.check(&core)?;
        self.inner.apply(&mut core)?;
        core.sound().map(drop)
    }
}

impl Inner {
    /// As [`Group::apply`]; damage is no error here.
    pub(super) fn apply(&self, core: &mut Core) -> Result<(), PointError> {
        if core.sound().is_err() {
            return Ok(());
        }
        if core.phase() == Some(Phase::Committed) {
            self.prepare(core)?;
        }
        let (Some(Phase::Applying { undo }), Some(record)) = (core.phase(), core.record.clone()) else {
            // What could not be deleted the last time.
            return self.sweep(core);
        };
        let Some(newest) = record.newest() else { return Ok(()) };
        if undo {
            self.show_readers(core, &record, newest)?;
        }
        let journal = record.journal(newest);
        let put = |inner: &Self| inner.replay(&Log::open(&*inner.medium.folder, journal)?);
        if let Err(fault) = self.in_place(core, put)? {
            let reason = fault.damage(journal)?;
            return self.fall_back(core, reason);
        }
        self.flush_disks()?;
        let Some(mut record) = core.record.clone() else { return Ok(()) };
        let surplus = record.points.len().saturating_sub(record.keep);
        record.points.drain(..surplus);
        record.phase = Phase::Settled;
        self.save(core, Some(record))?;
        self.sweep(core)?;
        self.bound_leases(core)
    }

    /// Makes the undo file and says so in the record.
    fn prepare(&self, core: &mut Core) -> Result<(), PointError> {
        let Some(record) = core.record.clone() else { return Ok(()) };
        let Some(newest) = record.newest() else { return Ok(()) };
        let changes = match self.changes(&record, newest) {
            Ok(changes) => changes,
            Err(fault) => {
                let reason = fault.damage(record.journal(newest))?;
                return self.lose_newest(core, reason);
            }
        };
        let older = record.points.len() > 1;
        let wanted = older && (record.keep > 1 || !record.held.is_empty() || self.has_readers());
        let made = match wanted.then(|| self.write_undo(core, &record, newest, &changes)) {
            None | Some(Err(PointError::NoSpace { .. })) => false,
            Some(Ok(())) => true,
            Some(Err(error)) => return Err(error),
        };
        // Older points may have been given up on the way.
        let Some(mut record) = core.record.clone() else { return Ok(()) };
        if !made && older {
            self.close_readers(&LeaseEnd::Space);
            record.points.drain(..record.points.len() - 1);
            record.held.clear();
            if wanted {
                tracing::warn!(point = newest, "no space for an undo: all older recovery points given up");
                record.lost = Some(format!("all recovery points before {newest} were given up for lack of space"));
            }
        }
        record.phase = Phase::Applying { undo: made };
        self.save(core, Some(record))?;
        self.sweep(core)
    }

    fn changes(&self, record: &Record, newest: u64) -> Result<Vec<DiskChanges>, Fault> {
        let mut changes: Vec<DiskChanges> = self.medium.disks.iter().map(|_| DiskChanges::default()).collect();
        let mut foreign = false;
        Log::open(&*self.medium.folder, record.journal(newest))?.walk(|entry| {
            match (changes.get_mut(usize::from(entry.head.disk)), entry.head.kind) {
                (None, _) => foreign = true,
                (Some(disk), Kind::Resize) => {
                    let before = disk.resized.map_or(entry.head.length, |(before, _)| before);
                    disk.resized = Some((before, entry.head.offset));
                }
                (Some(disk), _) => disk.ranges.insert(entry.head.offset, entry.end()),
            }
        })?;
        if foreign { Err(Fault::Damaged("it changes a disk that is not here")) } else { Ok(changes) }
    }

    fn write_undo(
        &self,
        core: &mut Core,
        record: &Record,
        newest: u64,
        changes: &[DiskChanges],
    ) -> Result<(), PointError> {
        let id = record.undo(newest);
        let mut log = self.create_log(core, id)?;
        for (number, ((name, disk), changed)) in (0..).zip(self.medium.disks.iter().zip(changes)) {
            if let Some((before, after)) = changed.resized {
                log.append(Head::new(Kind::Resize, number, before, after), &[]);
            }
            for (start, end) in changed.ranges.iter() {
                // What lies past the old end has no old content.
                let end = end.min(disk.size_bytes());
                let mut at = start;
                while at < end {
                    let (head, payload) = old_content(&**disk, number, at, end).map_err(disk_error("read", name))?;
                    self.make_room(core, payload.len() as u64 + 2 * SEAL_RECORD_BYTES)?;
                    log.append(head, &payload);
                    self.note_length(core, id, log.length());
                    self.with_room(core, &mut log, LogWriter::spill)?;
                    at = head.offset + head.length;
                }
            }
        }
        log.seal();
        self.note_length(core, id, log.length());
        self.with_room(core, &mut log, LogWriter::write_out)?;
        match log.sync() {
            Err(error) if is_full(&error) => return Err(self.no_space(core, log.length())),
            synced => synced.map_err(file_error("sync", &id.name()))?,
        }
        self.sync_folder()
    }

    fn replay(&self, journal: &Log) -> Result<(), Stop> {
        // Whole, before any of it is believed.
        journal.walk(|_| ())?;
        let mut put = Ok(());
        journal.walk(|entry| {
            if put.is_ok() {
                put = self.put(journal, entry);
            }
        })?;
        put
    }

    /// Writes an undo file's content back, last record first: a disk that has grown is cut once its old content is there.
    pub(super) fn write_back(&self, log: &Log, entries: &[Entry]) -> Result<(), Stop> {
        entries.iter().rev().try_for_each(|entry| match entry.head.kind {
            Kind::Resize => self.change_disk(entry.head.disk, |disk| disk.cut(entry.head.offset)),
            _ => self.put(log, *entry),
        })
    }

    fn put(&self, log: &Log, entry: Entry) -> Result<(), Stop> {
        let Head { kind, disk: number, offset, length, .. } = entry.head;
        match kind {
            Kind::Data => {
                let payload = log.payload(entry)?;
                self.change_disk(number, |disk| disk.write(offset, &payload))
            }
            Kind::Zero => self.change_disk(number, |disk| disk.zero(offset, length)),
            // What a layer had left behind the old end may be there again: power failed before its cut was on stable storage.
            Kind::Resize => self.change_disk(number, |disk| disk.cut(length).and_then(|()| disk.grow(offset))),
            Kind::Seal | Kind::Mark => Ok(()),
        }
    }

    fn change_disk(&self, number: u16, change: impl FnOnce(&dyn Disk) -> io::Result<()>) -> Result<(), Stop> {
        let (name, disk) = self.disk(number).ok_or(Fault::Damaged("it changes a disk that is not here"))?;
        change(&**disk).map_err(|source| Stop::Disk { name: name.to_owned(), source })
    }

    /// Cuts disks that were made larger for what has come to nothing: they have the size of the newest point, if that is in place.
    pub(super) fn fit_disks(&self, core: &Core) -> Result<(), PointError> {
        let Some(record) = core.sound()?.filter(|record| record.phase == Phase::Settled) else { return Ok(()) };
        for (name, disk) in &self.medium.disks {
            // One that was added since is nothing there.
            let size_bytes = record.disks.get(name).copied().unwrap_or(0);
            if disk.size_bytes() > size_bytes {
                tracing::info!(disk = name, size_bytes, "a disk is cut to its size at the newest recovery point");
                disk.cut(size_bytes).and_then(|()| disk.flush()).map_err(disk_error("cut", name))?;
            }
        }
        Ok(())
    }

    /// Changes disks; as long as they are full, older points give way. Damage is handed back.
    pub(super) fn in_place(
        &self,
        core: &mut Core,
        mut put: impl FnMut(&Self) -> Result<(), Stop>,
    ) -> Result<Result<(), Fault>, PointError> {
        loop {
            match put(self) {
                Ok(()) => return Ok(Ok(())),
                Err(Stop::File(fault)) => return Ok(Err(fault)),
                Err(Stop::Disk { source, .. }) if is_full(&source) => {
                    if !self.give_up_oldest(core)? {
                        return Err(self.no_space(core, 0));
                    }
                }
                Err(Stop::Disk { name, source }) => return Err(disk_error("write", &name)(source)),
            }
        }
    }

    /// The journal of a point of which nothing is in place is damaged: the replica is the point before.
    fn lose_newest(&self, core: &mut Core, reason: String) -> Result<(), PointError> {
        let Some(mut record) = core.record.clone() else { return Ok(()) };
        record.points.pop();
        self.damaged(core, record, reason)
    }

    /// The journal of a point that is partly in place is damaged: the replica goes back to the point before, if it can.
    fn fall_back(&self, core: &mut Core, reason: String) -> Result<(), PointError> {
        let Some(mut record) = core.record.clone() else { return Ok(()) };
        let back = match (record.phase, record.newest()) {
            (Phase::Applying { undo: true }, Some(newest)) => self.in_place(core, |inner| {
                let log = Log::open(&*inner.medium.folder, record.undo(newest))?;
                inner.write_back(&log, &log.entries()?)
            })?,
            _ => Err(Fault::Damaged("there is no undo file")),
        };
        match back {
            Ok(()) => {
                self.flush_disks()?;
                record.points.pop();
            }
            Err(Fault::Damaged(_)) => record.points.clear(),
            Err(Fault::Io(source)) => return Err(file_error("read", FOLDER)(source)),
        }
        self.damaged(core, record, reason)
    }

    /// Makes `record` the durable one, with the damage in it. Its points can still be opened.
    pub(super) fn damaged(&self, core: &mut Core, mut record: Record, reason: String) -> Result<(), PointError> {
        tracing::error!(reason, "replica damaged");
        if record.points.is_empty() {
            self.close_readers(&LeaseEnd::Lost { reason: reason.clone() });
            record.held.clear();
        }
        record.disks = self.medium.disks.iter().map(|(name, disk)| (name.clone(), disk.size_bytes())).collect();
        record.order = self.medium.order();
        record.phase = Phase::Settled;
        record.damaged = Some(reason);
        self.save(core, Some(record))?;
        self.sweep(core)
    }
}

/// The record that restores the beginning of `start..end` as it is now; a hole stays a hole.
pub(super) fn old_content(disk: &dyn Disk, number: u16, start: u64, end: u64) -> io::Result<(Head, Vec<u8>)> {
    let (data, data_end) = disk.next_data(start)?.unwrap_or((end, end));
    if data > start {
        return Ok((Head::new(Kind::Zero, number, start, data.min(end) - start), Vec::new()));
    }
    let length = (data_end.min(end) - start).min(UNDO_CHUNK_BYTES);
    let mut raw = vec![0; length as usize];
    disk.read(start, &mut raw)?;
    if raw.iter().all(|byte| *byte == 0) {
        return Ok((Head::new(Kind::Zero, number, start, length), Vec::new()));
    }
    Ok((Head::new(Kind::Data, number, start, length), zstd::bulk::compress(&raw, UNDO_ZSTD_LEVEL)?))
}
