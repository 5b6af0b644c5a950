//! `make bench-controller`: what three controllers do for a large fleet, and how each figure grows with it.
//!
//! ```text
//!  for each size:  three real controllers, 50 ms round trip between the sites     ┐
//!                  a simulated worker for each host, on a connection of its own   ├▶ stages ─▶ a line of controller.jsonl
//!                  VMs, defined through the API; a fifth of them at one site      ┘              │
//!                  the same fleet as a state of this process ─▶ planning, snapshot ──────────────┤
//!                                                                                                ▼
//!                                                              controller.json, table, plot ◀─ report
//! ```
//! | real | simulated |
//! |---|---|
//! | controllers, their disks, TLS, the worker link's protocol and its rhythm, certificates, the WAN between the sites | what workers report: there is no QEMU, guests run and replicas are complete as soon as that is ordered |
//!
//! Controllers, emulator and load share this machine's processors, so everything that computes is slower than on hosts of their own;
//! [`report::Report`] says how many there were. Needs namespaces. A size that was measured at this commit is not measured again.

use std::path::PathBuf;
use std::time::Duration;

use crate::faults::error::FaultsError;
use crate::lab::daemon::DaemonError;
use crate::lab::network::NetworkError;
use crate::lab::tls::TlsError;
use crate::lab::{CtlError, LabError};

mod arena;
pub mod client;
pub mod fleet;
pub mod model;
pub mod plot;
pub mod report;
pub mod results;
pub mod site;
pub mod size;
pub mod stages;
pub mod worker;

pub use size::Size;

use report::Report;
use results::Results;

/// Tells somebody what happens.
pub type Tell<'a> = &'a dyn Fn(&str);

/// How much is measured of each size.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Commands one after the other, whose latencies are taken.
    pub writes: usize,
    /// Leaders that are killed.
    pub failovers: usize,
    /// How long many clients give commands, and how long the leader is left alone with its workers.
    pub stretch: Duration,
    /// How many clients.
    pub clients: usize,
    /// How long the fleet comes to rest before a stage.
    pub settle: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            writes: 300,
            failovers: 5,
            stretch: Duration::from_secs(10),
            clients: 128,
            settle: Duration::from_secs(2),
        }
    }
}

/// How it is to be.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// The fleets, each with three controllers of its own.
    pub sizes: Vec<Size>,
    /// How much is measured.
    pub effort: Effort,
    /// The fleet of which the evacuation of 2,000 VMs is planned, in this process: it has 10,000.
    pub planned: Size,
    /// Whether what is known of this commit is measured again.
    pub known: Known,
    /// Where lines are kept.
    pub folder: PathBuf,
}

/// What to do about a size that was measured at this commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Take what is known.
    Keep,
    /// Measure it again.
    Again,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The lab does not start.
    #[error("start the lab of the benchmark")]
    Lab(#[from] LabError),
    /// The WAN does not answer.
    #[error("connect the sites of the benchmark")]
    Network(#[from] NetworkError),
    /// No certificates.
    #[error("issue the workers' certificates")]
    Tls(#[from] TlsError),
    /// A certificate cannot be used.
    #[error("load a certificate of the benchmark")]
    Identity(#[from] pageport_common::tls::TlsError),
    /// A command failed.
    #[error("run the benchmark's commands")]
    Ctl(#[from] CtlError),
    /// A controller does not do as told.
    #[error("handle a controller of the benchmark")]
    Daemon(#[from] DaemonError),
    /// A thread cannot work at a site.
    #[error("work at site {site}")]
    Site {
        /// Which.
        site: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A worker cannot be simulated.
    #[error("simulate worker {name}")]
    Worker {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: worker::WorkerError,
    },
    /// An address is none.
    #[error("connect to controller {address}")]
    Address {
        /// Which.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The controllers did not do it in time.
    #[error("{what}: not done after {} s; the controllers last said: {said}", client::PATIENCE.as_secs())]
    Late {
        /// What was waited for.
        what: &'static str,
        /// Their last words.
        said: String,
    },
    /// Nobody leads, or a controller does not run.
    #[error("find out {what}")]
    Unknown {
        /// What.
        what: &'static str,
    },
    /// The model of the fleet is not what it should be.
    #[error("plan the evacuation of {expected} vms: {planned} were planned; the first that stays: {why}")]
    Plan {
        /// VMs to leave.
        expected: usize,
        /// VMs that would.
        planned: usize,
        /// Why one would not.
        why: String,
    },
    /// A snapshot cannot be made.
    #[error("make a snapshot")]
    Snapshot(#[from] pageport_controller::consensus::snapshot::SnapshotError),
    /// A file cannot be used.
    #[error("keep the benchmark's figures")]
    File(#[from] FaultsError),
    /// A folder cannot be made.
    #[error("make a folder for the benchmark")]
    Folder(#[source] std::io::Error),
}

/// Measures every size that is not known yet.
///
/// # Errors
/// When a step fails; everything is taken down, and sizes that were measured are kept.
pub async fn run(config: &BenchConfig, tell: Tell<'_>) -> Result<Report, BenchError> {
    let results = Results::open(&config.folder)?;
    let mut fleets = vec![];
    for size in &config.sizes {
        let known = results.newest(*size).filter(|_| config.known == Known::Keep);
        fleets.push(match known {
            Some(known) => {
                tell(&format!("{size}: measured at this commit already; --again measures it anew"));
                known
            }
            None => {
                tell(&format!("{size}"));
                let figures = stages::measure(*size, config.effort, tell).await?;
                results.append(&figures)?;
                figures
            }
        });
    }
    let Size { workers, vms } = config.planned;
    let plan_s = match fleets.iter().find(|fleet| (fleet.workers, fleet.vms) == (workers, vms)) {
        Some(fleet) => fleet.plan_s,
        None => {
            tell(&format!("planning the evacuation of a fifth of {vms} VMs"));
            model::Model::new(config.planned).plan()?.as_secs_f64()
        }
    };
    Ok(Report::new(results.commit().to_owned(), fleets, plan_s))
}
