//! Brings the disks of a running VM in line with its definition: each is there, and as large as was ordered.
//!
//! ```text
//!   definition, hypervisor ─▶ in line already? ─no─▶ turn (a round of replication makes room, a move does not) ─▶ make, attach, grow
//! ```
//! Guarantees: level-triggered, so an order that was interrupted is carried out later; nothing changes while a recovery point is taken or the VM
//! moves. Does not change the disks of a VM that does not run: see [`super::managed`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_proto::v1::{DiskSpec, VmSpec};
use tokio_util::task::AbortOnDropHandle;

use super::{ManagedVm, VmError};
use crate::hypervisor::{AddedDisk, HypervisorError, Vm};
use crate::node::Node;
use crate::replica::store::ReplicaError;
use crate::replica::store::device::must_fit;

/// What failed is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Why the disks are not as they should be yet.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The image of a disk that was added.
    #[error(transparent)]
    Image(#[from] ReplicaError),
    /// A disk that was added does not get into the hypervisor.
    #[error("attach disk {disk:?}")]
    Attach {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: HypervisorError,
    },
    /// A disk on a block device that is larger than was ordered.
    #[error(
        "disk {disk:?} lies on the block device {}, of which it can only get all {device_bytes} bytes under the guest: order that size, or stop and start the vm for {size_bytes} bytes",
        device.display()
    )]
    OnDevice {
        /// The disk.
        disk: String,
        /// The device.
        device: PathBuf,
        /// The device's size.
        device_bytes: u64,
        /// What was ordered.
        size_bytes: u64,
    },
    /// A disk does not grow.
    #[error("make disk {disk:?} {size_bytes} bytes large")]
    Grow {
        /// The disk.
        disk: String,
        /// What was ordered.
        size_bytes: u64,
        /// Why.
        #[source]
        source: HypervisorError,
    },
}

/// What has been brought in line: these disks, of the hypervisor with this process number.
type Done = (Vec<DiskSpec>, u32);

/// Follows the disks of one VM.
#[derive(Debug, Default)]
pub struct DisksInLine {
    done: Option<Done>,
    under_way: Option<AbortOnDropHandle<Result<Done, DisksError>>>,
    failed: Option<Instant>,
}

impl DisksInLine {
    /// Looks once, and does what is to be done in a task of its own.
    pub async fn follow(&mut self, node: &Arc<Node>, vm: &Arc<ManagedVm>, spec: &VmSpec) {
        if self.under_way.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Some(task) = self.under_way.take() {
            self.ended(vm, task.await);
        }
        // A disk that was added has a size, too.
        let ordered = spec.disks.iter().any(|disk| disk.size_bytes > 0);
        let waits = self.failed.is_some_and(|failed| failed.elapsed() < RETRY_PAUSE);
        if !ordered || waits || !vm.owns_and_runs() {
            return;
        }
        let Ok(qemu) = vm.qemu().await else { return };
        if self.done.as_ref().is_some_and(|(disks, pid)| *disks == spec.disks && *pid == qemu.pid()) {
            return;
        }
        let change = bring_in_line(node.clone(), vm.clone(), spec.clone());
        self.under_way = Some(AbortOnDropHandle::new(tokio::spawn(change)));
    }

    fn ended(&mut self, vm: &ManagedVm, outcome: Result<Result<Done, DisksError>, tokio::task::JoinError>) {
        match outcome {
            Ok(Ok(done)) => {
                self.done = Some(done);
                if self.failed.take().is_some() {
                    vm.set_problem(String::new());
                }
            }
            Ok(Err(error)) => {
                let problem = crate::error::with_causes(&error);
                tracing::warn!(vm_id = %vm.id(), problem, "the vm's disks are not as they should be");
                vm.set_problem(problem);
                self.failed = Some(Instant::now());
            }
            Err(error) => {
                tracing::error!(vm_id = %vm.id(), %error, "the task that changes the vm's disks ended");
                self.failed = Some(Instant::now());
            }
        }
    }
}

async fn bring_in_line(node: Arc<Node>, vm: Arc<ManagedVm>, spec: VmSpec) -> Result<Done, DisksError> {
    let turn = node.replications.turn(vm.id());
    let _turn = turn.take_for_migration().await;
    // Only now: the VM may have moved meanwhile.
    let qemu = vm.qemu().await?;
    if !vm.owns_and_runs() {
        return Err(VmError::NotHere { vm: vm.id() }.into());
    }
    let plugged = qemu.plugged_disks().await.map_err(VmError::from)?;
    // In their order, so that those that are open are always the first so many.
    for disk in spec.disks.iter().filter(|disk| !plugged.contains(&disk.name)) {
        attach(&vm, &qemu, disk, &spec.machine).await?;
    }
    for disk in &spec.disks {
        grow(&vm, &qemu, disk).await?;
    }
    Ok((spec.disks, qemu.pid()))
}

/// Makes a disk larger, if it is smaller than ordered. On a block device what is new becomes zeros first, and the size is recorded: whatever becomes of the
/// hypervisor then, what its guest writes there stays.
async fn grow(vm: &ManagedVm, qemu: &Vm, disk: &DiskSpec) -> Result<(), DisksError> {
    let DiskSpec { name, size_bytes, .. } = disk;
    let failed = |source| DisksError::Grow { disk: name.clone(), size_bytes: *size_bytes, source };
    if qemu.disk_bytes(name).await.map_err(failed)? >= *size_bytes {
        return Ok(());
    }
    let Some(device) = device_of(vm, name)? else { return qemu.grow_disk(name, *size_bytes).await.map_err(failed) };
    let device_bytes = tokio::task::block_in_place(|| must_fit(&device, *size_bytes))?;
    if device_bytes > *size_bytes {
        return Err(DisksError::OnDevice { disk: name.clone(), device, device_bytes, size_bytes: *size_bytes });
    }
    tokio::task::block_in_place(|| vm.replicas().grow_on_device(vm.id(), name, *size_bytes))?;
    qemu.grow_disk_to_device(name, device_bytes).await.map_err(failed)
}

/// The block device that a disk lies on.
fn device_of(vm: &ManagedVm, disk: &str) -> Result<Option<PathBuf>, ReplicaError> {
    let location = tokio::task::block_in_place(|| vm.replicas().locate(vm.id(), disk))?;
    Ok(location.filter(|location| location.size_bytes.is_some()).map(|location| location.path))
}

async fn attach(vm: &ManagedVm, qemu: &Vm, disk: &DiskSpec, machine: &str) -> Result<(), DisksError> {
    let image = tokio::task::block_in_place(|| vm.make_image(disk)?.image().map_err(ReplicaError::from))?;
    let added = AddedDisk { name: disk.name.clone(), port: disk.port, machine: machine.to_owned() };
    let attached = qemu.attach_disk(&added, &image).await;
    attached.map(drop).map_err(|source| DisksError::Attach { disk: disk.name.clone(), source })
}
