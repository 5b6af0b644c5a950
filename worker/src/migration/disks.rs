//! How the disks of a migration come to the destination: from its standing replica, or by comparing them whole.

use std::sync::Arc;
use std::time::Duration;

use crate::hypervisor::Vm;
use crate::node::Node;
use crate::replica::cap::Cap;
use crate::replica::copy::{CopyError, CopyProgress, DiskCopies};
use crate::replication::moving::{MovingDisks, MovingError};
use crate::transport::PeerConnection;

use pageport_proto::v1::{MigrationAssignment, VmSpec};

/// Why the disks did not follow.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// They were compared.
    #[error(transparent)]
    Compared(#[from] CopyError),
    /// They were to go on from the standing replica.
    #[error(transparent)]
    Standing(#[from] MovingError),
}

/// The disks of a migration under way.
#[derive(Debug)]
pub enum Disks {
    /// The replica has no recovery point: mirrored whole, and compared.
    Compared(DiskCopies),
    /// Only what is newer than the replica's newest recovery point.
    Standing(Box<MovingDisks>),
}

impl Disks {
    /// Begins, from the standing replica where there is one, over the connection that memory will move over. What is sent is taken from `cap`.
    ///
    /// # Errors
    /// Nothing is left running.
    pub async fn start(
        node: &Node,
        qemu: &Vm,
        spec: &VmSpec,
        connection: &PeerConnection,
        order: &MigrationAssignment,
        cap: Arc<Cap>,
    ) -> Result<Self, DisksError> {
        let (peer, address, id) = (&order.peer_worker, &order.peer_address, &order.migration_id);
        if !spec.disks.is_empty()
            && let Some(moving) =
                MovingDisks::start(node, qemu, spec, connection.clone(), peer, id, cap.clone()).await?
        {
            return Ok(Self::Standing(Box::new(moving)));
        }
        Ok(Self::Compared(DiskCopies::start(node, qemu, spec, peer, address, id, cap).await?))
    }

    /// Waits until the replicas keep up with the disks, or will before memory has moved.
    ///
    /// # Errors
    /// A copy ended, or it took too long.
    pub async fn wait_ready(&mut self, limit: Duration, progress: impl FnMut(CopyProgress)) -> Result<(), DisksError> {
        match self {
            Self::Compared(copies) => Ok(copies.wait_ready(limit, progress).await?),
            Self::Standing(moving) => Ok(moving.wait_ready(limit, progress).await?),
        }
    }

    /// What the guest has written and the replicas do not have yet, in bytes.
    ///
    /// # Errors
    /// A mirror ended.
    pub async fn lag_bytes(&self) -> Result<u64, DisksError> {
        match self {
            Self::Compared(copies) => Ok(copies.lag_bytes().await?),
            Self::Standing(moving) => Ok(moving.lag_bytes().await?),
        }
    }

    /// What was written before the migration and is still to be copied, in bytes.
    ///
    /// # Errors
    /// The copy has failed.
    pub fn last_increment_bytes(&self) -> Result<u64, DisksError> {
        match self {
            Self::Compared(_) => Ok(0),
            Self::Standing(moving) => Ok(moving.last_increment_bytes()?),
        }
    }

    /// Once ready and with the guest stopped: the last writes, on stable storage.
    ///
    /// # Errors
    /// A copy failed.
    pub async fn finish(&mut self) -> Result<(), DisksError> {
        match self {
            Self::Compared(copies) => Ok(copies.finish().await?),
            Self::Standing(moving) => Ok(moving.finish().await?),
        }
    }

    /// Ends everything at once.
    pub async fn cancel(&mut self) {
        match self {
            Self::Compared(copies) => copies.cancel().await,
            Self::Standing(moving) => moving.cancel().await,
        }
    }

    /// Bytes that the transport sent for disks.
    pub fn wan_bytes(&self) -> u64 {
        match self {
            Self::Compared(copies) => copies.wan_bytes(),
            Self::Standing(moving) => moving.wan_bytes(),
        }
    }

    /// Of them those that the connection of memory counts too.
    pub fn shared_bytes(&self) -> u64 {
        match self {
            Self::Compared(_) => 0,
            Self::Standing(moving) => moving.shared_bytes(),
        }
    }
}
