//! One case: a move that is held at a point, struck there, let go, and healed.
//!
//! ```text
//! loads ─▶ hold ─▶ order the move ─▶ reached ─▶ strike ─▶ let go ─▶ the fault lasts ─▶ heal ─▶ judge
//! ```
//! The fault is in place before the move goes on, so it strikes exactly there.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::sleep;

use super::arena::{Arena, VM, steer, wait_for};
use super::error::FaultsError;
use super::plan::{Fault, Pair, Side, Target, Way};
use crate::demo::loads::{self, Before};
use crate::lab::guest::SMALL;
use crate::lab::network::SITES;
use crate::wan::control::Request;

/// How long a killed daemon is away.
const AWAY: Duration = Duration::from_secs(2);
/// How long a link is cut: longer than a silent connection lives, and than a lease.
const CUT: Duration = Duration::from_secs(12);
const REACH_LIMIT: Duration = Duration::from_secs(60);
const REACH_POLL: Duration = Duration::from_millis(5);
const HYPERVISOR_LIMIT: Duration = Duration::from_secs(30);

/// A case that was struck and healed, to be judged.
#[derive(Debug)]
pub struct Struck {
    /// Which pair.
    pub pair: Pair,
    /// The move.
    pub migration: String,
    /// Where the VM was.
    pub source: String,
    /// Where it was to go.
    pub destination: String,
    /// The QEMU of its source, looked up before the move: past the commit point it does not last long.
    pub hypervisor: i32,
    /// The controller that led when the move was ordered.
    pub leader: String,
    /// What the guest was.
    pub before: Before,
    /// What had been said of leases and takeovers until then.
    pub before_leases: Leases,
}

/// What has become of leases, counted: a case is judged by what was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leases {
    /// Guests that their keepers, or guards, ended.
    pub expired: usize,
    /// The epoch of the newest takeover; 0 if there was none.
    pub takeover_epoch: u64,
}

impl Leases {
    /// As the workers' logs and the VM show it.
    #[must_use]
    pub fn of(arena: &Arena, vm: &serde_json::Value) -> Self {
        let expired = SITES.iter().map(|site| {
            let log = fs::read(arena.logs().join(format!("worker-{site}.log"))).unwrap_or_default();
            String::from_utf8_lossy(&log).matches("cause=LeaseExpired").count()
        });
        let takeovers = vm["takeovers"].as_array().into_iter().flatten();
        let newest = takeovers.filter_map(|takeover| takeover["epoch"].as_u64()).max();
        Self { expired: expired.sum(), takeover_epoch: newest.unwrap_or_default() }
    }
}

