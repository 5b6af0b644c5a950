//! What is done about a move that does not converge. Pure.
//!
//! | policy | when two rounds in a row say that it does not converge |
//! |---|---|
//! | wait | nothing |
//! | throttle | the guest gets half of the CPU time that it had, down to 1 %; it gets all back when the move ends |
//! | longer pause | the guest may stand still for as long as the least that was left takes, up to the stated maximum |
//! | give up | the move ends; the guest goes on at its source |
//!
//! After each measure two more rounds are judged. None is taken back as long as its policy is in force.

use std::time::Duration;

use pageport_proto::LONGEST_PAUSE_MS;
use pageport_proto::v1::{Convergence, ConvergencePolicy};

use super::rounds::Estimate;
use super::{USUAL_PAUSE, words};
use crate::hypervisor::migrate::MOST_THROTTLE_PERCENT;

/// Of a pause, what is not for memory: the disks' last writes, the digest, the hand-over.
const REST_OF_THE_PAUSE: Duration = Duration::from_millis(300);
/// A pause is as long as the least that was left takes, and so much longer: no round is like another.
const MARGIN: f64 = 1.1;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Nothing but to say so.
    #[default]
    Wait,
    /// The guest is slowed down.
    Throttle,
    /// The guest may stand still for longer.
    LongerPause {
        /// In all, at most.
        longest: Duration,
    },
    /// The move ends.
    GiveUp,
}

impl Policy {
    /// As the controllers say it; what is not known waits.
    pub fn told(policy: ConvergencePolicy, longest_pause_ms: u64) -> Self {
        match policy {
            ConvergencePolicy::Throttle => Self::Throttle,
            ConvergencePolicy::LongerPause => {
                let longest_ms = longest_pause_ms.clamp(*LONGEST_PAUSE_MS.start(), *LONGEST_PAUSE_MS.end());
                Self::LongerPause { longest: Duration::from_millis(longest_ms) }
            }
            ConvergencePolicy::GiveUp => Self::GiveUp,
            ConvergencePolicy::Wait | ConvergencePolicy::Unspecified => Self::Wait,
        }
    }

    /// Its name.
    pub fn name(self) -> ConvergencePolicy {
        match self {
            Self::Wait => ConvergencePolicy::Wait,
            Self::Throttle => ConvergencePolicy::Throttle,
            Self::LongerPause { .. } => ConvergencePolicy::LongerPause,
            Self::GiveUp => ConvergencePolicy::GiveUp,
        }
    }
}

/// What is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measures {
    /// Of its CPUs, what the guest is denied, in per cent.
    pub throttle_percent: u8,
    /// How long it may stand still for the last of its memory.
    pub pause: Duration,
}

impl Default for Measures {
    fn default() -> Self {
        Self { throttle_percent: 0, pause: USUAL_PAUSE }
    }
}

/// The move is given up, as was ordered.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{}", words::given_up(.estimate))]
pub struct GivenUp {
    estimate: Estimate,
}

/// What is to be in force from now on.
///
/// # Errors
/// [`GivenUp`].
pub fn decide(policy: Policy, estimate: Option<&Estimate>, in_force: Measures) -> Result<Measures, GivenUp> {
    let hopeless = estimate.filter(|estimate| estimate.outlook == Convergence::No);
    let usual = Measures::default();
    match (policy, hopeless) {
        (Policy::GiveUp, Some(estimate)) => Err(GivenUp { estimate: *estimate }),
        (Policy::Wait | Policy::GiveUp, _) => Ok(usual),
        (Policy::Throttle, hopeless) => {
            let percent = in_force.throttle_percent;
            Ok(Measures { throttle_percent: if hopeless.is_some() { harder(percent) } else { percent }, ..usual })
        }
        (Policy::LongerPause { longest }, hopeless) => {
            let needed = hopeless.map_or(Duration::ZERO, pause_for);
            Ok(Measures { pause: in_force.pause.max(needed).min(for_memory(longest)), ..usual })
        }
    }
}

/// The guest keeps half of what it has.
fn harder(throttle_percent: u8) -> u8 {
    let kept = 100_u8.saturating_sub(throttle_percent);
    (100 - kept / 2).min(MOST_THROTTLE_PERCENT)
}

/// What of a pause is for memory.
fn for_memory(longest: Duration) -> Duration {
    longest.saturating_sub(REST_OF_THE_PAUSE).max(USUAL_PAUSE)
}

