//! A small cluster in this process for the tests of the real binary: TLS identities and fakes of the services.
//!
//! The fakes answer by a script that the test writes; they hold no fleet of their own.

#![allow(dead_code, missing_docs, clippy::unwrap_used)] // each test file uses its part

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageport_proto::v1;
use pageport_proto::v1::fleet_service_server::{FleetService, FleetServiceServer};
use pageport_proto::v1::host_service_server::{HostService, HostServiceServer};
use pageport_proto::v1::membership_service_server::{MembershipService, MembershipServiceServer};
use pageport_proto::v1::migration_service_server::{MigrationService, MigrationServiceServer};
use pageport_proto::v1::replication_service_server::{ReplicationService, ReplicationServiceServer};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// Longer than any command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// One certificate authority in a folder of its own.
pub struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), &pem).unwrap();
        let authority = Self { folder, issuer: Issuer::new(params, key), pem };
        let (cert, key) = authority.issue("operator.pageport");
        std::fs::write(authority.path("operator.pem"), cert).unwrap();
        std::fs::write(authority.path("operator.key"), key).unwrap();
        authority
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Certificate and key for one name.
    pub fn issue(&self, name: &str) -> (String, String) {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn server(&self, name: &str) -> ServerTlsConfig {
        let (cert, key) = self.issue(name);
        ServerTlsConfig::new().identity(Identity::from_pem(cert, key)).client_ca_root(Certificate::from_pem(&self.pem))
    }
}

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

