//! Sites, workers, VMs.

use std::sync::Arc;

use pageport_ownership::Proof;
use pageport_proto::v1::fleet_service_server::FleetService;
use pageport_proto::v1::{self, VmState};
use pageport_proto::{RequestId, VmId};
use tonic::{Request, Response, Status};

use super::error::ApiError;
use super::watch::{Views, unless_same, views};
use super::{Api, Moment, Rehearsal, request_id};
use crate::model::command::ClientOrder;
use crate::model::state::Power;
use crate::model::takeover;
use crate::model::{Answer, Rejection, Spec};
use crate::peer;

type Reply<T> = Result<Response<T>, Status>;

pub(super) fn vm_of(moment: &Moment, id: VmId) -> Option<v1::Vm> {
    moment.state.vms.get(&id).map(|vm| moment.view().vm(id, vm))
}

impl Moment {
    /// A VM of this name or id, also one of which it is not known who owns it.
    pub(super) fn any_vm(&self, id_or_name: &str) -> Result<v1::Vm, ApiError> {
        if let Some((id, recovering)) = self.state.find_recovering(id_or_name) {
            return Ok(self.view().recovering(id, recovering));
        }
        let (id, vm) = self.vm(id_or_name)?;
        Ok(self.view().vm(id, vm))
    }
}

impl Api {
    async fn set_power(&self, request: &str, vm: &str, power: Power) -> Result<Option<v1::Vm>, ApiError> {
        let request = request_id(request)?;
        self.decide(|moment| self.set_power_at(moment, request, vm, power)).await
    }

    async fn set_power_at(
        &self,
        moment: Moment,
        request: RequestId,
        vm: &str,
        power: Power,
    ) -> Result<Option<v1::Vm>, ApiError> {
        let (id, vm) = moment.vm(vm)?;
        let order = ClientOrder::SetPower { vm: id, power };
        let owner = vm.ownership.owner().0;
        // An owner that is away is told when it is back: then nobody can say yet.
        let here = power == Power::Run && moment.observations.connected(owner, moment.now).is_some();
        if here && self.rehearse(&moment, request, &order)? == Rehearsal::New {
            moment.must_be_guarded(owner, &vm.spec)?;
        }
        let (_, after) = self.order(request, order).await?;
        Ok(vm_of(&after, id))
    }

    async fn define(&self, request: v1::DefineVmRequest) -> Result<Option<v1::Vm>, ApiError> {
        let id = request_id(&request.request_id)?;
        let spec = request.spec.ok_or(ApiError::Missing { field: "spec", fix: "give the vm's definition" })?;
        let spec = Box::new(Spec::try_from(spec)?);
        self.decide(|moment| self.define_at(moment, id, &request.site, spec.clone())).await
    }

    async fn define_at(
        &self,
        moment: Moment,
        id: RequestId,
        site: &str,
        spec: Box<Spec>,
    ) -> Result<Option<v1::Vm>, ApiError> {
        let site = moment.site(site)?;
        let worker = moment.worker_at(&site, spec.on_isolation)?;
        let order = ClientOrder::DefineVm { id: VmId::generate(), spec: spec.clone(), worker: worker.clone() };
        if self.rehearse(&moment, id, &order)? == Rehearsal::New {
            moment.must_be_guarded(&worker, &spec)?;
        }
        let (answer, after) = self.order(id, order).await?;
        match answer {
            Answer::Vm(vm) => Ok(vm_of(&after, vm)),
            Answer::Done | Answer::Migration(_) | Answer::Replica(..) => {
                Err(Rejection::RequestReused { request: id }.into())
            }
        }
    }

