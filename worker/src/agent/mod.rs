//! The worker's daemon: brings this host in line with what the controllers assign, and reports what is.
//!
//! ```text
//!   link ──assignment──▶ watch ─▶ one task per VM (vms::converge)
//!     ▲                    └────▶ dispatch: starts and cancels migrations, seeds, removals
//!     └──report── everything that this host knows, on each change and as a heartbeat
//! ```
//! - [`controllers`]: finds the leader and asks it.
//! - [`link`]: the stream of reports and assignments.
//! - [`lease`]: keeps the lease of VMs that fence themselves.
//! - [`dispatch`]: from an assignment to tasks.
//! - [`peers`]: what other workers ask of this one.
//! - [`console`]: what operators ask of this one. [`drills`]: of it, recovery points that are to be read.

pub mod console;
pub mod controllers;
pub mod dispatch;
pub mod drills;
pub mod lease;
pub mod link;
pub mod peers;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use pageport_common::store::Store;
use pageport_common::tls::Identity;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use self::controllers::Controllers;
use crate::clock;
use crate::config::{AcceleratorChoice, Config};
use crate::drill::export::Grounds;
use crate::drill::exports::Exports;
use crate::generation::Joined;
use crate::hypervisor::offer::Offers;
use crate::hypervisor::{self, Accelerator, accel};
use crate::memory::KeptMemory;
use crate::migration::registry::Registry;
use crate::node::Node;
use crate::pool::Pools;
use crate::questions::Questions;
use crate::quote::Quotes;
use crate::replica::cap::Caps;
use crate::replica::flatten::Flattenings;
use crate::replica::groups::Groups;
use crate::replica::points::Limits;
use crate::replica::store::ReplicaStore;
use crate::replica::view::Views;
use crate::replication::registry::Replications;
use crate::replication::serve::Sessions;
use crate::store_identity::{StoreAge, StoreIdentity};
use crate::transport::PeerEndpoint;
use crate::vms::{Vms, managed};

