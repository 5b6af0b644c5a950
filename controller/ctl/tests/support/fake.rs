//! [`Fake`]: every service that the command talks to, answering by a [`Script`] that the test writes. Holds no fleet of its own.

mod fleet;
mod host;
mod membership;
mod migration;
mod replication;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_server::FleetServiceServer;
use pageport_proto::v1::host_service_server::HostServiceServer;
use pageport_proto::v1::membership_service_server::MembershipServiceServer;
use pageport_proto::v1::migration_service_server::MigrationServiceServer;
use pageport_proto::v1::replication_service_server::ReplicationServiceServer;
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Response, Status};

use super::authority::Authority;

/// What the watch of a migration yields, update by update.
#[derive(Clone)]
pub enum Step {
    Update(Box<v1::Migration>),
    /// The controller goes away.
    Lose,
    /// Says nothing more.
    Hang,
}

impl Step {
    pub fn update(migration: v1::Migration) -> Self {
        Self::Update(Box::new(migration))
    }
}

/// What the fakes answer, and what they were asked.
#[derive(Default)]
pub struct Script {
    pub vms: Vec<v1::Vm>,
    pub found: Vec<v1::FoundVm>,
    pub workers: Vec<v1::Worker>,
    /// The next commands fail with these first.
    pub failures: VecDeque<Status>,
    pub request_ids: Vec<String>,
    pub defined: Vec<v1::VmSpec>,
    /// One list of steps per watch; each watch takes the next.
    pub watches: VecDeque<Vec<Step>>,
    pub fleets: VecDeque<Vec<v1::WatchFleetResponse>>,
    /// One list per order to fence; each order takes the next.
    pub fences: VecDeque<Vec<v1::FenceWorkerResponse>>,
    pub fenced: Vec<v1::FenceWorkerRequest>,
    pub protected: Vec<v1::ProtectVmRequest>,
    pub resized: Vec<v1::ResizeDiskRequest>,
    pub added: Vec<v1::AddDiskRequest>,
    pub points: Vec<v1::RecoveryPoint>,
    pub exports: Vec<v1::PointExport>,
    pub opened: Vec<v1::OpenPointRequest>,
    pub closed: Vec<v1::ClosePointRequest>,
    pub links: Vec<v1::Link>,
    /// One list of parts per stream of a backup, which then breaks unless all are there.
    pub backups: VecDeque<Vec<v1::BackupResponse>>,
}

#[derive(Clone, Default)]
pub struct Fake(pub Arc<Mutex<Script>>);

/// A server with a runtime of its own, so that dropping it takes its connections along, as a crash does.
pub struct Running {
    pub address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Fake {
    pub fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    fn fail(&self) -> Result<(), Status> {
        self.script().failures.pop_front().map_or(Ok(()), Err)
    }

    fn command(&self, request_id: &str) -> Result<(), Status> {
        self.script().request_ids.push(request_id.to_owned());
        self.fail()
    }

    fn vm(&self, name: &str) -> Result<v1::Vm, Status> {
        let is_it = |vm: &&v1::Vm| vm.id == name || vm.spec.as_ref().is_some_and(|spec| spec.name == name);
        let found = self.script().vms.iter().find(is_it).cloned();
        found.ok_or_else(|| Status::not_found(format!("there is no VM \"{name}\"")))
    }

    pub async fn serve(&self, authority: &Authority, name: &str) -> Running {
        self.serve_at(authority, name, "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn serve_at(&self, authority: &Authority, name: &str, address: SocketAddr) -> Running {
        let listener = TcpListener::bind(address).await.unwrap().into_std().unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder()
            .tls_config(authority.server(name))
            .unwrap()
            .add_service(FleetServiceServer::new(self.clone()))
            .add_service(MigrationServiceServer::new(self.clone()))
            .add_service(ReplicationServiceServer::new(self.clone()))
            .add_service(MembershipServiceServer::new(self.clone()))
            .add_service(HostServiceServer::new(self.clone()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Running { address, runtime: Some(runtime) }
    }
}

pub fn vm(name: &str) -> v1::Vm {
    v1::Vm {
        id: format!("id-{name}"),
        spec: Some(v1::VmSpec { name: name.into(), memory_bytes: 2 << 30, vcpus: 2, ..Default::default() }),
        owner_site: "a".into(),
        owner_worker: "worker-a".into(),
        state: v1::VmState::Running.into(),
        desired_running: true,
        ..Default::default()
    }
}

type Reply<T> = Result<Response<T>, Status>;
type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
