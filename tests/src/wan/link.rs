//! One direction of an emulated WAN link: what goes in at `t` comes out at `t'`, or not at all. Pure: time is passed in.
//!
//! ```text
//! offer(now) ─▶ cut? ─▶ queue full? ─▶ serialise: depart = max(now, last depart) + size·8/rate ─▶ lost? ─▶ deliver = depart + delay
//! ```
//! Guarantees: packets leave in the order in which they came; no more than `rate_bps` leaves over any interval; a randomly
//! lost packet still uses its time on the wire; the same seed loses the same packets. Does not model jitter, reordering
//! or link-layer overhead: a packet counts with the bytes that were read from the device.

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The least queue that a link gets when none is set: below this even slow links starve TCP.
pub const MIN_QUEUE_BYTES: u64 = 64 * 1024;

/// What a direction of a link is like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Bits per second.
    pub rate_bps: u64,
    /// Propagation delay of this direction.
    pub one_way_delay_ms: u64,
    /// Probability in `0.0..=1.0` that a packet is lost on the wire.
    #[serde(default)]
    pub loss: f64,
    /// Bytes that may wait for their turn; one bandwidth-delay product of the round trip when absent.
    #[serde(default)]
    pub queue_bytes: Option<u64>,
}

impl Shape {
    /// Bytes that may wait for their turn.
    #[must_use]
    pub fn queue_limit(&self) -> u64 {
        let product = u128::from(self.rate_bps) * u128::from(self.one_way_delay_ms) * 2 / 8000;
        self.queue_bytes.unwrap_or_else(|| u64::try_from(product).unwrap_or(u64::MAX).max(MIN_QUEUE_BYTES))
    }

    /// Whether the numbers make sense.
    ///
    /// # Errors
    /// Names the field that does not.
    pub fn validate(&self) -> Result<(), ShapeError> {
        if self.rate_bps == 0 {
            return Err(ShapeError::Rate);
        }
        if !(0.0..=1.0).contains(&self.loss) {
            return Err(ShapeError::Loss { loss: self.loss });
        }
        Ok(())
    }
}

/// A link that cannot be.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ShapeError {
    /// Zero bits per second.
    #[error("check link shape: rate_bps must be at least 1 (cut the link instead)")]
    Rate,
    /// Not a probability.
    #[error("check link shape: loss {loss} is not within 0.0 and 1.0")]
    Loss {
        /// What was asked for.
        loss: f64,
    },
}

/// What became of an offered packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Will be delivered.
    Carried,
    /// Used the wire and was lost on it.
    Lost,
    /// Found the queue full.
    QueueFull,
    /// Found the link cut.
    Cut,
}

#[derive(Debug)]
struct InFlight<P> {
    deliver_at: Duration,
    packet: P,
}

/// One direction of a link.
#[derive(Debug)]
pub struct Link<P> {
    shape: Shape,
    cut: bool,
    last_depart: Duration,
    in_flight: VecDeque<InFlight<P>>,
    rng: StdRng,
}

impl<P> Link<P> {
    /// An idle link.
    #[must_use]
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            cut: false,
            last_depart: Duration::ZERO,
            in_flight: VecDeque::new(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// What the link is like now.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether nothing gets through.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Changes the link for packets that are offered from now on; those under way keep their times.
    pub fn set_shape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// Cuts the link: what is under way is lost. Hands back the packets.
    pub fn cut(&mut self) -> impl Iterator<Item = P> + '_ {
        self.cut = true;
        self.last_depart = Duration::ZERO;
        self.in_flight.drain(..).map(|entry| entry.packet)
    }

    /// Joins the link again.
    pub fn heal(&mut self) {
        self.cut = false;
    }

    /// Whether a packet of `size` bytes would find room in the queue.
    #[must_use]
    pub fn has_room(&self, now: Duration, size: usize) -> bool {
        let bits = size as u128 * 8;
        let waiting = self.last_depart.saturating_sub(now).as_nanos() * u128::from(self.shape.rate_bps);
        waiting + bits * 1_000_000_000 <= u128::from(self.shape.queue_limit()) * 8_000_000_000
    }

    /// Takes a packet of `size` bytes in. A packet that is not carried is handed back with the reason.
    ///
    /// # Errors
    /// The fate of a packet that will not come out.
    pub fn offer(&mut self, now: Duration, size: usize, packet: P) -> Result<(), (Fate, P)> {
        if self.cut {
            return Err((Fate::Cut, packet));
        }
        if !self.has_room(now, size) {
            return Err((Fate::QueueFull, packet));
        }
        let serialise =
            u64::try_from(size as u128 * 8_000_000_000 / u128::from(self.shape.rate_bps)).unwrap_or(u64::MAX);
        self.last_depart = self.last_depart.max(now) + Duration::from_nanos(serialise);
        if self.shape.loss > 0.0 && self.rng.random::<f64>() < self.shape.loss {
            return Err((Fate::Lost, packet));
        }
        let deliver_at = self.last_depart + Duration::from_millis(self.shape.one_way_delay_ms);
        // A shortened delay must not let later packets overtake.
        let deliver_at = self.in_flight.back().map_or(deliver_at, |last| last.deliver_at.max(deliver_at));
        self.in_flight.push_back(InFlight { deliver_at, packet });
        Ok(())
    }

