//! The cases: every fault at several moments, which are drawn from seeds. Pure: a case's name says all of it.
//!
//! | cue | the moment is that long after | so the fault falls into |
//! |---|---|---|
//! | begun | the destination has made the journal of the next point | freeze, copy, journal, commit |
//! | frozen | the source has made the scratch of a frozen point | copy, commit, release |
//! | applying | the destination has made the undo file of a committed point | apply |
//! | any | nothing in particular | anything, also a pause |

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// One of the two workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Runs the VM.
    Source,
    /// Holds the replica.
    Destination,
}

impl Side {
    /// Where it is in the lab.
    #[must_use]
    pub fn site(self) -> &'static str {
        match self {
            Self::Source => "a",
            Self::Destination => "b",
        }
    }
}

/// What carries nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    Forth,
    /// From the destination to the source.
    Back,
    /// Either.
    Both,
}

/// What strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a worker; it is started again.
    KillWorker(Side),
    /// `SIGSTOP` of a worker, then `SIGCONT`.
    StopWorker(Side),
    /// `kill -9` of the VM's QEMU; the VM is started again.
    KillHypervisor,
    /// The link carries nothing.
    Cut(Way),
    /// The file system of a worker's data is full.
    FillDisk(Side),
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::KillWorker(Side::Source),
        Self::StopWorker(Side::Source),
        Self::KillWorker(Side::Destination),
        Self::StopWorker(Side::Destination),
        Self::KillHypervisor,
        Self::Cut(Way::Forth),
        Self::Cut(Way::Back),
        Self::Cut(Way::Both),
        Self::FillDisk(Side::Source),
        Self::FillDisk(Side::Destination),
    ];

    /// As it is called in names of cases.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KillWorker(Side::Source) => "kill-source-worker",
            Self::KillWorker(Side::Destination) => "kill-destination-worker",
            Self::StopWorker(Side::Source) => "stop-source-worker",
            Self::StopWorker(Side::Destination) => "stop-destination-worker",
            Self::KillHypervisor => "kill-qemu",
            Self::Cut(Way::Forth) => "cut-forth",
            Self::Cut(Way::Back) => "cut-back",
            Self::Cut(Way::Both) => "cut-both",
            Self::FillDisk(Side::Source) => "full-disk-source",
            Self::FillDisk(Side::Destination) => "full-disk-destination",
        }
    }

    /// Whether the destination's worker does nothing while it lasts.
    #[must_use]
    pub fn holds_destination(self) -> bool {
        matches!(self, Self::KillWorker(Side::Destination) | Self::StopWorker(Side::Destination))
    }

    fn number(self) -> u64 {
        Self::ALL.into_iter().zip(0..).find_map(|(fault, number)| (fault == self).then_some(number)).unwrap_or_default()
    }
}

/// A moment of a round that can be seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cue {
    /// The destination has begun a journal.
    Begun,
    /// The source has begun a scratch file.
    Frozen,
    /// The destination has begun an undo file.
    Applying,
    /// No moment in particular.
    Any,
}

impl Cue {
    const ALL: [Self; 4] = [Self::Begun, Self::Applying, Self::Frozen, Self::Any];

    /// As results call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Frozen => "frozen",
            Self::Applying => "applying",
            Self::Any => "any",
        }
    }

    /// The longest delay behind it that still falls into what it stands for, in milliseconds.
    fn reach_ms(self) -> u64 {
        match self {
            Self::Begun => 1500,
            Self::Frozen => 800,
            Self::Applying => 60,
            Self::Any => 5000,
        }
    }
}

/// When a fault strikes, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strike {
    /// After what.
    pub cue: Cue,
    /// How long after it.
    pub delay: Duration,
    /// Until it is healed.
    pub lasts: Duration,
}

/// A fault and the seed that its moment is drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// What.
    pub fault: Fault,
    /// When.
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.fault.name(), self.seed)
    }
}

impl Case {
    /// Whether a pattern means it: its name, `FAULT`, or `/SEED`.
    #[must_use]
    pub fn is_meant_by(&self, pattern: &str) -> bool {
        let (fault, seed) = pattern.split_once('/').unwrap_or((pattern, ""));
        let is = |part: &str, name: &str| part.is_empty() || part == name;
        is(fault, self.fault.name()) && is(seed, &self.seed.to_string())
    }

    /// Its moment. Seeds that follow each other have different cues, so that a few of them cover a round.
    #[must_use]
    pub fn strike(&self) -> Strike {
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_mul(64).wrapping_add(self.fault.number()));
        let cue = Cue::ALL[usize::try_from(self.seed.wrapping_add(self.fault.number()) % 4).unwrap_or_default()];
        let delay = Duration::from_millis(random.random_range(0..cue.reach_ms()));
        let lasts = match self.fault {
            Fault::KillWorker(_) => 500..6000,
            Fault::KillHypervisor => 1000..4000,
            // Long enough for at least one round that finds it full.
            Fault::FillDisk(_) => 7000..16_000,
            // Shorter than a silent connection lives, or longer.
            Fault::StopWorker(_) | Fault::Cut(_) if random.random_bool(0.5) => 1000..6000,
            Fault::StopWorker(_) | Fault::Cut(_) => 13_000..20_000,
        };
        Strike { cue, delay, lasts: Duration::from_millis(random.random_range(lasts)) }
    }
}

/// Every fault with so many seeds, beginning with `first_seed`; all faults of a seed before the next.
#[must_use]
pub fn cases(first_seed: u64, seeds: u64) -> Vec<Case> {
    let seeds = (0..seeds).map(|n| first_seed.wrapping_add(n));
    seeds.flat_map(|seed| Fault::ALL.map(|fault| Case { fault, seed })).collect()
}

/// The few that run with every test.
#[must_use]
pub fn short_set() -> Vec<Case> {
    const NAMES: [&str; 4] =
        ["kill-destination-worker/3", "kill-source-worker/2", "kill-qemu/4", "full-disk-destination/3"];
    let all = cases(1, 4);
    all.into_iter().filter(|case| NAMES.iter().any(|name| case.is_meant_by(name))).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_has_every_cue_and_a_case_is_always_the_same() {
        for fault in Fault::ALL {
            let cues: BTreeSet<_> = (1..=6).map(|seed| Case { fault, seed }.strike().cue.name()).collect();
            assert_eq!(cues.len(), 4, "{}", fault.name());
        }
        let names: BTreeSet<_> = cases(1, 6).iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 60);
        for case in cases(1, 6) {
            assert_eq!(case.strike(), case.strike());
            assert!(case.strike().delay < Duration::from_millis(case.strike().cue.reach_ms()));
        }
        assert_eq!(short_set().len(), 4);
    }

    #[test]
    fn stops_and_cuts_are_short_and_long() {
        for fault in [Fault::StopWorker(Side::Source), Fault::Cut(Way::Both)] {
            let lasts: Vec<_> = (1..=6).map(|seed| Case { fault, seed }.strike().lasts.as_secs()).collect();
            assert!(lasts.iter().any(|s| *s < 7) && lasts.iter().any(|s| *s > 12), "{}: {lasts:?}", fault.name());
        }
    }

    #[test]
    fn patterns_mean_a_fault_a_seed_or_one_case() {
        let count = |pattern: &str| cases(1, 6).iter().filter(|case| case.is_meant_by(pattern)).count();
        assert_eq!(count("cut-both"), 6);
        assert_eq!(count("/2"), 10);
        assert_eq!(count("cut-both/2"), 1);
        assert_eq!(count("cut-both/9"), 0);
        assert_eq!(count("nothing"), 0);
    }
}
