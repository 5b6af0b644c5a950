//! The stream of reports to the leader and of assignments from it; opened again whenever it ends.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use pageport_proto::v1::{DiskStatus, OwnershipRecord, VmReport, WorkerAssignment, WorkerReport};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::controllers::ControllerError;
use crate::generation::Generation;
use crate::node::Node;
use crate::vms::ManagedVm;

/// Longest time without a report.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Shortest time between two reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);
/// The leader says something at least every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(6);
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Keeps the link up for ever.
pub async fn run(node: Arc<Node>, assignments: watch::Sender<Option<WorkerAssignment>>) {
    loop {
        if let Err(error) = session(&node, &assignments).await {
            tracing::warn!(error = %crate::error::with_causes(&error), "link to the controllers is down");
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// One link, until it ends.
async fn session(
    node: &Arc<Node>,
    assignments: &watch::Sender<Option<WorkerAssignment>>,
) -> Result<(), ControllerError> {
    let seq = watch::Sender::new(0);
    let mut stream = node
        .controllers
        .link(|| {
            let (sender, receiver) = mpsc::channel(1);
            tokio::spawn(report(node.clone(), seq.subscribe(), assignments.subscribe(), sender));
            ReceiverStream::new(receiver)
        })
        .await?;
    tracing::info!("link to the leader is up");
    loop {
        match tokio::time::timeout(SILENCE_LIMIT, stream.message()).await {
            Ok(Ok(Some(assignment))) => {
                let from = Generation::said(assignment.generation, &assignment.restoration_id);
                if !node.joined.hears(from) {
                    return Err(node.controllers.give_up(from));
                }
                seq.send_replace(assignment.seq);
                node.controllers.learn(&assignment.controllers);
                assignments.send_if_modified(|held| {
                    let news = held.as_ref() != Some(&assignment);
                    *held = Some(assignment);
                    news
                });
            }
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(status)) => return Err(ControllerError::Refused(Box::new(status))),
            Err(_) => {
                return Err(ControllerError::Refused(Box::new(tonic::Status::deadline_exceeded(
                    "the leader is silent",
                ))));
            }
        }
    }
}

/// Sends reports until the link ends.
async fn report(
    node: Arc<Node>,
    seq: watch::Receiver<u64>,
    assigned: watch::Receiver<Option<WorkerAssignment>>,
    reports: mpsc::Sender<WorkerReport>,
) {
    loop {
        let report = build(&node, *seq.borrow(), assigned.borrow().as_ref());
        if reports.send(report).await.is_err() {
            return;
        }
        tokio::time::sleep(REPORT_INTERVAL).await;
        // A heartbeat, unless something changes before.
        let _ = tokio::time::timeout(HEARTBEAT, node.changed.notified()).await;
    }
}

fn build(node: &Node, assignment_seq: u64, assigned: Option<&WorkerAssignment>) -> WorkerReport {
    let (config, joined) = (&node.config, node.joined.reported());
    let spoken_of: Option<HashSet<&str>> = assigned.map(|it| it.vms.iter().map(|vm| vm.vm_id.as_str()).collect());
    let vm_report = |vm: &Arc<ManagedVm>| {
        let report = vm_report(node, vm);
        let unknown = spoken_of.as_ref().is_some_and(|known| !known.contains(report.vm_id.as_str()));
        VmReport { spec: if unknown { vm.kept_spec() } else { None }, ..report }
    };
    WorkerReport {
        worker: config.name.to_string(),
        site: config.site.to_string(),
        grpc_address: config.advertised.grpc.to_string(),
        peer_address: config.advertised.peer.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        qemu_version: node.qemu_version.to_string(),
        accelerator: node.hypervisor.accelerator.to_string(),
        memory_total_bytes: nix::sys::sysinfo::sysinfo().map(|info| info.ram_total()).unwrap_or_default(),
        vms: node.vms.list().iter().map(vm_report).collect(),
        migrations: node.registry.migration_reports(),
        seeds: node.registry.seed_reports(),
        replications: node.replications.reports(),
        point_exports: node.exports.reports(),
        quotes: node.quotes.reports(),
        preflights: node.preflights.answers(),
        pools: node.pools.reports(),
        assignment_seq,
        store_id: node.store.id.to_string(),
        generation: joined.number,
        restoration_id: joined.restoration.map(|restoration| restoration.to_string()).unwrap_or_default(),
        guarded: pageport_keeper::heartbeat::is_guarded(&config.runtime_dir),
    }
}

fn vm_report(node: &Node, vm: &ManagedVm) -> VmReport {
    let status = vm.status();
    let locations = node.replicas.locations(vm.id());
    let (mut disk_bytes, mut disk_allocated_bytes, mut disks) = (0, 0, vec![]);
    for (name, location) in &locations {
        let Ok((size_bytes, allocated_bytes)) = location.bytes() else { continue };
        disk_bytes += size_bytes;
        disk_allocated_bytes += allocated_bytes;
        disks.push(DiskStatus { name: name.clone(), size_bytes });
    }
    VmReport {
        vm_id: vm.id().to_string(),
        state: status.state.into(),
        problem: status.problem,
        record: Some(OwnershipRecord::from(status.record)),
        whose: status.whose,
        disk_bytes,
        disk_allocated_bytes,
        has_replica: !locations.is_empty() && status.record.owned().is_none(),
        recovery_points: node.groups.points(vm.id()),
        halted_power_seq: status.halted_under.unwrap_or_default(),
        flattening: node.flattenings.report(vm.id()),
        disks,
        spec: None,
    }
}
