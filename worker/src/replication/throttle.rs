//! How fast a full copy may read a disk that a guest uses: pure.
//!
//! The copy is sped up while the guest's writes are as quick as they are without it, and slowed down when they are not
//! (additive increase, multiplicative decrease, as TCP does with a link). Increments are short and not throttled.

use crate::hypervisor::WriteCount;

/// Never slower, so that a copy ends; in bytes per second.
pub const SLOWEST_BYTES_PER_S: u64 = 4 << 20;
/// Never faster.
pub const FASTEST_BYTES_PER_S: u64 = 2 << 30;
const FIRST_BYTES_PER_S: u64 = 64 << 20;
const STEP_BYTES_PER_S: u64 = 16 << 20;
/// A write may take this many times as long as without the copy …
const TOLERATED: f64 = 2.0;
/// … or this long, whichever is more.
const TOLERATED_MS: f64 = 10.0;

/// Mean time of the writes between two counts, in milliseconds; [`None`]: there were none.
fn mean_ms(before: WriteCount, now: WriteCount) -> Option<f64> {
    let operations = now.operations.checked_sub(before.operations).filter(|count| *count > 0)?;
    Some(now.total_ns.saturating_sub(before.total_ns) as f64 / operations as f64 / 1e6)
}

/// Follows the guest's writes, and says how fast to copy.
#[derive(Debug, Clone)]
pub struct Throttle {
    seen: WriteCount,
    /// Mean time of a write without the copy, if there were any.
    undisturbed_ms: Option<f64>,
    bytes_per_s: u64,
}

impl Throttle {
    /// `before` and `begun`: counts some time before the copy, and at its beginning.
    pub fn new(before: WriteCount, begun: WriteCount) -> Self {
        Self { seen: begun, undisturbed_ms: mean_ms(before, begun), bytes_per_s: FIRST_BYTES_PER_S }
    }

    /// The rate for now, in bytes per second.
    pub fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// Takes a new count; returns the rate if it has changed.
    pub fn look(&mut self, now: WriteCount) -> Option<u64> {
        let mean_ms = mean_ms(self.seen, now);
        self.seen = now;
        let tolerated_ms = self.undisturbed_ms.map_or(TOLERATED_MS, |ms| (ms * TOLERATED).max(TOLERATED_MS));
        let next = match mean_ms {
            Some(ms) if ms > tolerated_ms => self.bytes_per_s / 2,
            _ => self.bytes_per_s.saturating_add(STEP_BYTES_PER_S),
        };
        let next = next.clamp(SLOWEST_BYTES_PER_S, FASTEST_BYTES_PER_S);
        (std::mem::replace(&mut self.bytes_per_s, next) != next).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(operations: u64, each_ms: u64) -> WriteCount {
        WriteCount { operations, total_ns: operations * each_ms * 1_000_000 }
    }

    #[test]
    fn a_guest_that_writes_slower_slows_the_copy_down_and_one_that_does_not_lets_it_grow() {
        let mut throttle = Throttle::new(WriteCount::default(), count(100, 8));
        let mut seen = count(100, 8);
        let mut write = |operations, each_ms: u64| {
            seen.operations += operations;
            seen.total_ns += operations * each_ms * 1_000_000;
            seen
        };
        assert_eq!(throttle.look(write(50, 15)), Some(FIRST_BYTES_PER_S + STEP_BYTES_PER_S));
        assert_eq!(throttle.look(write(50, 17)), Some((FIRST_BYTES_PER_S + STEP_BYTES_PER_S) / 2));
        assert!(throttle.look(write(0, 0)) > Some((FIRST_BYTES_PER_S + STEP_BYTES_PER_S) / 2));
        for _ in 0..20 {
            throttle.look(write(10, 500));
        }
        assert_eq!(throttle.bytes_per_s(), SLOWEST_BYTES_PER_S);
        for _ in 0..1000 {
            throttle.look(write(1, 1));
        }
        assert_eq!(throttle.bytes_per_s(), FASTEST_BYTES_PER_S);
        assert_eq!(throttle.look(write(1, 1)), None);
    }

    #[test]
    fn a_guest_of_which_nothing_was_known_may_take_ten_milliseconds() {
        let mut throttle = Throttle::new(count(7, 1), count(7, 1));
        assert!(throttle.look(count(8, 1)) > Some(FIRST_BYTES_PER_S));
        // The counts go back when a hypervisor is replaced.
        assert!(throttle.look(count(0, 0)) > Some(FIRST_BYTES_PER_S));
    }
}
