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
//! Guarantees: when a [`Lab`] is dropped (also by a panic) every process in its namespaces has been killed, guests included,
//! and namespaces and large files are gone; what a killed run left is removed by the next. Needs root and `/dev/net/tun`
//! (ask [`crate::netns::available`] first), or [`Mode::Loopback`]: see [`network`] for what that cannot do. Does not build the
//! daemons: `cargo build --workspace` does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tracing::info;

use crate::paths;
use crate::wan::link::Shape;

mod ctl;
pub(crate) mod processes;
mod restore;
mod vm_file;
mod volume;

pub mod addresses;
pub mod daemon;
pub mod guest;
pub mod network;
pub mod settings;
pub mod tls;

pub use ctl::{CtlError, Output};
pub use vm_file::VmFile;

use daemon::{Daemon, DaemonError};
use guest::client::{GuestClient, GuestError};
use guest::line::SerialPort;
use network::{Mode, Network, NetworkError, SITES};
use settings::{SettingsError, Shared};
use tls::{Authority, Identity, TlsError};
use volume::Volume;

/// How long a lab may take until all workers are connected.
const READY_DEADLINE: Duration = Duration::from_secs(90);
/// How long a guest may take to boot.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// The pause between looks at what is not ready yet.
const POLL: Duration = Duration::from_millis(200);
/// What tells the workers where failpoints are held.
const FAILPOINTS_VARIABLE: &str = "PAGEPORT_FAILPOINTS";
/// What workers leave free where their data folder, or a pool, is a file system of its own.
const RESERVE_BYTES: u32 = 16 << 20;
/// The pool of storage that workers may have besides the default one.
pub const POOL: &str = "extra";
/// Folders of past runs that are kept for their logs.
const KEPT_RUNS: usize = 10;

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Every direction of every link.
    pub link: Shape,
    /// Where the daemons send spans.
    pub otlp_endpoint: Option<String>,
    /// What the daemons log.
    pub log: String,
    /// `auto`, `kvm` or `tcg`.
    pub accelerator: String,
    /// Whether guests get huge pages that are free.
    pub huge_pages: bool,
    /// How sites are told apart.
    pub mode: Mode,
    /// How long a worker may run VMs that fence themselves without hearing from the leader.
    pub lease_ms: u32,
    /// Whether moves can be held at exact points.
    pub failpoints: Failpoints,
    /// Size of the file system of its own that each worker's data folder is, so that it can be filled; [`None`]: it is none. Needs namespaces.
    pub worker_volume_bytes: Option<u64>,
    /// Size of the file system of its own that is the pool [`POOL`] of each worker; [`None`]: workers have no pool but the default one.
    pub worker_pool_bytes: Option<u64>,
    /// Block devices of this machine that workers may make replicas on.
    pub devices: Vec<PathBuf>,
    /// Who is at the sites.
    pub daemons: Daemons,
}

/// Which daemons a lab has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Daemons {
    /// A controller, a worker and its guard at each site.
    #[default]
    All,
    /// A controller at each site.
    Controllers,
}

/// Whether the workers' failpoints are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Failpoints {
    /// As in production.
    #[default]
    Off,
    /// Held by files in [`Lab::failpoints`].
    On,
}

