//! What QEMUs leave in the runtime folder: which of them run, and what is to go of those that do not.

use std::path::Path;

use pageport_proto::VmId;

use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::paths::VmPaths;
use crate::hypervisor::process::Process;
use crate::hypervisor::{keeper, tap};

/// The VMs whose QEMU runs, as the runtime folder and `/proc` say.
pub fn list_running(runtime_dir: &Path) -> Result<Vec<VmId>, HypervisorError> {
    let all = VmPaths::all(runtime_dir);
    let file_error = |source| HypervisorError::File { operation: "list", path: all.clone(), source };
    let entries = match std::fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file_error(error)),
    };
    let mut running = Vec::new();
    for entry in entries {
        let name = entry.map_err(file_error)?.file_name();
        let Some(vm) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) else { continue };
        if find(&VmPaths::new(runtime_dir, vm))?.is_some() {
            running.push(vm);
        }
    }
    running.sort();
    Ok(running)
}

/// Removes what a VM's QEMU left behind when it ended without a worker: tap devices and sockets. Does nothing while it
/// runs.
pub async fn clean_up(runtime_dir: &Path, vm: VmId) -> Result<(), HypervisorError> {
    let paths = VmPaths::new(runtime_dir, vm);
    if keeper::settle(vm, &paths).await?.is_none() {
        if let Some(expired) = keeper::expired(&paths) {
            tracing::warn!(vm_id = %vm, deadline = %expired.deadline, "QEMU's lease ran out while no worker watched");
        }
        remove_leftovers(&paths).await;
    }
    Ok(())
}

/// Removes everything of a deleted VM, its log too. Does nothing while it runs.
pub async fn remove(runtime_dir: &Path, vm: VmId) -> Result<(), HypervisorError> {
    clean_up(runtime_dir, vm).await?;
    let paths = VmPaths::new(runtime_dir, vm);
    if find(&paths)?.is_some() {
        return Ok(());
    }
    match tokio::fs::remove_dir_all(paths.dir()).await {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(HypervisorError::File { operation: "remove", path: paths.dir().to_owned(), source })
        }
        _ => Ok(()),
    }
}

pub(in crate::hypervisor) fn find(paths: &VmPaths) -> Result<Option<Process>, HypervisorError> {
    Process::find(paths).map_err(|source| HypervisorError::File { operation: "check", path: paths.pid(), source })
}

/// Removes taps and everything in the VM's folder but its log. Only for a QEMU that does not run.
pub(in crate::hypervisor) async fn remove_leftovers(paths: &VmPaths) {
    if let Ok(names) = tokio::fs::read_to_string(paths.taps()).await {
        let taps: Vec<String> = names.lines().filter(|name| !name.is_empty()).map(str::to_owned).collect();
        tap::remove(&taps).await;
    }
    let Ok(mut entries) = tokio::fs::read_dir(paths.dir()).await else { return };
    while let Ok(Some(entry)) = entries.next_entry().await {
        if entry.path() != paths.log()
            && let Err(error) = tokio::fs::remove_file(entry.path()).await
        {
            tracing::warn!(path = %entry.path().display(), error = %error, "file not removed");
        }
    }
}