impl Struck {
    /// The site of a side.
    #[must_use]
    pub fn site(&self, side: Side) -> &str {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    /// The site whose QEMU was killed, if one was.
    #[must_use]
    pub fn killed_hypervisor(&self) -> Option<&str> {
        match self.pair.fault {
            // It does not outlive its keeper.
            Fault::Kill(Target::Hypervisor(side) | Target::Keeper(side)) => Some(self.site(side)),
            _ => None,
        }
    }
}

/// Runs a case up to the point where all is healed. What is to be struck may be gone in time: the controllers' relay ends a source's
/// guest although its destination is held. Then the case is begun once more.
///
/// # Errors
/// When it could not be set up, struck or healed.
pub async fn strike(arena: &mut Arena, pair: Pair, lease: Duration) -> Result<Struck, FaultsError> {
    match strike_once(arena, pair, lease).await {
        Err(FaultsError::InVain { .. }) => {
            wait_for("the move to end", REACH_LIMIT, async || {
                let vm = arena.vm().await.map_err(|error| error.to_string())?;
                let moving = vm["migration_id"].as_str().unwrap_or_default();
                if moving.is_empty() { Ok(()) } else { Err(format!("migration {moving}")) }
            })
            .await?;
            let vm = arena.vm().await?;
            let mut guest = arena.guest(vm["owner_site"].as_str().unwrap_or_default()).await?;
            loads::stop(&mut guest).await?;
            strike_once(arena, pair, lease).await
        }
        struck => struck,
    }
}

async fn strike_once(arena: &mut Arena, pair: Pair, lease: Duration) -> Result<Struck, FaultsError> {
    let vm = arena.vm().await?;
    let source = vm["owner_site"].as_str().unwrap_or_default().to_owned();
    let destination = if source == "a" { "b" } else { "a" }.to_owned();
    arena.seed(&destination).await?;
    let before_leases = Leases::of(arena, &vm);
    let before = loads::begin(&mut arena.guest(&source).await?, SMALL).await?;

    let folder = arena.lab.failpoints();
    let file = |kind| folder.join(format!("{}.{}.{kind}", pair.point.side().name(), pair.point.name()));
    let (hold, reached) = (file("hold"), file("reached"));
    empty(&folder)?;
    arena.sniffer.take().map_err(FaultsError::Heartbeats)?;
    fs::write(&hold, b"").map_err(|source| FaultsError::File { operation: "write", path: hold.clone(), source })?;

    let leader = arena.leader().await?;
    let hypervisor = hypervisor(arena, &source).await?;
    let ordered = arena.lab.ctl_json(["migrate", VM, "--to", &destination]).await?;
    let migration = ordered["id"].as_str().map(str::to_owned);
    let migration =
        migration.ok_or_else(|| FaultsError::Answer { what: "the move's id", answer: ordered.to_string() })?;
    let struck = Struck { pair, migration, source, destination, hypervisor, leader, before, before_leases };
    reach(&reached).await?;

    let healing = apply(arena, &struck).await;
    // Whether it was struck or not: nobody waits for what will not come.
    fs::remove_file(&hold).map_err(|source| FaultsError::File { operation: "remove", path: hold, source })?;
    let healing = healing?;
    sleep(match pair.fault {
        Fault::Kill(_) => AWAY,
        Fault::Cut(_) => CUT,
        Fault::Stop(_) => lease,
    })
    .await;
    heal(arena, &struck, healing)?;
    Ok(struck)
}

/// Waits until the move is held. Looks often: the controllers may settle a move that is held past its commit point.
async fn reach(reached: &Path) -> Result<(), FaultsError> {
    let began = Instant::now();
    while !reached.exists() {
        if began.elapsed() > REACH_LIMIT {
            let (what, seen) = (format!("{} to be reached", reached.display()), "it is not there".to_owned());
            return Err(FaultsError::InVain { what, seconds: REACH_LIMIT.as_secs(), seen });
        }
        sleep(REACH_POLL).await;
    }
    Ok(())
}

/// What ends a fault.
enum Healing {
    Restart(Daemon),
    Thaw(Daemon),
    Continue(i32),
    Mend,
    Nothing,
}

/// A daemon of the lab.
enum Daemon {
    Worker(String),
    Controller(String),
}

impl Daemon {
    fn of<'a>(&self, arena: &'a mut Arena) -> &'a mut crate::lab::daemon::Daemon {
        match self {
            Self::Worker(site) => arena.lab.worker(site),
            Self::Controller(site) => arena.lab.controller(site),
        }
    }
}