impl Default for LabConfig {
    /// The link of the issue's figures: 200 Mbit/s, 25 ms each way, no loss.
    fn default() -> Self {
        Self {
            link: Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None },
            otlp_endpoint: None,
            log: "info".into(),
            accelerator: "auto".into(),
            huge_pages: false,
            mode: Mode::default(),
            lease_ms: 10_000,
            failpoints: Failpoints::default(),
            worker_volume_bytes: None,
            worker_pool_bytes: None,
            devices: vec![],
            daemons: Daemons::default(),
        }
    }
}

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The sites cannot be connected.
    #[error("start lab")]
    Network(#[from] NetworkError),
    /// No certificates.
    #[error("start lab")]
    Tls(#[from] TlsError),
    /// No configurations.
    #[error("start lab")]
    Settings(#[from] SettingsError),
    /// A daemon does not run.
    #[error("start lab")]
    Daemon(#[from] DaemonError),
    /// A file or folder cannot be made.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The programs are not built.
    #[error("find {program}: run `cargo build --workspace` first")]
    NotBuilt {
        /// Which is missing.
        program: PathBuf,
    },
    /// Controllers do not begin anew.
    #[error("restore controllers from {backup}")]
    Restore {
        /// The backup.
        backup: PathBuf,
        /// Why.
        #[source]
        source: Box<CtlError>,
    },
    /// The workers do not connect.
    #[error("wait for the lab: not ready after {} s; logs are in {logs}; last seen: {seen}", READY_DEADLINE.as_secs())]
    NotReady {
        /// Where to look.
        logs: PathBuf,
        /// What the last look said.
        seen: String,
    },
}

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

#[derive(Debug)]
struct Folders {
    run: PathBuf,
    runtime: PathBuf,
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in [&self.runtime, &self.run.join("data"), &self.run.join("disks")] {
            // It may never have been made.
            fs::remove_dir_all(folder).ok();
        }
    }
}

impl Lab {
    /// Starts everything and returns when all workers are connected to a leader.
    ///
    /// # Errors
    /// When something cannot be started or is not ready in time; what was started is ended.
    pub async fn start(config: LabConfig) -> Result<Self, LabError> {
        let programs = ["pageport-controller", "pageport-worker", "pageport-keeper", "pageportctl"].map(paths::program);
        let [controller, worker, keeper, _] = &programs;
        for program in &programs {
            if !program.exists() {
                return Err(LabError::NotBuilt { program: program.clone() });
            }
        }
        remove_old_runs();
        let run = network::run_id();
        let folders = Folders { run: paths::lab().join(&run), runtime: Path::new("/tmp").join(&run) };
        for folder in
            [&folders.runtime, &folders.run.join("config"), &folders.run.join("logs"), &folders.run.join("disks")]
        {
            fs::create_dir_all(folder).map_err(|source| LabError::Io {
                operation: "make",
                path: folder.clone(),
                source,
            })?;
        }
        let network = Network::create_in(config.mode, run, &folders.runtime, config.link)?;
        let authority = Authority::create(&folders.run.join("tls"))?;
        let operator = authority.issue("operator", "operator.pageport")?;
        let mut lab = Self {
            controllers: BTreeMap::new(),
            workers: BTreeMap::new(),
            guards: BTreeMap::new(),
            network,
            volumes: Vec::new(),
            folders,
            authority,
            operator,
        };

        let LabConfig {
            otlp_endpoint,
            log,
            accelerator,
            huge_pages,
            lease_ms,
            failpoints,
            worker_volume_bytes,
            worker_pool_bytes,
            devices,
            daemons,
            ..
        } = config;
        let mut environment = Vec::new();
        if failpoints == Failpoints::On {
            let path = lab.failpoints();
            fs::create_dir_all(&path).map_err(|source| LabError::Io {
                operation: "make",
                path: path.clone(),
                source,
            })?;
            environment.push((FAILPOINTS_VARIABLE, path.into_os_string()));
        }
        let addresses = lab.network.addresses().clone();
        let reserve_bytes = worker_volume_bytes.or(worker_pool_bytes).map(|_| RESERVE_BYTES);
        let shared =
            Shared { otlp_endpoint, log, accelerator, huge_pages, lease_ms, reserve_bytes, devices, addresses };
        for site in SITES {
            let name = settings::controller_name(site);
            let identity = lab.authority.issue(&name, "controller.pageport")?;
            let text = settings::controller(site, &lab.data_folder(&name)?, &identity, &shared)?;
            let config = lab.write_config(&name, &text)?;
            let daemon = lab.start_daemon(&name, site, controller, &config, &[])?;
            lab.controllers.insert(site.to_owned(), daemon);
        }
        let with_workers: &[&'static str] = if daemons == Daemons::All { &SITES } else { &[] };
        for site in with_workers.iter().copied() {
            let name = settings::worker_name(site);
            let identity = lab.authority.issue(&name, &format!("{name}.worker.pageport"))?;
            let runtime = lab.folders.runtime.join(site);
            let guard = format!("guard-{site}");
            let log = lab.logs().join(format!("{guard}.log"));
            let guard = Daemon::start_guard(&guard, lab.network.place(site), keeper, &runtime, &log)?;
            lab.guards.insert(site.to_owned(), guard);
            let data = lab.data_folder(&name)?;
            if let Some(bytes) = worker_volume_bytes {
                lab.mount(&data, bytes)?;
            }
            let mut pool = None;
            if let Some(bytes) = worker_pool_bytes {
                let path = lab.data_folder(&pool_folder(site))?;
                lab.mount(&path, bytes)?;
                pool = Some(path);
            }
            let text = settings::worker(site, &data, &runtime, &identity, &shared, pool.as_deref())?;
            let config = lab.write_config(&name, &text)?;
            let daemon = lab.start_daemon(&name, site, worker, &config, &environment)?;
            lab.workers.insert(site.to_owned(), daemon);
        }
        lab.wait_until_ready().await?;
        Ok(lab)
    }

    fn mount(&mut self, folder: &Path, bytes: u64) -> Result<(), LabError> {
        let failed = |source| LabError::Io { operation: "mount a file system over", path: folder.to_owned(), source };
        self.volumes.push(Volume::mount(folder, bytes).map_err(failed)?);
        Ok(())
    }

    fn data_folder(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.folders.run.join("data").join(name);
        fs::create_dir_all(&path).map_err(|source| LabError::Io { operation: "make", path: path.clone(), source })?;
        Ok(path)
    }

    fn write_config(&self, name: &str, config: &str) -> Result<PathBuf, LabError> {
        let path = self.folders.run.join("config").join(format!("{name}.toml"));
        fs::write(&path, config).map_err(|source| LabError::Io { operation: "write", path: path.clone(), source })?;
        Ok(path)
    }

    fn start_daemon(
        &self,
        name: &str,
        site: &str,
        program: &Path,
        config: &Path,
        environment: &[(&'static str, OsString)],
    ) -> Result<Daemon, LabError> {
        let log = self.logs().join(format!("{name}.log"));
        Ok(Daemon::start(name, self.network.place(site), program, config, &log, environment)?)
    }

    /// Waits until every worker is connected and guarded.
    ///
    /// # Errors
    /// When a daemon has ended or time is up.
    pub async fn wait_until_ready(&mut self) -> Result<(), LabError> {
        let end = Instant::now() + READY_DEADLINE;
        loop {
            for daemon in self.controllers.values_mut().chain(self.workers.values_mut()).chain(self.guards.values_mut())
            {
                daemon.check()?;
            }
            let seen = match self.ctl_json(["worker", "list"]).await {
                Ok(answer) if ready_workers(&answer) == self.workers.len() => break,
                Ok(answer) => answer.to_string(),
                Err(error) => error.to_string(),
            };
            if Instant::now() > end {
                return Err(LabError::NotReady { logs: self.logs(), seen });
            }
            tokio::time::sleep(POLL).await;
        }
        info!(run = self.network.run(), "all workers are connected");
        Ok(())
    }

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

    /// Finds a VM's QEMUs again and again, for a witness in a thread of its own: their process numbers.
    pub fn hypervisors_of(&self, vm: &str) -> impl Fn() -> Vec<i32> + Send + 'static {
        let guest = format!("guest={vm}");
        let run = self.runtime().to_string_lossy().into_owned();
        move || {
            let is_its_qemu = |pid: &i32| {
                let line = processes::command_line(*pid);
                line.first().is_some_and(|program| program.contains("qemu")) && line.contains(&guest)
            };
            processes::of_labs(|argument| argument.contains(&run)).into_iter().filter(is_its_qemu).collect()
        }
    }

    /// The processes of a VM's QEMUs and the sites they are at.
    #[must_use]
    pub fn qemu_pids(&self, vm: &str) -> Vec<(&'static str, i32)> {
        let guest = format!("guest={vm}");
        let is_its_qemu = |pid: &i32| {
            let line = processes::command_line(*pid);
            line.first().is_some_and(|program| program.contains("qemu")) && line.contains(&guest)
        };
        let at_sites = SITES.iter().map(|site| (*site, self.network.processes_at(site)));
        at_sites.flat_map(|(site, pids)| pids.into_iter().filter(is_its_qemu).map(move |pid| (site, pid))).collect()
    }
}

impl Lab {
    /// The keeper of a QEMU: its parent, if that is one.
    #[must_use]
    pub fn keeper_of(&self, qemu: i32) -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{qemu}/stat")).ok()?;
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        processes::command_line(parent).first()?.ends_with("pageport-keeper").then_some(parent)
    }

    /// The processes at a site and the names of their programs; the dead are not among them.
    #[must_use]
    pub fn programs(&self, site: &str) -> Vec<(i32, String)> {
        let name_of = |pid: i32| {
            let line = processes::command_line(pid);
            let name = Path::new(line.first()?).file_name()?.to_str()?.to_owned();
            Some((pid, name))
        };
        self.network.processes_at(site).into_iter().filter_map(name_of).collect()
    }
}

fn ready_workers(answer: &Value) -> usize {
    let is_ready = |worker: &&Value| worker["connected"] == true && worker["guarded"] == true;
    answer["workers"].as_array().map_or(0, |workers| workers.iter().filter(is_ready).count())
}

/// Removes what killed runs left in the file system, and the oldest logs.
fn pool_folder(site: &str) -> String {
    format!("{}-{POOL}", settings::worker_name(site))
}

fn remove_old_runs() {
    let listed = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        entries
            .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(network::is_dead_run))
            .collect()
    };
    for runtime in listed(Path::new("/tmp")) {
        fs::remove_dir_all(runtime).ok();
    }
    let mut runs = listed(&paths::lab());
    runs.iter().for_each(|run| volume::unmount_below(&run.join("data")));
    runs.sort_by_key(|path| fs::metadata(path).and_then(|about| about.modified()).ok());
    let keep_from = runs.len().saturating_sub(KEPT_RUNS);
    for (n, run) in runs.into_iter().enumerate() {
        if n < keep_from {
            fs::remove_dir_all(run).ok();
        } else {
            for large in ["data", "disks"] {
                fs::remove_dir_all(run.join(large)).ok();
            }
        }
    }
}
