//! From a sample to a forecast. Pure.
//!
//! ```text
//!   classes = memory x share in the sample, as far as it can be trusted
//!   first pass = what crosses the link / link, and what the hypervisors stream / their rate
//!   rounds: what was dirtied meanwhile follows, u = dirtied per second / taken per second of it:
//!           total = first pass x (1 + u + u² + …) = first pass / (1 - u)
//! ```
//! The first pass takes the longer of the two at best, and both one after the other at worst. What is dirtied is taken to be literal.

use std::time::Duration;

use pageport_proto::v1::{Convergence, Quote, Range};
use pageport_teleport::PAGE_SIZE;

use super::sample::Cluster;
use crate::migration::convergence::{SURE_SHARE, outlook, passes};

/// Standard errors by which the truth is expected to differ at most.
const TRUST: f64 = 2.0;
/// Where none of `n` clusters has a class, fewer than 3/n of the memory have it, in 95 of 100 cases.
const RULE_OF_THREE: f64 = 3.0;
/// Bytes per second that two hypervisors stream while the link has no part in it: between software emulation on a busy host, and KVM.
const STREAM_BYTES_PER_S: Span = Span { low: 250e6, high: 1500e6 };
/// On the wire beside what is sent: packets' headers, acknowledgements, operations.
const OVERHEAD: Span = Span { low: 1.02, high: 1.06 };
/// On the wire for a page that is teleported or zero, in bytes: extents and runs.
const REFERENCE_BYTES: Span = Span { low: 0.2, high: 12.0 };
/// Of what a probe found, what a move gets.
const LINK_SHARE: Span = Span { low: 0.6, high: 1.05 };
/// Before the first page moves, besides round trips.
const SET_UP_S: Span = Span { low: 0.2, high: 2.0 };
const SET_UP_ROUND_TRIPS: Span = Span { low: 3.0, high: 10.0 };
/// The hypervisor's own limit of the last pass is within it.
const DOWNTIME_S: Span = Span { low: 0.05, high: 0.8 };
const DOWNTIME_ROUND_TRIPS: Span = Span { low: 2.0, high: 6.0 };

/// What was found.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Of the guest.
    pub memory_bytes: u64,
    /// Of its memory.
    pub clusters: &'a [Cluster],
    /// That the guest dirties.
    pub dirty_bytes_per_s: u64,
    /// That the replica lacks.
    pub disk_lag_bytes: u64,
    /// That the link took; not 0.
    pub link_bytes_per_s: u64,
    /// Of the link.
    pub round_trip: Duration,
}

/// The forecast, without what it is of.
pub fn estimate(facts: &Facts<'_>) -> Quote {
    let memory = facts.memory_bytes as f64;
    let share = |pages: fn(&Cluster) -> u32| trusted(facts.clusters, |it| ratio(pages(it), it.pages), true);
    let (zero, teleported, literal) = (share(|it| it.zero), share(|it| it.teleported), share(|it| it.literal));
    let page_bytes = PAGE_SIZE as f64;
    let literal_wire = trusted(facts.clusters, |it| ratio(it.literal_wire_bytes, it.pages) / page_bytes, false);
    let references = (zero + teleported).capped(1.0) * REFERENCE_BYTES * (1.0 / page_bytes);
    let first_wire = (literal_wire + references) * OVERHEAD * memory;
    let link = LINK_SHARE * facts.link_bytes_per_s as f64;
    let stream = (Span::of(memory)) / STREAM_BYTES_PER_S;
    let sending = first_wire / link;
    let first_pass = Span { low: sending.low.max(stream.low), high: sending.high + stream.high };
    let taken = (link / wire_per_literal(facts.clusters)).capped_by(STREAM_BYTES_PER_S);
    let left = Span::of(facts.dirty_bytes_per_s as f64) / taken;
    let convergence = outlook(left.low, left.high);
    let rounds = Span { low: passes(left.low.min(SURE_SHARE)), high: passes(left.high.min(SURE_SHARE)) };
    let lag = Span { low: 0.0, high: facts.disk_lag_bytes as f64 } / link;
    let round_trip = facts.round_trip.as_secs_f64();
    let total = SET_UP_S + SET_UP_ROUND_TRIPS * round_trip + lag + first_pass * rounds;
    let downtime = DOWNTIME_S + DOWNTIME_ROUND_TRIPS * round_trip;
    let ends = convergence != Convergence::No;
    Quote {
        memory_bytes: facts.memory_bytes,
        sampled_bytes: facts.clusters.iter().map(|cluster| u64::from(cluster.pages) * PAGE_SIZE as u64).sum(),
        zero_bytes: Some((zero * memory).range()),
        teleported_bytes: Some((teleported * memory).range()),
        literal_bytes: Some((literal * memory).range()),
        memory_wan_bytes: ends.then(|| (first_wire * rounds).range()),
        disk_lag_bytes: facts.disk_lag_bytes,
        dirty_rate_bps: facts.dirty_bytes_per_s.saturating_mul(8),
        link_bps: Some((link * 8.0).range()),
        round_trip_us: facts.round_trip.as_micros() as u64,
        total_time_ms: ends.then(|| (total * 1000.0).range()),
        downtime_ms: ends.then(|| (downtime * 1000.0).range()),
        convergence: convergence.into(),
        ..Quote::default()
    }
}

/// Bytes on the wire of one literal byte.
fn wire_per_literal(clusters: &[Cluster]) -> Span {
    let literal: f64 = clusters.iter().map(|it| f64::from(it.literal) * PAGE_SIZE as f64).sum();
    let wire: f64 = clusters.iter().map(|it| f64::from(it.literal_wire_bytes)).sum();
    // Of nothing nothing is known; what does not compress at all is the worst.
    if literal == 0.0 {
        Span { low: 0.1, high: 1.0 }
    } else {
        Span { low: 0.7, high: 1.3 } * (wire / literal).max(0.01)
    }
}

