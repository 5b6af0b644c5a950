//! Phase `admit`: asks the controllers whether the VM may come, and starts a hypervisor that waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_ownership::{Epoch, Event, Guest, Nonce};
use pageport_proto::VmId;
use pageport_proto::v1::{AskAuthorisationRequest, MigrationHello, ReplicationDisk, VmSpec};

use super::memory::check_memory;
use super::{Arrival, DestinationError};
use crate::agent::controllers::ControllerError;
use crate::hypervisor::Vm;
use crate::hypervisor::accel::refuse_live_move;
use crate::replica::points::MAX_DISK_BYTES;
use crate::replica::store::ReplicaDisk;
use crate::vms::ManagedVm;

/// How long the controllers may have no leader before a move is refused: an election takes seconds.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Between two rounds of questions.
const ASK_PAUSE: Duration = Duration::from_millis(500);

/// A move that was admitted.
pub(super) struct Admitted {
    pub(super) vm: Arc<ManagedVm>,
    pub(super) epoch: Epoch,
    pub(super) qemu: Vm,
    pub(super) names: Vec<String>,
    pub(super) disks: Vec<Arc<ReplicaDisk>>,
}

impl Arrival {
    pub(super) async fn admit(&mut self, hello: &MigrationHello) -> Result<Admitted, DestinationError> {
        let request = |what| DestinationError::Request { what };
        let id: VmId = hello.vm_id.parse().map_err(|_| request("the vm's id is none"))?;
        let epoch = Epoch::from_raw(hello.epoch);
        if let Some(reason) = refuse_live_move(self.node.qemu_version, self.node.hypervisor.accelerator) {
            return Err(DestinationError::Hypervisor { reason });
        }
        let vm = self.node.vms.get_or_create(id)?;
        let mut spec = self.authorised(&vm, hello).await?;
        // Its source has called before and was restarted since: what came then will never be whole.
        if vm.drop_unfinished_image().await? {
            spec = self.authorised(&vm, hello).await?;
        }
        let status = vm.status();
        let admissible = status.volatile.authorised == Some(epoch) && status.volatile.guest == Guest::Absent;
        if !admissible {
            return Err(DestinationError::NotPermitted { record: status.record });
        }
        check_memory(spec.memory_bytes)?;
        // The definition comes from the controllers, not from the peer.
        vm.set_spec(&spec).await?;
        self.node.lease_wanted.notify_one();
        self.grow_replicas(id, hello)?;
        let qemu = vm.load_image(&spec).await?;
        let prepared = async {
            let disks = self.replica_disks(id, &spec)?;
            qemu.listen_incoming(&qemu.paths().incoming()).await?;
            Ok(disks)
        };
        match prepared.await {
            Ok(disks) => {
                let names = spec.disks.iter().map(|disk| disk.name.clone()).collect();
                Ok(Admitted { vm, epoch, qemu, names, disks })
            }
            Err(error) => {
                vm.drop_image(&qemu).await?;
                Err(error)
            }
        }
    }

    async fn authorised(&self, vm: &Arc<ManagedVm>, hello: &MigrationHello) -> Result<VmSpec, DestinationError> {
        let nonce = rand::random();
        vm.step(Event::Asked(Nonce(nonce))).await?;
        let question = AskAuthorisationRequest {
            worker: self.node.config.name.to_string(),
            vm_id: hello.vm_id.clone(),
            migration_id: hello.migration_id.clone(),
            epoch: hello.epoch,
            nonce,
            store_id: self.node.store.id.to_string(),
        };
        let give_up = Instant::now() + ASK_LIMIT;
        let answer = loop {
            match self.node.controllers.ask_authorisation(question.clone()).await {
                Err(error @ ControllerError::NoLeader { .. }) if Instant::now() < give_up => {
                    tracing::info!(error = %crate::error::with_causes(&error), "the question is asked again");
                    tokio::time::sleep(ASK_PAUSE).await;
                }
                answer => break answer?,
            }
        };
        if !answer.authorised {
            return Err(DestinationError::NotAuthorised { reason: answer.reason });
        }
        let epoch = Epoch::from_raw(hello.epoch);
        vm.step(Event::AuthReply { nonce: Nonce(answer.nonce), epoch }).await?;
        answer.spec.ok_or(DestinationError::Request { what: "the controllers sent no definition" })
    }

    /// The hypervisor must find the replicas as large as the disks are: it does not look again. What becomes of a move that breaks off is cut
    /// to its newest recovery point.
    fn grow_replicas(&self, vm: VmId, hello: &MigrationHello) -> Result<(), DestinationError> {
        tokio::task::block_in_place(|| {
            for ReplicationDisk { name, size_bytes, .. } in &hello.disks {
                if *size_bytes > MAX_DISK_BYTES {
                    return Err(DestinationError::Request { what: "a disk is too large" });
                }
                let replica = self.node.replicas.open_existing(vm, name)?;
                replica.must_not_shrink(*size_bytes)?;
                let grown = replica.grow(*size_bytes);
                grown.map_err(|source| DestinationError::Grow { disk: replica.to_string(), source })?;
            }
            Ok(())
        })
    }

    /// The replicas, opened as the disk sessions will find them.
    fn replica_disks(&self, vm: VmId, spec: &VmSpec) -> Result<Vec<Arc<ReplicaDisk>>, DestinationError> {
        let replicas = self.node.replicas.clone();
        let names: Vec<String> = spec.disks.iter().map(|disk| disk.name.clone()).collect();
        tokio::task::block_in_place(|| {
            let open = |name: &String| Ok(replicas.open_existing(vm, name)?);
            names.iter().map(open).collect()
        })
    }
}
