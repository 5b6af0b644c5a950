//! The sites' networks: a namespace each, the WAN between them, the guests' segment across them.
//!
//! | site n (from 1) | device | address |
//! |---|---|---|
//! | hosts | `ppwan` (TUN to the WAN emulator) | `10.77.n.1/24`, the other sites by route |
//! | guests' segment | `br-guest` (bridge with `ppseg`, the TAP to the emulator) | `10.88.255.n/16` |
//!
//! Namespaces are called `pp<process>n<count>-<site>`, so runs do not meet. When a [`Network`] is dropped every process in its
//! namespaces is killed and the namespaces are removed; what a killed run left behind is removed by the next one.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tracing::{info, warn};

use crate::netns::{self, Namespace, ip};
use crate::wan::config::{TAP_DEVICE, TUN_DEVICE, WanConfig};
use crate::wan::control::{Control, Request};
use crate::wan::emulator::{Emulator, EmulatorError};
use crate::wan::link::Shape;

/// The sites of every lab.
pub const SITES: [&str; 3] = ["a", "b", "c"];
/// The bridge of each site that guests join.
pub const GUEST_BRIDGE: &str = "br-guest";
/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

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
    namespaces: Vec<Namespace>,
    control: PathBuf,
    emulator: Option<JoinHandle<()>>,
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
        Self::create_as(run_id(), folder, shape)
    }

    /// As [`Network::create`] for a run that has a name already.
    pub(super) fn create_as(run: String, folder: &Path, shape: Shape) -> Result<Self, NetworkError> {
        if !netns::available() {
            return Err(NetworkError::NotAllowed);
        }
        remove_left_behind();
        let control = folder.join(format!("{run}.wan.sock"));
        let mut network = Self { run, namespaces: Vec::new(), control: control.clone(), emulator: None };
        let mut config = WanConfig::mesh(SITES, shape, control);
        for (n, site) in (1u8..).zip(SITES) {
            let step = |step, result: io::Result<()>| {
                result.map_err(|source| NetworkError::Step { step, site: site.to_owned(), source })
            };
            let namespace = Namespace::create(&network.namespace_name(site)).map_err(|source| NetworkError::Step {
                step: "make namespace",
                site: site.to_owned(),
                source,
            })?;
            let namespace = {
                network.namespaces.push(namespace);
                &network.namespaces[network.namespaces.len() - 1]
            };
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
        }
        let emulator = Emulator::open(&config)?;
        network.emulator = Some(std::thread::spawn(move || {
            if let Err(error) = emulator.run() {
                warn!(%error, "wan emulator ended");
            }
        }));
        info!(run = network.run, "sites are connected");
        Ok(network)
    }

    fn namespace_name(&self, site: &str) -> String {
        format!("{}-{site}", self.run)
    }

    /// What namespaces of this run begin with.
    #[must_use]
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The name of a site's namespace.
    #[must_use]
    pub fn namespace(&self, site: &str) -> &str {
        let position = SITES.iter().position(|name| *name == site).unwrap_or_default();
        self.namespaces[position].name()
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
        for namespace in &self.namespaces {
            kill_processes_in(namespace.name());
        }
        let stopped = self.wan().map(|mut control| control.call(&Request::Stop));
        if let (Ok(Ok(_)), Some(thread)) = (stopped, self.emulator.take()) {
            drop(thread.join());
        }
        // Best effort: the folder may be gone already.
        std::fs::remove_file(&self.control).ok();
    }
}

/// Kills every process in a namespace and waits until they are gone.
fn kill_processes_in(namespace: &str) {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        let alive: Vec<i32> = processes_in(namespace).into_iter().filter(|pid| !is_zombie(*pid)).collect();
        if alive.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            warn!(namespace, ?alive, "processes would not end");
            return;
        }
        for pid in alive {
            // It may have ended by itself.
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit(") ").next().map(|rest| rest.starts_with('Z')))
        .unwrap_or(true)
}

/// Removes namespaces (and the processes in them) of runs whose process is gone.
fn remove_left_behind() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if owner_of(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            info!(name, "removing what an earlier run left behind");
            kill_processes_in(&name);
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
pub(super) fn owner_of_run(run: &str) -> Option<u32> {
    let (pid, count) = run.strip_prefix("pp")?.split_once('n')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// The ids of all processes in a namespace.
pub(super) fn processes_in(namespace: &str) -> Vec<i32> {
    let listed = std::process::Command::new("ip").args(["netns", "pids", namespace]).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
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
