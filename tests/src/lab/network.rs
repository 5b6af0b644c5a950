//! The sites' networks: a namespace each with the WAN between them, or, without namespaces, ports of the loopback with a relay
//! between them.
//!
//! With namespaces, the guests' segment stretches across the sites:
//!
//! | site n (from 1) | device | address |
//! |---|---|---|
//! | hosts | `ppwan` (TUN to the WAN emulator) | `10.77.n.1/24`, the other sites by route |
//! | guests' segment | `br-guest` (bridge with `ppseg`, the TAP to the emulator) | `10.88.255.n/16` |
//!
//! On the loopback there is no segment: guests have no network card, and are talked to over their serial port. What
//! crosses the relay is the workers' QUIC and QEMU's own migrations; the rest is as fast as the machine.
//!
//! Namespaces are called `pp<process>n<count>-<site>`, so runs do not meet. When a [`Network`] is dropped every process of its
//! sites is killed and the namespaces are removed; what a killed run left behind is removed by the next one.

use std::ffi::OsStr;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use tracing::{info, warn};

use super::addresses::{Addresses, PEER_PORT};
use super::processes;
use crate::baseline::MIGRATION_PORT;
use crate::netns::{self, Namespace, ip};
use crate::wan::config::{TAP_DEVICE, TUN_DEVICE, WanConfig};
use crate::wan::control::{Control, Request};
use crate::wan::emulator::{Emulator, EmulatorError};
use crate::wan::link::Shape;
use crate::wan::relay::{Relay, RelayConfig, RelayError, RelaySite};

/// The sites of every lab.
pub const SITES: [&str; 3] = ["a", "b", "c"];
/// The bridge of each site that guests join.
pub const GUEST_BRIDGE: &str = "br-guest";

/// How sites are told apart and connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// A network namespace each.
    #[default]
    Namespaces,
    /// Ports of the loopback.
    Loopback,
}

/// Where a site's programs run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a network namespace of this name.
    Namespace(String),
    /// On this machine, like any other program.
    Host,
}

impl Place {
    /// A command that will run there. Its process id is that of `program`.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Namespace(name) => netns::command(name, program),
            Self::Host => Command::new(program),
        }
    }
}

