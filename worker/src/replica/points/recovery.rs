//! What opening a group does after a crash, or after nothing at all.

use super::FOLDER;
use super::error::PointError;
use super::group::{Core, Inner, file_error};
use super::lease::without_overdue;
use super::log_reader::Log;
use super::medium::Cell;
use super::record::{Phase, Record};

/// The record, if there is one.
pub(super) fn load(cell: &dyn Cell) -> Result<Option<Record>, PointError> {
    let text = cell.load().map_err(|source| PointError::Store { what: "read", source })?;
    text.map(|text| serde_json::from_slice(&text)).transpose().map_err(PointError::Record)
}

impl Inner {
    /// Reads the record, ends what was under way, and deletes what the record does not speak of.
    pub(super) fn recover(&self, core: &mut Core) -> Result<(), PointError> {
        let record = load(&*self.medium.cell)?.map(without_overdue);
        let files = self.medium.folder.list().map_err(file_error("list", FOLDER))?;
        core.files = files.into_iter().collect();
        self.count(core);
        if let Some(reason) = record.as_ref().and_then(|record| self.misfit(record)) {
            // Not saved: nothing is deleted because of disks that the caller did not name.
            self.refuse(core, record, reason);
            return Ok(());
        }
        // The store may show a change whose write failed before this opening. Saved once more, it is durable or an error.
        self.save(core, record)?;
        self.sweep(core)?;
        self.undo_layer(core)?;
        match self.apply(core) {
            Err(error @ PointError::NoSpace { .. }) => {
                tracing::warn!(%error, "a committed recovery point is not in place yet");
            }
            applied => applied?,
        }
        self.check_undo_files(core)?;
        self.sweep(core)?;
        // What is damaged is said elsewhere.
        if core.sound().is_ok() { self.fit_disks(core) } else { Ok(()) }
    }

    /// Why the record cannot be of these disks. There may be more: disks that were added since the newest point.
    fn misfit(&self, record: &Record) -> Option<String> {
        let names = |names: Vec<&String>| names.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let recorded: Vec<_> = record.disks.keys().collect();
        let present: Vec<_> = self.medium.disks.iter().map(|(name, _)| name).collect();
        if recorded.iter().any(|name| !present.contains(name)) {
            let (recorded, present) = (names(recorded), names(present));
            return Some(format!("the recovery points are of the disks {recorded}, and the vm has {present}"));
        }
        // While a point is being put in place, a disk may still have to grow.
        let settled = !record.state().applying;
        let short = |(name, disk): &&(String, std::sync::Arc<dyn super::medium::Disk>)| {
            settled && record.disks.get(name).is_some_and(|size| disk.size_bytes() < *size)
        };
        let (name, disk) = self.medium.disks.iter().find(short)?;
        Some(format!("disk {name:?} has been cut to {} bytes", disk.size_bytes()))
    }

    /// Loses the points behind the newest undo file that cannot be walked through. Payloads are checked when they are read.
    fn check_undo_files(&self, core: &mut Core) -> Result<(), PointError> {
        let files = core.record.as_ref().map(Record::undo_files).unwrap_or_default();
        for id in files.into_iter().rev() {
            if let Err(fault) = Log::open(&*self.medium.folder, id).and_then(|log| log.walk(|_| ())) {
                let reason = fault.damage(id)?;
                return self.lose_before(core, id.point, &reason);
            }
        }
        Ok(())
    }

    fn refuse(&self, core: &mut Core, record: Option<Record>, reason: String) {
        tracing::error!(reason, "replica damaged");
        let damaged = |record: Record| Record {
            points: Vec::new(),
            held: Vec::new(),
            phase: Phase::Settled,
            damaged: Some(reason),
            ..record
        };
        core.record = record.map(damaged);
        self.show(core);
    }
}
