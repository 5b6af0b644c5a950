//! The rounds of a move, and what they say together. Pure: time is passed in.
//!
//! What a round dirtied follows from what was left before and after it and what it sent, all of them the hypervisor's own counts; so a round that
//! the hypervisor ends early (every 5 s while it slows a guest down) counts as truly as a whole one. What a page costs on the wire is
//! the codec's word.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pageport_proto::v1::Convergence;

use super::{SURE_SHARE, outlook};

/// So many rounds in a row are judged together.
const JUDGED: usize = 2;
/// A round that has sent so much of what it began with is a whole one.
const WHOLE: f64 = 0.7;

/// What hypervisor and wire show at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// Passes that the hypervisor has begun, from 1.
    pub round: u64,
    /// Memory still to be sent in this one.
    pub left_bytes: u64,
    /// Memory that was sent in all.
    pub sent_bytes: u64,
    /// Bytes on the wire for it in all.
    pub wire_bytes: u64,
    /// When.
    pub at: Instant,
}

/// A round that has ended.
#[derive(Debug, Clone, Copy)]
struct Round {
    before_bytes: u64,
    left_bytes: u64,
    sent_bytes: u64,
    dirtied_bytes: u64,
    wire_bytes: u64,
    took: Duration,
}

impl Round {
    fn between(begun: Observation, ended: Observation) -> Self {
        let sent_bytes = ended.sent_bytes.saturating_sub(begun.sent_bytes);
        Self {
            before_bytes: begun.left_bytes,
            left_bytes: ended.left_bytes,
            sent_bytes,
            dirtied_bytes: (ended.left_bytes + sent_bytes).saturating_sub(begun.left_bytes),
            wire_bytes: ended.wire_bytes.saturating_sub(begun.wire_bytes),
            took: ended.at.duration_since(begun.at),
        }
    }

    fn share(&self) -> f64 {
        self.dirtied_bytes as f64 / self.sent_bytes.max(1) as f64
    }

    /// Was nearly all sent that was to be sent in it? If not, the hypervisor has cut it short.
    fn is_whole(&self) -> bool {
        self.sent_bytes as f64 > self.before_bytes as f64 * WHOLE
    }
}

/// The rounds so far.
#[derive(Debug, Default)]
pub struct Rounds {
    round: Option<u64>,
    /// The beginning of the round under way. Of the first that was seen it is not known: what it leaves was dirtied before, too. Of a move, that
    /// is the pass which sends what was never dirtied.
    begun: Option<Observation>,
    judged: VecDeque<Round>,
}

/// What the newest rounds say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Does memory converge?
    pub outlook: Convergence,
    /// The least that one of them left; the pause must hold it.
    pub least_left_bytes: u64,
    /// Rounds to come until what is left fits into the pause; [`None`]: nobody knows, or they are cut short.
    pub rounds_to_come: Option<u32>,
    /// Memory that the guest dirties, in bytes per second.
    pub dirtied_bytes_per_s: f64,
    /// The same as it goes over the wire, in bytes per second.
    pub dirtied_wire_bytes_per_s: f64,
    /// What the wire carries of it, in bytes per second.
    pub carried_bytes_per_s: f64,
}

impl Rounds {
    /// Takes note of what is seen now.
    pub fn observe(&mut self, now: Observation) {
        let Some(round) = self.round.replace(now.round) else { return };
        if round == now.round {
            return;
        }
        if let Some(begun) = self.begun.replace(now) {
            self.judged.push_back(Round::between(begun, now));
            self.judged.drain(..self.judged.len().saturating_sub(JUDGED));
        }
    }

    /// What was seen so far says nothing of what is to come: the move was held, or something is done about it.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// What the newest rounds say, when `fits_bytes` of memory fit into the permitted pause; [`None`] before the end of the second.
    pub fn estimate(&self, fits_bytes: u64) -> Option<Estimate> {
        let least_left_bytes = self.judged.iter().map(|round| round.left_bytes).min()?;
        let of = |share: fn(f64, f64) -> f64| self.judged.iter().map(Round::share).reduce(share).unwrap_or_default();
        let (low, high) = (of(f64::min), of(f64::max));
        let outlook = match outlook(low, high) {
            _ if least_left_bytes <= fits_bytes => Convergence::Yes,
            // One round alone may be an odd one.
            Convergence::No if self.judged.len() < JUDGED => Convergence::Uncertain,
            outlook => outlook,
        };
        let sum = |figure: fn(&Round) -> u64| self.judged.iter().map(figure).sum::<u64>() as f64;
        let took_s = self.judged.iter().map(|round| round.took).sum::<Duration>().as_secs_f64().max(0.001);
        let dirtied_bytes_per_s = sum(|round| round.dirtied_bytes) / took_s;
        let on_the_wire = sum(|round| round.wire_bytes) / sum(|round| round.sent_bytes).max(1.0);
        Some(Estimate {
            outlook,
            least_left_bytes,
            rounds_to_come: (high <= SURE_SHARE && self.judged.iter().all(Round::is_whole))
                .then(|| rounds_to_come(least_left_bytes, fits_bytes, high)),
            dirtied_bytes_per_s,
            dirtied_wire_bytes_per_s: dirtied_bytes_per_s * on_the_wire,
            carried_bytes_per_s: sum(|round| round.wire_bytes) / took_s,
        })
    }
}

