//! [`Fleet`]: all simulated workers, those of a site on one thread in its namespace.

use pageport_common::tls::{Identity, TlsPaths};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::worker::{SimulatedWorker, joined};
use super::{BenchError, Size, site};
use crate::lab::network::SITES;
use crate::lab::{Lab, tls};

/// Workers that run until this is dropped.
#[derive(Debug)]
pub struct Fleet {
    _runs: watch::Sender<()>,
}

/// The identity behind these files.
///
/// # Errors
/// When they cannot be used.
pub fn load(files: &tls::Identity) -> Result<Identity, BenchError> {
    Ok(Identity::load(&TlsPaths { ca: files.ca.clone(), cert: files.cert.clone(), key: files.key.clone() })?)
}

impl Fleet {
    /// Gives every worker a certificate and lets all connect at once.
    ///
    /// # Errors
    /// When one cannot be simulated.
    pub fn start(lab: &Lab, size: Size) -> Result<Self, BenchError> {
        let (runs, run) = watch::channel(());
        for site in SITES {
            let addresses = lab.network().addresses().controllers();
            let folder = lab.folder().join("data").join(format!("simulated-{site}"));
            let failed = |source| BenchError::Worker { name: site.to_owned(), source };
            let joined = joined(&folder).map_err(failed)?;
            let mut workers = vec![];
            for name in size.workers_at(site) {
                let files = lab.authority().issue(&name, &pageport_common::tls::worker_name(&name))?;
                let identity = load(&files)?;
                workers.push(SimulatedWorker::new(name, site, identity, addresses.clone(), joined.clone()));
            }
            // The thread ends with the fleet.
            drop(site::at(lab, site, {
                let run = run.clone();
                move || run_all(workers, run)
            }));
        }
        Ok(Self { _runs: runs })
    }
}

async fn run_all(workers: Vec<SimulatedWorker>, mut run: watch::Receiver<()>) {
    let mut tasks: JoinSet<()> = workers.into_iter().map(SimulatedWorker::run).collect();
    // An error says that the fleet was dropped.
    let _ = run.changed().await;
    tasks.abort_all();
}
