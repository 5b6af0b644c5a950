//! The fake of the fleet service: sites, workers and VMs.

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_server::FleetService;
use tonic::{Request, Response, Status};

use super::{Boxed, Fake, Reply, vm};

#[tonic::async_trait]
impl FleetService for Fake {
    async fn list_sites(&self, _: Request<v1::ListSitesRequest>) -> Reply<v1::ListSitesResponse> {
        self.fail()?;
        let site = v1::Site { name: "a".into(), workers: vec!["worker-a".into()], vms_running: 1, reachable: true };
        Ok(Response::new(v1::ListSitesResponse { sites: vec![site] }))
    }

    async fn list_workers(&self, _: Request<v1::ListWorkersRequest>) -> Reply<v1::ListWorkersResponse> {
        Ok(Response::new(v1::ListWorkersResponse { workers: self.script().workers.clone() }))
    }

    async fn define_vm(&self, request: Request<v1::DefineVmRequest>) -> Reply<v1::DefineVmResponse> {
        let v1::DefineVmRequest { request_id, spec, site } = request.into_inner();
        self.command(&request_id)?;
        let spec = spec.unwrap();
        self.script().defined.push(spec.clone());
        let vm = v1::Vm { spec: Some(spec), owner_site: site, state: v1::VmState::Stopped.into(), ..vm("new") };
        Ok(Response::new(v1::DefineVmResponse { vm: Some(vm) }))
    }

    async fn declare_worker_dead(
        &self,
        request: Request<v1::DeclareWorkerDeadRequest>,
    ) -> Reply<v1::DeclareWorkerDeadResponse> {
        let v1::DeclareWorkerDeadRequest { request_id, worker, confirm_name, .. } = request.into_inner();
        self.command(&request_id)?;
        if confirm_name != worker {
            return Err(Status::invalid_argument("not its name"));
        }
        let awaited_workers = vec!["worker-c".to_owned()];
        Ok(Response::new(v1::DeclareWorkerDeadResponse { vms_unknown: 2, awaited_workers }))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Reply<v1::GetVmResponse> {
        Ok(Response::new(v1::GetVmResponse { vm: Some(self.vm(&request.into_inner().vm)?) }))
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        let script = self.script();
        Ok(Response::new(v1::ListVmsResponse { vms: script.vms.clone(), found: script.found.clone() }))
    }

    async fn adopt_vm(&self, request: Request<v1::AdoptVmRequest>) -> Reply<v1::AdoptVmResponse> {
        let v1::AdoptVmRequest { request_id, vm: id } = request.into_inner();
        self.command(&request_id)?;
        let named = |found: &v1::FoundVm| found.id == id || found.name == id;
        let found = self.script().found.iter().find(|found| named(found)).cloned();
        let found = found.ok_or_else(|| Status::not_found(format!("no worker speaks of a vm \"{id}\"")))?;
        Ok(Response::new(v1::AdoptVmResponse { vm: Some(vm(&found.name)) }))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Reply<v1::StartVmResponse> {
        let v1::StartVmRequest { request_id, vm } = request.into_inner();
        self.command(&request_id)?;
        Ok(Response::new(v1::StartVmResponse { vm: Some(self.vm(&vm)?) }))
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Reply<v1::StopVmResponse> {
        let v1::StopVmRequest { request_id, vm, force } = request.into_inner();
        self.command(&request_id)?;
        let mut vm = self.vm(&vm)?;
        vm.desired_running = false;
        if force {
            vm.state = v1::VmState::Stopped.into();
        }
        Ok(Response::new(v1::StopVmResponse { vm: Some(vm) }))
    }

    async fn resolve_vm(&self, request: Request<v1::ResolveVmRequest>) -> Reply<v1::ResolveVmResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        if request.confirm_name != request.vm {
            return Err(Status::invalid_argument(format!("\"{}\" is not the VM's name", request.confirm_name)));
        }
        let vm = v1::Vm { owner_site: request.force_owner_site, ..vm };
        Ok(Response::new(v1::ResolveVmResponse { vm: Some(vm) }))
    }

    type FenceWorkerStream = Boxed<v1::FenceWorkerResponse>;

    async fn fence_worker(&self, request: Request<v1::FenceWorkerRequest>) -> Reply<Self::FenceWorkerStream> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        self.script().fenced.push(request);
        let fences = self.script().fences.pop_front().unwrap_or_default();
        Ok(Response::new(Box::pin(tokio_stream::iter(fences.into_iter().map(Ok)))))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Reply<v1::DeleteVmResponse> {
        let v1::DeleteVmRequest { request_id, vm } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        Err(Status::failed_precondition(format!("{vm} is running: stop it first")))
    }

    async fn resize_disk(&self, request: Request<v1::ResizeDiskRequest>) -> Reply<v1::ResizeDiskResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        self.script().resized.push(request);
        Ok(Response::new(v1::ResizeDiskResponse { vm: Some(vm) }))
    }

    async fn add_disk(&self, request: Request<v1::AddDiskRequest>) -> Reply<v1::AddDiskResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        self.script().added.push(request);
        Ok(Response::new(v1::AddDiskResponse { vm: Some(vm) }))
    }

    type WatchFleetStream = Boxed<v1::WatchFleetResponse>;

    async fn watch_fleet(&self, _: Request<v1::WatchFleetRequest>) -> Reply<Self::WatchFleetStream> {
        let fleets = self.script().fleets.pop_front().unwrap_or_default();
        Ok(Response::new(Box::pin(tokio_stream::iter(fleets.into_iter().map(Ok)))))
    }
}