fn ratio(part: u32, whole: u32) -> f64 {
    if whole == 0 { 0.0 } else { f64::from(part) / f64::from(whole) }
}

/// The mean over all clusters, as far as it can be trusted; of `share`s at most 1, and never surely 0.
fn trusted(clusters: &[Cluster], of: impl Fn(&Cluster) -> f64, share: bool) -> Span {
    let count = clusters.len() as f64;
    if clusters.len() < 2 {
        return Span { low: 0.0, high: 1.0 };
    }
    let mean = clusters.iter().map(&of).sum::<f64>() / count;
    let variance = clusters.iter().map(|cluster| (of(cluster) - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let error = TRUST * (variance / count).sqrt();
    let least_high = if share && mean == 0.0 { RULE_OF_THREE / count } else { 0.0 };
    Span { low: (mean - error).max(0.0), high: (mean + error).max(least_high).min(1.0) }
}

/// Between two numbers, none of them negative.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    low: f64,
    high: f64,
}

impl Span {
    fn of(value: f64) -> Self {
        Self { low: value, high: value }
    }

    fn capped(self, at: f64) -> Self {
        self.capped_by(Self::of(at))
    }

    fn capped_by(self, other: Self) -> Self {
        Self { low: self.low.min(other.low), high: self.high.min(other.high) }
    }

    fn range(self) -> Range {
        Range { low: self.low.floor() as u64, high: self.high.ceil() as u64 }
    }
}

impl std::ops::Add for Span {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { low: self.low + other.low, high: self.high + other.high }
    }
}

impl std::ops::Mul for Span {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self { low: self.low * other.low, high: self.high * other.high }
    }
}

impl std::ops::Mul<f64> for Span {
    type Output = Self;
    fn mul(self, factor: f64) -> Self {
        self * Self::of(factor)
    }
}

impl std::ops::Div for Span {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        Self { low: self.low / other.high, high: self.high / other.low }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn facts(clusters: &[Cluster]) -> Facts<'_> {
        Facts {
            memory_bytes: 2048 * MIB,
            clusters,
            dirty_bytes_per_s: 2 * MIB,
            disk_lag_bytes: 20 * MIB,
            link_bytes_per_s: 25_000_000,
            round_trip: Duration::from_millis(50),
        }
    }

    fn cluster(zero: u32, teleported: u32, literal: u32) -> Cluster {
        Cluster { pages: 16, zero, teleported, literal, literal_wire_bytes: literal * 1500 }
    }

    /// 6 % zero, 83 % teleported, 11 % literal: what the demo's guest is.
    fn warm() -> Vec<Cluster> {
        let of = |number| match number % 18 {
            0 => cluster(16, 0, 0),
            1 | 2 => cluster(0, 0, 16),
            _ => cluster(0, 16, 0),
        };
        (0..512).map(of).collect()
    }

    #[test]
    fn what_the_demos_guest_took_lies_within_its_forecast() {
        let quote = estimate(&facts(&warm()));
        let within = |range: &Option<Range>, value: u64| {
            let range = range.unwrap();
            assert!((range.low..=range.high).contains(&value), "{value} of {range:?} in {quote:?}");
        };
        within(&quote.zero_bytes, 124 * MIB);
        within(&quote.teleported_bytes, 1700 * MIB);
        within(&quote.literal_bytes, 230 * MIB);
        within(&quote.memory_wan_bytes, 86 * MIB);
        within(&quote.total_time_ms, 7500);
        within(&quote.downtime_ms, 400);
        assert_eq!(quote.convergence(), Convergence::Yes);
    }

    #[test]
    fn a_guest_that_dirties_more_than_the_link_takes_has_no_time() {
        let clusters = warm();
        let quote = estimate(&Facts { dirty_bytes_per_s: 400 * MIB, ..facts(&clusters) });
        assert_eq!(quote.convergence(), Convergence::No);
        assert_eq!((quote.total_time_ms, quote.downtime_ms, quote.memory_wan_bytes), (None, None, None));
    }

    #[test]
    fn a_sample_of_nothing_promises_nothing() {
        let quote = estimate(&facts(&[]));
        assert_eq!(quote.literal_bytes, Some(Range { low: 0, high: 2048 * MIB }));
    }

    proptest! {
        #[test]
        fn every_range_is_one(
            counts in prop::collection::vec((0u32..=8, 0u32..=8, 0u32..5000), 0..40),
            dirty in 0u64..1 << 40,
            link in 1u64..1 << 40,
            lag in 0u64..1 << 50,
        ) {
            let clusters: Vec<_> = counts
                .into_iter()
                .map(|(zero, teleported, wire)| Cluster { literal_wire_bytes: wire, ..cluster(zero, teleported, 16 - zero - teleported) })
                .collect();
            let quote = estimate(&Facts { dirty_bytes_per_s: dirty, link_bytes_per_s: link, disk_lag_bytes: lag, ..facts(&clusters) });
            let ranges = [quote.zero_bytes, quote.teleported_bytes, quote.literal_bytes, quote.memory_wan_bytes, quote.link_bps, quote.total_time_ms, quote.downtime_ms];
            for range in ranges.into_iter().flatten() {
                prop_assert!(range.low <= range.high, "{range:?}");
            }
            for class in ranges[..3].iter().flatten() {
                prop_assert!(class.high <= quote.memory_bytes);
            }
        }
    }
}
