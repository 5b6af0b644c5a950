//! Keeps the lease of this worker's VMs that fence themselves: asks the leader, and tells the VMs what came back.
//!
//! ```text
//!   ask (nonce, now) ──▶ leader: quorum round ──▶ lease, VMs it covers ──▶ each VM: keeper's deadline moves on
//! ```
//! Guarantees: the lease counts from the moment before the question was sent; an answer that comes late or to an older
//! question extends nothing. Without an answer nothing is done here: the keepers' deadlines stand.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_keeper::BootTime;
use pageport_ownership::{Epoch, Nonce};
use pageport_proto::VmId;
use pageport_proto::v1::{LeasedVm, RenewLeaseRequest};

use crate::node::Node;

/// Leases last three seconds at least.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// An answer that takes longer is asked for again.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

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
    let vms = node.vms.list();
    for vm in &vms {
        vm.lease_asked(nonce, asked).await;
    }
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
        let own = covered.get(&vm.id());
        if let Err(error) = vm.lease_answered(nonce, own.map(|own| (*own, lease_ms))).await {
            tracing::error!(vm_id = %vm.id(), error = %crate::error::with_causes(&error), "the lease could not be put to use");
        }
    }
}
