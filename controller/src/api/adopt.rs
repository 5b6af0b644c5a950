//! After a restore: VMs that were defined since the backup come into the fleet again.

use pageport_proto::VmId;
use pageport_proto::v1;

use super::error::ApiError;
use super::{Api, Moment, echo, request_id};
use crate::link::found::{Found, found};
use crate::model::command::ClientOrder;
use crate::model::{Rejection, Spec};

impl Moment {
    /// VMs that workers own and the controllers do not know.
    fn found(&self) -> Vec<Found> {
        found(&self.state, &self.observations, self.now)
    }

    /// The same, as clients see them.
    pub(super) fn found_vms(&self) -> Vec<v1::FoundVm> {
        self.found().into_iter().map(v1::FoundVm::from).collect()
    }
}

impl Api {
    pub(super) async fn adopt(&self, request: v1::AdoptVmRequest) -> Result<v1::Vm, ApiError> {
        let request_id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        if let Ok(known) = moment.any_vm(&request.vm) {
            return Ok(known);
        }
        let Found { id, spec, workers, .. } = one_of(moment.found(), &request.vm)?;
        let worker = workers.into_iter().next().ok_or_else(|| not_found(&request.vm))?;
        let kept = spec.ok_or_else(|| ApiError::NoDefinition { vm: id, worker: worker.clone() })?;
        let spec = Spec::kept(kept);
        let spec = spec.map_err(|source| ApiError::KeptDefinition { vm: id, worker: worker.clone(), source })?;
        let order = ClientOrder::AdoptVm { vm: id, spec: Box::new(spec), worker };
        let (_, after) = self.order(request_id, order).await?;
        after.any_vm(&id.to_string())
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
