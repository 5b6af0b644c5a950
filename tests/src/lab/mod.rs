//! The lab: three sites on one machine, a controller, a worker and its guard at each, a WAN between them, real guests.
//!
//! ```text
//!      site a                      site b                      site c             each a network namespace
//!  controller 1, worker-a     controller 2, worker-b     controller 3, worker-c
//!  10.77.1.1                  10.77.2.1                  10.77.3.1                hosts: TUN ─┐
//!  br-guest 10.88.255.1       br-guest 10.88.255.2       br-guest 10.88.255.3     guests: TAP ┴─▶ wan emulator
//! ```
//! How a test uses it:
//! ```no_run
//! # async fn story() -> anyhow::Result<()> {
//! use pageport_lab::lab::{Lab, LabConfig, VmFile, guest};
//! let mut lab = Lab::start(LabConfig::default()).await?;         // returns when all workers are connected
//! let images = guest::GuestImages::build(guest::SMALL)?;
//! let vm = VmFile::new(&lab, "web", &images, guest::SMALL)?;     // copies the disk, writes vm.yaml
//! lab.ctl(["vm", "define", "-f", vm.path(), "--site", "a"]).await?;
//! lab.ctl(["vm", "start", "web"]).await?;
//! let mut client = lab.guest("c", guest::GUEST_ADDRESS).await?;  // control connection from site c's segment
//! lab.worker("a").kill()?;                                       // kill -9; also stop, freeze, thaw, restart
//! lab.network().wan()?.counters()?;                              // bytes by service; cut, heal, set-link
//! # client.uptime().await?; Ok(()) }
//! ```
//! | where | what |
//! |---|---|
//! | `target/lab/<run>/{tls,config,logs}` | kept after the run, the newest ten |
//! | `target/lab/<run>/{data,disks}` | removed at the end |
//! | `/tmp/<run>` | runtime folders (unix sockets need short paths), removed at the end |
//!
//! | module | what |
//! |---|---|
//! | `config` | what a lab is to be |
//! | `start`, [`settings`], [`tls`] | how it comes to be so |
//! | `folders`, `volume` | where its files lie |
//! | [`network`], [`addresses`] | its sites, and the WAN between them |
//! | [`daemon`], `hypervisors`, `processes` | what runs there |
//! | `ctl`, `vm_file`, [`guest`] | what a test says to controllers and guests |
//! | `restore` | controllers that begin anew from a backup |
//!
//! Guarantees: when a [`Lab`] is dropped (also by a panic) every process in its namespaces has been killed, guests included,
//! and namespaces and large files are gone; what a killed run left is removed by the next. Needs root and `/dev/net/tun`
//! (ask [`crate::netns::available`] first), or [`Mode::Loopback`]: see [`network`] for what that cannot do. Does not build the
//! daemons: `cargo build --workspace` does.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod config;
mod ctl;
mod error;
mod folders;
mod hypervisors;
pub(crate) mod processes;
mod restore;
mod start;
mod vm_file;
mod volume;

pub mod addresses;
pub mod daemon;
pub mod guest;
pub mod network;
pub mod settings;
pub mod tls;

pub use config::{Daemons, Failpoints, LabConfig};
pub use ctl::{CtlError, Output};
pub use error::LabError;
pub use vm_file::VmFile;

use daemon::Daemon;
use folders::Folders;
use guest::client::{GuestClient, GuestError};
use guest::line::SerialPort;
use network::{Mode, Network, SITES};
use tls::{Authority, Identity};
use volume::Volume;

/// How long a lab may take until all workers are connected.
const READY_DEADLINE: Duration = Duration::from_secs(90);
/// How long a guest may take to boot.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// The pool of storage that workers may have besides the default one.
pub const POOL: &str = "extra";

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: daemons, then everything else in the namespaces, then folders.
    controllers: BTreeMap<String, Daemon>,
    workers: BTreeMap<String, Daemon>,
    guards: BTreeMap<String, Daemon>,
    network: Network,
    volumes: Vec<Volume>,
    folders: Folders,
    authority: Authority,
    operator: Identity,
}

impl Lab {
    /// The networks and the WAN.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// This run's folder: `tls`, `config`, `logs`, and while it runs `data` and `disks`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folders.run
    }

    /// A folder with a short path, for unix sockets; removed at the end.
    #[must_use]
    pub fn runtime(&self) -> &Path {
        &self.folders.runtime
    }

    /// Where the workers' failpoints are held and told.
    #[must_use]
    pub fn failpoints(&self) -> PathBuf {
        self.folders.runtime.join("failpoints")
    }

    /// The data folder of a site's worker.
    #[must_use]
    pub fn worker_data(&self, site: &str) -> PathBuf {
        self.folders.run.join("data").join(settings::worker_name(site))
    }

    /// The pool [`POOL`] of a site's worker.
    #[must_use]
    pub fn worker_pool(&self, site: &str) -> PathBuf {
        self.folders.run.join("data").join(pool_folder(site))
    }

    /// Where the daemons' logs are.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.folders.run.join("logs")
    }

    /// Who gives out the daemons' certificates.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The operator's identity.
    #[must_use]
    pub fn operator(&self) -> &Identity {
        &self.operator
    }

    /// The controller at a site.
    ///
    /// # Panics
    /// When there is no such site.
    pub fn controller(&mut self, site: &str) -> &mut Daemon {
        self.controllers.get_mut(site).unwrap_or_else(|| panic!("site {site} is not one of {SITES:?}"))
    }

    /// The worker at a site.
    ///
    /// # Panics
    /// When there is no such site.
    pub fn worker(&mut self, site: &str) -> &mut Daemon {
        self.workers.get_mut(site).unwrap_or_else(|| panic!("site {site} is not one of {SITES:?}"))
    }

    /// The guard of a site's worker.
    ///
    /// # Panics
    /// When there is no such site.
    pub fn guard(&mut self, site: &str) -> &mut Daemon {
        self.guards.get_mut(site).unwrap_or_else(|| panic!("site {site} is not one of {SITES:?}"))
    }

    /// Connects to a guest's control server from a site's segment, once it has booted.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn guest(&self, from: &str, address: Ipv4Addr) -> Result<GuestClient, GuestError> {
        GuestClient::connect(self.network.namespace(from), address, BOOT_DEADLINE).await
    }

    /// Connects to a guest's control server once it has booted, however it can be reached: from site a's segment at the
    /// usual address, or over its serial port.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn reach(&self, vm: &str) -> Result<GuestClient, GuestError> {
        match self.network.mode() {
            Mode::Namespaces => self.guest("a", guest::GUEST_ADDRESS).await,
            Mode::Loopback => {
                let port = SerialPort::Console { environment: self.ctl_environment().into(), vm: vm.to_owned() };
                GuestClient::attach(port, BOOT_DEADLINE).await
            }
        }
    }
}

fn pool_folder(site: &str) -> String {
    format!("{}-{POOL}", settings::worker_name(site))
}
