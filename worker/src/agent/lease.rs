//! Keeps the lease of this worker's VMs that fence themselves: asks the leader, and tells the VMs what came back.
//!
//! ```text
//!   ask (nonce, now) ──▶ leader: quorum round ──▶ lease, VMs it covers ──▶ each VM: keeper's deadline moves on
//! ```
//! Guarantees: the lease counts from the moment before the question was sent; an answer that comes late or to an older
//! question extends nothing. Without an answer nothing is done here: the keepers' deadlines stand. A VM that is busy,
//! since its hypervisor hangs, goes without; the others do not wait for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_keeper::BootTime;
use pageport_ownership::{Epoch, Nonce};
use pageport_proto::VmId;
use pageport_proto::v1::{LeasedVm, RenewLeaseRequest};

use crate::node::Node;
use crate::vms::ManagedVm;

/// Leases last three seconds at least.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// An answer that takes longer is asked for again.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// What a VM has under way may take this long before the question is asked without it.
const BUSY_LIMIT: Duration = Duration::from_millis(200);

/// Renews for ever.
pub async fn run(node: Arc<Node>) {
    loop {
        if node.vms.list().iter().any(|vm| vm.fences_itself()) {
            renew(&node).await;
        }
        // A move that has just been admitted needs its lease before its guest can run.
        let _ = tokio::time::timeout(RENEW_EVERY, node.lease_wanted.notified()).await;
    }
}

async fn renew(node: &Node) {
    let nonce = Nonce(rand::random());
    let asked = BootTime::now();
    let vms = ask_for(node.vms.list(), nonce, asked).await;
    let request = RenewLeaseRequest { worker: node.config.name.to_string(), nonce: nonce.0 };
    let answer = tokio::time::timeout(ANSWER_WITHIN, node.controllers.renew_lease(request)).await;
    let (lease_ms, covered) = match answer {
        Ok(Ok(answer)) if answer.nonce == nonce.0 => (answer.lease_ms, answer.vms),
        Ok(Ok(_)) => (0, vec![]),
        Ok(Err(error)) => {
            tracing::warn!(error = %crate::error::with_causes(&error), "lease not renewed");
            (0, vec![])
        }
        Err(_) => {
            tracing::warn!("lease not renewed: no controller answers in time");
            (0, vec![])
        }
    };
    let leased = |vm: &LeasedVm| Some((vm.vm_id.parse::<VmId>().ok()?, Epoch::from_raw(vm.own)));
    let covered: HashMap<VmId, Epoch> = covered.iter().filter_map(leased).collect();
    for vm in vms {
        let lease = covered.get(&vm.id()).map(|own| (*own, lease_ms));
        // A task of its own: what the lease sets off may wait for a hypervisor.
        tokio::spawn(async move {
            if let Err(error) = vm.lease_answered(nonce, lease).await {
                tracing::error!(vm_id = %vm.id(), error = %crate::error::with_causes(&error), "the lease could not be put to use");
            }
        });
    }
}

/// Notes the question at each VM, and returns those that took note.
async fn ask_for(vms: Vec<Arc<ManagedVm>>, nonce: Nonce, asked: BootTime) -> Vec<Arc<ManagedVm>> {
    let questions = vms.into_iter().map(|vm| async move {
        let noted = tokio::time::timeout(BUSY_LIMIT, vm.lease_asked(nonce, asked)).await;
        if noted.is_err() {
            tracing::warn!(vm_id = %vm.id(), "the vm is busy: no lease is asked for it this time");
        }
        noted.ok().map(|()| vm)
    });
    futures::future::join_all(questions).await.into_iter().flatten().collect()
}
