//! After a restore: VMs that were defined since the backup come into the fleet again.

use pageport_proto::VmId;
use pageport_proto::v1;

use super::error::ApiError;
use super::fleet::vm_of;
use super::{Api, Moment, echo, request_id};
use crate::link::found::{Found, found};
use crate::model::command::ClientOrder;
use crate::model::{Rejection, Spec};

impl Moment {
    /// VMs that workers own and the controllers do not know.
    pub(super) fn found(&self) -> Vec<Found> {
        found(&self.state, &self.observations, self.now)
    }

    /// A VM, also one of which it is not known who owns it.
    fn any_vm(&self, id: VmId) -> Option<v1::Vm> {
        let recovering = self.state.recovering.get(&id).map(|recovering| self.view().recovering(id, recovering));
        recovering.or_else(|| vm_of(self, id))
    }
}

impl Api {
    pub(super) async fn adopt(&self, request: v1::AdoptVmRequest) -> Result<Option<v1::Vm>, ApiError> {
        let request_id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let known = moment.state.find_recovering(&request.vm).map(|(id, _)| id);
        if let Some(id) = known.or_else(|| moment.state.find_vm(&request.vm).map(|(id, _)| id)) {
            return Ok(moment.any_vm(id));
        }
        let found = one_of(moment.found(), &request.vm)?;
        let [worker, ..] = &found.workers[..] else { return Err(not_found(&request.vm)) };
        let worker = worker.clone();
        let Some(kept) = found.spec else { return Err(ApiError::NoDefinition { vm: found.id, worker }) };
        let spec = Spec::kept(kept).map_err(|source| {
            let worker = worker.clone();
            ApiError::KeptDefinition { vm: found.id, worker, source }
        })?;
        let order = ClientOrder::AdoptVm { vm: found.id, spec: Box::new(spec), worker };
        let (_, after) = self.order(request_id, order).await?;
        Ok(after.any_vm(found.id))
    }
}

fn not_found(vm: &str) -> ApiError {
    Rejection::NotFound { vm: echo(vm) }.into()
}

fn one_of(all: Vec<Found>, id_or_name: &str) -> Result<Found, ApiError> {
    let id = id_or_name.parse::<VmId>().ok();
    let named = |found: &Found| found.spec.as_ref().is_some_and(|spec| spec.name == id_or_name);
    let mut meant: Vec<_> = all.into_iter().filter(|found| Some(found.id) == id || named(found)).collect();
    match meant.len() {
        1 => meant.pop().ok_or_else(|| not_found(id_or_name)),
        0 => Err(not_found(id_or_name)),
        count => Err(ApiError::SeveralFound { name: echo(id_or_name), count }),
    }
}

impl From<Found> for v1::FoundVm {
    fn from(found: Found) -> Self {
        Self {
            id: found.id.to_string(),
            name: found.spec.map(|spec| spec.name).unwrap_or_default(),
            workers: found.workers.iter().map(ToString::to_string).collect(),
            runs: found.runs,
        }
    }
}
