//! Copies of VMs' disks.

use pageport_proto::v1;
use pageport_proto::v1::replication_service_server::ReplicationService;
use tonic::{Request, Response, Status};

use super::error::ApiError;
use super::{Api, Rehearsal, request_id};
use crate::model::command::ClientOrder;

type Reply<T> = Result<Response<T>, Status>;

impl Api {
    async fn seed(&self, request: v1::SeedReplicaRequest) -> Result<Option<v1::Replica>, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (vm_id, vm) = moment.vm(&request.vm)?;
        let site = moment.site(&request.to_site)?;
        let worker = match vm.replicas.get(&site) {
            Some(replica) => replica.worker.clone(),
            None => moment.worker_at(&site, vm.spec.on_isolation)?,
        };
        let order = ClientOrder::SeedReplica { vm: vm_id, site: site.clone(), worker: worker.clone() };
        if self.rehearse(&moment, id, &order)? == Rehearsal::New {
            moment.must_run(vm_id, vm)?;
            if moment.observations.connected(&worker, moment.now).is_none() {
                return Err(ApiError::WorkerLost { worker });
            }
        }
        let (_, after) = self.order(id, order).await?;
        let vm = after.state.vms.get(&vm_id);
        Ok(vm.and_then(|vm| Some(after.view().replica(vm_id, vm, &site, vm.replicas.get(&site)?))))
    }
}

#[tonic::async_trait]
impl ReplicationService for Api {
    async fn seed_replica(&self, request: Request<v1::SeedReplicaRequest>) -> Reply<v1::SeedReplicaResponse> {
        let replica = self.seed(request.into_inner()).await?;
        Ok(Response::new(v1::SeedReplicaResponse { replica }))
    }

    async fn list_replicas(&self, request: Request<v1::ListReplicasRequest>) -> Reply<v1::ListReplicasResponse> {
        let moment = self.read().await?;
        let (id, vm) = moment.vm(&request.into_inner().vm)?;
        Ok(Response::new(v1::ListReplicasResponse { replicas: moment.view().replicas(id, vm) }))
    }

    async fn delete_replica(&self, request: Request<v1::DeleteReplicaRequest>) -> Reply<v1::DeleteReplicaResponse> {
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (vm, _) = moment.vm(&request.vm)?;
        let site = moment.site(&request.site)?;
        self.order(id, ClientOrder::DeleteReplica { vm, site }).await?;
        Ok(Response::new(v1::DeleteReplicaResponse {}))
    }
}
