//! What the matrix is made of: points of a move, faults, what the VM does when it is cut off, and the cases of them that can be.
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
    /// The keeper of that QEMU.
    Keeper(Side),
    /// The controller that leads.
    Leader,
}

impl Target {
    fn name(self) -> String {
        match self {
            Self::Worker(side) => format!("{}-worker", side.name()),
            Self::Hypervisor(side) => format!("{}-qemu", side.name()),
            Self::Keeper(side) => format!("{}-keeper", side.name()),
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
    pub const ALL: [Self; 17] = [
        Self::Kill(Target::Worker(Side::Source)),
        Self::Kill(Target::Worker(Side::Destination)),
        Self::Kill(Target::Hypervisor(Side::Source)),
        Self::Kill(Target::Hypervisor(Side::Destination)),
        Self::Kill(Target::Keeper(Side::Source)),
        Self::Kill(Target::Keeper(Side::Destination)),
        Self::Kill(Target::Leader),
        Self::Cut(Way::There),
        Self::Cut(Way::Back),
        Self::Cut(Way::Both),
        Self::Stop(Target::Worker(Side::Source)),
        Self::Stop(Target::Worker(Side::Destination)),
        Self::Stop(Target::Hypervisor(Side::Source)),
        Self::Stop(Target::Hypervisor(Side::Destination)),
        Self::Stop(Target::Keeper(Side::Source)),
        Self::Stop(Target::Keeper(Side::Destination)),
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
        let with_hypervisor = [Target::Hypervisor(Side::Destination), Target::Keeper(Side::Destination)];
        !matches!(self, Self::Kill(target) | Self::Stop(target) if with_hypervisor.contains(&target))
            || point.destination_has_hypervisor()
    }

    /// Whether it can take the lease from whoever runs the VM: then a VM that fences itself is worth a case of its own.
    fn can_take_a_lease(self) -> bool {
        matches!(self, Self::Cut(_) | Self::Stop(Target::Worker(_) | Target::Leader))
    }
}

/// What the VM does when its host is cut off from the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// It runs on.
    KeepRunning,
    /// It is ended with its lease, and may be started elsewhere.
    SelfFence,
}

impl Isolation {
    /// Both.
    pub const ALL: [Self; 2] = [Self::KeepRunning, Self::SelfFence];

    /// As `on_isolation` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KeepRunning => "keep-running",
            Self::SelfFence => "self-fence",
        }
    }
}

/// A fault at a point, with a VM of one policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Where.
    pub point: Point,
    /// What.
    pub fault: Fault,
    /// The VM's policy.
    pub isolation: Isolation,
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.point.name(), self.fault.name())?;
        match self.isolation {
            Isolation::KeepRunning => Ok(()),
            Isolation::SelfFence => write!(f, "/{}", self.isolation.name()),
        }
    }
}

impl Pair {
    /// Whether a pattern means it: its name, or `POINT`, `/FAULT`, `//POLICY` and the like, where what is left out is anything.
    #[must_use]
    pub fn is_meant_by(&self, pattern: &str) -> bool {
        let mut parts = pattern.splitn(3, '/');
        let [point, fault, policy] = [parts.next(), parts.next(), parts.next()].map(Option::unwrap_or_default);
        if !point.is_empty() && !fault.is_empty() && policy.is_empty() {
            return pattern == self.to_string();
        }
        let is = |part: &str, name: &str| part.is_empty() || part == name;
        is(point, self.point.name()) && is(fault, &self.fault.name()) && is(policy, self.isolation.name())
    }
}

/// The matrix: every case that can be, those of VMs that keep running first.
#[must_use]
pub fn matrix() -> Vec<Pair> {
    let mut all = vec![];
    for isolation in Isolation::ALL {
        for point in Point::ALL {
            all.extend(Fault::ALL.map(|fault| Pair { point, fault, isolation }));
        }
    }
    let makes_sense = |pair: &Pair| pair.isolation == Isolation::KeepRunning || pair.fault.can_take_a_lease();
    all.retain(|pair| pair.fault.can_strike_at(pair.point) && makes_sense(pair));
    all
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
        assert_eq!(names.len(), Point::ALL.len() * Fault::ALL.len() - 8 + Point::ALL.len() * 6);
        assert!(!names.contains("connect/kill-destination-qemu"));
        assert!(!names.contains("admit/stop-destination-keeper"));
        assert!(names.contains("disk-sync/stop-destination-qemu"));
        assert!(names.contains("acquired/stop-destination-worker/self-fence"));
        assert!(!names.contains("acquired/kill-destination-worker/self-fence"));
    }

    #[test]
    fn patterns_mean_a_point_a_fault_a_policy_or_one_case() {
        let count = |pattern: &str| matrix().iter().filter(|pair| pair.is_meant_by(pattern)).count();
        assert_eq!(count("memory"), 17 + 6);
        assert_eq!(count("/kill-leader"), 10);
        assert_eq!(count("/stop-leader"), 20);
        assert_eq!(count("memory/kill-leader"), 1);
        assert_eq!(count("memory/stop-leader"), 1);
        assert_eq!(count("memory/stop-leader/self-fence"), 1);
        assert_eq!(count("//self-fence"), 60);
        assert_eq!(count("memory//self-fence"), 6);
        assert_eq!(count("nowhere"), 0);
        assert_eq!(short_set().len(), 6);
    }
}