    async fn resolve(&self, request: v1::ResolveVmRequest, operator: String) -> Result<Option<v1::Vm>, ApiError> {
        let request_id = request_id(&request.request_id)?;
        let mut moment = self.read().await?;
        if let Some((id, _)) = moment.state.find_recovering(&request.vm) {
            Arc::make_mut(&mut moment.state).leave_to_the_operator(id);
        }
        let (id, vm) = moment.vm(&request.vm)?;
        if request.confirm_name != vm.spec.name {
            let typed = super::echo(&request.confirm_name);
            return Err(ApiError::NotConfirmed { typed, name: vm.spec.name.clone() });
        }
        if request.reason.trim().is_empty() {
            return Err(ApiError::Missing { field: "reason", fix: "say how you know that the vm runs nowhere else" });
        }
        let site = moment.site(&request.force_owner_site)?;
        let worker = moment.heir_at(vm, &site)?;
        let order = takeover::Order {
            vm: id,
            point: moment.observations.newest_point(&worker, id),
            worker,
            site,
            last: vm.ownership.last(),
            proof: Proof::Override {
                who: operator,
                reason: super::clip(request.reason.trim(), super::MAX_REASON_CHARS),
            },
            seen: String::new(),
            ordered_by: None,
        };
        let heir = order.worker.clone();
        let order = ClientOrder::Resolve(order);
        if self.rehearse(&moment, request_id, &order)? == Rehearsal::New
            && let Some(worker) = moment.answering_holder(id, vm, &heir)
        {
            return Err(ApiError::HolderAnswers { worker, name: vm.spec.name.clone() });
        }
        let (_, after) = self.order(request_id, order).await?;
        Ok(vm_of(&after, id))
    }

    async fn declare_dead(
        &self,
        request: v1::DeclareWorkerDeadRequest,
        by: String,
    ) -> Result<v1::DeclareWorkerDeadResponse, ApiError> {
        let id = request_id(&request.request_id)?;
        let worker = request.worker.parse().map_err(|source| ApiError::BadId { field: "worker", source })?;
        if request.confirm_name != request.worker {
            return Err(ApiError::WorkerNotConfirmed { typed: super::echo(&request.confirm_name), worker });
        }
        let reason = super::clip(request.reason.trim(), super::MAX_REASON_CHARS);
        if reason.is_empty() {
            return Err(ApiError::Missing { field: "reason", fix: "say how you know that it is not coming back" });
        }
        let moment = self.read().await?;
        if moment.observations.connected(&worker, moment.now).is_some() {
            return Err(ApiError::WorkerAnswers { worker });
        }
        let (_, after) = self.order(id, ClientOrder::DeclareDead { worker, by, reason }).await?;
        Ok(v1::DeclareWorkerDeadResponse {
            vms_unknown: after.state.recovering.len() as u32,
            awaited_workers: after.state.awaited().iter().map(ToString::to_string).collect(),
        })
    }

    async fn delete_vm(&self, request: RequestId, vm: &str) -> Result<(), ApiError> {
        let moment = self.read().await?;
        let id = match moment.vm(vm) {
            Ok((id, _)) => id,
            // The same request once more: the VM is gone, as was asked.
            Err(_) if moment.state.answers.get(&request) == Some(&Answer::Done) => return Ok(()),
            Err(error) => return Err(error),
        };
        let order = ClientOrder::DeleteVm { vm: id };
        if self.rehearse(&moment, request, &order)? == Rehearsal::New {
            let (_, vm) = moment.vm(vm)?;
            match moment.view().vm_state(id, vm) {
                VmState::Stopped | VmState::Crashed | VmState::Unspecified => {}
                VmState::Unknown | VmState::InDoubt => {
                    return Err(ApiError::WorkerLost { worker: vm.ownership.owner().0.clone() });
                }
                VmState::Starting | VmState::Running | VmState::Paused | VmState::Migrating => {
                    return Err(Rejection::StillRunning { name: vm.spec.name.clone() }.into());
                }
            }
        }
        self.order(request, order).await?;
        Ok(())
    }
}

#[tonic::async_trait]
impl FleetService for Api {
    async fn list_sites(&self, _: Request<v1::ListSitesRequest>) -> Reply<v1::ListSitesResponse> {
        Ok(Response::new(v1::ListSitesResponse { sites: self.read().await?.view().sites() }))
    }