/// The binary, with an empty environment and the operator's identity.
pub fn pageportctl(authority: &Authority, controllers: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageportctl"));
    command
        .env_clear()
        .env("HOME", authority.folder.path())
        .env("PAGEPORT_CONTROLLERS", controllers)
        .env("PAGEPORT_CA", authority.path("ca.pem"))
        .env("PAGEPORT_CERT", authority.path("operator.pem"))
        .env("PAGEPORT_KEY", authority.path("operator.key"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// How a finished command ended.
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn lines(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The one error line.
    #[track_caller]
    pub fn error(&self) -> &str {
        assert_eq!(self.code, 1, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        errors[0]
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

pub async fn finish(mut command: Command) -> Ended {
    let output = tokio::time::timeout(COMMAND_DEADLINE, command.output()).await.expect("the command hangs").unwrap();
    ended(output)
}

pub fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub async fn run(authority: &Authority, controllers: &str, arguments: &[&str]) -> Ended {
    finish(pageportctl(authority, controllers, arguments)).await
}

pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
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

#[tonic::async_trait]
impl MembershipService for Fake {
    type AddMemberStream = Boxed<v1::AddMemberResponse>;
    type BackupStream = Boxed<v1::BackupResponse>;

    async fn transfer_leadership(
        &self,
        _: Request<v1::TransferLeadershipRequest>,
    ) -> Reply<v1::TransferLeadershipResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn add_member(&self, _: Request<v1::AddMemberRequest>) -> Reply<Self::AddMemberStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn remove_member(&self, _: Request<v1::RemoveMemberRequest>) -> Reply<v1::RemoveMemberResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn backup(&self, _: Request<v1::BackupRequest>) -> Reply<Self::BackupStream> {
        let parts = self.script().backups.pop_front().unwrap_or_default();
        let parts = parts.into_iter().map(Ok).chain([Err(Status::unavailable("the leader is gone"))]);
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }
}

#[tonic::async_trait]
impl FleetService for Fake {
    async fn list_sites(&self, _: Request<v1::ListSitesRequest>) -> Reply<v1::ListSitesResponse> {
        self.fail()?;
        let site = v1::Site { name: "a".into(), workers: vec!["worker-a".into()], vms_running: 1, reachable: true };
        Ok(Response::new(v1::ListSitesResponse { sites: vec![site] }))
    }

    async fn list_workers(&self, _: Request<v1::ListWorkersRequest>) -> Reply<v1::ListWorkersResponse> {
        Ok(Response::new(v1::ListWorkersResponse { workers: self.script().workers.clone() }))
    }

    async fn define_vm(&self, request: Request<v1::DefineVmRequest>) -> Reply<v1::DefineVmResponse> {
        let v1::DefineVmRequest { request_id, spec, site } = request.into_inner();
        self.command(&request_id)?;
        let spec = spec.unwrap();
        self.script().defined.push(spec.clone());
        let vm = v1::Vm { spec: Some(spec), owner_site: site, state: v1::VmState::Stopped.into(), ..vm("new") };
        Ok(Response::new(v1::DefineVmResponse { vm: Some(vm) }))
    }

    async fn declare_worker_dead(
        &self,
        request: Request<v1::DeclareWorkerDeadRequest>,
    ) -> Reply<v1::DeclareWorkerDeadResponse> {
        let v1::DeclareWorkerDeadRequest { request_id, worker, confirm_name, .. } = request.into_inner();
        self.command(&request_id)?;
        if confirm_name != worker {
            return Err(Status::invalid_argument("not its name"));
        }
        let awaited_workers = vec!["worker-c".to_owned()];
        Ok(Response::new(v1::DeclareWorkerDeadResponse { vms_unknown: 2, awaited_workers }))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Reply<v1::GetVmResponse> {
        Ok(Response::new(v1::GetVmResponse { vm: Some(self.vm(&request.into_inner().vm)?) }))
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        Ok(Response::new(v1::ListVmsResponse { vms: self.script().vms.clone() }))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Reply<v1::StartVmResponse> {
        let v1::StartVmRequest { request_id, vm } = request.into_inner();
        self.command(&request_id)?;
        Ok(Response::new(v1::StartVmResponse { vm: Some(self.vm(&vm)?) }))
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Reply<v1::StopVmResponse> {
        let v1::StopVmRequest { request_id, vm, force } = request.into_inner();
        self.command(&request_id)?;
        let mut vm = self.vm(&vm)?;
        vm.desired_running = false;
        if force {
            vm.state = v1::VmState::Stopped.into();
        }
        Ok(Response::new(v1::StopVmResponse { vm: Some(vm) }))
    }

    async fn resolve_vm(&self, request: Request<v1::ResolveVmRequest>) -> Reply<v1::ResolveVmResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        if request.confirm_name != request.vm {
            return Err(Status::invalid_argument(format!("\"{}\" is not the VM's name", request.confirm_name)));
        }
        let vm = v1::Vm { owner_site: request.force_owner_site, ..vm };
        Ok(Response::new(v1::ResolveVmResponse { vm: Some(vm) }))
    }

    type FenceWorkerStream = Boxed<v1::FenceWorkerResponse>;

    async fn fence_worker(&self, request: Request<v1::FenceWorkerRequest>) -> Reply<Self::FenceWorkerStream> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        self.script().fenced.push(request);
        let fences = self.script().fences.pop_front().unwrap_or_default();
        Ok(Response::new(Box::pin(tokio_stream::iter(fences.into_iter().map(Ok)))))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Reply<v1::DeleteVmResponse> {
        let v1::DeleteVmRequest { request_id, vm } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        Err(Status::failed_precondition(format!("{vm} is running: stop it first")))
    }

    async fn resize_disk(&self, request: Request<v1::ResizeDiskRequest>) -> Reply<v1::ResizeDiskResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        self.script().resized.push(request);
        Ok(Response::new(v1::ResizeDiskResponse { vm: Some(vm) }))
    }

    async fn add_disk(&self, request: Request<v1::AddDiskRequest>) -> Reply<v1::AddDiskResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let vm = self.vm(&request.vm)?;
        self.script().added.push(request);
        Ok(Response::new(v1::AddDiskResponse { vm: Some(vm) }))
    }

    type WatchFleetStream = Boxed<v1::WatchFleetResponse>;

    async fn watch_fleet(&self, _: Request<v1::WatchFleetRequest>) -> Reply<Self::WatchFleetStream> {
        let fleets = self.script().fleets.pop_front().unwrap_or_default();
        Ok(Response::new(Box::pin(tokio_stream::iter(fleets.into_iter().map(Ok)))))
    }
}

#[tonic::async_trait]
impl MigrationService for Fake {
    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Reply<v1::CreateMigrationResponse> {
        let v1::CreateMigrationRequest { request_id, vm, to_site, .. } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        if to_site == "nowhere" {
            return Err(Status::not_found("there is no site \"nowhere\""));
        }
        let state = v1::MigrationState::Requested.into();
        let migration = v1::Migration { id: "m1".into(), vm_name: vm, to_site, state, ..Default::default() };
        Ok(Response::new(v1::CreateMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration(&self, request: Request<v1::GetMigrationRequest>) -> Reply<v1::GetMigrationResponse> {
        Err(Status::not_found(format!("there is no migration \"{}\"", request.into_inner().id)))
    }

    async fn list_migrations(&self, _: Request<v1::ListMigrationsRequest>) -> Reply<v1::ListMigrationsResponse> {
        Ok(Response::new(v1::ListMigrationsResponse::default()))
    }

    type WatchMigrationsStream = Boxed<v1::WatchMigrationsResponse>;

    async fn watch_migrations(&self, _: Request<v1::WatchMigrationsRequest>) -> Reply<Self::WatchMigrationsStream> {
        Err(Status::unimplemented("commands follow one migration"))
    }

    type WatchMigrationStream = Boxed<v1::WatchMigrationResponse>;

    async fn watch_migration(&self, _: Request<v1::WatchMigrationRequest>) -> Reply<Self::WatchMigrationStream> {
        let steps = self.script().watches.pop_front();
        let steps = steps.ok_or_else(|| Status::unavailable("there is no leader"))?;
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            for step in steps {
                let item = match step {
                    Step::Update(migration) => Ok(v1::WatchMigrationResponse { migration: Some(*migration) }),
                    Step::Lose => Err(Status::unavailable("the leader went away")),
                    Step::Hang => {
                        sender.closed().await;
                        return;
                    }
                };
                if sender.send(item).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Reply<v1::CancelMigrationResponse> {
        let v1::CancelMigrationRequest { request_id, id } = request.into_inner();
        self.command(&request_id)?;
        let state = v1::MigrationState::Cancelling.into();
        let migration = v1::Migration { id, vm_name: "web".into(), state, ..Default::default() };
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(migration) }))
    }

    async fn change_migration(
        &self,
        request: Request<v1::ChangeMigrationRequest>,
    ) -> Reply<v1::ChangeMigrationResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let (id, vm_name) = (request.id.clone(), "web".into());
        let terms = v1::MigrationTerms {
            priority: request.priority.unwrap_or(50),
            rate_bps: request.rate_bps.unwrap_or_default(),
            paused: request.paused.unwrap_or_default(),
            convergence: request.convergence,
            longest_pause_ms: request.longest_pause_ms,
            ..Default::default()
        };
        let state = v1::MigrationState::Requested.into();
        let migration = v1::Migration { id, vm_name, state, terms: Some(terms), ..Default::default() };
        Ok(Response::new(v1::ChangeMigrationResponse { migration: Some(migration) }))
    }
}

#[tonic::async_trait]
impl ReplicationService for Fake {
    async fn seed_replica(&self, request: Request<v1::SeedReplicaRequest>) -> Reply<v1::SeedReplicaResponse> {
        let v1::SeedReplicaRequest { request_id, vm, to_site } = request.into_inner();
        self.command(&request_id)?;
        self.vm(&vm)?;
        let replica = v1::Replica { site: to_site, state: v1::ReplicaState::Seeding.into(), ..Default::default() };
        Ok(Response::new(v1::SeedReplicaResponse { replica: Some(replica) }))
    }

    async fn list_replicas(&self, request: Request<v1::ListReplicasRequest>) -> Reply<v1::ListReplicasResponse> {
        Ok(Response::new(v1::ListReplicasResponse { replicas: self.vm(&request.into_inner().vm)?.replicas }))
    }

    async fn delete_replica(&self, request: Request<v1::DeleteReplicaRequest>) -> Reply<v1::DeleteReplicaResponse> {
        self.command(&request.into_inner().request_id)?;
        Ok(Response::new(v1::DeleteReplicaResponse {}))
    }

    async fn protect_vm(&self, request: Request<v1::ProtectVmRequest>) -> Reply<v1::ProtectVmResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        self.vm(&request.vm)?;
        self.script().protected.push(request.clone());
        let state = v1::ReplicaState::Seeding.into();
        let replica = v1::Replica {
            site: request.to_site,
            state,
            protection: request.protection,
            places: request.places,
            pool: request.pool,
            ..Default::default()
        };
        Ok(Response::new(v1::ProtectVmResponse { replica: Some(replica) }))
    }

    async fn unprotect_vm(&self, request: Request<v1::UnprotectVmRequest>) -> Reply<v1::UnprotectVmResponse> {
        let v1::UnprotectVmRequest { request_id, vm, site } = request.into_inner();
        self.command(&request_id)?;
        if self.vm(&vm)?.replicas.iter().any(|replica| replica.site == site && replica.protection.is_some()) {
            return Ok(Response::new(v1::UnprotectVmResponse {}));
        }
        Err(Status::failed_precondition(format!("vm \"{vm}\" is not protected at site \"{site}\"")))
    }

    async fn scrub_replica(&self, request: Request<v1::ScrubReplicaRequest>) -> Reply<v1::ScrubReplicaResponse> {
        let request = request.into_inner();
        self.command(&request.request_id)?;
        let replica = self.vm(&request.vm)?.replicas.into_iter().find(|replica| replica.site == request.site);
        let protected = replica.filter(|replica| replica.protection.is_some());
        let missing = || Status::failed_precondition(format!("vm \"{}\" is not protected there", request.vm));
        Ok(Response::new(v1::ScrubReplicaResponse { replica: Some(protected.ok_or_else(missing)?) }))
    }

    async fn list_recovery_points(
        &self,
        request: Request<v1::ListRecoveryPointsRequest>,
    ) -> Reply<v1::ListRecoveryPointsResponse> {
        self.vm(&request.into_inner().vm)?;
        let points = self.script().points.clone();
        let exports = self.script().exports.clone();
        Ok(Response::new(v1::ListRecoveryPointsResponse { points, exports }))
    }

    async fn set_link_cap(&self, request: Request<v1::SetLinkCapRequest>) -> Reply<v1::SetLinkCapResponse> {
        let v1::SetLinkCapRequest { request_id, link } = request.into_inner();
        self.command(&request_id)?;
        self.script().links.extend(link.clone());
        Ok(Response::new(v1::SetLinkCapResponse { link }))
    }

    async fn list_links(&self, _: Request<v1::ListLinksRequest>) -> Reply<v1::ListLinksResponse> {
        Ok(Response::new(v1::ListLinksResponse { links: self.script().links.clone() }))
    }
}

#[tonic::async_trait]
impl HostService for Fake {
    type ConsoleStream = Boxed<v1::ConsoleOutput>;

    /// Greets with the VM's id, then says everything back in capitals; "bye" ends the stream.
    async fn console(&self, request: Request<Streaming<v1::ConsoleInput>>) -> Reply<Self::ConsoleStream> {
        let mut input = request.into_inner();
        let hello = input.message().await?.ok_or_else(|| Status::invalid_argument("no hello"))?;
        if !self.script().vms.iter().any(|vm| vm.id == hello.vm_id) {
            return Err(Status::not_found("no such VM runs here"));
        }
        let greeting = v1::ConsoleOutput { data: format!("[{}]", hello.vm_id).into_bytes().into() };
        let echo = input
            .take_while(|item| !matches!(item, Ok(input) if &input.data[..] == b"bye\n"))
            .map(|item| item.map(|input| v1::ConsoleOutput { data: input.data.to_ascii_uppercase().into() }));
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(greeting)).chain(echo))))
    }

    async fn open_point(&self, request: Request<v1::OpenPointRequest>) -> Reply<v1::OpenPointResponse> {
        self.fail()?;
        let request = request.into_inner();
        let export = v1::PointExport { vm_id: request.vm_id.clone(), number: request.number, ..Default::default() };
        self.script().opened.push(request);
        Ok(Response::new(v1::OpenPointResponse { export: Some(export) }))
    }

    async fn close_point(&self, request: Request<v1::ClosePointRequest>) -> Reply<v1::ClosePointResponse> {
        self.fail()?;
        self.script().closed.push(request.into_inner());
        Ok(Response::new(v1::ClosePointResponse {}))
    }
}
