//! `disk resize | add`.

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;

use super::{Context, ask, request_id, required};
use crate::cli::DiskCommand;
use crate::error::CtlError;
use crate::render::units;
use crate::trace::Traced;

type Fleet = FleetServiceClient<Traced>;

pub async fn run(context: &mut Context, command: DiskCommand) -> Result<(), CtlError> {
    match command {
        DiskCommand::Resize { vm, disk, size } => {
            let request = v1::ResizeDiskRequest {
                request_id: request_id(),
                vm: vm.clone(),
                disk: disk.clone(),
                size_bytes: size.0,
            };
            let response = ask!(context, Fleet, resize_disk, request).await?;
            let changed = required(response.vm, "ResizeDisk", "vm")?;
            context.output.message(&changed, |_| format!("{vm}: disk {disk} becomes {}", units::bytes(size.0)))
        }
        DiskCommand::Add { vm, disk, size, path } => {
            let (request_id, path) = (request_id(), path.unwrap_or_default());
            let request =
                v1::AddDiskRequest { request_id, vm: vm.clone(), disk: disk.clone(), size_bytes: size.0, path };
            let response = ask!(context, Fleet, add_disk, request).await?;
            let changed = required(response.vm, "AddDisk", "vm")?;
            context.output.message(&changed, |_| format!("{vm}: gets disk {disk} of {}", units::bytes(size.0)))
        }
    }
}