async fn apply(arena: &mut Arena, struck: &Struck) -> Result<Healing, FaultsError> {
    let daemon = |target| match target {
        Target::Worker(side) => Some(Daemon::Worker(struck.site(side).to_owned())),
        Target::Leader => Some(Daemon::Controller(struck.leader.clone())),
        Target::Hypervisor(_) | Target::Keeper(_) => None,
    };
    match struck.pair.fault {
        Fault::Kill(Target::Hypervisor(side)) => {
            strike_process(target_hypervisor(arena, struck, side).await?, Signal::SIGKILL)?;
            Ok(Healing::Nothing)
        }
        Fault::Stop(Target::Hypervisor(side)) => {
            let pid = target_hypervisor(arena, struck, side).await?;
            strike_process(pid, Signal::SIGSTOP)?;
            Ok(Healing::Continue(pid))
        }
        Fault::Kill(Target::Keeper(side)) => {
            strike_process(keeper(arena, struck, side).await?, Signal::SIGKILL)?;
            Ok(Healing::Nothing)
        }
        Fault::Stop(Target::Keeper(side)) => {
            let pid = keeper(arena, struck, side).await?;
            strike_process(pid, Signal::SIGSTOP)?;
            Ok(Healing::Continue(pid))
        }
        Fault::Kill(target) => match daemon(target) {
            Some(daemon) => {
                daemon.of(arena).kill()?;
                Ok(Healing::Restart(daemon))
            }
            None => Ok(Healing::Nothing),
        },
        Fault::Stop(target) => match daemon(target) {
            Some(daemon) => {
                daemon.of(arena).freeze()?;
                Ok(Healing::Thaw(daemon))
            }
            None => Ok(Healing::Nothing),
        },
        Fault::Cut(way) => {
            for (from, to) in directions(way, struck) {
                steer(&arena.lab, from, to, |from, to| Request::Cut { from, to })?;
            }
            Ok(Healing::Mend)
        }
    }
}

fn heal(arena: &mut Arena, struck: &Struck, healing: Healing) -> Result<(), FaultsError> {
    match healing {
        Healing::Restart(daemon) => daemon.of(arena).restart()?,
        Healing::Thaw(daemon) => daemon.of(arena).thaw()?,
        Healing::Continue(pid) => signal(pid, Signal::SIGCONT)?,
        Healing::Mend => {
            for (from, to) in directions(Way::Both, struck) {
                steer(&arena.lab, from, to, |from, to| Request::Heal { from, to })?;
            }
        }
        Healing::Nothing => {}
    }
    Ok(())
}

fn directions(way: Way, struck: &Struck) -> Vec<(&str, &str)> {
    let (there, back) = ((&*struck.source, &*struck.destination), (&*struck.destination, &*struck.source));
    match way {
        Way::There => vec![there],
        Way::Back => vec![back],
        Way::Both => vec![there, back],
    }
}

/// The VM's QEMU at a site; the destination's may be about to start.
async fn hypervisor(arena: &Arena, site: &str) -> Result<i32, FaultsError> {
    wait_for(&format!("a qemu at {site}"), HYPERVISOR_LIMIT, async || {
        let pids = arena.lab.qemu_pids(VM);
        pids.iter().find(|(at, _)| *at == site).map(|(_, pid)| *pid).ok_or_else(|| format!("{pids:?} of {SITES:?}"))
    })
    .await
}

/// The QEMU of a side, to be struck.
async fn target_hypervisor(arena: &Arena, struck: &Struck, side: Side) -> Result<i32, FaultsError> {
    match side {
        Side::Source => Ok(struck.hypervisor),
        Side::Destination => hypervisor(arena, &struck.destination).await,
    }
}

/// The parent of that QEMU.
async fn keeper(arena: &Arena, struck: &Struck, side: Side) -> Result<i32, FaultsError> {
    let qemu = target_hypervisor(arena, struck, side).await?;
    arena.lab.keeper_of(qemu).ok_or_else(|| gone(qemu))
}

/// What has ended in time is not struck.
fn strike_process(pid: i32, signal: Signal) -> Result<(), FaultsError> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => Err(gone(pid)),
        Err(errno) => Err(FaultsError::Signal { signal: signal.as_str(), pid, source: errno.into() }),
    }
}

fn gone(pid: i32) -> FaultsError {
    FaultsError::InVain { what: format!("process {pid} to be struck"), seconds: 0, seen: "it has ended".to_owned() }
}

/// One that has ended meanwhile needs no signal.
fn signal(pid: i32, signal: Signal) -> Result<(), FaultsError> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(FaultsError::Signal { signal: signal.as_str(), pid, source: errno.into() }),
    }
}

fn empty(folder: &Path) -> Result<(), FaultsError> {
    let named = |operation| move |source| FaultsError::File { operation, path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(named("list"))? {
        fs::remove_file(entry.map_err(named("list"))?.path()).map_err(named("empty"))?;
    }
    Ok(())
}
