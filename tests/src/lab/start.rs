//! A lab starts: its network, its identities, then its daemons, until all workers are connected.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tracing::info;

use super::daemon::Daemon;
use super::folders::{self, Folders};
use super::network::{self, Network, SITES};
use super::settings::{self, Shared};
use super::tls::Authority;
use super::volume::Volume;
use super::{Daemons, Failpoints, Lab, LabConfig, LabError, READY_DEADLINE, pool_folder};
use crate::paths;

/// The pause between looks at what is not ready yet.
const POLL: Duration = Duration::from_millis(200);
/// What tells the workers where failpoints are held.
const FAILPOINTS_VARIABLE: &str = "PAGEPORT_FAILPOINTS";
/// What workers leave free where their data folder, or a pool, is a file system of its own.
const RESERVE_BYTES: u32 = 16 << 20;

/// What a daemon's environment has besides the usual.
type Environment = [(&'static str, OsString)];

/// Sizes of file systems of a worker's own; [`None`]: its data folder is none, or it has no pool but the default one.
#[derive(Clone, Copy, Debug)]
struct WorkerVolumes {
    data_bytes: Option<u64>,
    pool_bytes: Option<u64>,
}

impl Lab {
    /// Starts everything and returns when all workers are connected to a leader.
    ///
    /// # Errors
    /// When something cannot be started or is not ready in time; what was started is ended.
    pub async fn start(config: LabConfig) -> Result<Self, LabError> {
        all_are_built()?;
        folders::remove_old_runs();
        let run = network::run_id();
        let folders = Folders::make(&run)?;
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
        let environment = lab.environment(config.failpoints)?;
        let volumes = WorkerVolumes { data_bytes: config.worker_volume_bytes, pool_bytes: config.worker_pool_bytes };
        let shared = Shared {
            otlp_endpoint: config.otlp_endpoint,
            log: config.log,
            accelerator: config.accelerator,
            huge_pages: config.huge_pages,
            lease_ms: config.lease_ms,
            reserve_bytes: config.worker_volume_bytes.or(config.worker_pool_bytes).map(|_| RESERVE_BYTES),
            devices: config.devices,
            addresses: lab.network.addresses().clone(),
        };
        for site in SITES {
            lab.start_controller(site, &shared)?;
        }
        if config.daemons == Daemons::All {
            for site in SITES {
                lab.start_guard(site)?;
                lab.start_worker(site, &shared, volumes, &environment)?;
            }
        }
        lab.wait_until_ready().await?;
        Ok(lab)
    }

    /// Of the workers, with the folder that it names.
    fn environment(&self, failpoints: Failpoints) -> Result<Vec<(&'static str, OsString)>, LabError> {
        if failpoints == Failpoints::Off {
            return Ok(Vec::new());
        }
        let path = self.failpoints();
        folders::make(&path)?;
        Ok(vec![(FAILPOINTS_VARIABLE, path.into_os_string())])
    }

    fn start_controller(&mut self, site: &str, shared: &Shared) -> Result<(), LabError> {
        let name = settings::controller_name(site);
        let identity = self.authority.issue(&name, "controller.pageport")?;
        let text = settings::controller(site, &self.data_folder(&name)?, &identity, shared)?;
        let config = self.write_config(&name, &text)?;
        let daemon = self.start_daemon(&name, site, &paths::program("pageport-controller"), &config, &[])?;
        self.controllers.insert(site.to_owned(), daemon);
        Ok(())
    }

    fn start_guard(&mut self, site: &str) -> Result<(), LabError> {
        let runtime = self.folders.runtime.join(site);
        let name = format!("guard-{site}");
        let log = self.logs().join(format!("{name}.log"));
        let keeper = paths::program("pageport-keeper");
        let guard = Daemon::start_guard(&name, self.network.place(site), &keeper, &runtime, &log)?;
        self.guards.insert(site.to_owned(), guard);
        Ok(())
    }

    fn start_worker(
        &mut self,
        site: &str,
        shared: &Shared,
        volumes: WorkerVolumes,
        environment: &Environment,
    ) -> Result<(), LabError> {
        let name = settings::worker_name(site);
        let identity = self.authority.issue(&name, &format!("{name}.worker.pageport"))?;
        let data = self.data_folder(&name)?;
        if let Some(bytes) = volumes.data_bytes {
            self.mount(&data, bytes)?;
        }
        let mut pool = None;
        if let Some(bytes) = volumes.pool_bytes {
            let path = self.data_folder(&pool_folder(site))?;
            self.mount(&path, bytes)?;
            pool = Some(path);
        }
        let text = settings::worker(site, &data, &self.folders.runtime.join(site), &identity, shared, pool.as_deref())?;
        let config = self.write_config(&name, &text)?;
        let daemon = self.start_daemon(&name, site, &paths::program("pageport-worker"), &config, environment)?;
        self.workers.insert(site.to_owned(), daemon);
        Ok(())
    }

    fn mount(&mut self, folder: &Path, bytes: u64) -> Result<(), LabError> {
        let failed = |source| LabError::Io { operation: "mount a file system over", path: folder.to_owned(), source };
        self.volumes.push(Volume::mount(folder, bytes).map_err(failed)?);
        Ok(())
    }

    pub(super) fn data_folder(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.folders.run.join("data").join(name);
        folders::make(&path)?;
        Ok(path)
    }

    pub(super) fn write_config(&self, name: &str, config: &str) -> Result<PathBuf, LabError> {
        let path = self.folders.run.join("config").join(format!("{name}.toml"));
        fs::write(&path, config).map_err(|source| LabError::Io { operation: "write", path: path.clone(), source })?;
        Ok(path)
    }

    pub(super) fn start_daemon(
        &self,
        name: &str,
        site: &str,
        program: &Path,
        config: &Path,
        environment: &Environment,
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
}

fn all_are_built() -> Result<(), LabError> {
    let programs = ["pageport-controller", "pageport-worker", "pageport-keeper", "pageportctl"].map(paths::program);
    match programs.into_iter().find(|program| !program.exists()) {
        Some(program) => Err(LabError::NotBuilt { program }),
        None => Ok(()),
    }
}

fn ready_workers(answer: &Value) -> usize {
    let is_ready = |worker: &&Value| worker["connected"] == true && worker["guarded"] == true;
    answer["workers"].as_array().map_or(0, |workers| workers.iter().filter(is_ready).count())
}
