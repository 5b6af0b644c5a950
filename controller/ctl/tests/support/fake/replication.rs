//! The fake of the replication service: replicas, points and links.

use pageport_proto::v1;
use pageport_proto::v1::replication_service_server::ReplicationService;
use tonic::{Request, Response, Status};

use super::{Fake, Reply};

#[tonic::async_trait]
impl ReplicationService for Fake {
    async fn seed_replica(&self, request: Request<v1::SeedReplicaRequest>) -> Reply<v1::SeedReplicaResponse> {
        let v1::SeedReplicaRequest { request_id, vm, to_site } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        let replica = v1::Replica { site: to_site, state: v1::ReplicaState::Seeding.into(), ..Default::default() };
        Ok(Response::new(v1::SeedReplicaResponse { replica: Some(replica) }))
    }

    async fn list_replicas(&self, request: Request<v1::ListReplicasRequest>) -> Reply<v1::ListReplicasResponse> {
        Ok(Response::new(v1::ListReplicasResponse { replicas: self.vm(&request.into_inner().vm)?.replicas }))
    }

    async fn delete_replica(&self, request: Request<v1::DeleteReplicaRequest>) -> Reply<v1::DeleteReplicaResponse> {
        self.command(&request.into_inner().request_id)?;
        Ok(Response::new(v1::DeleteReplicaResponse {}))
    }

    async fn protect_vm(&self, request: Request<v1::ProtectVmRequest>) -> Reply<v1::ProtectVmResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        self.vm(&request.vm)?;
        self.script().protected.push(request.clone());
        let state = v1::ReplicaState::Seeding.into();
        let replica = v1::Replica {
            site: request.to_site,
            state,
            protection: request.protection,
            places: request.places,
            pool: request.pool,
            ..Default::default()
        };
        Ok(Response::new(v1::ProtectVmResponse { replica: Some(replica) }))
    }

    async fn unprotect_vm(&self, request: Request<v1::UnprotectVmRequest>) -> Reply<v1::UnprotectVmResponse> {
        let v1::UnprotectVmRequest { request_id, vm, site } = request.into_inner();
        self.command(&request_id)?;
        if self.vm(&vm)?.replicas.iter().any(|replica| replica.site == site && replica.protection.is_some()) {
            return Ok(Response::new(v1::UnprotectVmResponse {}));
        }
        Err(Status::failed_precondition(format!("vm \"{vm}\" is not protected at site \"{site}\"")))
    }

    async fn scrub_replica(&self, request: Request<v1::ScrubReplicaRequest>) -> Reply<v1::ScrubReplicaResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let replica = self.vm(&request.vm)?.replicas.into_iter().find(|replica| replica.site == request.site);
        let protected = replica.filter(|replica| replica.protection.is_some());
        let missing = || Status::failed_precondition(format!("vm \"{}\" is not protected there", request.vm));
        Ok(Response::new(v1::ScrubReplicaResponse { replica: Some(protected.ok_or_else(missing)?) }))
    }

    async fn list_recovery_points(
        &self,
        request: Request<v1::ListRecoveryPointsRequest>,
    ) -> Reply<v1::ListRecoveryPointsResponse> {
        self.vm(&request.into_inner().vm)?;
        let points = self.script().points.clone();
        let exports = self.script().exports.clone();
        Ok(Response::new(v1::ListRecoveryPointsResponse { points, exports }))
    }

    async fn set_link_cap(&self, request: Request<v1::SetLinkCapRequest>) -> Reply<v1::SetLinkCapResponse> {
        let v1::SetLinkCapRequest { request_id, link } = request.into_inner();
        self.command(&request_id)?;
        self.script().links.extend(link.clone());
        Ok(Response::new(v1::SetLinkCapResponse { link }))
    }

    async fn list_links(&self, _: Request<v1::ListLinksRequest>) -> Reply<v1::ListLinksResponse> {
        Ok(Response::new(v1::ListLinksResponse { links: self.script().links.clone() }))
    }
}