    async fn list_workers(&self, _: Request<v1::ListWorkersRequest>) -> Reply<v1::ListWorkersResponse> {
        Ok(Response::new(v1::ListWorkersResponse { workers: self.read().await?.view().workers() }))
    }

    async fn define_vm(&self, request: Request<v1::DefineVmRequest>) -> Reply<v1::DefineVmResponse> {
        let vm = self.define(request.into_inner()).await?;
        Ok(Response::new(v1::DefineVmResponse { vm }))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Reply<v1::GetVmResponse> {
        let vm = self.read().await?.any_vm(&request.into_inner().vm)?;
        Ok(Response::new(v1::GetVmResponse { vm: Some(vm) }))
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        let moment = self.read().await?;
        Ok(Response::new(v1::ListVmsResponse { vms: moment.view().vms(), found: moment.found_vms() }))
    }

    async fn adopt_vm(&self, request: Request<v1::AdoptVmRequest>) -> Reply<v1::AdoptVmResponse> {
        let vm = self.adopt(request.into_inner()).await?;
        Ok(Response::new(v1::AdoptVmResponse { vm: Some(vm) }))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Reply<v1::StartVmResponse> {
        let request = request.into_inner();
        let vm = self.set_power(&request.request_id, &request.vm, Power::Run).await?;
        Ok(Response::new(v1::StartVmResponse { vm }))
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Reply<v1::StopVmResponse> {
        let request = request.into_inner();
        let power = if request.force { Power::Kill } else { Power::Stop };
        let vm = self.set_power(&request.request_id, &request.vm, power).await?;
        Ok(Response::new(v1::StopVmResponse { vm }))
    }

    async fn resolve_vm(&self, request: Request<v1::ResolveVmRequest>) -> Reply<v1::ResolveVmResponse> {
        let operator = peer::operator(&request)?;
        let vm = self.resolve(request.into_inner(), operator).await?;
        Ok(Response::new(v1::ResolveVmResponse { vm }))
    }

    type FenceWorkerStream = Views<v1::FenceWorkerResponse>;

    async fn fence_worker(&self, request: Request<v1::FenceWorkerRequest>) -> Reply<Self::FenceWorkerStream> {
        let operator = peer::operator(&request)?;
        Ok(Response::new(self.fence(request.into_inner(), operator).await?))
    }

    async fn declare_worker_dead(
        &self,
        request: Request<v1::DeclareWorkerDeadRequest>,
    ) -> Reply<v1::DeclareWorkerDeadResponse> {
        let operator = peer::operator(&request)?;
        Ok(Response::new(self.declare_dead(request.into_inner(), operator).await?))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Reply<v1::DeleteVmResponse> {
        let request = request.into_inner();
        Api::delete_vm(self, request_id(&request.request_id)?, &request.vm).await?;
        Ok(Response::new(v1::DeleteVmResponse {}))
    }

    async fn resize_disk(&self, request: Request<v1::ResizeDiskRequest>) -> Reply<v1::ResizeDiskResponse> {
        let vm = Api::resize_disk(self, request.into_inner()).await?;
        Ok(Response::new(v1::ResizeDiskResponse { vm }))
    }

    async fn add_disk(&self, request: Request<v1::AddDiskRequest>) -> Reply<v1::AddDiskResponse> {
        let vm = Api::add_disk(self, request.into_inner()).await?;
        Ok(Response::new(v1::AddDiskResponse { vm }))
    }

    type WatchFleetStream = Views<v1::WatchFleetResponse>;

    async fn watch_fleet(&self, _: Request<v1::WatchFleetRequest>) -> Reply<Self::WatchFleetStream> {
        self.read().await?;
        let fleet = |moment: &Moment| {
            let view = moment.view();
            v1::WatchFleetResponse {
                sites: view.sites(),
                workers: view.workers(),
                vms: view.vms(),
                found: moment.found_vms(),
            }
        };
        Ok(Response::new(views(self.clone(), unless_same(fleet))))
    }
}
