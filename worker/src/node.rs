//! What the parts of one worker share: its identity, its stores, its ways to peers and controllers.

use std::sync::Arc;

use pageport_common::store::Store;
use pageport_proto::v1::PreflightReport;
use tokio::sync::Notify;

use crate::agent::controllers::Controllers;
use crate::config::Config;
use crate::drill::exports::Exports;
use crate::generation::Joined;
use crate::hypervisor;
use crate::hypervisor::QemuVersion;
use crate::hypervisor::offer::Offers;
use crate::memory::KeptMemory;
use crate::migration::registry::Registry;
use crate::pool::Pools;
use crate::questions::Questions;
use crate::quote::Quotes;
use crate::replica::cap::Caps;
use crate::replica::flatten::Flattenings;
use crate::replica::groups::Groups;
use crate::replica::store::ReplicaStore;
use crate::replica::view::Views;
use crate::replication::registry::Replications;
use crate::replication::serve::Sessions;
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
    /// Which controllers are heard.
    pub joined: Arc<Joined>,
    /// That store.
    pub records: Arc<Store>,
    /// How QEMU is run here.
    pub hypervisor: hypervisor::Host,
    /// Which QEMU that is.
    pub qemu_version: QemuVersion,
    /// What that offers.
    pub offers: Offers,
    /// Where they, their recovery points and scratch lie.
    pub pools: Arc<Pools>,
    /// Disks and replicas.
    pub replicas: Arc<ReplicaStore>,
    /// Their recovery points.
    pub groups: Arc<Groups>,
    /// Images that become raw.
    pub flattenings: Arc<Flattenings>,
    /// Those that are open for reading.
    pub exports: Exports,
    /// What is known of replicas elsewhere.
    pub views: Views,
    /// Memory that is kept for the way back.
    pub memory: KeptMemory,
    /// What replication and seeds may send.
    pub caps: Caps,
    /// Replications whose source is here.
    pub replications: Replications,
    /// Replication sessions whose replica is here.
    pub sessions: Sessions,
    /// The way to other workers.
    pub endpoint: PeerEndpoint,
    /// The way to the controllers.
    pub controllers: Controllers,
    /// The VMs.
    pub vms: Vms,
    /// Migrations and seeds under way.
    pub registry: Registry,
    /// Forecasts of moves.
    pub quotes: Quotes,
    /// Looks at what would hinder moves.
    pub preflights: Questions<PreflightReport>,
    /// Notified when a report would differ from the one before.
    pub changed: Arc<Notify>,
    /// Notified when a VM needs a lease now.
    pub lease_wanted: Notify,
}
