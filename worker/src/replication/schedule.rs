//! When the next recovery point is taken, and how old the newest one became: pure, time is passed in.
//!
//! ```text
//!   taken n ────────────────┬──── taken n+1 ───── committed n+1
//!           └── interval ───┘          └── round ──┘
//!   the newest point is oldest just before the next is committed: interval + round ≤ target
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Of the target, what a point may be old when the next is expected: the rest is for rounds that take longer than the last.
const SHARE_OF_TARGET: f64 = 0.9;
/// A round is expected to take this many times what the last ones took.
const ROUND_MARGIN: f64 = 1.5;
/// Shortest time between two rounds, so that the guest has some without a snapshot.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// A pause that is shorter leaves no time for anything else.
const TIGHT_PAUSE: Duration = Duration::from_secs(2);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How far back ages are remembered.
pub const WINDOW: Duration = Duration::from_secs(24 * 3600);

/// Decides when rounds begin.
#[derive(Debug, Clone)]
pub struct Schedule {
    target: Duration,
    expected_round: Duration,
    failures: u32,
}

impl Schedule {
    /// No point is to become older than `target`.
    pub fn new(target: Duration) -> Self {
        Self { target, expected_round: Duration::ZERO, failures: 0 }
    }

    /// The policy has changed.
    pub fn set_target(&mut self, target: Duration) {
        self.target = target;
    }

    /// A point was committed; the round took so long.
    pub fn committed(&mut self, round: Duration) {
        self.failures = 0;
        // Grows at once, shrinks slowly.
        self.expected_round = round.max(self.expected_round.mul_f64(0.7) + round.mul_f64(0.3));
    }

    /// A round failed; returns how long to wait before the next.
    pub fn failed(&mut self) -> Duration {
        let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(LONGEST_RETRY);
        self.failures += 1;
        pause
    }

    /// How long to wait from now, with the newest point taken at `taken`.
    pub fn pause(&self, taken: Instant, now: Instant) -> Duration {
        let interval = self.interval();
        let age = now.saturating_duration_since(taken);
        interval.saturating_sub(age).max(SHORTEST_PAUSE)
    }
}

impl Schedule {
    /// From a point to the beginning of the next round.
    fn interval(&self) -> Duration {
        self.target.mul_f64(SHARE_OF_TARGET).saturating_sub(self.expected_round.mul_f64(ROUND_MARGIN))
    }

    /// Whether rounds take so long that hardly a pause is left between them.
    pub fn is_tight(&self) -> bool {
        self.interval() < self.expected_round + TIGHT_PAUSE
    }
}

/// Remembers the greatest age that the newest point reached.
#[derive(Debug, Clone)]
pub struct Ages {
    began: Instant,
    /// When a point was superseded, and the age that it had reached; ages fall from front to back.
    worst: VecDeque<(Instant, Duration)>,
}

impl Ages {
    /// Nothing is known of the time before `now`.
    pub fn new(now: Instant) -> Self {
        Self { began: now, worst: VecDeque::new() }
    }

    /// A point taken at `taken` is superseded now.
    pub fn superseded(&mut self, taken: Instant, now: Instant) {
        let age = now.saturating_duration_since(taken);
        while self.worst.back().is_some_and(|(_, smaller)| *smaller <= age) {
            self.worst.pop_back();
        }
        self.worst.push_back((now, age));
        while self.worst.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.worst.pop_front();
        }
    }

    /// The greatest age within the window, with the newest point taken at `taken`.
    pub fn worst(&self, taken: Option<Instant>, now: Instant) -> Duration {
        let current = taken.map_or(Duration::ZERO, |taken| now.saturating_duration_since(taken));
        self.worst.front().map_or(current, |(_, age)| current.max(*age))
    }

    /// How much time is looked back on.
    pub fn window(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began).min(WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_secs(30);

    #[test]
    fn a_point_is_superseded_before_it_is_older_than_the_target() {
        let start = Instant::now();
        let mut schedule = Schedule::new(TARGET);
        let rounds = [1, 2, 2, 5, 8, 8, 3, 1, 1, 8].map(Duration::from_secs);
        let (mut taken, mut now) = (start, start);
        for round in rounds {
            let begin = now + schedule.pause(taken, now);
            now = begin + round;
            assert!(now - taken <= TARGET, "{:?} after a round of {round:?}", now - taken);
            assert!(begin >= taken);
            taken = begin;
            schedule.committed(round);
        }
    }

    #[test]
    fn a_round_longer_than_the_target_leaves_the_guest_a_pause() {
        let start = Instant::now();
        let mut schedule = Schedule::new(TARGET);
        schedule.committed(Duration::from_secs(100));
        assert_eq!(schedule.pause(start, start + Duration::from_secs(100)), SHORTEST_PAUSE);
        assert!(schedule.is_tight() && !Schedule::new(TARGET).is_tight());
    }

    #[test]
    fn failures_are_retried_ever_later_up_to_half_a_minute() {
        let mut schedule = Schedule::new(TARGET);
        let pauses: Vec<u64> = (0..7).map(|_| schedule.failed().as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        schedule.committed(Duration::ZERO);
        assert_eq!(schedule.failed(), FIRST_RETRY);
    }

    #[test]
    fn the_worst_age_is_that_of_the_last_day() {
        let start = Instant::now();
        let mut ages = Ages::new(start);
        let at = |s| start + Duration::from_secs(s);
        assert_eq!(ages.worst(None, at(5)), Duration::ZERO);
        ages.superseded(at(0), at(90));
        ages.superseded(at(80), at(100));
        ages.superseded(at(90), at(120));
        assert_eq!(ages.worst(Some(at(110)), at(125)), Duration::from_secs(90));
        assert_eq!(ages.worst(Some(at(110)), at(400)), Duration::from_secs(290));
        let day = WINDOW.as_secs();
        ages.superseded(at(day + 95), at(day + 100));
        assert_eq!(ages.worst(None, at(day + 101)), Duration::from_secs(30));
        assert_eq!(ages.window(at(2 * day)), WINDOW);
    }
}
