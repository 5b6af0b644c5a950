//! Why something about a VM's QEMU did not work.

use std::path::PathBuf;
use std::time::Duration;

use pageport_keeper::DeadlineFileError;
use pageport_proto::VmId;

use super::command_line::SpecError;
use super::event::MigrationStatus;
use super::qmp::QmpError;
use super::tap::TapError;

/// Why something about a VM's QEMU did not work.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The VM's definition is no good.
    #[error("VM definition refused")]
    Spec(#[from] SpecError),
    /// A tap device could not be made.
    #[error("prepare the network of VM {vm}")]
    Tap {
        /// Which VM.
        vm: VmId,
        /// Why.
        #[source]
        source: TapError,
    },
    /// QEMU of this VM runs already.
    #[error("QEMU of VM {vm} runs already, as process {pid}")]
    AlreadyRunning {
        /// Which VM.
        vm: VmId,
        /// Its process.
        pid: u32,
    },
    /// A guest that is to have huge pages does not get them.
    #[error(
        "VM {vm} needs {memory_bytes} bytes of huge pages (of {page_bytes} bytes each), and {free_bytes} are free: \
         raise vm.nr_hugepages, or set hypervisor.huge_pages to \"if-free\""
    )]
    NoHugePages {
        /// Which VM.
        vm: VmId,
        /// What it needs; a multiple of a page.
        memory_bytes: u64,
        /// Of one page; 0: the kernel has none.
        page_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// There is no QEMU of this VM.
    #[error("no QEMU of VM {vm} runs here")]
    NotRunning {
        /// Which VM.
        vm: VmId,
    },
    /// The keeper's program is not there.
    #[error("keeper {keeper} not found: install pageport-keeper beside pageport-worker, or set hypervisor.keeper")]
    KeeperMissing {
        /// As configured.
        keeper: String,
    },
    /// QEMU runs without its keeper: nothing would end it when its lease runs out.
    #[error("QEMU of VM {vm} runs without a keeper, as process {pid}: end it with kill -KILL {pid}")]
    NotKept {
        /// Which VM.
        vm: VmId,
        /// QEMU's process.
        pid: u32,
    },
    /// The VM's lease could not be read or changed.
    #[error("{operation} the lease of VM {vm}")]
    Lease {
        /// Which VM.
        vm: VmId,
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: DeadlineFileError,
    },
    /// QEMU ended before it was ready.
    #[error("QEMU of VM {vm} did not start ({status}): {log_tail}")]
    StartFailed {
        /// Which VM.
        vm: VmId,
        /// How it ended.
        status: String,
        /// What it said.
        log_tail: String,
    },
    /// Something did not happen in time.
    #[error("{operation} of VM {vm} not done within {:.0} s", deadline.as_secs_f64())]
    Deadline {
        /// Which VM.
        vm: VmId,
        /// What.
        operation: &'static str,
        /// The time it had.
        deadline: Duration,
    },
    /// QEMU ended while something was awaited.
    #[error("QEMU of VM {vm} ended during {operation}")]
    Ended {
        /// Which VM.
        vm: VmId,
        /// What was awaited.
        operation: &'static str,
    },
    /// A mirror ended, or never began, for a reason.
    #[error("mirror of disk {disk} failed: {reason}")]
    Mirror {
        /// Which disk.
        disk: String,
        /// QEMU's words.
        reason: String,
    },
    /// The guest wrote more than the scratch space holds, or that failed: the frozen point is lost, the guest's writes are not.
    #[error("frozen point of disk {disk} broke: its scratch space is full or failed")]
    PointBroken {
        /// Which disk.
        disk: String,
    },
    /// The disks of this VM are frozen already.
    #[error("disks of VM {vm} are frozen already")]
    AlreadyFrozen {
        /// Which VM.
        vm: VmId,
    },
    /// The frozen point has been released.
    #[error("disks of VM {vm} are no longer frozen")]
    NotFrozen {
        /// Which VM.
        vm: VmId,
    },
    /// The VM has no such disk.
    #[error("VM {vm} has no disk {disk}")]
    NoDisk {
        /// Which VM.
        vm: VmId,
        /// Which disk.
        disk: String,
    },
    /// There is no place for a disk.
    #[error(
        "this QEMU of VM {vm} has no place for disk {disk}: it was started by a version without such places, or its machine type ({machine:?}) takes no disks \
         while it runs; the disk is there once the VM was stopped and started"
    )]
    NoPlace {
        /// Which VM.
        vm: VmId,
        /// Which disk.
        disk: String,
        /// As defined; empty: the default.
        machine: String,
    },
    /// A disk that is being copied cannot change.
    #[error("disk {disk} is being copied; it changes when that has ended")]
    DiskBusy {
        /// Which disk.
        disk: String,
        /// QEMU's words.
        #[source]
        source: Box<HypervisorError>,
    },
    /// A bitmap that is needed is not there, or not usable.
    #[error("bitmap {bitmap} of disk {disk} is not there or not usable")]
    NoBitmap {
        /// Which disk.
        disk: String,
        /// Which bitmap.
        bitmap: String,
    },
    /// A migration ended in another state than was awaited.
    #[error("migration of VM {vm} is {status:?}: {reason}")]
    Migration {
        /// Which VM.
        vm: VmId,
        /// The state.
        status: MigrationStatus,
        /// QEMU's words.
        reason: String,
    },
    /// A file or process of the VM could not be handled.
    #[error("{operation} {}", path.display())]
    File {
        /// What was done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A command to QEMU failed.
    #[error("command to QEMU failed")]
    Qmp(#[from] QmpError),
}
