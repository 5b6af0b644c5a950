//! The cases: every fault at several moments, which are drawn from seeds. Pure: a case's name says all of it.
//!
//! | cue | the moment is that long after | so the fault falls into |
//! |---|---|---|
//! | begun | the destination has made the journal of the next point | freeze, copy, journal, commit |
//! | frozen | the source has made the scratch of a frozen point | copy, commit, release |
//! | applying | the destination has made the undo file of a committed point | apply |
//! | any | nothing in particular | anything, also a pause |
//!
//! First those with the VM where it was defined; then, after one move, those in the turned-round direction.

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

/// Which way the VM's disks are replicated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From a, where the VM was defined, to b.
    #[default]
    First,
    /// From b to a, after a move: the VM's own image is the replica.
    Turned,
}

impl Direction {
    /// As it is called in patterns.
    const TURNED: &'static str = "turned";

    /// Where a side is in the lab.
    #[must_use]
    pub fn site(self, side: Side) -> &'static str {
        match (self, side) {
            (Self::First, Side::Source) | (Self::Turned, Side::Destination) => "a",
            (Self::First, Side::Destination) | (Self::Turned, Side::Source) => "b",
        }
    }

    /// What strikes in it. Not a full disk where the VM runs on what was a replica: its own disk lies on that file system and is thin, so
    /// that the guest itself would find it full.
    fn faults(self) -> impl Iterator<Item = Fault> {
        let strikes = move |fault: &Fault| self == Self::First || *fault != Fault::FillDisk(Side::Source);
        Fault::ALL.into_iter().filter(strikes)
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
    /// Which way.
    pub direction: Direction,
    /// What.
    pub fault: Fault,
    /// When.
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name(), self.seed)
    }
}

impl Case {
    /// The fault, and the direction unless it is the first.
    fn name(&self) -> String {
        match self.direction {
            Direction::First => self.fault.name().to_owned(),
            Direction::Turned => format!("{}-{}", Direction::TURNED, self.fault.name()),
        }
    }

    /// Whether a pattern means it: its name, `FAULT`, `turned-FAULT`, `turned`, or `/SEED`.
    #[must_use]
    pub fn is_meant_by(&self, pattern: &str) -> bool {
        let (fault, seed) = pattern.split_once('/').unwrap_or((pattern, ""));
        let is = |part: &str, name: &str| part.is_empty() || part == name;
        let is_turned = self.direction == Direction::Turned && fault == Direction::TURNED;
        (is_turned || is(fault, &self.name())) && is(seed, &self.seed.to_string())
    }

    /// Its moment. Seeds that follow each other have different cues, so that a few of them cover a round.
    #[must_use]
    pub fn strike(&self) -> Strike {
        let turned = u64::from(self.direction == Direction::Turned) * 32;
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_mul(64).wrapping_add(turned + self.fault.number()));
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

/// Every fault with so many seeds, beginning with `first_seed`; all faults of a seed before the next. Then those in the turned-round
/// direction, with the first third of the seeds.
#[must_use]
pub fn cases(first_seed: u64, seeds: u64) -> Vec<Case> {
    let of = |direction: Direction, seeds: u64| {
        let seeds = (0..seeds).map(move |n| first_seed.wrapping_add(n));
        seeds.flat_map(move |seed| direction.faults().map(move |fault| Case { direction, fault, seed }))
    };
    of(Direction::First, seeds).chain(of(Direction::Turned, seeds.div_ceil(3))).collect()
}

/// The few that run with every test.
#[must_use]
pub fn short_set() -> Vec<Case> {
    const NAMES: [&str; 5] = [
        "kill-destination-worker/3",
        "kill-source-worker/2",
        "kill-qemu/4",
        "full-disk-destination/3",
        "turned-stop-destination-worker/2",
    ];
    let all = cases(1, 4);
    all.into_iter().filter(|case| NAMES.iter().any(|name| case.is_meant_by(name))).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn case(fault: Fault, seed: u64) -> Case {
        Case { direction: Direction::First, fault, seed }
    }

    #[test]
    fn every_fault_has_every_cue_and_a_case_is_always_the_same() {
        for fault in Fault::ALL {
            let cues: BTreeSet<_> = (1..=6).map(|seed| case(fault, seed).strike().cue.name()).collect();
            assert_eq!(cues.len(), 4, "{}", fault.name());
        }
        let names: BTreeSet<_> = cases(1, 6).iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 78);
        for case in cases(1, 6) {
            assert_eq!(case.strike(), case.strike());
            assert!(case.strike().delay < Duration::from_millis(case.strike().cue.reach_ms()));
        }
        assert_eq!(short_set().len(), 5);
    }

    #[test]
    fn one_move_lies_between_the_directions_and_turned_cases_have_every_cue_and_moments_of_their_own() {
        let all = cases(1, 6);
        let turned = all.iter().position(|case| case.direction == Direction::Turned).unwrap_or_default();
        assert_eq!(turned, 60);
        let turned = &all[turned..];
        assert!(turned.iter().all(|case| case.direction == Direction::Turned));
        assert!(!turned.iter().any(|case| case.fault == Fault::FillDisk(Side::Source)));
        assert_eq!(turned.iter().map(|case| case.strike().cue.name()).collect::<BTreeSet<_>>().len(), 4);
        let same = |case: &&Case| case.strike() == Case { direction: Direction::First, ..**case }.strike();
        assert_eq!(turned.iter().filter(same).count(), 0);
    }

    #[test]
    fn stops_and_cuts_are_short_and_long() {
        for fault in [Fault::StopWorker(Side::Source), Fault::Cut(Way::Both)] {
            let lasts: Vec<_> = (1..=6).map(|seed| case(fault, seed).strike().lasts.as_secs()).collect();
            assert!(lasts.iter().any(|s| *s < 7) && lasts.iter().any(|s| *s > 12), "{}: {lasts:?}", fault.name());
        }
    }

    #[test]
    fn patterns_mean_a_fault_a_seed_or_one_case() {
        let count = |pattern: &str| cases(1, 6).iter().filter(|case| case.is_meant_by(pattern)).count();
        assert_eq!(count("cut-both"), 6);
        assert_eq!(count("/2"), 19);
        assert_eq!(count("cut-both/2"), 1);
        assert_eq!(count("turned-cut-both"), 2);
        assert_eq!(count("turned/2"), 9);
        assert_eq!(count("cut-both/9"), 0);
        assert_eq!(count("nothing"), 0);
    }
}
