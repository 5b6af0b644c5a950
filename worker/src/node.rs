//! What the parts of one worker share: its identity, its stores, its ways to peers and controllers.

use std::sync::Arc;

use tokio::sync::Notify;

use crate::agent::controllers::Controllers;
use crate::config::Config;
use crate::hypervisor;
use crate::hypervisor::QemuVersion;
use crate::migration::registry::Registry;
use crate::replica::store::ReplicaStore;
use crate::replica::view::Views;
use crate::store_identity::StoreIdentity;
use crate::transport::PeerEndpoint;
use crate::vms::Vms;

/// One worker.
#[derive(Debug)]
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Which store its records are in.
    pub store: StoreIdentity,
    /// How QEMU is run here.
    pub hypervisor: hypervisor::Host,
    /// Which QEMU that is.
    pub qemu_version: QemuVersion,
    /// Disks and replicas.
    pub replicas: Arc<ReplicaStore>,
    /// What is known of replicas elsewhere.
    pub views: Views,
    /// The way to other workers.
    pub endpoint: PeerEndpoint,
    /// The way to the controllers.
    pub controllers: Controllers,
    /// The VMs.
    pub vms: Vms,
    /// Migrations and seeds under way.
    pub registry: Registry,
    /// Notified when a report would differ from the one before.
    pub changed: Arc<Notify>,
    /// Notified when a VM needs a lease now.
    pub lease_wanted: Notify,
}
