//! What the matrix is made of: points of a move, faults, and the pairs of them that can be.
//!
//! | point | side | the guest | what holds there |
//! |---|---|---|---|
//! | `connect` | source | runs | nothing has happened |
//! | `admit` | destination | runs | the hello has arrived |
//! | `disk-sync` | source | runs | connected; the destination's hypervisor starts |
//! | `receive` | destination | runs | admitted; what the source streams is not read yet |
//! | `memory` | source | runs | the disks keep up; not prepared yet |
//! | `switchover` | source | stopped | prepared; nothing is finished yet |
//! | `load` | destination | stopped | the stream has arrived; not vouched for |
//! | `hand-over` | source | stopped | **released**, the commit point; the destination does not know yet |
//! | `resume` | destination | stopped | vouched for; the release may have come |
//! | `acquired` | destination | runs there | acquired and resumed; the source does not know yet |

use std::fmt;

/// A side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the VM is.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// As failpoints call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Where a move is held while it is struck; in the order of their time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's table says it")]
pub enum Point {
    Connect,
    Admit,
    DiskSync,
    Receive,
    Memory,
    Switchover,
    Load,
    HandOver,
    Resume,
    Acquired,
}

impl Point {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Connect,
        Self::Admit,
        Self::DiskSync,
        Self::Receive,
        Self::Memory,
        Self::Switchover,
        Self::Load,
        Self::HandOver,
        Self::Resume,
        Self::Acquired,
    ];

    /// As the worker calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Admit => "admit",
            Self::DiskSync => "disk-sync",
            Self::Receive => "receive",
            Self::Memory => "memory",
            Self::Switchover => "switchover",
            Self::Load => "load",
            Self::HandOver => "hand-over",
            Self::Resume => "resume",
            Self::Acquired => "acquired",
        }
    }

    /// Whose worker is held.
    #[must_use]
    pub fn side(self) -> Side {
        match self {
            Self::Connect | Self::DiskSync | Self::Memory | Self::Switchover | Self::HandOver => Side::Source,
            Self::Admit | Self::Receive | Self::Load | Self::Resume | Self::Acquired => Side::Destination,
        }
    }

    /// Whether the destination has a hypervisor yet, or will have one while the move is held here.
    fn destination_has_hypervisor(self) -> bool {
        !matches!(self, Self::Connect | Self::Admit)
    }
}

/// A process that is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The worker of a side.
    Worker(Side),
    /// The VM's QEMU at a side.
    Hypervisor(Side),
    /// The controller that leads.
    Leader,
}

impl Target {
    fn name(self) -> String {
        match self {
            Self::Worker(side) => format!("{}-worker", side.name()),
            Self::Hypervisor(side) => format!("{}-qemu", side.name()),
            Self::Leader => "leader".to_owned(),
        }
    }
}

/// Which way a link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From source to destination.
    There,
    /// From destination to source.
    Back,
    /// Both.
    Both,
}

/// What strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`; a daemon is started again.
    Kill(Target),
    /// The link between the two sites is cut for a while.
    Cut(Way),
    /// `SIGSTOP` for longer than a lease, then `SIGCONT`.
    Stop(Target),
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Kill(Target::Worker(Side::Source)),
        Self::Kill(Target::Worker(Side::Destination)),
        Self::Kill(Target::Hypervisor(Side::Source)),
        Self::Kill(Target::Hypervisor(Side::Destination)),
        Self::Kill(Target::Leader),
        Self::Cut(Way::There),
        Self::Cut(Way::Back),
        Self::Cut(Way::Both),
        Self::Stop(Target::Worker(Side::Source)),
        Self::Stop(Target::Worker(Side::Destination)),
        Self::Stop(Target::Hypervisor(Side::Source)),
        Self::Stop(Target::Hypervisor(Side::Destination)),
        Self::Stop(Target::Leader),
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Kill(target) => format!("kill-{}", target.name()),
            Self::Cut(Way::There) => "cut-there".to_owned(),
            Self::Cut(Way::Back) => "cut-back".to_owned(),
            Self::Cut(Way::Both) => "cut-both".to_owned(),
            Self::Stop(target) => format!("stop-{}", target.name()),
        }
    }

    /// Whether there is something to strike at this point.
    fn can_strike_at(self, point: Point) -> bool {
        let hypervisor = Target::Hypervisor(Side::Destination);
        !matches!(self, Self::Kill(target) | Self::Stop(target) if target == hypervisor)
            || point.destination_has_hypervisor()
    }
}

/// A fault at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Where.
    pub point: Point,
    /// What.
    pub fault: Fault,
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.point.name(), self.fault.name())
    }
}

impl Pair {
    /// Whether a pattern `POINT`, `/FAULT` or `POINT/FAULT` means it.
    #[must_use]
    pub fn is_meant_by(&self, pattern: &str) -> bool {
        let (point, fault) = pattern.split_once('/').unwrap_or((pattern, ""));
        (point.is_empty() || point == self.point.name()) && (fault.is_empty() || fault == self.fault.name())
    }
}

/// The matrix: every pair that can be.
#[must_use]
pub fn matrix() -> Vec<Pair> {
    let all = Point::ALL.iter().flat_map(|point| Fault::ALL.iter().map(|fault| Pair { point: *point, fault: *fault }));
    all.filter(|pair| pair.fault.can_strike_at(pair.point)).collect()
}

/// The few that run with every test: one of each side, before and after the commit point.
#[must_use]
pub fn short_set() -> Vec<Pair> {
    const NAMES: [&str; 6] = [
        "receive/kill-destination-qemu",
        "switchover/kill-source-worker",
        "load/cut-both",
        "load/stop-destination-qemu",
        "hand-over/kill-source-worker",
        "resume/kill-destination-worker",
    ];
    matrix().into_iter().filter(|pair| NAMES.iter().any(|name| pair.is_meant_by(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_there_once_but_those_with_nothing_to_strike() {
        let names: std::collections::BTreeSet<_> = matrix().iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), matrix().len());
        assert_eq!(names.len(), Point::ALL.len() * Fault::ALL.len() - 4);
        assert!(!names.contains("connect/kill-destination-qemu"));
        assert!(names.contains("disk-sync/stop-destination-qemu"));
    }

    #[test]
    fn patterns_mean_a_point_a_fault_or_one_pair() {
        let count = |pattern: &str| matrix().iter().filter(|pair| pair.is_meant_by(pattern)).count();
        assert_eq!(count("memory"), 13);
        assert_eq!(count("/kill-leader"), 10);
        assert_eq!(count("memory/kill-leader"), 1);
        assert_eq!(count("nowhere"), 0);
        assert_eq!(short_set().len(), 6);
    }
}
