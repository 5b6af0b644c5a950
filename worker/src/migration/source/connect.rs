//! Phase `connect`: says to the destination what is to move, and looks whether it would go well.

use pageport_common::telemetry;
use pageport_proto::v1::{MigrationAssignment, MigrationHello, ReplicationDisk};

use super::{Move, Order, SourceError};
use crate::migration::control::Control;
use crate::preflight::{self, Way};
use crate::replica::copy::{CopyError, images};

impl Move {
    /// While the destination looks at itself its hypervisor starts; bytes move after both.
    pub(super) async fn connect(&mut self) -> Result<(), SourceError> {
        let Order { node, vm, spec, assignment, .. } = &self.order;
        let (node, vm, spec) = (node.clone(), vm.id(), spec.clone());
        let MigrationAssignment { peer_worker, peer_address, .. } = assignment.clone();
        let way = Way { vm, spec: &spec, peer_worker: &peer_worker, peer_address: &peer_address };
        let looked = async { Ok::<_, SourceError>(preflight::look(&node, way).await) };
        let ((), findings) = tokio::try_join!(self.greet(), looked)?;
        match preflight::hindrance(&findings) {
            Some(hindrance) => Err(SourceError::Preflight { hindrance }),
            None => {
                self.warnings = preflight::warnings(findings);
                Ok(())
            }
        }
    }

    async fn greet(&mut self) -> Result<(), SourceError> {
        if !self.order.vm.may_prepare(self.epoch) {
            return Err(SourceError::NotPermitted { record: self.order.vm.status().record });
        }
        let disks = self.disks_as_they_are().map_err(SourceError::Look)?;
        self.told.clone_from(&disks);
        let assignment = &self.order.assignment;
        let connection = self.order.node.endpoint.connect(&assignment.peer_worker, &assignment.peer_address).await?;
        let hello = MigrationHello {
            migration_id: assignment.migration_id.clone(),
            vm_id: assignment.vm_id.clone(),
            epoch: assignment.epoch,
            source_worker: self.order.node.config.name.to_string(),
            kept_from_migration: self
                .kept()
                .and_then(|kept| kept.migration())
                .map_or_else(String::new, |id| id.to_string()),
            disks,
        };
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        self.connection = Some(connection.clone());
        self.control = Some(Control::open(&connection, hello, &traceparent).await?);
        Ok(())
    }

    pub(super) fn disks_as_they_are(&self) -> Result<Vec<ReplicationDisk>, CopyError> {
        let Order { node, vm, spec, .. } = &self.order;
        // How much is allocated changes with every write.
        let image = |image| ReplicationDisk { allocated_bytes: 0, ..image };
        Ok(images(node, vm.id(), spec)?.into_iter().map(image).collect())
    }
}
