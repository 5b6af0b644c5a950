//! Disks that change while their VM is defined.
//!
//! What is ordered stands in the VM's definition, and its worker brings the disk in line with it, again and again until it is so. Replicas follow with their
//! next recovery point or move.
//!
//! Guarantees: a disk never becomes smaller; nothing is ordered while a move or a seed is under way, which have begun with what was there.

use pageport_proto::VmId;

use super::apply::{not_migrating, vm_mut};
use super::command::{Answer, Outcome, Rejection};
use super::state::{ReplicaPhase, State, Vm};

/// What a disk's size is a multiple of, in bytes.
pub const SIZE_UNIT_BYTES: u64 = 4096;
/// The largest disk, in bytes: what the usual file systems hold in one file.
pub const MAX_DISK_BYTES: u64 = 8 << 40;

/// Orders that a disk has so many bytes.
pub(super) fn resize(state: &mut State, id: VmId, disk: &str, size_bytes: u64) -> Outcome {
    let vm = vm_mut(state, id)?;
    let name = || vm.spec.name.clone();
    let Some(ordered_bytes) = vm.spec.ordered_bytes(disk) else {
        let known = vm.spec.disk_names().collect::<Vec<_>>().join(", ");
        return Err(Rejection::DiskUnknown { name: name(), disk: disk.to_owned(), known });
    };
    valid_size(size_bytes)?;
    if size_bytes < ordered_bytes {
        return Err(Rejection::DiskShrinks {
            name: name(),
            disk: disk.to_owned(),
            size_bytes,
            held_bytes: ordered_bytes,
        });
    }
    not_migrating(vm)?;
    not_copied(vm)?;
    vm.spec.order_bytes(disk, size_bytes);
    Ok(Answer::Vm(id))
}

fn valid_size(size_bytes: u64) -> Result<(), Rejection> {
    let valid = size_bytes.is_multiple_of(SIZE_UNIT_BYTES) && (1..=MAX_DISK_BYTES).contains(&size_bytes);
    if valid { Ok(()) } else { Err(Rejection::DiskSize { size_bytes }) }
}

/// A seed copies what was there when it began. (Replication makes room by itself.)
fn not_copied(vm: &Vm) -> Result<(), Rejection> {
    let copied =
        vm.replicas.iter().find(|(_, replica)| replica.phase == ReplicaPhase::Seeding && replica.protection.is_none());
    match copied {
        Some((site, _)) => Err(Rejection::BeingSeeded { name: vm.spec.name.clone(), site: site.clone() }),
        None => Ok(()),
    }
}
