//! Copies of VMs' disks, protection, recovery points and the caps of links.

use pageport_proto::v1;
use pageport_proto::v1::replication_service_server::ReplicationService;
use pageport_proto::{PoolName, RequestId, SiteName, VmId, WorkerName};
use tonic::{Request, Response, Status};

use super::error::ApiError;
use super::{Api, Moment, Rehearsal, request_id};
use crate::model::command::ClientOrder;
use crate::model::protection::{Placement, valid_cap, valid_places, valid_pool};
use crate::model::state::Replica;
use crate::model::{Rejection, State, Terms};

type Reply<T> = Result<Response<T>, Status>;

impl Api {
    async fn seed(&self, request: v1::SeedReplicaRequest) -> Result<Option<v1::Replica>, ApiError> {
        let id = request_id(&request.request_id)?;
        self.decide(|moment| self.seed_at(moment, id, &request)).await
    }

    async fn seed_at(
        &self,
        moment: Moment,
        id: RequestId,
        request: &v1::SeedReplicaRequest,
    ) -> Result<Option<v1::Replica>, ApiError> {
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
        Ok(replica_of(&after, vm_id, &site))
    }

    async fn protect(&self, request: v1::ProtectVmRequest) -> Result<Option<v1::Replica>, ApiError> {
        let id = request_id(&request.request_id)?;
        let terms = Terms::try_from(request.protection.unwrap_or_default())?;
        let at = Placement { places: valid_places(request.places)?, pool: valid_pool(&request.pool)? };
        let (vm, site) = (request.vm.as_str(), request.to_site.as_str());
        self.decide(|moment| self.protect_at(moment, id, vm, site, (terms, at.clone()))).await
    }

    async fn protect_at(
        &self,
        moment: Moment,
        id: RequestId,
        vm: &str,
        site: &str,
        (terms, at): (Terms, Placement),
    ) -> Result<Option<v1::Replica>, ApiError> {
        let (vm_id, vm) = moment.vm(vm)?;
        let site = moment.site(site)?;
        let worker = match vm.replicas.get(&site) {
            Some(replica) => replica.worker.clone(),
            // Where the VM itself is nobody has to be connected: it is refused for another reason.
            None if moment.state.site_of_vm(vm) == Some(&site) => vm.ownership.owner().0.clone(),
            None => moment.worker_at(&site, vm.spec.on_isolation)?,
        };
        if let Some(pool) = &at.pool {
            must_have_pool(&moment, &worker, pool)?;
        }
        let order = ClientOrder::Protect { vm: vm_id, site: site.clone(), worker, terms, at };
        let (_, after) = self.order(id, order).await?;
        Ok(replica_of(&after, vm_id, &site))
    }

    async fn scrub(&self, request: v1::ScrubReplicaRequest) -> Result<Option<v1::Replica>, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (vm, _) = moment.vm(&request.vm)?;
        let site = moment.site(&request.site)?;
        let (_, after) = self.order(id, ClientOrder::Scrub { vm, site: site.clone() }).await?;
        Ok(replica_of(&after, vm, &site))
    }

    async fn cap(&self, request: v1::SetLinkCapRequest) -> Result<v1::Link, ApiError> {
        let id = request_id(&request.request_id)?;
        let asked = request.link.ok_or(ApiError::Missing { field: "link", fix: "name two sites" })?;
        let cap_bps = valid_cap(asked.cap_bps)?;
        let moment = self.read().await?;
        let (from, to) = (moment.site(&asked.from_site)?, moment.site(&asked.to_site)?);
        let order = ClientOrder::SetLinkCap { from: from.clone(), to: to.clone(), cap_bps };
        let (_, after) = self.order(id, order).await?;
        Ok(link(&after.state, &from, &to))
    }
}

/// Refuses a pool that a worker does not have, by its last words. One that is away says so itself when it is told.
fn must_have_pool(moment: &Moment, worker: &WorkerName, pool: &PoolName) -> Result<(), ApiError> {
    let Some(observed) = moment.observations.connected(worker, moment.now) else { return Ok(()) };
    let known: Vec<_> = observed.report.pools.iter().map(|known| known.name.as_str()).collect();
    if known.contains(&pool.as_str()) {
        return Ok(());
    }
    Err(ApiError::PoolUnknown { worker: worker.clone(), pool: pool.clone(), known: known.join(", ") })
}