/// Why the networks cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Neither root nor devices.
    #[error("make namespaces: this needs root and /dev/net/tun")]
    NotAllowed,
    /// A step failed.
    #[error("{step} for site {site}")]
    Step {
        /// Which step.
        step: &'static str,
        /// For whom.
        site: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The emulator did not start.
    #[error("start the wan between the sites")]
    Wan(#[from] EmulatorError),
    /// The relay did not start.
    #[error("start the relay between the sites")]
    Relay(#[from] RelayError),
    /// Too few ports.
    #[error("find free ports on the loopback")]
    Ports(#[source] io::Error),
    /// The emulator does not answer.
    #[error("reach the wan emulator's control socket")]
    Control {
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The networks of one lab.
#[derive(Debug)]
pub struct Network {
    run: String,
    sites: Sites,
    addresses: Addresses,
    control: PathBuf,
    wan: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Sites {
    Namespaces(Vec<Namespace>),
    Loopback { doors: Vec<(&'static str, &'static str, SocketAddr)> },
}

/// A name for a run that no living process uses.
pub(super) fn run_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("pp{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

impl Network {
    /// Makes the namespaces and starts the WAN; the emulator's socket lies in `folder`.
    ///
    /// # Errors
    /// When something cannot be made; what was made so far is removed.
    pub fn create(folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        Self::create_in(Mode::Namespaces, run_id(), folder, shape)
    }

    /// As [`Network::create`], on the loopback. Needs no rights.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn on_loopback(folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        Self::create_in(Mode::Loopback, run_id(), folder, shape)
    }

    /// As either for a run that has a name already.
    pub(super) fn create_in(mode: Mode, run: String, folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        kill_left_behind();
        match mode {
            Mode::Namespaces => Self::create_namespaces(run, folder, shape),
            Mode::Loopback => Self::create_loopback(run, folder, shape),
        }
    }

    fn create_loopback(run: String, folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        let mut addresses = Addresses::on_loopback().map_err(NetworkError::Ports)?;
        let control = folder.join(format!("{run}.wan.sock"));
        let site = |name: &str| {
            let site = addresses.of(name);
            RelaySite { name: name.to_owned(), peer: site.peer, stream: site.migration }
        };
        let relay = Relay::open(RelayConfig {
            sites: SITES.map(site).into(),
            links: WanConfig::mesh(SITES, shape, control.clone()).links,
            seed: 1,
            counted_as: (PEER_PORT, MIGRATION_PORT),
            control: control.clone(),
        })?;
        for site in SITES {
            addresses.of_mut(site).advertised_peer = relay.face(site);
        }
        let pairs = SITES.iter().flat_map(|from| SITES.iter().map(move |to| (*from, *to)));
        let doors = pairs.filter_map(|(from, to)| Some((from, to, relay.door(from, to)?))).collect();
        let thread = std::thread::spawn(move || {
            if let Err(error) = relay.run() {
                warn!(%error, "relay ended");
            }
        });
        info!(run, "sites are ports of the loopback");
        Ok(Self { run, sites: Sites::Loopback { doors }, addresses, control, wan: Some(thread) })
    }

    fn create_namespaces(run: String, folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        if !netns::available() {
            return Err(NetworkError::NotAllowed);
        }
        remove_left_behind();
        let control = folder.join(format!("{run}.wan.sock"));
        let mut namespaces = Vec::new();
        let mut config = WanConfig::mesh(SITES, shape, control.clone());
        for (n, site) in (1u8..).zip(SITES) {
            let step = |step, result: io::Result<()>| {
                result.map_err(|source| NetworkError::Step { step, site: site.to_owned(), source })
            };
            let namespace = Namespace::create(&format!("{run}-{site}")).map_err(|source| NetworkError::Step {
                step: "make namespace",
                site: site.to_owned(),
                source,
            })?;
            for command in [
                format!("tuntap add dev {TUN_DEVICE} mode tun"),
                format!("addr add 10.77.{n}.1/24 dev {TUN_DEVICE}"),
                format!("link set {TUN_DEVICE} mtu 1500 txqueuelen 4000 up"),
                format!("route add 10.77.0.0/16 dev {TUN_DEVICE}"),
                format!("tuntap add dev {TAP_DEVICE} mode tap"),
                format!("link add {GUEST_BRIDGE} type bridge stp_state 0 forward_delay 0"),
                format!("link set {TAP_DEVICE} master {GUEST_BRIDGE} txqueuelen 4000 up"),
                format!("addr add 10.88.255.{n}/16 dev {GUEST_BRIDGE}"),
                format!("link set {GUEST_BRIDGE} up"),
            ] {
                step("set up network", namespace.ip(&command))?;
            }
            config.sites[usize::from(n) - 1].netns = Some(namespace.name().to_owned());
            namespaces.push(namespace);
        }
        let emulator = Emulator::open(&config)?;
        let thread = std::thread::spawn(move || {
            if let Err(error) = emulator.run() {
                warn!(%error, "wan emulator ended");
            }
        });
        info!(run, "sites are connected");
        let (sites, addresses) = (Sites::Namespaces(namespaces), Addresses::of_namespaces());
        Ok(Self { run, sites, addresses, control, wan: Some(thread) })
    }

    /// How the sites are told apart.
    #[must_use]
    pub fn mode(&self) -> Mode {
        match self.sites {
            Sites::Namespaces(_) => Mode::Namespaces,
            Sites::Loopback { .. } => Mode::Loopback,
        }
    }

    /// Where a site's programs run.
    #[must_use]
    pub fn place(&self, site: &str) -> Place {
        match self.mode() {
            Mode::Namespaces => Place::Namespace(self.namespace(site).to_owned()),
            Mode::Loopback => Place::Host,
        }
    }

    /// Where the daemons are.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Where a QEMU at one site reaches a migration that another takes.
    #[must_use]
    pub fn migration_target(&self, from: &str, to: &str) -> SocketAddr {
        let direct = self.addresses.of(to).migration;
        let Sites::Loopback { doors } = &self.sites else { return direct };
        doors.iter().find(|door| (door.0, door.1) == (from, to)).map_or(direct, |door| door.2)
    }

    /// The ids of the processes at a site.
    pub(crate) fn processes_at(&self, site: &str) -> Vec<i32> {
        match self.mode() {
            Mode::Namespaces => processes::in_namespace(self.namespace(site)),
            Mode::Loopback => processes::of_labs(|argument| argument.contains(&format!("/{}/{site}/", self.run))),
        }
    }

    /// What namespaces of this run begin with.
    #[must_use]
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The name of a site's namespace.
    ///
    /// # Panics
    /// When the sites are no namespaces: see [`Network::mode`].
    #[must_use]
    pub fn namespace(&self, site: &str) -> &str {
        let Sites::Namespaces(namespaces) = &self.sites else { panic!("{site} is no namespace but on the loopback") };
        let position = SITES.iter().position(|name| *name == site).unwrap_or_default();
        namespaces[position].name()
    }

    /// The address of a site's host on the WAN.
    #[must_use]
    pub fn host_address(site: &str) -> Ipv4Addr {
        let position = SITES.iter().position(|name| *name == site).unwrap_or_default();
        Ipv4Addr::new(10, 77, u8::try_from(position + 1).unwrap_or_default(), 1)
    }

    /// A connection to the WAN emulator: change, cut and heal links, read counters.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn wan(&self) -> Result<Control, NetworkError> {
        Control::connect(&self.control).map_err(|source| NetworkError::Control { source })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        match &self.sites {
            Sites::Namespaces(namespaces) => {
                for name in namespaces.iter().map(Namespace::name) {
                    processes::kill_all(name, || processes::in_namespace(name));
                }
            }
            Sites::Loopback { .. } => {
                let of_run = |argument: &str| argument.contains(&format!("/{}/", self.run));
                processes::kill_all(&self.run, || processes::of_labs(of_run));
            }
        }
        let stopped = self.wan().map(|mut control| control.call(&Request::Stop));
        if let (Ok(Ok(_)), Some(thread)) = (stopped, self.wan.take()) {
            drop(thread.join());
        }
        // Best effort: the folder may be gone already.
        std::fs::remove_file(&self.control).ok();
    }
}

/// Kills daemons and QEMUs of runs whose process is gone.
fn kill_left_behind() {
    processes::kill_all("earlier runs", || processes::of_labs(|argument| argument.split(['/', ',']).any(is_dead_run)));
}

/// Whether this is the name of a run whose process is gone.
pub(super) fn is_dead_run(name: &str) -> bool {
    owner_of_run(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Removes namespaces (and the processes in them) of runs whose process is gone.
fn remove_left_behind() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if owner_of(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            info!(name, "removing what an earlier run left behind");
            processes::kill_all(&name, || processes::in_namespace(&name));
            if let Err(error) = ip(["netns", "del", &name]) {
                warn!(name, %error, "namespace not removed");
            }
        }
    }
}

/// The process that made a namespace of this name; none when it is not a lab's.
fn owner_of(namespace: &str) -> Option<u32> {
    let (run, site) = namespace.split_once('-')?;
    SITES.contains(&site).then(|| owner_of_run(run))?
}

/// The process that gave itself this run's name; none when it is not one.
fn owner_of_run(run: &str) -> Option<u32> {
    let (pid, count) = run.strip_prefix("pp")?.split_once('n')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_labs_own_namespaces_have_an_owner() {
        assert_eq!(owner_of(&format!("{}-a", run_id())), Some(std::process::id()));
        for foreign in ["pp12-a", "ppxn1-a", "pp1n1-z", "cni-1234", "pp", ""] {
            assert_eq!(owner_of(foreign), None, "{foreign}");
        }
    }
}
