//! The worker's side of the keeper: where its program lies, the lease of a VM, and what to do with one that is half
//! started.
//!
//! | [`Kept`] | QEMU, by its pid file | keeper, by the lock on the deadline file | means |
//! |---|---|---|---|
//! | `Nothing` | absent | free | does not run |
//! | `Unfinished` | absent | held | starting, or ending |
//! | `Qemu` | found | - | runs |
//!
//! Guarantees: a QEMU that an earlier worker was starting when it died is found or ended, never overlooked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{AccessFlags, access};
use pageport_keeper::{BootTime, DeadlineFile, DeadlineFileError, Expired, Lease};
use pageport_proto::VmId;

use super::error::HypervisorError;
use super::paths::VmPaths;
use super::process::Process;

/// The program's name.
pub const PROGRAM: &str = "pageport-keeper";
/// Time for a VM that an earlier worker was starting to be found.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);
/// Time for a keeper to end what it keeps.
const END_DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks for either.
const SETTLE_INTERVAL: Duration = Duration::from_millis(20);

/// Finds the keeper's program. A bare name is looked for beside this program, then in `PATH`.
///
/// # Errors
/// It is not there, or is no program.
pub fn locate(configured: &str) -> Result<PathBuf, HypervisorError> {
    let given = Path::new(configured);
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates: Vec<PathBuf> = if given.components().count() > 1 {
        vec![given.to_owned()]
    } else {
        beside.into_iter().chain(std::env::split_paths(&path)).map(|folder| folder.join(given)).collect()
    };
    let runs = |candidate: &PathBuf| candidate.is_file() && access(candidate, AccessFlags::X_OK).is_ok();
    let missing = || HypervisorError::KeeperMissing { keeper: configured.to_owned() };
    candidates.into_iter().find(runs).ok_or_else(missing)
}

/// What there is of a VM.
enum Kept {
    Nothing,
    Unfinished,
    Qemu(Process),
}

fn look(vm: VmId, paths: &VmPaths) -> Result<Kept, HypervisorError> {
    if let Some(qemu) = super::vm::find(paths)? {
        return Ok(Kept::Qemu(qemu));
    }
    Ok(if is_locked(vm, paths)? { Kept::Unfinished } else { Kept::Nothing })
}

fn is_locked(vm: VmId, paths: &VmPaths) -> Result<bool, HypervisorError> {
    match DeadlineFile::open(&paths.deadline()) {
        Ok(file) => Ok(!file.try_lock().map_err(of(vm, "look for the keeper"))?),
        Err(DeadlineFileError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(of(vm, "look for the keeper")(error)),
    }
}

/// The VM's QEMU. One that is being started, or is ending, is waited for; one that stays half started is ended.
pub(super) async fn settle(vm: VmId, paths: &VmPaths) -> Result<Option<Process>, HypervisorError> {
    let appear = async {
        loop {
            match look(vm, paths)? {
                Kept::Qemu(qemu) => return Ok(Some(qemu)),
                Kept::Nothing => return Ok(None),
                Kept::Unfinished => tokio::time::sleep(SETTLE_INTERVAL).await,
            }
        }
    };
    if let Ok(settled) = tokio::time::timeout(SETTLE_DEADLINE, appear).await {
        return settled;
    }
    tracing::warn!(vm_id = %vm, "QEMU is half started; it is ended");
    order_end(vm, paths)?;
    let end = async {
        while is_locked(vm, paths)? {
            tokio::time::sleep(SETTLE_INTERVAL).await;
        }
        Ok(None)
    };
    let late = |_| HypervisorError::Deadline { vm, operation: "end", deadline: END_DEADLINE };
    tokio::time::timeout(END_DEADLINE, end).await.map_err(late)?
}

/// Makes the lease file of a VM that is about to start.
pub(super) fn prepare(vm: VmId, paths: &VmPaths, deadline: Option<BootTime>) -> Result<(), HypervisorError> {
    let lease = deadline.map_or(Lease::Disarmed, Lease::Until);
    DeadlineFile::create(&paths.deadline(), lease).map(drop).map_err(of(vm, "prepare"))
}

/// Has the keeper kill QEMU and end, however far it has come.
pub(super) fn order_end(vm: VmId, paths: &VmPaths) -> Result<(), HypervisorError> {
    change(vm, paths, "end", |_| Some(Lease::Until(BootTime::ZERO)))
}

/// Changes the lease; `new` gets the one that stands, if one does.
pub(super) fn change(
    vm: VmId,
    paths: &VmPaths,
    operation: &'static str,
    new: impl FnOnce(Option<Lease>) -> Option<Lease>,
) -> Result<(), HypervisorError> {
    let changed = || {
        let file = DeadlineFile::open(&paths.deadline())?;
        let standing = match file.lease() {
            Ok(lease) => Some(lease),
            Err(DeadlineFileError::Invalid { .. }) => None,
            Err(error) => return Err(error),
        };
        new(standing).map_or(Ok(()), |lease| file.set_lease(lease))
    };
    changed().map_err(of(vm, operation))
}

/// The lease that stands.
pub(super) fn lease(vm: VmId, paths: &VmPaths) -> Result<Lease, HypervisorError> {
    DeadlineFile::open(&paths.deadline()).and_then(|file| file.lease()).map_err(of(vm, "read"))
}

/// Whether the keeper killed QEMU at its deadline. A file that is gone says nothing.
pub(super) fn expired(paths: &VmPaths) -> Option<Expired> {
    DeadlineFile::open(&paths.deadline()).and_then(|file| file.expired()).ok().flatten()
}

fn of(vm: VmId, operation: &'static str) -> impl Fn(DeadlineFileError) -> HypervisorError {
    move |source| HypervisorError::Lease { vm, operation, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_keeper_is_named_with_the_remedy() {
        for absent in ["/nonexistent/pageport-keeper", "pageport-keeper-that-is-nowhere", "/etc/passwd", "/"] {
            let error = locate(absent).unwrap_err().to_string();
            assert!(error.contains(absent) && error.contains("hypervisor.keeper"), "{error}");
        }
        assert_eq!(locate("/bin/sh").unwrap(), Path::new("/bin/sh"));
        assert!(locate("sh").unwrap().ends_with("sh"));
    }
}
