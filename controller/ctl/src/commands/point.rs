//! `recovery-point list | open | close`: the controllers know what there is, and the worker that holds the replica opens it.

use std::time::Duration;

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::replication_service_client::ReplicationServiceClient;

use super::{Context, ask, now_unix_ms, required};
use crate::cli::RecoveryPointCommand;
use crate::error::CtlError;
use crate::host;
use crate::render::point;
use crate::trace::Traced;

type Fleet = FleetServiceClient<Traced>;
type Replication = ReplicationServiceClient<Traced>;

/// A worker may have to put a point in place first, and to look through many older ones.
const OPEN_LIMIT: Duration = Duration::from_secs(300);
const CLOSE_LIMIT: Duration = Duration::from_secs(60);

pub async fn run(context: &mut Context, command: RecoveryPointCommand) -> Result<(), CtlError> {
    match command {
        RecoveryPointCommand::List { vm, site } => list(context, vm, site).await,
        RecoveryPointCommand::Open { vm, number, site, lasts, listen } => {
            let (vm, worker) = holder(context, vm, site).await?;
            let request = v1::OpenPointRequest {
                vm_name: vm.spec.as_ref().map(|spec| spec.name.clone()).unwrap_or_default(),
                vm_id: vm.id,
                number,
                duration_ms: lasts.0,
                listen: listen.map(|address| address.to_string()).unwrap_or_default(),
            };
            let mut service = host::connect(context.controllers.identity(), &worker).await?;
            let response = host::answer(&worker, OPEN_LIMIT, service.open_point(request)).await?;
            let export = required(response.export, "OpenPoint", "export")?;
            context.output.message(&export, |export| point::opened(export, &worker.name, now_unix_ms()))
        }
        RecoveryPointCommand::Close { vm, number, site } => {
            let (found, worker) = holder(context, vm.clone(), site).await?;
            let request = v1::ClosePointRequest { vm_id: found.id, number };
            let mut service = host::connect(context.controllers.identity(), &worker).await?;
            let response = host::answer(&worker, CLOSE_LIMIT, service.close_point(request)).await?;
            context.output.message(&response, |_| format!("recovery point {number} of {vm} is closed"))
        }
    }
}

async fn list(context: &mut Context, vm: String, site: Option<String>) -> Result<(), CtlError> {
    let site = site_of(context, &vm, site).await?;
    let request = v1::ListRecoveryPointsRequest { vm, site };
    let response = ask!(context, Replication, list_recovery_points, request).await?;
    context.output.message(&response, |response| point::points(response, now_unix_ms()))
}

/// The site that is named, or that is meant.
pub async fn site_of(context: &mut Context, vm: &str, named: Option<String>) -> Result<String, CtlError> {
    match named {
        Some(site) => Ok(site),
        None => only_site(&get(context, vm.to_owned()).await?),
    }
}

/// The VM, and the worker that holds its replica.
async fn holder(context: &mut Context, vm: String, site: Option<String>) -> Result<(v1::Vm, v1::Worker), CtlError> {
    let vm = get(context, vm).await?;
    let site = match site {
        Some(site) => site,
        None => only_site(&vm)?,
    };
    let held = vm.replicas.iter().find(|replica| replica.site == site).map(|replica| replica.worker.clone());
    let held = held.ok_or_else(|| CtlError::Site {
        problem: format!("site {site} holds no replica of it"),
        fix: "`pageportctl replica list VM` shows those that do",
    })?;
    let workers = ask!(context, Fleet, list_workers, v1::ListWorkersRequest {}).await?.workers;
    let worker = workers.into_iter().find(|worker| worker.name == held && !worker.grpc_address.is_empty());
    let worker = worker.ok_or_else(|| CtlError::Site {
        problem: format!("the worker at site {site} that holds the replica has not connected yet"),
        fix: "start it",
    })?;
    Ok((vm, worker))
}

async fn get(context: &mut Context, vm: String) -> Result<v1::Vm, CtlError> {
    let response = ask!(context, Fleet, get_vm, v1::GetVmRequest { vm }).await?;
    required(response.vm, "GetVm", "vm")
}

/// The site that is meant when none is named: the only one that is protected, or else the only one with a replica.
fn only_site(vm: &v1::Vm) -> Result<String, CtlError> {
    let protected: Vec<_> = vm.replicas.iter().filter(|replica| replica.protection.is_some()).collect();
    let all: Vec<_> = vm.replicas.iter().collect();
    match (&protected[..], &all[..]) {
        ([only], _) | ([], [only]) => Ok(only.site.clone()),
        (_, []) => Err(CtlError::Site {
            problem: "it has no replica".to_owned(),
            fix: "`pageportctl protect VM --to SITE` keeps one with recovery points",
        }),
        (_, several) => {
            let sites: Vec<_> = several.iter().map(|replica| replica.site.as_str()).collect();
            let problem = format!("it has replicas at {}", sites.join(", "));
            Err(CtlError::Site { problem, fix: "name one with --site" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(replicas: &[(&str, bool)]) -> v1::Vm {
        let replica = |(site, protected): &(&str, bool)| v1::Replica {
            site: (*site).to_owned(),
            protection: protected.then(v1::Protection::default),
            ..v1::Replica::default()
        };
        v1::Vm { replicas: replicas.iter().map(replica).collect(), ..v1::Vm::default() }
    }

    #[test]
    fn a_site_need_not_be_named_where_only_one_can_be_meant() {
        assert_eq!(only_site(&vm(&[("b", true)])).unwrap(), "b");
        assert_eq!(only_site(&vm(&[("b", false)])).unwrap(), "b");
        assert_eq!(only_site(&vm(&[("b", false), ("c", true)])).unwrap(), "c");
        let several = only_site(&vm(&[("b", true), ("c", true)])).unwrap_err().to_string();
        assert_eq!(several, "it has replicas at b, c: name one with --site");
        assert!(only_site(&vm(&[])).unwrap_err().to_string().contains("pageportctl protect VM"));
    }
}
