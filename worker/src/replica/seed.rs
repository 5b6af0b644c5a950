//! A seed: the first copy of a running VM's disks to a site, or the same again to catch up.
//!
//! Resumable: what an earlier attempt brought across is found by its digests and does not cross the link again.

use std::sync::Arc;
use std::time::Duration;

use pageport_proto::v1::{SeedAssignment, VmSpec};

use super::copy::{CopyError, DiskCopies};
use crate::migration::registry::SeedEntry;
use crate::node::Node;
use crate::vms::{ManagedVm, VmError};

/// A seed slower than this is given up; ordering it again resumes it.
const SEED_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a seed did not complete.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The VM does not run here.
    #[error("a seed copies from the running vm: start it first")]
    NotRunning(#[source] VmError),
    /// The copy failed.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Asked to.
    #[error("cancelled")]
    Cancelled,
}

/// Copies the disks; reports through `entry`.
pub async fn run(node: Arc<Node>, vm: Arc<ManagedVm>, spec: VmSpec, order: SeedAssignment, entry: Arc<SeedEntry>) {
    let outcome = tokio::select! {
        outcome = copy(&node, &vm, &spec, &order, &entry) => outcome,
        () = entry.cancel.cancelled() => Err(SeedError::Cancelled),
    };
    match outcome {
        Ok(()) => entry.update(|report| {
            report.complete = true;
            report.done_bytes = report.total_bytes;
        }),
        Err(error) => {
            let reason = crate::error::with_causes(&error);
            tracing::warn!(vm_id = %order.vm_id, site = %order.to_site, reason, "seed ended early");
            entry.update(|report| report.failure = reason);
        }
    }
}

async fn copy(
    node: &Node,
    vm: &ManagedVm,
    spec: &VmSpec,
    order: &SeedAssignment,
    entry: &SeedEntry,
) -> Result<(), SeedError> {
    let qemu = vm.qemu().await.map_err(SeedError::NotRunning)?;
    let cap = node.caps.towards(&order.to_site);
    let mut copies = DiskCopies::start(node, &qemu, spec, &order.peer_worker, &order.peer_address, "", cap).await?;
    let ready = copies.wait_ready(SEED_LIMIT, |progress| {
        entry.update(|report| {
            report.done_bytes = progress.done_bytes;
            report.total_bytes = progress.total_bytes;
            report.wan_bytes = progress.wan_bytes;
            report.rate_bps = progress.rate_bps;
        });
    });
    let finished = match ready.await {
        Ok(()) => copies.finish().await,
        Err(error) => Err(error),
    };
    entry.update(|report| report.wan_bytes = copies.wan_bytes());
    copies.cancel().await;
    Ok(finished?)
}
