//! Keeps one replica of one VM up to date for as long as it is ordered: round after round.
//!
//! ```text
//!   wait until a point is due ─▶ turn ─▶ round ─▶ report ─▶ …
//!     └─ a scrub was ordered ─▶ turn ─▶ pass ─▶ …
//!                                 ▲ held by a migration of the VM while it lasts
//! ```
//! Guarantees: one round of a VM at a time, whatever the number of its replicas; none while a migration holds the VM's turn; a round that
//! failed is tried again, ever later up to half a minute; the task ends with the order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_proto::v1::{
    RecoveryPoint, ReplicationAssignment, ReplicationPhase, ReplicationStatus, ScrubStatus, VmSpec,
};
use tokio::sync::watch;

use super::registry::Entry;
use super::round::{News, Progress, Round, RoundError, Taken};
use super::schedule::{Ages, Schedule};
use super::scrub::pass::Pass;
use super::scrub::{LONGEST_PASS, Scrub};
use crate::error::with_causes;
use crate::hypervisor::guest_agent::NotQuiesced;
use crate::node::Node;
use crate::vms::ManagedVm;

/// Between two looks at what the guest has written since the newest point.
const LAG_INTERVAL: Duration = Duration::from_secs(2);
/// Without a running guest there is nothing to copy; it is looked for again after this.
const GUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Less time before the next round is not worth a pass of a scrub.
const SHORTEST_PASS: Duration = Duration::from_secs(1);
/// Damage that was found is repaired after this.
const REPAIR_PAUSE: Duration = Duration::from_millis(500);

/// What is wanted now.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The order.
    pub order: ReplicationAssignment,
    /// The VM's definition.
    pub spec: VmSpec,
}

/// Replicates until `wanted` is closed.
pub async fn run(node: Arc<Node>, vm: Arc<ManagedVm>, mut wanted: watch::Receiver<Wanted>, entry: Arc<Entry>) {
    let first = wanted.borrow().clone();
    let scrub = Scrub::load(node.records.clone(), vm.id(), &first.order.to_site);
    let mut replication = Replication {
        schedule: Schedule::new(target(&first.order)),
        ages: Ages::new(Instant::now()),
        newest: None,
        retry: None,
        scrub,
        passed: false,
        node,
        vm,
        entry,
    };
    loop {
        let now = wanted.borrow_and_update().clone();
        replication.schedule.set_target(target(&now.order));
        replication.scrub.order(now.order.scrub_seq);
        tokio::select! {
            biased;
            news = wanted.changed() => if news.is_err() { break },
            due = replication.wait() => match due {
                Due::Round => replication.round(&now, &mut wanted).await,
                Due::Pass { until } => replication.pass(&now, &mut wanted, until).await,
            },
        }
        if wanted.has_changed().is_err() {
            break;
        }
    }
}

fn target(order: &ReplicationAssignment) -> Duration {
    Duration::from_millis(order.protection.as_ref().map_or(u64::MAX, |protection| protection.rpo_ms))
}

/// What there is to do.
enum Due {
    Round,
    /// A part of a scrub; then the next round is due.
    Pass {
        until: Instant,
    },
}

/// Ends when the turn is wanted, or the order is withdrawn. A changed order waits; a withdrawn one does not.
async fn interrupted(wanted: impl Future<Output = ()>, news: &mut watch::Receiver<Wanted>) {
    let withdrawn = async { while news.changed().await.is_ok() {} };
    tokio::select! {
        () = wanted => {}
        () = withdrawn => {}
    }
}

struct Replication {
    node: Arc<Node>,
    vm: Arc<ManagedVm>,
    entry: Arc<Entry>,
    schedule: Schedule,
    ages: Ages,
    newest: Option<Taken>,
    retry: Option<Instant>,
    scrub: Scrub,
    /// There was a pass since the last round.
    passed: bool,
}

impl Replication {
    /// Waits until there is something to do, and tells meanwhile how the replica lags behind. Cancel-safe.
    async fn wait(&self) -> Due {
        let now = Instant::now();
        let due = match (&self.retry, &self.newest) {
            (Some(retry), _) => *retry,
            (None, Some(_)) if !self.scrub.differences().is_empty() => now + REPAIR_PAUSE,
            (None, Some(newest)) => now + self.schedule.pause(newest.at, now),
            (None, None) => now,
        };
        // Only behind a point of this worker's own: then the bitmap is there, and little has been written since.
        let pass = self.scrub.next_pass().filter(|at| {
            // Where rounds follow each other without a pause, passes take turns with them.
            let takes_turns = self.schedule.is_tight() && !self.passed;
            let enough = |left: Duration| left >= SHORTEST_PASS || takes_turns;
            self.retry.is_none() && self.newest.is_some() && enough(due.saturating_duration_since(now.max(*at)))
        });
        let until = pass.unwrap_or(due).min(due);
        while Instant::now() < until {
            self.tell_lag().await;
            tokio::time::sleep(until.saturating_duration_since(Instant::now()).min(LAG_INTERVAL)).await;
        }
        match pass {
            Some(_) => Due::Pass { until: due.min(Instant::now() + LONGEST_PASS) },
            None => Due::Round,
        }
    }

