//! What a VM leaves behind when it moves away: its memory and its disks, for the way back.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{Move, Order};
use crate::clock::unix_ms;
use crate::memory::arrived::Arrived;
use crate::memory::keeping::Keeping;
use crate::migration::outgoing::Outgoing;
use crate::replica::store::flattening::Adoption;
use crate::replication::mark::lineage_of;

impl Move {
    /// What the destination may have kept of the guest's memory.
    pub(super) fn kept(&self) -> Option<Arc<Arrived>> {
        self.order.node.memory.kept_by(self.order.vm.id(), &self.order.assignment.peer_worker)
    }

    /// Keeps what is sent, for the way back.
    pub(super) fn begin_keeping(&self) -> Option<Keeping> {
        let Order { node, vm, spec, assignment, .. } = &self.order;
        let migration = assignment.migration_id.parse().ok()?;
        tokio::task::block_in_place(|| node.memory.begin(vm.id(), migration, spec.memory_bytes))
    }

    /// The guest has gone: what was sent of its memory is kept.
    pub(super) async fn keep_memory(&mut self) {
        let Some(keeping) = self.outgoing.as_mut().and_then(Outgoing::take_kept) else { return };
        let kept = tokio::task::spawn_blocking(|| keeping.finish()).await;
        if !matches!(kept, Ok(Ok(()))) {
            tracing::warn!(?kept, "the guest's memory is not kept");
        }
    }

    /// What the disks here are: those that the guest went on with there.
    fn adoption(&self) -> Option<Adoption> {
        let migration = self.order.assignment.migration_id.parse().ok()?;
        let stopped = self.downtime_marks.first().map_or_else(Instant::now, |(_, at)| *at);
        let taken = SystemTime::now().checked_sub(stopped.elapsed()).unwrap_or(UNIX_EPOCH);
        Some(Adoption { lineage: lineage_of(migration), taken_unix_ms: unix_ms(taken) })
    }

    /// Are the disks here raw? If not, what they are is noted before they are left, for when they are.
    pub(super) fn is_flat(&self) -> bool {
        let (replicas, vm) = (&self.order.node.replicas, self.order.vm.id());
        let noted = tokio::task::block_in_place(|| {
            if replicas.unflattened(vm).is_empty() {
                return Ok(true);
            }
            self.adoption().map_or(Ok(()), |adoption| replicas.adopt_when_flat(vm, adoption)).map(|()| false)
        });
        noted.unwrap_or_else(|error| {
            // Replication compares the disks then.
            tracing::warn!(error = %crate::error::with_causes(&error), "the disks will be no recovery point");
            false
        })
    }

    /// Replication back begins with the disks as they are here.
    pub(super) fn keep_as_replica(&self) {
        let Some(Adoption { lineage, taken_unix_ms }) = self.adoption() else { return };
        let node = &self.order.node;
        let names: Vec<&str> = self.order.spec.disks.iter().map(|disk| disk.name.as_str()).collect();
        let kept = tokio::task::block_in_place(|| {
            node.groups.adopt(&node.replicas, self.order.vm.id(), &names, lineage, taken_unix_ms)
        });
        if let Err(error) = kept {
            // Replication compares the disks then.
            tracing::warn!(error = %crate::error::with_causes(&error), "the disks are no recovery point");
        }
    }
}
