//! Scrub: whether the replica's files still hold what they should, found by reading them, and repaired.
//!
//! ```text
//!   between two rounds: pass ─▶ freeze ─▶ piece after piece until the next point is due ─▶ release
//!      frozen disk ─ read ─▶ digest ══ ask ══▶ the replica's file, read anew: the same? ─yes─▶ next piece
//!                                                 └─no─▶ digests of its blocks ══▶ which differ
//!   next round: the blocks that differ go into the journal of the point, in front of what the guest has changed
//! ```
//! - [`record`]: how far a scrub is, durable; and how the last one ended.
//! - [`piece`]: what is compared at a time: pure.
//! - [`pass`]: a part of the comparison. [`answer`]: the replica's end of it.
//!
//! Guarantees: both sides are compared at one moment, and what the guest has written since the newest point is left out, so whatever differs is
//! damage; both are read, and neither the block index nor a cache of the replica's file is asked; the index says afterwards what the file
//! holds; recovery points are taken as often as without; a worker that ends goes on at the first piece that is not compared and repaired.
//!
//! Does not look at older points: their undo files have checksums of their own.

pub mod answer;
pub mod pass;
pub mod piece;
pub mod record;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_proto::v1::{ReplicationStatus, ScrubStatus};

use super::throttle::Throttle;
use pass::{Difference, Findings, Pass, ScrubError};
use record::{Progress, Record};

/// The longest pass: the guest's first write to a place is slower while its disks are frozen.
pub const LONGEST_PASS: Duration = Duration::from_secs(30);
/// Between two passes, so that the guest has some time without a snapshot.
const PAUSE: Duration = Duration::from_millis(500);
/// A pass that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(10);

/// The scrub of one replica, as its source knows it.
#[derive(Debug)]
pub struct Scrub {
    store: Arc<Store>,
    vm: VmId,
    site: String,
    record: Record,
    /// What was found and is not repaired yet, and how far the scrub will be when it is.
    ahead: Option<(Progress, Vec<Difference>)>,
    throttle: Option<Throttle>,
    /// When the next pass may begin.
    next: Instant,
    problem: String,
}

impl Scrub {
    /// As an earlier worker left it.
    pub fn load(store: Arc<Store>, vm: VmId, site: &str) -> Self {
        let record = tokio::task::block_in_place(|| Record::read(&store, vm, site));
        Self {
            store,
            vm,
            site: site.to_owned(),
            record,
            ahead: None,
            throttle: None,
            next: Instant::now(),
            problem: String::new(),
        }
    }

    /// The newest order's number; a newer one than known begins anew.
    pub fn order(&mut self, seq: u64) {
        if seq > self.record.newest() {
            tracing::info!(vm_id = %self.vm, site = self.site, seq, "scrub begins");
            let progress = Progress::begin(seq);
            // What was found is repaired all the same, and counts for this one.
            if let Some((ahead, _)) = &mut self.ahead {
                *ahead = progress.clone();
            }
            self.record.running = Some(progress);
            self.next = Instant::now();
            self.save();
        }
    }

    /// When the next pass may begin; [`None`]: nothing is to be compared, or what was found has to be repaired first.
    pub fn next_pass(&self) -> Option<Instant> {
        (self.record.running.is_some() && self.ahead.is_none()).then_some(self.next)
    }

    /// What the next point has to bring, as the disks were at an earlier moment.
    pub fn differences(&self) -> &[Difference] {
        self.ahead.as_ref().map(|(_, differences)| differences.as_slice()).unwrap_or_default()
    }

    /// A point with all [`Self::differences`] is committed.
    pub fn repaired(&mut self) {
        let Some((mut progress, differences)) = self.ahead.take() else { return };
        let blocks = differences.iter().map(Difference::blocks).sum::<u64>();
        tracing::warn!(vm_id = %self.vm, site = self.site, blocks, "damaged blocks of the replica repaired");
        progress.repaired_blocks += blocks;
        self.advance(progress);
    }

    /// Compares from where it is, until the pass has to end. `tell` hears how far it is.
    pub async fn compare(&mut self, pass: &Pass<'_>, interrupt: impl Future<Output = ()>, tell: impl FnMut(&Progress)) {
        let Some(progress) = self.record.running.clone().filter(|_| self.ahead.is_none()) else { return };
        let mut findings = Findings { progress, throttle: self.throttle.take(), ..Findings::default() };
        let outcome = pass.run(&mut findings, interrupt, tell).await;
        let (problem, pause) = match outcome {
            Ok(()) | Err(ScrubError::Interrupted) => (String::new(), PAUSE),
            Err(error) => (crate::error::with_causes(&error), RETRY),
        };
        if !problem.is_empty() {
            tracing::warn!(vm_id = %self.vm, site = self.site, problem, "scrub is tried again");
        }
        (self.problem, self.next) = (problem, Instant::now() + pause);
        let Findings { progress, differences, throttle } = findings;
        self.throttle = throttle;
        if differences.is_empty() {
            self.advance(progress);
        } else {
            self.ahead = Some((progress, differences));
        }
    }

    /// Everything up to there is compared and repaired.
    fn advance(&mut self, mut progress: Progress) {
        if progress.is_through() {
            progress.end();
            tracing::info!(
                vm_id = %self.vm,
                site = self.site,
                compared_bytes = progress.compared_bytes,
                different_blocks = progress.different_blocks,
                repaired_blocks = progress.repaired_blocks,
                "scrub complete"
            );
            self.record = Record { running: None, last: Some(progress) };
        } else {
            self.record.running = Some(progress);
        }
        self.save();
    }

    fn save(&self) {
        if let Err(error) = tokio::task::block_in_place(|| self.record.write(&self.store, self.vm, &self.site)) {
            // What is not noted is compared once more.
            let error = crate::error::with_causes(&error);
            tracing::warn!(vm_id = %self.vm, site = self.site, error, "how far a scrub is is not noted");
        }
    }

    /// Into a report.
    pub fn tell(&self, status: &mut ReplicationStatus) {
        let running = self.ahead.as_ref().map(|(progress, _)| progress).or(self.record.running.as_ref());
        status.scrub = running.map(|progress| ScrubStatus { problem: self.problem.clone(), ..progress.into() });
        status.last_scrub = self.record.last.as_ref().map(ScrubStatus::from);
    }
}

/// Forgets the scrubs of a replica that is no longer kept up to date from here.
pub fn forget(store: &Store, vm: VmId, site: &str) {
    if let Err(error) = Record::remove(store, vm, site) {
        let error = crate::error::with_causes(&error);
        tracing::warn!(vm_id = %vm, site, error, "the record of a scrub is left behind");
    }
}

#[cfg(test)]
mod tests;
