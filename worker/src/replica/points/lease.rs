//! Points that are held open: the way back to them is kept, whatever newer points come, until the lease ends.
//!
//! ```text
//!   lease ─▶ in the record ─▶ pruning leaves its undo files ─┬─ release, or run out
//!                 ▲ found again after a restart              ├─ more held back than `held_bytes`
//!                                                            ├─ room is needed: it goes before any recovery point does
//!                                                            └─ the points are given up, lost, or their disks taken
//! ```
//! Guarantees: a lease that returned is in the record, so neither a crash nor pruning loses its point; one that ended holds back nothing,
//! and its readers read nothing any more; no lease ever keeps a newer point from being received or put in place.
//!
//! Does not watch the clock: who took a lease releases it. One that nobody released is dropped when the points are opened after its time.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::error::PointError;
use super::group::{Core, Group, Inner};
use super::reader::PointReader;
use super::record::Record;
use super::{MAX_LEASES, PointInfo};
use crate::clock::unix_ms_now;

/// A lease in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) point: PointInfo,
    pub(super) until_unix_ms: i64,
}

/// A point that is held, and what that costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldPoint {
    /// The point.
    pub point: PointInfo,
    /// When the lease runs out: milliseconds since 1970, by this host's clock.
    pub until_unix_ms: i64,
    /// Undo files that are there for this lease and others, and for no listed point; in bytes.
    pub bytes: u64,
}

impl From<&Held> for HeldPoint {
    /// Without its cost, which only who has the files knows.
    fn from(held: &Held) -> Self {
        Self { point: held.point, until_unix_ms: held.until_unix_ms, bytes: 0 }
    }
}

/// Why a lease ended before it was released.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseEnd {
    /// Its quota.
    #[error(
        "it held back {held_bytes} bytes of older states, more than the {limit_bytes} of drill.held_bytes in worker.toml"
    )]
    Quota {
        /// What it held back.
        held_bytes: u64,
        /// What it may.
        limit_bytes: u64,
    },
    /// Room.
    #[error("the room that it took was needed for newer recovery points")]
    Space,
    /// What it needs cannot be read any more.
    #[error("its recovery point is lost: {reason}")]
    Lost {
        /// What was found.
        reason: String,
    },
    /// Who took it needs it no longer.
    #[error("it was released")]
    Released,
    /// The replica's points are another history's now.
    #[error("the replica is copied anew")]
    Replaced,
    /// A hypervisor has the disks.
    #[error("the vm was given to this site: its disks are no replica any more")]
    Runs,
    /// The replica is seeded: it is a mixture meanwhile.
    #[error("the replica is being seeded")]
    Seeded,
    /// Nobody wants the replica any more.
    #[error("the replica was removed")]
    Removed,
    /// The points were opened anew.
    #[error("the replica was opened anew, for other disks or after an error of the worker's store")]
    Reopened,
}

/// A point that is held open. Dropping it ends nothing: the record keeps the lease until it is released.
#[derive(Debug)]
pub struct Lease {
    group: Group,
    point: PointInfo,
    end: watch::Receiver<Option<LeaseEnd>>,
}

impl Group {
    /// Holds a point that is listed, or is held already: then its time becomes this. A committed point that is not in place yet is put
    /// in place first.
    ///
    /// # Errors
    /// [`PointError::NoPoint`]; [`PointError::Leases`] beyond [`MAX_LEASES`]; as [`Self::apply`].
    pub fn lease(&self, point: u64, until_unix_ms: i64) -> Result<Lease, PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        inner.apply(&mut core)?;
        let no_point = PointError::NoPoint { number: point };
        let Some(mut record) = core.record.clone() else { return Err(no_point) };
        let point = record.find(point).ok_or(no_point)?;
        record.held.retain(|held| held.point.number != point.number);
        if record.held.len() >= MAX_LEASES {
            return Err(PointError::Leases);
        }
        let place = record.held.partition_point(|held| held.point.number < point.number);
        record.held.insert(place, Held { point, until_unix_ms });
        inner.save(&mut core, Some(record))?;
        let end = inner.shared_mut().leases.entry(point.number).or_default().subscribe();
        Ok(Lease { group: self.clone(), point, end })
    }

    /// Ends the lease of a point, and deletes what only it held back. Does nothing if there is none.
    ///
    /// # Errors
    /// The worker's store or a file failed.
    pub fn release(&self, point: u64) -> Result<(), PointError> {
        let inner = &self.inner;
        let mut core = inner.core();
        inner.check(&core)?;
        let held = |record: &&Record| record.held.iter().any(|held| held.point.number == point);
        let Some(mut record) = core.record.as_ref().filter(held).cloned() else { return Ok(()) };
        record.held.retain(|held| held.point.number != point);
        record.forget_useless_undo();
        inner.save(&mut core, Some(record))?;
        inner.end_leases(&core, &LeaseEnd::Released);
        inner.sweep(&mut core)
    }
}