/// The pause for memory that would be enough: what is left is taken not to compress, so it is never too short.
fn pause_for(estimate: &Estimate) -> Duration {
    let seconds = estimate.least_left_bytes as f64 * MARGIN / estimate.carried_bytes_per_s.max(1.0);
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// The pause in all that would be enough.
pub fn whole_pause_for(estimate: &Estimate) -> Duration {
    pause_for(estimate).saturating_add(REST_OF_THE_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::super::rounds::tests::seen;
    use super::*;

    const FITS: u64 = 1_000_000;

    fn hopeless() -> Estimate {
        seen(&[50, 50, 50]).estimate(FITS).unwrap()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn nothing_is_done_while_memory_may_converge() {
        let uncertain = seen(&[50, 50]).estimate(FITS).unwrap();
        let converging = seen(&[50, 20, 8]).estimate(FITS).unwrap();
        for policy in [Policy::Wait, Policy::Throttle, Policy::LongerPause { longest: ms(9_000) }, Policy::GiveUp] {
            for estimate in [None, Some(&uncertain), Some(&converging)] {
                assert_eq!(decide(policy, estimate, Measures::default()), Ok(Measures::default()), "{policy:?}");
            }
        }
    }

    #[test]
    fn who_waits_does_nothing_and_who_gives_up_ends() {
        assert_eq!(decide(Policy::Wait, Some(&hopeless()), Measures::default()), Ok(Measures::default()));
        assert_eq!(
            decide(Policy::GiveUp, Some(&hopeless()), Measures::default()),
            Err(GivenUp { estimate: hopeless() })
        );
    }

    #[test]
    fn a_guest_is_slowed_down_step_by_step_and_keeps_one_per_cent() {
        let mut measures = Measures::default();
        let mut steps = Vec::new();
        for _ in 0..8 {
            measures = decide(Policy::Throttle, Some(&hopeless()), measures).unwrap();
            steps.push(measures.throttle_percent);
        }
        assert_eq!(steps, [50, 75, 88, 94, 97, 99, 99, 99]);
        assert_eq!(measures.pause, USUAL_PAUSE);
        assert_eq!(decide(Policy::Throttle, None, measures), Ok(measures), "it stays as it is while it helps");
    }

    #[test]
    fn a_pause_grows_as_far_as_it_must_and_never_beyond_its_maximum() {
        // 50 MB at 5 MB/s.
        let longer =
            |longest| decide(Policy::LongerPause { longest: ms(longest) }, Some(&hopeless()), Measures::default());
        let pause = longer(60_000).unwrap().pause;
        assert!((10_900..=11_100).contains(&pause.as_millis()), "{pause:?}");
        assert_eq!(longer(4_000).unwrap(), Measures { throttle_percent: 0, pause: ms(3_700) });
        assert_eq!(longer(500).unwrap().pause, USUAL_PAUSE);
        // A shorter maximum counts at once, and what was permitted is not taken back otherwise.
        let permitted = Measures { pause: ms(3_700), ..Measures::default() };
        let told = |longest| decide(Policy::LongerPause { longest: ms(longest) }, None, permitted).unwrap().pause;
        assert_eq!((told(2_000), told(9_000)), (ms(1_700), ms(3_700)));
    }

    #[test]
    fn another_policy_takes_back_what_the_one_before_did() {
        let slowed = Measures { throttle_percent: 88, pause: ms(2_000) };
        assert_eq!(decide(Policy::Wait, Some(&hopeless()), slowed), Ok(Measures::default()));
        assert_eq!(decide(Policy::Throttle, None, slowed).unwrap().pause, USUAL_PAUSE);
        let longer = Policy::LongerPause { longest: ms(9_000) };
        assert_eq!(decide(longer, None, slowed), Ok(Measures { throttle_percent: 0, pause: ms(2_000) }));
    }

    #[test]
    fn what_the_controllers_say_is_understood_and_what_is_not_known_waits() {
        for policy in [Policy::Wait, Policy::Throttle, Policy::LongerPause { longest: ms(700) }, Policy::GiveUp] {
            assert_eq!(Policy::told(policy.name(), 700), policy);
        }
        assert_eq!(Policy::told(ConvergencePolicy::Unspecified, 700), Policy::Wait);
        let endless = Policy::told(ConvergencePolicy::LongerPause, u64::MAX);
        assert_eq!(endless, Policy::LongerPause { longest: ms(20_000) });
    }
}
