//! Phase `load`: the hypervisor has it all and the replica is on stable storage; this side vouches for its image.

use std::time::Duration;

use pageport_ownership::{Epoch, Guest};
use pageport_proto::v1::{MigrationHello, Ready, StreamEnd, to_source};

use super::admit::Admitted;
use super::{Arrival, DestinationError};
use crate::hypervisor::MigrationStatus;
use crate::replication::mark::{Mark, lineage_of};
use crate::vms::ManagedVm;

/// From the last byte written until the hypervisor has taken it all.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// The guest stands still meanwhile, unless the lease is there already, as it should be.
const LEASE_LIMIT: Duration = Duration::from_secs(5);

impl Arrival {
    pub(super) async fn load(
        &mut self,
        admitted: &Admitted,
        hello: &MigrationHello,
        end: &StreamEnd,
    ) -> Result<(), DestinationError> {
        let Admitted { vm, epoch, qemu, disks, .. } = admitted;
        qemu.wait_migration(MigrationStatus::Completed, LOAD_LIMIT).await?;
        for disk in disks {
            let disk = disk.clone();
            let name = disk.to_string();
            let flushed = tokio::task::spawn_blocking(move || disk.flush()).await.map_err(std::io::Error::other);
            flushed.and_then(|flushed| flushed).map_err(|source| DestinationError::Sync { disk: name, source })?;
        }
        admitted.mark_the_way_back(hello).await;
        self.wait_for_lease(vm, *epoch).await?;
        let record = vm.loaded(qemu, *epoch).await?;
        if vm.status().volatile.guest != Guest::Loaded(*epoch) {
            return Err(DestinationError::NotPermitted { record });
        }
        self.say(to_source::Kind::Ready(Ready { epoch: epoch.raw(), digest: end.digest.clone() }));
        Ok(())
    }

    /// A guest that fences itself could not run here without a lease: better found out before the source lets go.
    async fn wait_for_lease(&self, vm: &ManagedVm, epoch: Epoch) -> Result<(), DestinationError> {
        let limit = LEASE_LIMIT;
        let mut status = vm.watch();
        self.node.lease_wanted.notify_one();
        let leased = status.wait_for(|now| now.volatile.standing.permits(epoch));
        let leased = tokio::time::timeout(limit, leased).await;
        leased.map(drop).map_err(|_| DestinationError::TooLong { what: "the lease for a vm that fences itself", limit })
    }
}

impl Admitted {
    /// From its first instruction here on it is noted what the guest writes: the source keeps the disks as they are now, and
    /// replication back to it begins with that.
    async fn mark_the_way_back(&self, hello: &MigrationHello) {
        let Ok(migration) = hello.migration_id.parse() else { return };
        let mark = Mark { worker: hello.source_worker.clone(), lineage: lineage_of(migration), point: 1 };
        if let Err(error) = self.qemu.add_bitmap(&self.names, &mark.to_string()).await {
            // Replication compares the disks then.
            tracing::warn!(error = %crate::error::with_causes(&error), "the way back is not marked");
        }
    }
}