fn replica_of(moment: &Moment, id: VmId, site: &SiteName) -> Option<v1::Replica> {
    let vm = moment.state.vms.get(&id)?;
    Some(moment.view().replica(id, vm, site, vm.replicas.get(site)?))
}

pub(super) fn link(state: &State, from: &SiteName, to: &SiteName) -> v1::Link {
    let limits = state.schedule.link(from, to);
    v1::Link {
        from_site: from.to_string(),
        to_site: to.to_string(),
        cap_bps: state.links.cap_bps(from, to),
        budget_bps: limits.budget_bps,
        migrations: limits.migrations,
    }
}

/// What the worker that holds the replica says: nobody else knows. Where a replica was, what ended with it is still told.
fn recovery_points(moment: &Moment, vm: &str, site: &str) -> Result<v1::ListRecoveryPointsResponse, ApiError> {
    let (id, vm) = moment.vm(vm)?;
    let site = moment.site(site)?;
    let Some(Replica { worker, .. }) = vm.replicas.get(&site) else {
        let here = moment.observations.iter().filter(|(name, _)| moment.state.site_of(name) == Some(&site));
        let exports: Vec<_> = here.flat_map(|(_, observed)| observed.point_exports(id)).collect();
        if exports.is_empty() {
            return Err(Rejection::NoReplica { name: vm.spec.name.clone(), site }.into());
        }
        return Ok(v1::ListRecoveryPointsResponse { points: vec![], exports });
    };
    let holder = moment.observations.connected(worker, moment.now);
    let holder = holder.ok_or_else(|| ApiError::WorkerLost { worker: worker.clone() })?;
    let points = holder.vm(id).map(|report| report.recovery_points.clone()).unwrap_or_default();
    Ok(v1::ListRecoveryPointsResponse { points, exports: holder.point_exports(id) })
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

    async fn protect_vm(&self, request: Request<v1::ProtectVmRequest>) -> Reply<v1::ProtectVmResponse> {
        let replica = self.protect(request.into_inner()).await?;
        Ok(Response::new(v1::ProtectVmResponse { replica }))
    }

    async fn unprotect_vm(&self, request: Request<v1::UnprotectVmRequest>) -> Reply<v1::UnprotectVmResponse> {
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let (vm, _) = moment.vm(&request.vm)?;
        let site = moment.site(&request.site)?;
        self.order(id, ClientOrder::Unprotect { vm, site }).await?;
        Ok(Response::new(v1::UnprotectVmResponse {}))
    }

    async fn scrub_replica(&self, request: Request<v1::ScrubReplicaRequest>) -> Reply<v1::ScrubReplicaResponse> {
        let replica = self.scrub(request.into_inner()).await?;
        Ok(Response::new(v1::ScrubReplicaResponse { replica }))
    }

    async fn list_recovery_points(
        &self,
        request: Request<v1::ListRecoveryPointsRequest>,
    ) -> Reply<v1::ListRecoveryPointsResponse> {
        let request = request.into_inner();
        Ok(Response::new(recovery_points(&self.read().await?, &request.vm, &request.site)?))
    }

    async fn set_link_cap(&self, request: Request<v1::SetLinkCapRequest>) -> Reply<v1::SetLinkCapResponse> {
        let link = self.cap(request.into_inner()).await?;
        Ok(Response::new(v1::SetLinkCapResponse { link: Some(link) }))
    }

    async fn list_links(&self, _: Request<v1::ListLinksRequest>) -> Reply<v1::ListLinksResponse> {
        let state = self.read().await?.state;
        let sites = state.sites();
        let from_each = sites.iter().flat_map(|from| sites.iter().map(move |to| (from, to)));
        let links = from_each.filter(|(from, to)| from != to).map(|(from, to)| link(&state, from, to));
        Ok(Response::new(v1::ListLinksResponse { links: links.collect() }))
    }
}
