//! Disks that change, or are added, while their VM is defined.
//!
//! What is ordered stands in the VM's definition, and its worker brings the disk in line with it, again and again until it is so. Replicas follow with their
//! next recovery point or move.
//!
//! A disk that was added is *lacking* in each replica until its owner says that a recovery point holds it, or a seed has ended. A VM does not move to a replica
//! that lacks a disk; if it is taken over there, the disk is made anew, empty, as it was when it was added.
//!
//! Guarantees: a disk never becomes smaller; nothing is ordered while a move or a seed is under way, which have begun with what was there.

use pageport_proto::{SiteName, VmId};

use super::apply::{not_migrating, vm_mut};
use super::command::{Answer, Outcome};
use super::rejection::Rejection;
use super::state::{Replica, ReplicaPhase, State, Vm};

/// What a disk's size is a multiple of, in bytes.
pub const SIZE_UNIT_BYTES: u64 = 4096;
/// The largest disk, in bytes: what the usual file systems hold in one file.
pub const MAX_DISK_BYTES: u64 = 8 << 40;

/// Orders that a disk has so many bytes.
pub(super) fn resize(state: &mut State, id: VmId, disk: &str, size_bytes: u64) -> Outcome {
    let vm = vm_mut(state, id)?;
    let name = || vm.spec.name.clone();
    let ordered_bytes = must_have(vm, disk)?;
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

/// The size that was ordered for a disk, which the VM must have, in bytes; 0: none was.
pub(super) fn must_have(vm: &Vm, disk: &str) -> Result<u64, Rejection> {
    let unknown = || {
        let known = vm.spec.disk_names().collect::<Vec<_>>().join(", ");
        Rejection::DiskUnknown { name: vm.spec.name.clone(), disk: disk.to_owned(), known }
    };
    vm.spec.ordered_bytes(disk).ok_or_else(unknown)
}

/// Orders one more disk. Replicas do not hold it before their next recovery point or seed.
pub(super) fn add(state: &mut State, id: VmId, disk: String, path: String, size_bytes: u64) -> Outcome {
    let vm = vm_mut(state, id)?;
    valid_size(size_bytes)?;
    not_migrating(vm)?;
    not_copied(vm)?;
    vm.spec.add_disk(disk.clone(), path, size_bytes).map_err(Rejection::Disk)?;
    for replica in vm.replicas.values_mut() {
        replica.lacks.insert(disk.clone());
    }
    Ok(Answer::Vm(id))
}

/// The owner has made the image of a disk.
pub(super) fn made(state: &mut State, id: VmId, disk: &str) {
    if let Some(vm) = state.vms.get_mut(&id) {
        vm.spec.disk_made(disk);
    }
}

/// A replica that is kept up to date holds the first so many disks now.
pub(super) fn held(state: &mut State, id: VmId, site: &SiteName, protect_seq: u64, disks: usize) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    let Vm { spec, replicas, .. } = vm;
    if let Some(replica) = replicas.get_mut(site).filter(|replica| replica.is_protected_by(protect_seq)) {
        for disk in spec.disk_names().take(disks) {
            replica.lacks.remove(disk);
        }
    }
}

/// Refuses a replica that does not hold all disks.
pub(super) fn has_all_disks(vm: &Vm, site: &SiteName, replica: &Replica) -> Result<(), Rejection> {
    match replica.lacks.first() {
        Some(disk) => {
            let (name, disk, site) = (vm.spec.name.clone(), disk.clone(), site.clone());
            Err(Rejection::LacksDisk { name, disk, site })
        }
        None => Ok(()),
    }
}

/// The VM goes on from a replica that may lack disks: they are empty there, as they were when they were added.
pub(super) fn make_what_is_lacking(vm: &mut Vm, replica: &Replica) {
    replica.lacks.iter().for_each(|disk| vm.spec.make_disk_anew(disk));
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
