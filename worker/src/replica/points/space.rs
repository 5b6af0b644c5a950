//! Room for journals and undo files: older points give way, the newest never does.

use std::io;

use super::FOLDER;
use super::error::{Bound, PointError};
use super::format::{FileId, HEADER_BYTES};
use super::group::{Core, Inner, file_error};
use super::lease::LeaseEnd;
use super::log_writer::LogWriter;
use super::record::{Phase, Record};
use crate::quota::Full;

impl Inner {
    /// Sees to it that `needed_bytes` more may be written, giving up older points if they must.
    ///
    /// # Errors
    /// [`PointError::NoSpace`]; the worker's store or a file failed.
    pub(super) fn make_room(&self, core: &mut Core, needed_bytes: u64) -> Result<(), PointError> {
        loop {
            let free_bytes = self.medium.folder.free_bytes().map_err(file_error("look for space in", FOLDER))?;
            let used_bytes = core.used_bytes().saturating_add(needed_bytes);
            let room = free_bytes >= needed_bytes.saturating_add(self.limits.reserve_bytes);
            let refused = match self.share.take(used_bytes) {
                Ok(()) if room && used_bytes <= self.limits.points_bytes => return Ok(()),
                Ok(()) => {
                    self.count(core);
                    self.no_space(core, needed_bytes)
                }
                Err(Full { used_bytes, limit_bytes }) => {
                    let (bound, pool) = (Bound::AllVms, self.share.pool().clone());
                    PointError::NoSpace { needed_bytes, used_bytes, limit_bytes, bound, free_bytes, pool }
                }
            };
            // Its own, whoever else has more: nobody loses points to another VM.
            if !self.give_up_oldest(core)? {
                return Err(refused);
            }
        }
    }

    /// Makes a file anew, giving up older points if there is no room for it.
    pub(super) fn create_log(&self, core: &mut Core, id: FileId) -> Result<LogWriter, PointError> {
        self.make_room(core, HEADER_BYTES as u64)?;
        // Noted first: a creation that fails may leave the file.
        self.note_length(core, id, HEADER_BYTES as u64);
        loop {
            match LogWriter::create(&*self.medium.folder, id) {
                Err(error) if is_full(&error) => {
                    if !self.give_up_oldest(core)? {
                        return Err(self.no_space(core, HEADER_BYTES as u64));
                    }
                }
                created => return created.map_err(file_error("create", &id.name())),
            }
        }
    }

    /// Does `write` until it no longer fails for lack of space, or nothing is left to give up.
    pub(super) fn with_room(
        &self,
        core: &mut Core,
        log: &mut LogWriter,
        mut write: impl FnMut(&mut LogWriter) -> io::Result<()>,
    ) -> Result<(), PointError> {
        loop {
            match write(log) {
                Ok(()) => return Ok(()),
                Err(error) if is_full(&error) => {
                    if !self.give_up_oldest(core)? {
                        return Err(self.no_space(core, 0));
                    }
                }
                Err(error) => return Err(file_error("write", &log.id.name())(error)),
            }
        }
    }

    /// Deletes the oldest point, unless it is the newest or the one that the newest is about to replace. What only leases keep goes first.
    pub(super) fn give_up_oldest(&self, core: &mut Core) -> Result<bool, PointError> {
        if self.give_up_oldest_lease(core, &LeaseEnd::Space)? {
            return Ok(true);
        }
        let Some(record) = &core.record else { return Ok(false) };
        // Of a point that is only committed the undo is not made yet: the one before it is the replica.
        let least = if record.phase == Phase::Committed { 2 } else { 1 };
        if record.points.len() <= least {
            return Ok(false);
        }
        let mut record = record.clone();
        let given_up = record.points.remove(0).number;
        record.held.retain(|held| held.point.number != given_up);
        record.forget_useless_undo();
        tracing::warn!(point = given_up, "recovery point given up for lack of space");
        record.lost = Some(format!("older recovery points, up to {given_up}, were given up for lack of space"));
        self.save(core, Some(record))?;
        self.end_leases(core, &LeaseEnd::Space);
        self.remove_useless(core, given_up)?;
        Ok(true)
    }

    pub(super) fn no_space(&self, core: &Core, needed_bytes: u64) -> PointError {
        PointError::NoSpace {
            needed_bytes,
            used_bytes: core.used_bytes(),
            limit_bytes: self.limits.points_bytes,
            bound: Bound::OneVm,
            free_bytes: self.medium.folder.free_bytes().unwrap_or_default(),
            pool: self.share.pool().clone(),
        }
    }

    /// Takes the points before `point` out of the record: they cannot be opened any more.
    pub(super) fn lose_before(&self, core: &mut Core, point: u64, reason: &str) -> Result<(), PointError> {
        let Some(record) = &core.record else { return Ok(()) };
        let mut record = Record { lost: Some(reason.to_owned()), ..record.clone() };
        record.points.retain(|kept| kept.number >= point);
        record.held.retain(|held| held.point.number >= point);
        record.forget_useless_undo();
        tracing::error!(point, reason, "recovery points lost");
        self.save(core, Some(record))?;
        self.end_leases(core, &LeaseEnd::Lost { reason: reason.to_owned() });
        Ok(())
    }
}

/// Whether an error means that the file system, or the quota, is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
