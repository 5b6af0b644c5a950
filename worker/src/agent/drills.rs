//! Drills as operators order them: only of VMs whose disks are a replica here.

use std::sync::Arc;

use pageport_ownership::Guest;
use pageport_proto::VmId;
use pageport_proto::v1::{ClosePointRequest, OpenPointRequest, PointExport};
use tonic::{Code, Status};

use crate::drill::DrillError;
use crate::drill::exports::Standing;
use crate::drill::order::Order;
use crate::node::Node;
use crate::replica::groups::GroupsError;
use crate::replica::points::PointError;

/// Opens a recovery point for reading.
///
/// # Errors
/// [`DrillError`].
pub async fn open(node: &Node, request: OpenPointRequest) -> Result<PointExport, DrillError> {
    let order = Order::parse(request, &node.config.drill.listen)?;
    let (vm, point) = (order.vm, order.point);
    if standing(node, vm).await == Standing::Owned {
        return Err(DrillError::Owned { vm });
    }
    let export = node.exports.open(order).await?;
    // Once more, now that the disks are open: had the VM been given to this worker meanwhile, nobody else would close them.
    if standing(node, vm).await == Standing::Owned {
        node.exports.close(vm, point).await?;
        node.replicas.close(vm);
        return Err(DrillError::Owned { vm });
    }
    Ok(export)
}

/// Ends the reading of a recovery point.
///
/// # Errors
/// [`DrillError::Request`], [`DrillError::NotOpen`].
pub async fn close(node: &Node, request: ClosePointRequest) -> Result<(), DrillError> {
    let vm = request.vm_id.parse().map_err(|error| DrillError::Request { what: format!("{error}") })?;
    node.exports.close(vm, request.number).await
}

/// Opens again what was open when the worker ended.
pub async fn restore(node: Arc<Node>) {
    if let Err(error) = reopen(&node).await {
        tracing::error!(error = %crate::error::with_causes(&error), "recovery points that were open are not opened again");
    }
    for vm in node.vms.list() {
        if standing(&node, vm.id()).await == Standing::Replica {
            node.exports.release_orphans(vm.id()).await;
        }
    }
}

async fn reopen(node: &Node) -> Result<(), DrillError> {
    let left_open = tokio::task::block_in_place(|| node.exports.left_open())?;
    for record in left_open {
        let standing = standing(node, record.vm).await;
        node.exports.reopen(record, standing).await?;
    }
    Ok(())
}

/// Whether no hypervisor of this host has the VM's disks, nor may have.
async fn standing(node: &Node, vm: VmId) -> Standing {
    let Some(known) = node.vms.get(vm) else { return Standing::Replica };
    match known.decided().await {
        (record, Guest::Absent) if record.owned().is_none() => Standing::Replica,
        _ => Standing::Owned,
    }
}

/// As gRPC says it.
pub fn status(error: &DrillError) -> Status {
    let code = match error {
        DrillError::Request { .. } | DrillError::Address { .. } => Code::InvalidArgument,
        DrillError::NotOpen { .. }
        | DrillError::Points(PointError::NoPoint { .. })
        | DrillError::Replica(GroupsError::Disk(_)) => Code::NotFound,
        DrillError::Points(PointError::Leases | PointError::NoSpace { .. }) => Code::ResourceExhausted,
        DrillError::Owned { .. }
        | DrillError::Listens { .. }
        | DrillError::Ended { .. }
        | DrillError::Points(_)
        | DrillError::Replica(GroupsError::Points(_) | GroupsError::Pool(_))
        | DrillError::Export(_) => Code::FailedPrecondition,
        DrillError::Folder(_) | DrillError::Store(_) | DrillError::Record(_) | DrillError::Thread(_) => Code::Internal,
    };
    Status::new(code, crate::error::with_causes(error))
}