    async fn tell_lag(&self) {
        let mark = self.entry.mark();
        let lag_bytes = match (self.vm.qemu().await, mark) {
            (Ok(qemu), Some(mark)) => qemu.bitmaps().await.ok().map(|bitmaps| {
                bitmaps.iter().filter(|bitmap| bitmap.name == mark).map(|bitmap| bitmap.dirty_bytes).sum()
            }),
            _ => None,
        };
        self.tell(|status| {
            if let Some(lag_bytes) = lag_bytes {
                status.lag_bytes = lag_bytes;
            }
        });
    }

    async fn round(&mut self, wanted: &Wanted, news: &mut watch::Receiver<Wanted>) {
        let Ok(qemu) = self.vm.qemu().await else {
            return self.wait_for_guest("the vm does not run").await;
        };
        if !self.vm.owns_and_runs() {
            return self.wait_for_guest("the vm is not running here").await;
        }
        let turn = self.entry.turn();
        let Some(_turn) = turn.take().await else {
            self.tell(|status| status.phase = ReplicationPhase::Migrating.into());
            return self.wait_for_guest("").await;
        };
        let repairs = self.scrub.differences();
        let round = Round { node: &self.node, qemu: &qemu, spec: &wanted.spec, order: &wanted.order, repairs };
        let began = Instant::now();
        let interrupt = interrupted(turn.wanted(), news);
        let mut rate = Rate::default();
        let tell = |news| match news {
            News::Progress(progress) => self.tell_progress(progress, &mut rate),
            News::Moment(problem) => self.tell_quiescence(problem),
        };
        let taken = round.take(interrupt, tell).await;
        match taken {
            Ok(taken) => self.committed(taken, wanted, began),
            Err(error) => self.failed(&error),
        }
    }

    /// A part of a scrub.
    async fn pass(&mut self, wanted: &Wanted, news: &mut watch::Receiver<Wanted>, until: Instant) {
        let (Ok(qemu), true) = (self.vm.qemu().await, self.vm.owns_and_runs()) else {
            return self.wait_for_guest("the vm is not running here").await;
        };
        let turn = self.entry.turn();
        let Some(_turn) = turn.take().await else {
            self.tell(|status| status.phase = ReplicationPhase::Migrating.into());
            return self.wait_for_guest("").await;
        };
        let pass = Pass { node: &self.node, qemu: &qemu, spec: &wanted.spec, order: &wanted.order, until };
        let entry = self.entry.clone();
        let tell = |progress: &_| entry.update(|status| status.scrub = Some(ScrubStatus::from(progress)));
        self.scrub.compare(&pass, interrupted(turn.contended(), news), tell).await;
        self.passed = true;
        self.entry.set_damaged(!self.scrub.differences().is_empty());
        self.tell(|_| {});
    }

    async fn wait_for_guest(&self, problem: &str) {
        self.tell(|status| {
            if !problem.is_empty() {
                status.phase = ReplicationPhase::Waiting.into();
            }
            status.problem = problem.to_owned();
        });
        tokio::time::sleep(GUEST_INTERVAL).await;
    }

    fn committed(&mut self, taken: Taken, wanted: &Wanted, began: Instant) {
        let now = Instant::now();
        if let Some(before) = &self.newest {
            self.ages.superseded(before.at, now);
        }
        (self.retry, self.passed) = (None, false);
        self.scrub.repaired();
        self.entry.set_damaged(false);
        self.schedule.committed(began.elapsed());
        tracing::info!(
            vm_id = %self.vm.id(),
            site = wanted.order.to_site,
            point = taken.number,
            duration_ms = began.elapsed().as_millis() as u64,
            "recovery point committed"
        );
        self.entry.set_mark(Some(taken.mark.clone()));
        let newest = RecoveryPoint {
            number: taken.number,
            taken_unix_ms: taken.taken_unix_ms,
            changed_bytes: taken.changed_bytes,
            quiesced: taken.quiesced,
            disks: taken.disks,
        };
        self.newest = Some(taken);
        self.tell(|status| {
            status.phase = ReplicationPhase::Idle.into();
            status.newest = Some(newest);
            status.problem.clear();
            (status.rate_bps, status.eta_low_ms, status.eta_high_ms, status.lag_bytes) = (0, 0, 0, 0);
        });
    }