/// Between two looks at what the pools hold.
const POOLS_INTERVAL: Duration = Duration::from_secs(2);
/// Tasks have this long to end when the worker stops; guests go on without it.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Runs the worker until `stop`.
///
/// # Errors
/// What kept it from starting; once started it goes on.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    clock::start();
    let (node, store) = start(config).await?;
    let node = Arc::new(node);
    node.vms.restore(node.store.age).await.context("take over the vms of an earlier worker")?;
    node.store.settle(&store)?;
    node.pools.begin()?;
    // Before the first report, which tells of them.
    tokio::task::block_in_place(|| node.replicas.look_at_pools());
    let owned = |vm| node.vms.get(vm).is_some_and(|vm| vm.status().record.owned().is_some());
    node.views.retain(owned).await;
    node.memory.retain(|vm| node.vms.get(vm).is_some() && !owned(vm));
    let (assignments, assigned) = watch::channel(None);
    let tasks = tokio_util::task::TaskTracker::new();
    tasks.spawn(stop.clone().run_until_cancelled_owned(link::run(node.clone(), assignments)));
    tasks.spawn(stop.clone().run_until_cancelled_owned(dispatch::run(node.clone(), assigned)));
    tasks.spawn(stop.clone().run_until_cancelled_owned(lease::run(node.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(peers::run(node.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(console::run(node.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(drills::restore(node.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(look_at_qemu(node.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(look_at_pools(node.clone())));
    tracing::info!(worker = %node.config.name, site = %node.config.site, accelerator = %node.hypervisor.accelerator, "worker runs");
    stop.cancelled().await;
    tasks.close();
    if tokio::time::timeout(STOP_LIMIT, tasks.wait()).await.is_err() {
        tracing::warn!("tasks did not end in time");
    }
    node.endpoint.close();
    Ok(())
}

/// So that no move waits for it.
async fn look_at_qemu(node: Arc<Node>) {
    if let Err(error) = node.offers.get(&node.hypervisor).await {
        tracing::warn!(error = %crate::error::with_causes(&error), "machine types and CPU models are not known");
    }
}

/// So that no report waits for a disk.
async fn look_at_pools(node: Arc<Node>) {
    loop {
        tokio::time::sleep(POOLS_INTERVAL).await;
        let replicas = node.replicas.clone();
        if tokio::task::spawn_blocking(move || replicas.look_at_pools()).await.is_err() {
            tracing::error!("the look at the pools broke off");
        }
    }
}

async fn start(config: Config) -> anyhow::Result<(Node, Arc<Store>)> {
    let identity = Identity::load(&config.tls)?;
    for folder in [&config.data_dir, &config.runtime_dir] {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let store = Arc::new(Store::open(&config.data_dir.join("store"))?);
    let identity_of_store = StoreIdentity::of(&store)?;
    if identity_of_store.age == StoreAge::New {
        tracing::info!(id = %identity_of_store.id, "the store is new");
    }
    let joined = Arc::new(Joined::of(store.clone())?);
    let qemu = config.hypervisor.qemu.clone();
    let keeper = hypervisor::keeper::locate(&config.hypervisor.keeper)?;
    let qemu_version = accel::qemu_version(&qemu).await?;
    let accelerator = match config.hypervisor.accelerator {
        AcceleratorChoice::Auto => accel::probe(&qemu, &config.runtime_dir).await?,
        AcceleratorChoice::Kvm => Accelerator::Kvm,
        AcceleratorChoice::Tcg => Accelerator::Tcg,
    };
    let (huge_pages, runtime_dir) = (config.hypervisor.huge_pages, config.runtime_dir.clone());
    let hypervisor = hypervisor::Host { qemu, keeper, accelerator, huge_pages, runtime_dir };
    let changed = Arc::new(Notify::new());
    let pools = Arc::new(Pools::new(store.clone(), identity_of_store.id, &config.pools, &config.scratch_pool)?);
    let devices = config.replication.devices.clone();
    let replicas = Arc::new(ReplicaStore::over(store.clone(), pools.clone()).allow(devices));
    let reserve_bytes = config.replication.reserve_bytes;
    let limits =
        Limits { points_bytes: config.replication.points_bytes, held_bytes: config.drill.held_bytes, reserve_bytes };
    let groups = Arc::new(Groups::over(store.clone(), pools.clone(), limits));
    let tool = config.hypervisor.qemu_img.clone();
    let flattenings = Arc::new(Flattenings::new(tool, reserve_bytes, changed.clone()));
    let vms = Vms::new(managed::Shared {
        store: store.clone(),
        joined: joined.clone(),
        hypervisor: hypervisor.clone(),
        replicas: replicas.clone(),
        groups: groups.clone(),
        flattenings: flattenings.clone(),
        changed: changed.clone(),
    });
    let grounds = Grounds {
        store: store.clone(),
        replicas: replicas.clone(),
        groups: groups.clone(),
        folder: config.runtime_dir.join("points"),
    };
    let node = Node {
        store: identity_of_store,
        records: store.clone(),
        endpoint: PeerEndpoint::bind(config.peer, &identity)?,
        controllers: Controllers::new(config.name.as_str(), identity, config.controllers.clone(), joined.clone()),
        joined,
        registry: Registry::new(changed.clone()),
        quotes: Quotes::new(changed.clone()),
        preflights: Questions::new(changed.clone()),
        pools,
        groups,
        flattenings,
        exports: Exports::new(grounds, changed.clone()),
        views: Views::new(&config.data_dir),
        memory: KeptMemory::new(&config.data_dir, config.keep_memory),
        caps: Caps::default(),
        replications: Replications::new(changed.clone()),
        sessions: Sessions::default(),
        hypervisor,
        qemu_version,
        offers: Offers::default(),
        replicas,
        vms,
        changed,
        lease_wanted: Notify::new(),
        config,
    };
    Ok((node, store))
}