    /// The next packet that has arrived by `now`.
    pub fn pop_due(&mut self, now: Duration) -> Option<P> {
        if self.in_flight.front()?.deliver_at > now {
            return None;
        }
        self.in_flight.pop_front().map(|entry| entry.packet)
    }

    /// When the next packet arrives.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.in_flight.front().map(|entry| entry.deliver_at)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn shape(rate_bps: u64, one_way_delay_ms: u64) -> Shape {
        Shape { rate_bps, one_way_delay_ms, loss: 0.0, queue_bytes: None }
    }

    #[test]
    fn a_lone_packet_takes_its_serialisation_time_and_the_delay() {
        let mut link = Link::new(shape(8_000_000, 25), 1);
        link.offer(MS * 100, 1000, 'x').unwrap();
        assert_eq!(link.next_due(), Some(MS * 126));
        assert_eq!(link.pop_due(MS * 126 - Duration::from_nanos(1)), None);
        assert_eq!(link.pop_due(MS * 126), Some('x'));
        assert_eq!(link.next_due(), None);
    }

    #[test]
    fn packets_of_a_burst_wait_for_each_other() {
        let mut link = Link::new(shape(8_000_000, 10), 1);
        for n in 0..5 {
            link.offer(Duration::ZERO, 1000, n).unwrap();
        }
        for n in 0..5 {
            assert_eq!(link.next_due(), Some(MS * (11 + n)));
            assert_eq!(link.pop_due(MS * (11 + n)), Some(n));
        }
    }

    #[test]
    fn the_default_queue_is_one_round_trip_of_bandwidth() {
        assert_eq!(shape(200_000_000, 25).queue_limit(), 1_250_000);
        assert_eq!(shape(1_000_000, 1).queue_limit(), MIN_QUEUE_BYTES);
    }

    #[test]
    fn a_full_queue_drops_and_drains_with_time() {
        let mut link = Link::new(Shape { queue_bytes: Some(3000), ..shape(8_000_000, 0) }, 1);
        let fates: Vec<_> = (0..4).map(|n| link.offer(Duration::ZERO, 1000, n).map_err(|(fate, _)| fate)).collect();
        assert_eq!(fates, [Ok(()), Ok(()), Ok(()), Err(Fate::QueueFull)]);
        assert_eq!(link.offer(MS, 1000, 9), Ok(()));
    }

    #[test]
    fn a_cut_link_loses_what_is_under_way_and_heals() {
        let mut link = Link::new(shape(8_000_000, 10), 1);
        link.offer(Duration::ZERO, 1000, 1).unwrap();
        assert_eq!(link.cut().collect::<Vec<_>>(), [1]);
        assert_eq!(link.offer(MS, 1000, 2), Err((Fate::Cut, 2)));
        link.heal();
        link.offer(MS, 1000, 3).unwrap();
        assert_eq!(link.pop_due(MS * 12), Some(3));
    }

    #[test]
    fn the_same_seed_loses_the_same_packets_at_the_set_rate() {
        let run = |seed| -> Vec<bool> {
            let mut link = Link::new(Shape { loss: 0.02, ..shape(1_000_000_000, 1) }, seed);
            (0..20_000u64).map(|n| link.offer(Duration::from_micros(n * 20), 1000, ()).is_err()).collect()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let lost = run(7).iter().filter(|lost| **lost).count();
        assert!((300..500).contains(&lost), "lost {lost} of 20000 at 2 %");
    }

    proptest! {
        #[test]
        fn order_holds_and_the_rate_is_never_exceeded(
            sizes in prop::collection::vec((40usize..1500, 0u64..2000), 1..200),
            rate in 100_000u64..1_000_000_000,
        ) {
            let mut link = Link::new(shape(rate, 5), 3);
            let (mut now, mut sent) = (Duration::ZERO, Vec::new());
            for (n, (size, gap_us)) in sizes.into_iter().enumerate() {
                now += Duration::from_micros(gap_us);
                if link.offer(now, size, (n, size)).is_ok() {
                    sent.push((n, now));
                }
            }
            let mut out = Vec::new();
            while let Some(due) = link.next_due() {
                let (n, size) = link.pop_due(due).unwrap();
                out.push((n, size, due));
            }
            prop_assert_eq!(sent.len(), out.len());
            for ((n, offered), (m, _, due)) in sent.iter().zip(&out) {
                prop_assert_eq!(n, m);
                prop_assert!(*due >= *offered + MS * 5);
            }
            for pair in out.windows(2) {
                let least = (pair[1].1 as u128 * 8_000_000_000 / u128::from(rate)) as u64;
                prop_assert!(pair[1].2 - pair[0].2 >= Duration::from_nanos(least));
            }
        }
    }
}