impl Lease {
    /// What it holds.
    pub fn point(&self) -> PointInfo {
        self.point
    }

    /// Opens a disk as it was at the point; the reader ends with the lease.
    ///
    /// # Errors
    /// As [`Group::reader`].
    pub fn reader(&self, disk: &str) -> Result<PointReader, PointError> {
        self.group.open_reader(self.point.number, disk, true)
    }

    /// Makes it end at another time.
    ///
    /// # Errors
    /// It has ended: [`PointError::NoPoint`], unless the point is listed; as [`Group::lease`].
    pub fn renew(&self, until_unix_ms: i64) -> Result<(), PointError> {
        self.group.lease(self.point.number, until_unix_ms).map(drop)
    }

    /// Ends it.
    ///
    /// # Errors
    /// As [`Group::release`].
    pub fn release(&self) -> Result<(), PointError> {
        self.group.release(self.point.number)
    }

    /// Waits until the lease ends by itself.
    pub async fn ended(&mut self) -> LeaseEnd {
        let end = self.end.wait_for(Option::is_some).await.map(|end| end.clone());
        end.ok().flatten().unwrap_or(LeaseEnd::Released)
    }
}

impl Inner {
    /// Tells those whose lease the record does not speak of any more, and ends their readers.
    pub(super) fn end_leases(&self, core: &Core, why: &LeaseEnd) {
        let held =
            |point: u64| core.record.iter().flat_map(|record| &record.held).any(|held| held.point.number == point);
        let mut shared = self.shared_mut();
        shared.readers.retain(|_, reader| reader.leased_point().is_none_or(held));
        for (point, end) in shared.leases.extract_if(|point, _| !held(*point)) {
            tracing::info!(point, %why, "a recovery point is held no longer");
            end.send_replace(Some(why.clone()));
        }
    }

    /// Ends the lease of the oldest point if only leases keep it; whether there was one.
    pub(super) fn give_up_oldest_lease(&self, core: &mut Core, why: &LeaseEnd) -> Result<bool, PointError> {
        let Some(record) = &core.record else { return Ok(false) };
        let listed = record.points.first().map_or(0, |point| point.number);
        let Some(oldest) = record.oldest().filter(|oldest| *oldest < listed) else { return Ok(false) };
        let mut record = record.clone();
        record.held.retain(|held| held.point.number != oldest);
        record.forget_useless_undo();
        self.save(core, Some(record))?;
        self.end_leases(core, why);
        self.remove_useless(core, oldest)?;
        Ok(true)
    }

    /// Ends leases until what they hold back is within its bound.
    pub(super) fn bound_leases(&self, core: &mut Core) -> Result<(), PointError> {
        let limit_bytes = self.limits.held_bytes;
        loop {
            let held_bytes = core.record.as_ref().map_or(0, |record| self.bytes_of(core, record));
            let why = LeaseEnd::Quota { held_bytes, limit_bytes };
            if held_bytes <= limit_bytes || !self.give_up_oldest_lease(core, &why)? {
                return Ok(());
            }
        }
    }

    /// Deletes the undo files that nothing needs now that `gone` was taken out of the record, as the oldest point.
    pub(super) fn remove_useless(&self, core: &mut Core, gone: u64) -> Result<(), PointError> {
        let Some(record) = core.record.clone() else { return Ok(()) };
        for point in gone + 1..=record.oldest().unwrap_or(gone) {
            self.remove_file(core, &record.undo(point).name())?;
        }
        Ok(())
    }

    fn bytes_of(&self, core: &Core, record: &Record) -> u64 {
        record.held_back().iter().filter_map(|id| core.files.get(&id.name())).sum()
    }

    /// What is held, with what that costs.
    pub(super) fn held(&self, core: &Core) -> Vec<HeldPoint> {
        let Some(record) = &core.record else { return vec![] };
        let (mut bytes, mut files) = (0, record.held_back().into_iter().rev().peekable());
        let mut found: Vec<_> = record.held.iter().map(HeldPoint::from).collect();
        for held in found.iter_mut().rev() {
            while let Some(id) = files.next_if(|id| id.point > held.point.number) {
                bytes += core.files.get(&id.name()).copied().unwrap_or_default();
            }
            held.bytes = bytes;
        }
        found
    }
}

/// The record without leases whose time is over.
pub(super) fn without_overdue(mut record: Record) -> Record {
    let now = unix_ms_now();
    record.held.retain(|held| held.until_unix_ms > now);
    record.forget_useless_undo();
    record
}
