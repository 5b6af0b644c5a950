//! The one clock that is compared between workers: monotonic, in nanoseconds since this process began to look.
//!
//! Two workers' clocks differ by a constant that the source measures ([`Offset`]); no wall clock is asked for that. What people are shown, and what a
//! record keeps, is by [`unix_ms`].

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn origin() -> Instant {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    *ORIGIN.get_or_init(Instant::now)
}

/// Begins to look at the clock: once, before anything else happens that will be timed.
pub fn start() {
    origin();
}

/// Now.
pub fn now_ns() -> u64 {
    at_ns(Instant::now())
}

/// A moment of this process; those before the first look at the clock count as the first.
pub fn at_ns(moment: Instant) -> u64 {
    moment.saturating_duration_since(origin()).as_nanos() as u64
}

/// A moment by this host's wall clock, in milliseconds since 1970; 0: before that.
pub fn unix_ms(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Now, as [`unix_ms`] has it.
pub fn unix_ms_now() -> i64 {
    unix_ms(SystemTime::now())
}

/// How far the peer's clock is ahead of ours, from probes that went there and back (Cristian's algorithm: the probe
/// with the shortest way bounds the error to half its round trip).
#[derive(Debug, Clone, Copy, Default)]
pub struct Offset {
    best: Option<Probe>,
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    round_trip_ns: u64,
    ahead_ns: i128,
}

impl Offset {
    /// Takes in one probe: sent and received by our clock, answered by the peer's.
    pub fn observe(&mut self, sent_ns: u64, answered_ns: u64, received_ns: u64) {
        let round_trip_ns = received_ns.saturating_sub(sent_ns);
        let ahead_ns = i128::from(answered_ns) - i128::from(sent_ns) - i128::from(round_trip_ns / 2);
        if self.best.is_none_or(|best| round_trip_ns < best.round_trip_ns) {
            self.best = Some(Probe { round_trip_ns, ahead_ns });
        }
    }

    /// From a moment of ours to a moment of the peer's; zero if the clocks say it went backwards.
    pub fn between(&self, ours_ns: u64, theirs_ns: u64) -> Duration {
        let ahead = self.best.map_or(0, |best| best.ahead_ns);
        let elapsed = i128::from(theirs_ns) - ahead - i128::from(ours_ns);
        Duration::from_nanos(u64::try_from(elapsed).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_probe_decides_and_the_offset_cancels_out() {
        let mut offset = Offset::default();
        // The peer is 1000 ns ahead; the second probe is the better one.
        offset.observe(0, 1000 + 90, 100);
        offset.observe(200, 1000 + 205, 210);
        assert_eq!(offset.between(300, 1000 + 350), Duration::from_nanos(50));
        assert_eq!(offset.between(300, 1000 + 200), Duration::ZERO);
    }
}
