//! [`Lab`]: a cluster with workers at `a` and at `b`, and what tests have it do with VMs and moves.

use pageport_controller::config::LogLimits;
use pageport_proto::v1::{self, ReplicaState, VmState};
use tonic::Status;

use super::{Cluster, eventually, request_id, worker};

pub struct Lab {
    pub cluster: Cluster,
    pub board: worker::Shared,
    /// Who is asked: at first one that does not lead.
    pub node: u64,
}

impl Lab {
    /// Both workers are connected.
    pub async fn start() -> Self {
        let cluster = Cluster::start(LogLimits::default()).await;
        let board = worker::Shared::default();
        worker::start(&cluster, "worker-a", "a", &board);
        worker::start(&cluster, "worker-b", "b", &board);
        let node = cluster.a_follower().await;
        cluster.both_sites(node).await;
        Self { cluster, board, node }
    }

    /// Defines a VM, starts it, and waits until it runs.
    pub async fn run(&self, order: v1::DefineVmRequest) {
        let name = order.spec.as_ref().unwrap().name.clone();
        self.cluster.fleet(self.node).define_vm(order).await.unwrap();
        let start = v1::StartVmRequest { request_id: request_id(), vm: name.clone() };
        self.cluster.fleet(self.node).start_vm(start).await.unwrap();
        self.vm_until(&name, |vm| vm.state() == VmState::Running).await;
    }

    /// Copies a VM's disks, and waits until they are there.
    pub async fn seed(&self, vm: &str, site: &str) {
        let order = v1::SeedReplicaRequest { request_id: request_id(), vm: vm.into(), to_site: site.into() };
        self.cluster.replication(self.node).seed_replica(order).await.unwrap();
        self.vm_until(vm, |vm| is_seeded_at(vm, site)).await;
    }

    pub async fn vm_until(&self, name: &str, wanted: impl Fn(&v1::Vm) -> bool) -> v1::Vm {
        eventually("the VM to get there", async || {
            let answer = self.cluster.fleet(self.node).get_vm(v1::GetVmRequest { vm: name.into() }).await.ok()?;
            answer.into_inner().vm.filter(|vm| wanted(vm))
        })
        .await
    }

    /// Orders a move, under a request id of its own.
    pub async fn migrate(&self, order: v1::CreateMigrationRequest) -> Result<v1::Migration, Status> {
        let order = v1::CreateMigrationRequest { request_id: request_id(), ..order };
        let answer = self.cluster.migration(self.node).create_migration(order).await?;
        Ok(answer.into_inner().migration.unwrap())
    }

    pub async fn cancel(&self, id: &str) -> Result<v1::Migration, Status> {
        let order = v1::CancelMigrationRequest { request_id: request_id(), id: id.to_owned() };
        let answer = self.cluster.migration(self.node).cancel_migration(order).await?;
        Ok(answer.into_inner().migration.unwrap())
    }

    pub async fn migration_until(&self, id: &str, wanted: impl Fn(&v1::Migration) -> bool) -> v1::Migration {
        eventually("the migration to get there", async || {
            let request = v1::GetMigrationRequest { id: id.into() };
            let answer = self.cluster.migration(self.node).get_migration(request).await.ok()?;
            answer.into_inner().migration.filter(|migration| wanted(migration))
        })
        .await
    }
}

pub fn is_seeded_at(vm: &v1::Vm, site: &str) -> bool {
    vm.replicas.iter().any(|replica| replica.site == site && replica.state() == ReplicaState::Seeded)
}

/// An order to move a VM, without terms.
pub fn order(vm: &str, site: &str) -> v1::CreateMigrationRequest {
    v1::CreateMigrationRequest { vm: vm.into(), to_site: site.into(), ..Default::default() }
}
