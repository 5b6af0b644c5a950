//! [`Convergence`]: what becomes of a move whose guest dirties memory faster than the link carries it. An operator's word; workers
//! look at the rounds of a move and act on it.

use pageport_proto::LONGEST_PAUSE_MS;
use pageport_proto::v1::{self, ConvergencePolicy};
use serde::{Deserialize, Serialize};

use super::schedule::ScheduleError;

/// What becomes of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Convergence {
    /// It goes on and says so: nothing is done to a guest unasked.
    #[default]
    Wait,
    /// The guest is slowed down.
    Throttle,
    /// The guest may stand still for longer.
    LongerPause {
        /// In all, in milliseconds.
        longest_ms: u64,
    },
    /// It is given up.
    GiveUp,
}

impl Convergence {
    /// As it may be ordered; [`None`]: nothing was said of it.
    ///
    /// # Errors
    /// [`ScheduleError::Convergence`], [`ScheduleError::LongestPause`], [`ScheduleError::NoLongerPause`].
    pub fn ordered(policy: i32, longest_pause_ms: u64) -> Result<Option<Self>, ScheduleError> {
        let policy = ConvergencePolicy::try_from(policy).map_err(|_| ScheduleError::Convergence { policy })?;
        let convergence = match policy {
            ConvergencePolicy::LongerPause if LONGEST_PAUSE_MS.contains(&longest_pause_ms) => {
                return Ok(Some(Self::LongerPause { longest_ms: longest_pause_ms }));
            }
            ConvergencePolicy::LongerPause => return Err(ScheduleError::LongestPause { ms: longest_pause_ms }),
            ConvergencePolicy::Unspecified => None,
            ConvergencePolicy::Wait => Some(Self::Wait),
            ConvergencePolicy::Throttle => Some(Self::Throttle),
            ConvergencePolicy::GiveUp => Some(Self::GiveUp),
        };
        if longest_pause_ms == 0 { Ok(convergence) } else { Err(ScheduleError::NoLongerPause) }
    }

    /// On the wire, with the longest pause.
    pub fn told(self) -> (v1::ConvergencePolicy, u64) {
        match self {
            Self::Wait => (ConvergencePolicy::Wait, 0),
            Self::Throttle => (ConvergencePolicy::Throttle, 0),
            Self::LongerPause { longest_ms } => (ConvergencePolicy::LongerPause, longest_ms),
            Self::GiveUp => (ConvergencePolicy::GiveUp, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ordered_is_what_is_told() {
        let all = [
            Convergence::Wait,
            Convergence::Throttle,
            Convergence::LongerPause { longest_ms: 500 },
            Convergence::GiveUp,
        ];
        for convergence in all {
            let (policy, longest_ms) = convergence.told();
            assert_eq!(Convergence::ordered(policy.into(), longest_ms), Ok(Some(convergence)));
        }
        assert_eq!(Convergence::ordered(0, 0), Ok(None));
    }

    #[test]
    fn a_longer_pause_has_a_maximum_and_nothing_else_has() {
        let longer = ConvergencePolicy::LongerPause.into();
        for ms in [0, 499, 20_001, u64::MAX] {
            assert_eq!(Convergence::ordered(longer, ms), Err(ScheduleError::LongestPause { ms }));
        }
        for policy in [ConvergencePolicy::Unspecified, ConvergencePolicy::Wait, ConvergencePolicy::GiveUp] {
            assert_eq!(Convergence::ordered(policy.into(), 2_000), Err(ScheduleError::NoLongerPause));
        }
        assert_eq!(Convergence::ordered(77, 0), Err(ScheduleError::Convergence { policy: 77 }));
    }
}