/// Rounds until `left` has become `fits`, when each leaves `share` (below 1) of the one before.
fn rounds_to_come(left_bytes: u64, fits_bytes: u64, share: f64) -> u32 {
    let factor = fits_bytes.max(1) as f64 / left_bytes.max(1) as f64;
    if factor >= 1.0 { 0 } else { (factor.ln() / share.max(0.01).ln()).ceil() as u32 }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const MB: u64 = 1_000_000;
    const FITS: u64 = MB;

    /// Rounds that begin with so many MB each, sent at 10 MB/s, half of that on the wire, after a first pass of 500 MB.
    pub(in super::super) fn seen(lefts: &[u64]) -> Rounds {
        let mut rounds = Rounds::default();
        let start = Instant::now();
        let (mut left, mut sent) = (500 * MB, 0);
        rounds.observe(Observation { round: 1, left_bytes: left, sent_bytes: 0, wire_bytes: 0, at: start });
        for (round, next) in (2..).zip(lefts) {
            // In the middle of a round nothing is learned.
            let middle = sent + left / 2;
            let observation = |round, left_bytes, sent: u64| Observation {
                round,
                left_bytes,
                sent_bytes: sent,
                wire_bytes: sent / 2,
                at: start + Duration::from_micros(sent / 10),
            };
            rounds.observe(observation(round - 1, left - left / 2, middle));
            sent += left;
            left = next * MB;
            rounds.observe(observation(round, left, sent));
        }
        rounds
    }

    fn outlook_of(lefts: &[u64]) -> Option<Convergence> {
        seen(lefts).estimate(FITS).map(|estimate| estimate.outlook)
    }

    #[test]
    fn rounds_that_shrink_converge_and_the_rest_of_them_is_told() {
        assert_eq!(outlook_of(&[]), None);
        assert_eq!(outlook_of(&[80]), None, "the first pass says nothing");
        let estimate = seen(&[80, 40, 20]).estimate(FITS).unwrap();
        assert_eq!((estimate.outlook, estimate.rounds_to_come), (Convergence::Yes, Some(5)));
        assert_eq!(estimate.least_left_bytes, 20 * MB);
    }

    #[test]
    fn rounds_that_stay_as_they_are_do_not_converge_and_the_figures_say_why() {
        assert_eq!(outlook_of(&[48, 48]), Some(Convergence::Uncertain), "after the second round");
        let estimate = seen(&[48, 48, 48]).estimate(FITS).unwrap();
        assert_eq!((estimate.outlook, estimate.rounds_to_come), (Convergence::No, None), "after the third");
        let near = |value: f64, mega: f64| (value / 1e6 - mega).abs() < 0.1;
        assert!(
            near(estimate.dirtied_bytes_per_s, 10.0) && near(estimate.dirtied_wire_bytes_per_s, 5.0),
            "{estimate:?}"
        );
        assert!(near(estimate.carried_bytes_per_s, 5.0), "{estimate:?}");
        assert_eq!(outlook_of(&[40, 60, 90]), Some(Convergence::No), "nor do those that grow");
    }

    #[test]
    fn what_dirties_the_same_pages_again_and_again_comes_to_rest_and_does_not_converge() {
        // A quarter of what is sent is not dirtied again in the first round, nothing later on.
        assert_eq!(outlook_of(&[64, 48, 47]), Some(Convergence::Uncertain));
        assert_eq!(outlook_of(&[64, 48, 47, 47]), Some(Convergence::No));
    }

    #[test]
    fn one_odd_round_changes_nothing() {
        assert_ne!(outlook_of(&[100, 60, 64, 36]), Some(Convergence::No), "a busy moment of a guest that converges");
        assert_ne!(outlook_of(&[100, 60, 64]), Some(Convergence::No));
        assert_eq!(outlook_of(&[48, 48, 20, 48, 48]), Some(Convergence::No), "a quiet moment of one that does not");
    }

    #[test]
    fn what_fits_into_the_pause_converges_whatever_its_share() {
        let rounds = seen(&[1, 1, 1]);
        assert_eq!(rounds.estimate(FITS).map(|it| (it.outlook, it.rounds_to_come)), Some((Convergence::Yes, None)));
        assert_eq!(rounds.estimate(FITS - 1).map(|it| it.outlook), Some(Convergence::No));
    }

    #[test]
    fn rounds_that_are_cut_short_count_by_what_they_sent_and_dirtied() {
        let mut rounds = Rounds::default();
        let start = Instant::now();
        // 1 GB to send, 20 MB of it in each round, and 10 MB dirtied meanwhile.
        for round in 2..6 {
            let sent_bytes = (round - 2) * 20 * MB;
            let at = start + Duration::from_secs(2 * (round - 2));
            let left_bytes = 1000 * MB - sent_bytes / 2;
            rounds.observe(Observation { round, left_bytes, sent_bytes, wire_bytes: sent_bytes, at });
        }
        let estimate = rounds.estimate(FITS).unwrap();
        assert_eq!((estimate.outlook, estimate.rounds_to_come), (Convergence::Yes, None));
    }

    #[test]
    fn after_something_was_done_two_more_rounds_are_judged() {
        let mut rounds = seen(&[48, 48, 48]);
        rounds.forget();
        assert_eq!(rounds.estimate(FITS), None);
        let mut seen = |round: u64| {
            let sent_bytes = 48 * MB * round;
            let at = Instant::now();
            rounds.observe(Observation { round, left_bytes: 48 * MB, sent_bytes, wire_bytes: sent_bytes, at });
            rounds.estimate(FITS).map(|estimate| estimate.outlook)
        };
        assert_eq!([5, 5, 6].map(&mut seen), [None; 3], "the rest of the round under way is none of them");
        assert_eq!(
            [7, 7, 8].map(seen),
            [Some(Convergence::Uncertain), Some(Convergence::Uncertain), Some(Convergence::No)]
        );
    }
}
