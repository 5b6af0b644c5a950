//! What the leader answers to a worker's questions: pure functions of a state that a quorum round has confirmed.

use pageport_ownership::Epoch;
use pageport_proto::v1;
use pageport_proto::{VmId, WorkerName};
use tokio::time::Instant;

use super::leases::Leases;
use crate::model::State;
use crate::model::state::{Life, Vm};

fn defined(state: &State, id: VmId) -> Option<&Vm> {
    state.vms.get(&id).filter(|vm| vm.life == Life::Defined)
}

/// May this worker load the image of a move?
pub fn authorisation(
    state: &State,
    worker: &WorkerName,
    id: VmId,
    request: &v1::AskAuthorisationRequest,
) -> v1::AskAuthorisationResponse {
    let epoch = Epoch::from_raw(request.epoch);
    let vm = defined(state, id);
    let authorised = vm.filter(|vm| vm.ownership.authorised(worker) == Some(epoch));
    let forgot = authorised.is_some() && !same_store(state, id, epoch, &request.store_id);
    let authorised = authorised.filter(|_| !forgot);
    v1::AskAuthorisationResponse {
        nonce: request.nonce,
        authorised: authorised.is_some(),
        reason: match (vm, authorised) {
            (_, Some(_)) => String::new(),
            (Some(_), None) if forgot => {
                format!("worker \"{worker}\" lost its store after this move was ordered: order it again")
            }
            (Some(_), None) => format!("worker \"{worker}\" is not to receive vm {id} under epoch {epoch}"),
            (None, None) => format!("vm {id} is unknown"),
        },
        spec: authorised.map(|vm| v1::VmSpec::from(&vm.spec)),
        generation: state.generation.0.into(),
        restoration_id: state.restoration_id(),
    }
}

/// Has the destination of this move had its store since before it was ordered? A younger one cannot say what it has refused.
fn same_store(state: &State, vm: VmId, epoch: Epoch, asker: &str) -> bool {
    let migration = state.vms.get(&vm).and_then(|vm| vm.migration).and_then(|id| state.migrations.get(&id));
    let ordered = migration.filter(|migration| migration.epoch == epoch).and_then(|migration| migration.to_store);
    ordered.is_some() && ordered == asker.parse().ok()
}

/// A lease for what this worker may hold. [`None`]: the term is over.
pub fn lease(
    leases: &Leases,
    term: u64,
    state: &State,
    worker: &WorkerName,
    request: &v1::RenewLeaseRequest,
    now: Instant,
) -> Option<v1::RenewLeaseResponse> {
    let grant = leases.grant(term, state, worker, now)?;
    Some(v1::RenewLeaseResponse {
        nonce: request.nonce,
        lease_ms: grant.lease_ms,
        vms: grant.vms.iter().map(|(id, own)| v1::LeasedVm { vm_id: id.to_string(), own: own.raw() }).collect(),
        generation: state.generation.0.into(),
        restoration_id: state.restoration_id(),
    })
}

/// May this worker run a VM?
pub fn grant(
    leases: &Leases,
    term: u64,
    state: &State,
    worker: &WorkerName,
    id: VmId,
    request: &v1::AskGrantRequest,
    now: Instant,
) -> v1::AskGrantResponse {
    let vm = defined(state, id);
    let own = vm.and_then(|vm| vm.ownership.grantable(worker));
    let own = own.filter(|_| leases.grantable(term, id, now));
    v1::AskGrantResponse {
        nonce: request.nonce,
        granted: own.is_some(),
        own: own.unwrap_or_default().raw(),
        image: vm.and_then(|vm| vm.ownership.inherits(worker)).unwrap_or_default().raw(),
        generation: state.generation.0.into(),
        restoration_id: state.restoration_id(),
        reason: match (vm, own) {
            (_, Some(_)) => String::new(),
            (Some(_), None) => format!("worker \"{worker}\" does not own vm {id}, or a move of it is not settled"),
            (None, None) => format!("vm {id} is unknown"),
        },
    }
}
