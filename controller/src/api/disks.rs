//! Orders about a VM's disks.

use pageport_proto::v1;

use super::error::ApiError;
use super::fleet::vm_of;
use super::{Api, Rehearsal, request_id};
use crate::model::Rejection;
use crate::model::command::ClientOrder;

impl Api {
    /// Has a disk made larger. Only its worker knows how large it is.
    ///
    /// # Errors
    /// It would become smaller, its size is not known, or as the model says.
    pub(super) async fn resize_disk(&self, request: v1::ResizeDiskRequest) -> Result<Option<v1::Vm>, ApiError> {
        let v1::ResizeDiskRequest { request_id: id, vm, disk, size_bytes } = request;
        let id = request_id(&id)?;
        let moment = self.read().await?;
        let (vm_id, vm) = moment.vm(&vm)?;
        let disk = super::echo(&disk);
        let order = ClientOrder::ResizeDisk { vm: vm_id, disk: disk.clone(), size_bytes };
        if self.rehearse(&moment, id, &order)? == Rehearsal::New {
            let (worker, name) = (vm.ownership.owner().0.clone(), || vm.spec.name.clone());
            let owner = moment.observations.connected(&worker, moment.now).ok_or(ApiError::WorkerLost { worker })?;
            let seen = owner.vm(vm_id).and_then(|report| report.disks.iter().find(|seen| seen.name == disk));
            let held_bytes = match seen {
                Some(seen) => seen.size_bytes,
                None => return Err(ApiError::DiskNotSeen { name: name(), disk }),
            };
            if size_bytes < held_bytes {
                return Err(Rejection::DiskShrinks { name: name(), disk, size_bytes, held_bytes }.into());
            }
        }
        let (_, after) = self.order(id, order).await?;
        Ok(vm_of(&after, vm_id))
    }

    /// Gives a VM one more disk.
    ///
    /// # Errors
    /// As the model says.
    pub(super) async fn add_disk(&self, request: v1::AddDiskRequest) -> Result<Option<v1::Vm>, ApiError> {
        let v1::AddDiskRequest { request_id: id, vm, disk, size_bytes, path } = request;
        let id = request_id(&id)?;
        let moment = self.read().await?;
        let (vm, _) = moment.vm(&vm)?;
        let (_, after) = self.order(id, ClientOrder::AddDisk { vm, disk, path, size_bytes }).await?;
        Ok(vm_of(&after, vm))
    }
}
