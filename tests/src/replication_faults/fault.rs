//! Faults on real processes, links and file systems, and what ends each.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::arena::Arena;
use super::plan::{Fault, Side, Way};
use crate::faults::FaultsError;
use crate::faults::arena::{VM, steer};
use crate::wan::control::Request;

/// What takes up the room of a full disk.
const BALLAST: &str = "ballast";

/// What ends a fault.
#[derive(Debug)]
pub enum Healing {
    /// Start a site's worker again.
    Restart(&'static str),
    /// Let a site's stopped worker go on.
    Thaw(&'static str),
    /// Start the VM again.
    Boot,
    /// Let the link carry again.
    Mend,
    /// Make room.
    Remove(PathBuf),
}

/// Strikes.
///
/// # Errors
/// When it cannot be struck.
pub fn apply(arena: &mut Arena, fault: Fault) -> Result<Healing, FaultsError> {
    Ok(match fault {
        Fault::KillWorker(side) => {
            let site = arena.site(side);
            arena.lab.worker(site).kill()?;
            Healing::Restart(site)
        }
        Fault::StopWorker(side) => {
            let site = arena.site(side);
            arena.lab.worker(site).freeze()?;
            Healing::Thaw(site)
        }
        Fault::KillHypervisor => {
            for (_, pid) in arena.lab.qemu_pids(VM) {
                match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => {
                        return Err(FaultsError::Signal { signal: "SIGKILL", pid, source: errno.into() });
                    }
                }
            }
            Healing::Boot
        }
        Fault::Cut(way) => {
            for (from, to) in directions(arena, way) {
                steer(&arena.lab, from, to, |from, to| Request::Cut { from, to })?;
            }
            Healing::Mend
        }
        Fault::FillDisk(side) => {
            let path = arena.lab.worker_data(arena.site(side)).join(BALLAST);
            fill(&path).map_err(|source| FaultsError::File {
                operation: "fill a disk with",
                path: path.clone(),
                source,
            })?;
            Healing::Remove(path)
        }
    })
}

/// Ends it. What takes its time is over when this returns.
///
/// # Errors
/// When it cannot be ended.
pub async fn heal(arena: &mut Arena, healing: Healing) -> Result<(), FaultsError> {
    match healing {
        Healing::Restart(site) => arena.lab.worker(site).restart()?,
        Healing::Thaw(site) => arena.lab.worker(site).thaw()?,
        Healing::Boot => arena.boot_again().await?,
        Healing::Mend => {
            for (from, to) in directions(arena, Way::Both) {
                steer(&arena.lab, from, to, |from, to| Request::Heal { from, to })?;
            }
        }
        Healing::Remove(path) => {
            fs::remove_file(&path).map_err(|source| FaultsError::File { operation: "remove", path, source })?;
        }
    }
    Ok(())
}

fn directions(arena: &Arena, way: Way) -> Vec<(&'static str, &'static str)> {
    let (source, destination) = (arena.site(Side::Source), arena.site(Side::Destination));
    let (forth, back) = ((source, destination), (destination, source));
    match way {
        Way::Forth => vec![forth],
        Way::Back => vec![back],
        Way::Both => vec![forth, back],
    }
}

/// Writes until not one more block fits.
fn fill(path: &Path) -> io::Result<()> {
    let mut ballast = File::create(path)?;
    for bytes in [1 << 20, 4096] {
        let block = vec![0xaa; bytes];
        loop {
            match ballast.write_all(&block) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
