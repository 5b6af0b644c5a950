//! Where a VM's sockets and files lie: `<runtime_dir>/vm/<vm_id>/`.
//!
//! | file | made by | for |
//! |---|---|---|
//! | `qmp.sock` | QEMU | the worker's control connection; takes one client at a time |
//! | `console.sock` | QEMU | the guest's serial port |
//! | `agent.sock` | QEMU | the guest agent's port, if the guest has an agent; takes one client at a time |
//! | `frozen` | the worker | the guest's file systems may be frozen: whoever adopts the VM thaws them |
//! | `incoming.sock` | QEMU | the migration stream at the destination |
//! | `outgoing.sock` | the worker | the migration stream at the source |
//! | `nbd-<disk>.sock` | the worker | the target of a disk's mirror |
//! | `points.sock` | QEMU | its frozen disks, while they are being copied |
//! | `pid` | QEMU | finding a running VM again |
//! | `deadline` | the worker | the lease that the keeper enforces, and the keeper's word when it did |
//! | `taps` | the worker | tap devices to remove when the VM ends, one name per line |
//! | `image` | the worker | which move's image QEMU holds, complete and vouched for, until it runs |
//! | `qemu.log` | QEMU, the keeper | their standard error |

use std::path::{Path, PathBuf};

use pageport_proto::VmId;

/// The folder of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    dir: PathBuf,
}

impl VmPaths {
    /// The folder of `vm` below the worker's runtime folder.
    pub fn new(runtime_dir: &Path, vm: VmId) -> Self {
        Self { dir: Self::all(runtime_dir).join(vm.to_string()) }
    }

    /// The folder that holds all VMs' folders.
    pub fn all(runtime_dir: &Path) -> PathBuf {
        runtime_dir.join("vm")
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// QEMU's control socket.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The serial port's socket.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// The guest agent's port.
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// There while the guest's file systems may be frozen.
    pub fn frozen(&self) -> PathBuf {
        self.dir.join("frozen")
    }

    /// Where a destination QEMU listens for the migration stream.
    pub fn incoming(&self) -> PathBuf {
        self.dir.join("incoming.sock")
    }

    /// Where the worker listens for a source QEMU's migration stream.
    pub fn outgoing(&self) -> PathBuf {
        self.dir.join("outgoing.sock")
    }

    /// Where the worker's NBD server for a disk listens.
    pub fn nbd(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("nbd-{disk}.sock"))
    }

    /// Where QEMU's NBD server offers its frozen disks.
    pub fn points(&self) -> PathBuf {
        self.dir.join("points.sock")
    }

    /// The mirrors' NBD sockets that are there, with the disks that they are for.
    pub fn nbd_sockets(&self) -> Vec<(String, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Vec::new() };
        let disk_of = |path: &Path| {
            let name = path.file_name()?.to_str()?;
            Some(name.strip_prefix("nbd-")?.strip_suffix(".sock")?.to_owned())
        };
        entries.flatten().map(|entry| entry.path()).filter_map(|path| Some((disk_of(&path)?, path))).collect()
    }

    /// Names the move whose image is complete here.
    pub fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// The lease that the keeper enforces.
    pub fn deadline(&self) -> PathBuf {
        self.dir.join("deadline")
    }

    /// Names of the VM's tap devices.
    pub fn taps(&self) -> PathBuf {
        self.dir.join("taps")
    }

    /// Standard error of QEMU and its keeper.
    pub fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }
}
