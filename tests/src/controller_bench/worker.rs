//! [`SimulatedWorker`]: a worker without a hypervisor: the real way to the controllers, the real rhythm of reports, and as the
//! reports' content that everything is as it was ordered.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pageport_common::store::{Store, StoreError};
use pageport_common::tls::Identity;
use pageport_proto::StoreId;
use pageport_proto::v1::{
    OwnershipRecord, SeedReport, VmAssignment, VmReport, VmState, WorkerAssignment, WorkerReport, ownership_record,
    vm_assignment,
};
use pageport_worker::agent::controllers::{ControllerError, Controllers};
use pageport_worker::generation::{GenerationError, Joined};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::size::HOST_MEMORY_BYTES;

/// As the real worker's link.
const HEARTBEAT: Duration = Duration::from_millis(500);
const REPORT_INTERVAL: Duration = Duration::from_millis(50);
const SILENCE_LIMIT: Duration = Duration::from_secs(6);
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Why a worker cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// What it would remember.
    #[error("open a store")]
    Store(#[from] StoreError),
    /// The controllers' generation.
    #[error("read the generation")]
    Generation(#[from] GenerationError),
}

/// What all workers of a site share: none is ever told of a newer generation.
///
/// # Errors
/// When there can be no store in `folder`.
pub fn joined(folder: &Path) -> Result<Arc<Joined>, WorkerError> {
    Ok(Arc::new(Joined::of(Arc::new(Store::open(folder)?))?))
}

/// See the module.
#[derive(Debug)]
pub struct SimulatedWorker {
    name: String,
    site: &'static str,
    store: StoreId,
    controllers: Controllers,
    assigned: watch::Sender<Arc<WorkerAssignment>>,
}

impl SimulatedWorker {
    /// With this certificate, which carries its name.
    #[must_use]
    pub fn new(
        name: String,
        site: &'static str,
        identity: Identity,
        addresses: Vec<String>,
        joined: Arc<Joined>,
    ) -> Self {
        let controllers = Controllers::new(&name, identity, addresses, joined);
        Self { name, site, store: StoreId::generate(), controllers, assigned: watch::Sender::default() }
    }

    /// Keeps the link up for ever.
    pub async fn run(self) {
        let this = Arc::new(self);
        loop {
            if let Err(error) = this.clone().session().await {
                tracing::debug!(worker = this.name, %error, "link to the controllers is down");
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    async fn session(self: Arc<Self>) -> Result<(), ControllerError> {
        let reports = || {
            let (sender, receiver) = mpsc::channel(1);
            tokio::spawn(self.clone().report(sender));
            ReceiverStream::new(receiver)
        };
        let mut stream = self.controllers.link(reports).await?;
        while let Ok(Ok(Some(assignment))) = tokio::time::timeout(SILENCE_LIMIT, stream.message()).await {
            self.assigned.send_if_modified(|held| {
                let news = held.seq != assignment.seq;
                *held = Arc::new(assignment);
                news
            });
        }
        Ok(())
    }

    async fn report(self: Arc<Self>, reports: mpsc::Sender<WorkerReport>) {
        let mut assigned = self.assigned.subscribe();
        loop {
            let assignment = assigned.borrow_and_update().clone();
            if reports.send(report(&self.name, self.site, self.store, &assignment)).await.is_err() {
                return;
            }
            tokio::time::sleep(REPORT_INTERVAL).await;
            // A heartbeat, unless something changes before.
            let _ = tokio::time::timeout(HEARTBEAT, assigned.changed()).await;
        }
    }
}

/// What a worker says that has done all that it was told.
#[must_use]
pub fn report(name: &str, site: &str, store: StoreId, assignment: &WorkerAssignment) -> WorkerReport {
    let seeds = assignment.seeds.iter().map(|seed| SeedReport {
        vm_id: seed.vm_id.clone(),
        to_site: seed.to_site.clone(),
        seed_seq: seed.seed_seq,
        complete: true,
        ..SeedReport::default()
    });
    WorkerReport {
        worker: name.to_owned(),
        site: site.to_owned(),
        grpc_address: "192.0.2.1:7500".to_owned(),
        peer_address: "192.0.2.1:7501".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        qemu_version: "10.0".to_owned(),
        accelerator: "kvm".to_owned(),
        memory_total_bytes: HOST_MEMORY_BYTES,
        vms: assignment.vms.iter().filter(|vm| !vm.deleted).map(|vm| vm_report(name, vm)).collect(),
        seeds: seeds.collect(),
        assignment_seq: assignment.seq,
        guarded: true,
        store_id: store.to_string(),
        generation: assignment.generation,
        ..WorkerReport::default()
    }
}

fn vm_report(name: &str, vm: &VmAssignment) -> VmReport {
    let owns = vm.owner_worker == name;
    let runs = owns && vm.power() == vm_assignment::Power::Run;
    let record = if owns {
        OwnershipRecord {
            kind: ownership_record::Kind::Own.into(),
            own: vm.owner_epoch,
            seen: vm.owner_epoch,
            epoch: 0,
        }
    } else {
        OwnershipRecord { kind: ownership_record::Kind::Replica.into(), own: 0, seen: vm.owner_epoch, epoch: 0 }
    };
    VmReport {
        vm_id: vm.vm_id.clone(),
        state: if runs { VmState::Running } else { VmState::Stopped }.into(),
        record: Some(record),
        has_replica: !owns,
        ..VmReport::default()
    }
}