    fn failed(&mut self, error: &RoundError) {
        let reason = with_causes(error);
        if matches!(error, RoundError::Interrupted) {
            tracing::info!(vm_id = %self.vm.id(), "replication round interrupted");
            self.retry = Some(Instant::now());
            return;
        }
        let pause = self.schedule.failed();
        tracing::warn!(vm_id = %self.vm.id(), reason, retry_in_ms = pause.as_millis() as u64, "replication round failed");
        self.retry = Some(Instant::now() + pause);
        self.tell(|status| {
            status.phase = ReplicationPhase::Waiting.into();
            status.problem = reason;
            (status.rate_bps, status.eta_low_ms, status.eta_high_ms) = (0, 0, 0);
        });
    }

    /// Points go on without file systems at rest; the log hears of it when it changes.
    fn tell_quiescence(&self, problem: Option<NotQuiesced>) {
        let now =
            problem.as_ref().map(|problem| problem as &dyn std::error::Error).map(with_causes).unwrap_or_default();
        self.tell(|status| {
            if status.quiesce_problem == now {
                return;
            }
            if now.is_empty() {
                tracing::info!(vm_id = %self.vm.id(), "what kept recovery points from being quiesced is over");
            } else {
                tracing::warn!(vm_id = %self.vm.id(), problem = now, "recovery points are not quiesced");
            }
            status.quiesce_problem = now;
        });
    }

    fn tell_progress(&self, progress: Progress, rate: &mut Rate) {
        let phase = if progress.full { ReplicationPhase::FullCopy } else { ReplicationPhase::Increment };
        let (bps, eta) = rate.look(progress, Instant::now());
        self.tell(|status| {
            status.phase = phase.into();
            status.done_bytes = progress.done_bytes;
            status.total_bytes = progress.total_bytes;
            status.rate_bps = bps;
            status.problem.clear();
            let (low, high) = eta.filter(|_| progress.full).unwrap_or_default();
            (status.eta_low_ms, status.eta_high_ms) = (low.as_millis() as u64, high.as_millis() as u64);
        });
    }

    /// Changes what is reported; ages are brought up to date by the way.
    fn tell(&self, change: impl FnOnce(&mut ReplicationStatus)) {
        let now = Instant::now();
        let taken = self.newest.as_ref().map(|newest| newest.at);
        self.entry.update(|status| {
            change(status);
            status.lag_ms = taken.map_or(0, |taken| now.saturating_duration_since(taken).as_millis() as u64);
            status.worst_rpo_ms = self.ages.worst(taken, now).as_millis() as u64;
            status.window_ms = self.ages.window(now).as_millis() as u64;
            self.scrub.tell(status);
        });
    }
}

/// Rate on the link, and the time left of a copy.
#[derive(Debug, Default)]
struct Rate {
    began: Option<(Instant, Progress)>,
    last: Option<(Instant, Progress)>,
    bps: u64,
    lately_bytes_per_s: f64,
}

impl Rate {
    /// Bits per second on the link lately, and the time left: from the faster to the slower of the mean pace and the pace lately.
    fn look(&mut self, progress: Progress, now: Instant) -> (u64, Option<(Duration, Duration)>) {
        let (began, first) = *self.began.get_or_insert((now, progress));
        let (last_at, last) = *self.last.get_or_insert((now, progress));
        let since = now.duration_since(last_at).as_secs_f64();
        if since >= 1.0 {
            self.bps = (progress.wan_bytes.saturating_sub(last.wan_bytes) as f64 * 8.0 / since) as u64;
            self.lately_bytes_per_s = progress.done_bytes.saturating_sub(last.done_bytes) as f64 / since;
            self.last = Some((now, progress));
        }
        let elapsed = now.duration_since(began).as_secs_f64();
        let mean = progress.done_bytes.saturating_sub(first.done_bytes) as f64 / elapsed.max(0.001);
        let (slow, fast) = (mean.min(self.lately_bytes_per_s), mean.max(self.lately_bytes_per_s));
        let left = progress.total_bytes.saturating_sub(progress.done_bytes) as f64;
        let eta = (slow > 1.0).then(|| (Duration::from_secs_f64(left / fast), Duration::from_secs_f64(left / slow)));
        (self.bps, eta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_lies_between_the_mean_pace_and_the_pace_lately() {
        let (start, mut rate) = (Instant::now(), Rate::default());
        let mut look = |s: u64, done_bytes, wan_bytes| {
            let progress = Progress { full: true, done_bytes, total_bytes: 1000, wan_bytes };
            rate.look(progress, start + Duration::from_secs(s))
        };
        assert_eq!(look(0, 0, 0), (0, None));
        assert_eq!(look(1, 100, 50), (400, Some((Duration::from_secs(9), Duration::from_secs(9)))));
        let (bps, eta) = look(3, 400, 70);
        assert_eq!(bps, 80);
        let (low, high) = eta.unwrap();
        assert_eq!((low.as_millis(), high.as_millis()), (4000, 4500));
    }
}
