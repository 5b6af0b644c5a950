//! What is on its way to the destination and not yet acknowledged: the bound on it, and the rate that follows from it.
//!
//! QEMU decides when to stop the guest from the rate at which we take its stream. References are cheap, so a bound on raw
//! bytes alone would let it believe in a fast link and then wait for slow literals while the guest stands still. The
//! window is therefore bounded twice: by cost *on the wire* and by raw bytes. While much is left the wire may queue for
//! [`LONGEST_QUEUE`], so that neither link nor processors idle when runs of references and of literals alternate; towards
//! the end of a pass the queue shrinks to [`SHORTEST_QUEUE`], because what is queued when the guest stops is downtime.
//!
//! Pure: time is passed in.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use pageport_teleport::Retained;

/// Raw bytes of the hypervisor's stream on their way, at most; the destination may have to hold them all.
/// More would not make a move faster: it would only wait, in memory that both sides would have to touch first.
pub const RAW_LIMIT_BYTES: u64 = 64 << 20;
/// Wire bytes on their way, at least, so that a slow start is not slower still.
const WIRE_FLOOR_BYTES: u64 = 512 << 10;
/// What the window holds beyond one round trip when the guest may stop any moment: it adds to the downtime.
pub const SHORTEST_QUEUE: Duration = Duration::from_millis(60);
/// What it holds while much of the guest's memory is still to be sent.
pub const LONGEST_QUEUE: Duration = Duration::from_millis(1500);
/// With this much left the queue may be at its longest; below it shrinks in proportion.
const MUCH_LEFT_BYTES: u64 = 512 << 20;
/// Acknowledgements are counted over this time.
const RATE_SPAN: Duration = Duration::from_secs(1);

/// One batch on its way.
#[derive(Debug)]
pub struct Outstanding {
    /// Bytes of the hypervisor's stream.
    pub raw_bytes: u64,
    /// Bytes of the frame.
    pub wire_bytes: u64,
    /// Pages in it that are references.
    pub teleported_pages: u64,
    /// What answers a request for fallback, once.
    pub retained: Option<Retained>,
}

/// All batches on their way.
#[derive(Debug)]
pub struct Window {
    outstanding: BTreeMap<u64, Outstanding>,
    raw_bytes: u64,
    wire_bytes: u64,
    acknowledged: VecDeque<(Instant, u64)>,
    peak_bytes_per_s: u64,
    queue: Duration,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            outstanding: BTreeMap::new(),
            raw_bytes: 0,
            wire_bytes: 0,
            acknowledged: VecDeque::new(),
            peak_bytes_per_s: 0,
            queue: LONGEST_QUEUE,
        }
    }
}

impl Window {
    /// So much of the hypervisor's pass is still to come.
    pub fn set_left(&mut self, left_bytes: u64) {
        let share = left_bytes.min(MUCH_LEFT_BYTES) as f64 / MUCH_LEFT_BYTES as f64;
        self.queue = LONGEST_QUEUE.mul_f64(share).max(SHORTEST_QUEUE);
    }

    /// Is there room for another batch, given the path's rate and round trip?
    pub fn has_room(&self, bytes_per_s: u64, round_trip: Duration) -> bool {
        let span = round_trip + self.queue;
        let wire_limit = ((bytes_per_s as f64 * span.as_secs_f64()) as u64).max(WIRE_FLOOR_BYTES);
        self.outstanding.is_empty() || (self.wire_bytes < wire_limit && self.raw_bytes < RAW_LIMIT_BYTES)
    }

    /// A batch is about to be sent.
    pub fn sent(&mut self, sequence: u64, batch: Outstanding) {
        self.raw_bytes += batch.raw_bytes;
        self.wire_bytes += batch.wire_bytes;
        self.outstanding.insert(sequence, batch);
    }

    /// The destination has verified and written all batches up to and including this one.
    pub fn acknowledged(&mut self, sequence: u64, now: Instant) {
        let still_out = self.outstanding.split_off(&sequence.saturating_add(1));
        let done = std::mem::replace(&mut self.outstanding, still_out);
        let wire_bytes: u64 = done.values().map(|batch| batch.wire_bytes).sum();
        self.raw_bytes -= done.values().map(|batch| batch.raw_bytes).sum::<u64>();
        self.wire_bytes -= wire_bytes;
        self.acknowledged.push_back((now, wire_bytes));
        self.peak_bytes_per_s = self.peak_bytes_per_s.max(self.rate_bytes_per_s(now));
    }

    /// What answers a request for fallback of this batch, and the pages that were references in it; [`None`] if it has
    /// none, is done, or was asked for before.
    pub fn take_retained(&mut self, sequence: u64) -> Option<(Retained, u64)> {
        let batch = self.outstanding.get_mut(&sequence)?;
        Some((batch.retained.take()?, batch.teleported_pages))
    }

    /// Wire bytes acknowledged per second, lately.
    pub fn rate_bytes_per_s(&mut self, now: Instant) -> u64 {
        while self.acknowledged.front().is_some_and(|(at, _)| now.duration_since(*at) > RATE_SPAN) {
            self.acknowledged.pop_front();
        }
        let bytes: u64 = self.acknowledged.iter().map(|(_, bytes)| bytes).sum();
        (bytes as f64 / RATE_SPAN.as_secs_f64()) as u64
    }

    /// The most that was acknowledged in any second.
    pub fn peak_bytes_per_s(&self) -> u64 {
        self.peak_bytes_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(raw_bytes: u64, wire_bytes: u64) -> Outstanding {
        Outstanding { raw_bytes, wire_bytes, teleported_pages: 0, retained: None }
    }

    #[test]
    fn cheap_references_are_bounded_by_raw_bytes_and_literals_by_the_wire() {
        let (rate, round_trip) = (25_000_000, Duration::from_millis(50));
        let mut references = Window::default();
        let mut sequence = 0;
        while references.has_room(rate, round_trip) {
            references.sent(sequence, batch(4 << 20, 1000));
            sequence += 1;
        }
        assert_eq!(references.raw_bytes, RAW_LIMIT_BYTES);

        let mut literals = Window::default();
        literals.set_left(0);
        while literals.has_room(rate, round_trip) {
            literals.sent(sequence, batch(512 << 10, 128 << 10));
            sequence += 1;
        }
        let seconds = literals.wire_bytes as f64 / rate as f64;
        assert!((0.1..0.13).contains(&seconds), "{seconds} s of wire time are queued");
    }

    #[test]
    fn the_queue_shrinks_with_what_is_left() {
        let mut window = Window::default();
        let queue = |window: &mut Window, left| {
            window.set_left(left);
            window.queue
        };
        assert_eq!(queue(&mut window, 4 << 30), LONGEST_QUEUE);
        assert_eq!(queue(&mut window, MUCH_LEFT_BYTES / 2), LONGEST_QUEUE / 2);
        assert_eq!(queue(&mut window, 1 << 20), SHORTEST_QUEUE);
    }

    #[test]
    fn an_acknowledgement_covers_all_before_it_and_makes_room() {
        let start = Instant::now();
        let mut window = Window::default();
        for sequence in 0..4 {
            window.sent(sequence, batch(100, 10));
        }
        window.acknowledged(2, start);
        assert_eq!((window.raw_bytes, window.wire_bytes), (100, 10));
        assert_eq!(window.rate_bytes_per_s(start), 30);
        window.acknowledged(2, start);
        window.acknowledged(u64::MAX, start);
        assert!(window.outstanding.is_empty());
        assert_eq!(window.rate_bytes_per_s(start + RATE_SPAN * 2), 0);
        assert_eq!(window.peak_bytes_per_s(), 40);
    }
}
