//! `vm define | list | get | start | stop | adopt | resolve | delete | console`.

use std::path::Path;
use std::time::Duration;

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;

use super::confirm::ask_for_name;
use super::{Context, ask, now_unix_ms, request_id, required};
use crate::cli::VmCommand;
use crate::console::{self, ConsoleError};
use crate::error::{CtlError, one_line};
use crate::render::{lists, note, words};
use crate::trace::Traced;
use crate::vmfile;

type Fleet = FleetServiceClient<Traced>;

pub async fn run(context: &mut Context, command: VmCommand) -> Result<(), CtlError> {
    match command {
        VmCommand::Define { file, site } => define(context, &file, site).await,
        VmCommand::List => {
            let response = ask!(context, Fleet, list_vms, v1::ListVmsRequest {}).await?;
            context.output.message(&response, lists::vms)
        }
        VmCommand::Get { vm } => {
            let vm = get(context, vm).await?;
            context.output.message(&vm, |vm| lists::vm(vm, now_unix_ms()))
        }
        VmCommand::Start { vm } => {
            let request = v1::StartVmRequest { request_id: request_id(), vm };
            let response = ask!(context, Fleet, start_vm, request).await?;
            changed(context, required(response.vm, "StartVm", "vm")?)
        }
        VmCommand::Stop { vm, force } => {
            let request = v1::StopVmRequest { request_id: request_id(), vm, force };
            let response = ask!(context, Fleet, stop_vm, request).await?;
            changed(context, required(response.vm, "StopVm", "vm")?)
        }
        VmCommand::Adopt { vm: Some(vm), .. } => adopt(context, vm).await,
        VmCommand::Adopt { vm: None, .. } => adopt_all(context).await,
        VmCommand::Delete { vm } => {
            let request = v1::DeleteVmRequest { request_id: request_id(), vm: vm.clone() };
            let response = ask!(context, Fleet, delete_vm, request).await?;
            context.output.message(&response, |_| format!("{vm}: deleted; its original disk image stays where it is"))
        }
        VmCommand::Resolve { vm, force_owner, confirm, reason } => {
            resolve(context, vm, force_owner, confirm, reason).await
        }
        VmCommand::Console { vm, linger } => attach(context, vm, Duration::from_secs(linger.into())).await,
    }
}

async fn define(context: &mut Context, file: &Path, site: String) -> Result<(), CtlError> {
    let spec = vmfile::load(file)?;
    let request = v1::DefineVmRequest { request_id: request_id(), spec: Some(spec), site };
    let response = ask!(context, Fleet, define_vm, request).await?;
    changed(context, required(response.vm, "DefineVm", "vm")?)
}

async fn adopt(context: &mut Context, vm: String) -> Result<(), CtlError> {
    let request = v1::AdoptVmRequest { request_id: request_id(), vm };
    let response = ask!(context, Fleet, adopt_vm, request).await?;
    context.output.message(&required(response.vm, "AdoptVm", "vm")?, lists::adopted)
}

/// One that cannot be adopted does not keep the others from it.
async fn adopt_all(context: &mut Context) -> Result<(), CtlError> {
    let found = ask!(context, Fleet, list_vms, v1::ListVmsRequest {}).await?.found;
    if found.is_empty() {
        note("no worker speaks of a VM that the controllers do not know");
    }
    let mut failed = Ok(());
    for vm in found {
        if let Err(error) = adopt(context, vm.id).await
            && let Err(earlier) = std::mem::replace(&mut failed, Err(error))
        {
            note(&format!("error: {}", one_line(&earlier)));
        }
    }
    failed
}

async fn resolve(
    context: &mut Context,
    vm: String,
    force_owner_site: String,
    confirm: Option<String>,
    reason: String,
) -> Result<(), CtlError> {
    let confirm_name = match confirm {
        Some(name) => name,
        None => ask_for_name("VM", &warning(&get(context, vm.clone()).await?, &force_owner_site))?,
    };
    let request = v1::ResolveVmRequest { request_id: request_id(), vm, force_owner_site, confirm_name, reason };
    let response = ask!(context, Fleet, resolve_vm, request).await?;
    changed(context, required(response.vm, "ResolveVm", "vm")?)
}

/// What is about to happen to a VM that is given to a site.
fn warning(vm: &v1::Vm, site: &str) -> Vec<String> {
    let name = vm.spec.as_ref().map_or("", |spec| &spec.name);
    let owned = format!("{name} is owned by {} at {}, {}.", vm.owner_worker, vm.owner_site, words::vm_state(vm.state));
    let doubt = Some(vm.doubt.clone()).filter(|doubt| !doubt.is_empty());
    let twice = format!("If it still runs there, it will run twice once {site} owns it.");
    [Some(owned), doubt, Some(twice)].into_iter().flatten().collect()
}

async fn get(context: &mut Context, vm: String) -> Result<v1::Vm, CtlError> {
    let response = ask!(context, Fleet, get_vm, v1::GetVmRequest { vm }).await?;
    required(response.vm, "GetVm", "vm")
}

fn changed(context: &Context, vm: v1::Vm) -> Result<(), CtlError> {
    context.output.message(&vm, lists::vm_line)
}

async fn attach(context: &mut Context, name: String, linger: Duration) -> Result<(), CtlError> {
    let vm = get(context, name.clone()).await?;
    let workers = ask!(context, Fleet, list_workers, v1::ListWorkersRequest {}).await?.workers;
    let worker = workers.into_iter().find(|worker| worker.name == vm.owner_worker);
    let Some(worker) = worker.filter(|worker| !worker.grpc_address.is_empty()) else {
        return Err(ConsoleError::NoWorker { vm: name, worker: vm.owner_worker }.into());
    };
    let end = console::attach(context.controllers.identity(), &worker, vm.id, linger).await?;
    note(&format!("console of {name}: {end}"));
    Ok(())
}
