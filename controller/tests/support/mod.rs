//! Three controllers in one process: real sled in a temporary folder, real mTLS gRPC on loopback.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod lab;
pub mod worker;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageport_common::telemetry::TelemetryConfig;
use pageport_common::tls::{CONTROLLER_NAME, Identity, TlsPaths, worker_name};
use pageport_controller::backup::{Backup, RestoreError, restore};
use pageport_controller::config::{Config, FirstStart, LogLimits};
use pageport_controller::consensus::membership::Member;
use pageport_controller::fence::FenceConfig;
use pageport_controller::server::{Listeners, ServerError, run};
use pageport_ownership::LeaseTerms;
use pageport_proto::v1;
use pageport_proto::v1::cluster_service_client::ClusterServiceClient;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::migration_service_client::MigrationServiceClient;
use pageport_proto::v1::quote_service_client::QuoteServiceClient;
use pageport_proto::v1::replication_service_client::ReplicationServiceClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

/// Nothing in these tests takes longer.
pub const DEADLINE: Duration = Duration::from_secs(40);

struct Node {
    config: Config,
    web: SocketAddr,
    running: Option<(CancellationToken, JoinHandle<Result<(), ServerError>>)>,
}

pub struct Cluster {
    folder: tempfile::TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
    nodes: Vec<Node>,
}

fn write(path: PathBuf, text: String) -> PathBuf {
    std::fs::write(&path, text).unwrap();
    path
}

impl Cluster {
    pub async fn start(log: LogLimits) -> Self {
        Self::with_agents(log, FenceConfig::default()).await
    }

    pub async fn with_agents(log: LogLimits, fence: FenceConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut cluster = Self { folder, authority, nodes: vec![] };
        let mut listeners = vec![];
        for _ in 0..3 {
            let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
            listeners.push(Listeners { api: bind().await, web: bind().await });
        }
        let members: Vec<Member> = listeners
            .iter()
            .zip(["a", "b", "c"])
            .enumerate()
            .map(|(index, (listeners, site))| {
                let address = listeners.api.local_addr().unwrap().to_string();
                Member::new(index as u64 + 1, site.parse().unwrap(), address)
            })
            .collect();
        for (member, listeners) in members.iter().zip(listeners) {
            let config = Config {
                id: member.id,
                site: member.site.clone(),
                data_dir: cluster.folder.path().join(format!("controller-{}", member.id)),
                listen_api: listeners.api.local_addr().unwrap(),
                listen_web: listeners.web.local_addr().unwrap(),
                first_start: FirstStart::Found,
                members: members.clone(),
                log,
                lease: LeaseTerms::new(3_000, 10_000, 500).unwrap(),
                fence: fence.clone(),
                tls: cluster.certificate("controller", CONTROLLER_NAME),
                telemetry: TelemetryConfig::default(),
            };
            let web = config.listen_web;
            cluster.nodes.push(Node { config, web, running: None });
            cluster.launch(member.id, listeners);
        }
        cluster
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn data_dir(&self, id: u64) -> PathBuf {
        self.nodes[id as usize - 1].config.data_dir.clone()
    }

    fn certificate(&self, file: &str, dns_name: &str) -> TlsPaths {
        let mut params = CertificateParams::new(vec![dns_name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let at = |end: &str| self.folder.path().join(format!("{file}.{end}"));
        TlsPaths {
            ca: write(at("ca.pem"), self.authority.pem()),
            cert: write(at("pem"), certificate.pem()),
            key: write(at("key"), key.serialize_pem()),
        }
    }

    pub fn worker_identity(&self, worker: &str) -> Identity {
        Identity::load(&self.certificate(worker, &worker_name(worker))).unwrap()
    }

    fn node(&mut self, id: u64) -> &mut Node {
        &mut self.nodes[id as usize - 1]
    }

    fn launch(&mut self, id: u64, listeners: Listeners) {
        let config = self.node(id).config.clone();
        let identity = Identity::load(&config.tls).unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move { run(config, &identity, listeners, stopped).await });
        self.node(id).running = Some((stop, task));
    }

    /// Stops one node and waits until its files are free.
    pub async fn stop(&mut self, id: u64) {
        let (stop, task) = self.node(id).running.take().unwrap();
        stop.cancel();
        within("a node to stop", task).await.unwrap().unwrap();
    }

    /// Starts a stopped node again, from its disk.
    pub async fn restart(&mut self, id: u64) {
        let config = self.node(id).config.clone();
        let listeners = eventually("the ports to be free", async || Listeners::bind(&config).await.ok()).await;
        self.launch(id, listeners);
    }

    fn running(&self) -> Vec<Member> {
        let running = self.nodes.iter().filter(|node| node.running.is_some()).map(|node| &node.config);
        running.map(|it| Member::new(it.id, it.site.clone(), it.listen_api.to_string())).collect()
    }

    /// Starts one more node, which waits until it is added. Gives its number and address.
    pub async fn join(&mut self) -> (u64, String) {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listeners = Listeners { api: bind().await, web: bind().await };
        let (id, web) = (self.nodes.len() as u64 + 1, listeners.web.local_addr().unwrap());
        let config = Config {
            id,
            site: "d".parse().unwrap(),
            data_dir: self.folder.path().join(format!("controller-{id}")),
            listen_api: listeners.api.local_addr().unwrap(),
            listen_web: web,
            members: self.running(),
            first_start: FirstStart::Join,
            ..self.nodes[0].config.clone()
        };
        self.nodes.push(Node { config, web, running: None });
        self.launch(id, listeners);
        (id, self.addresses()[id as usize - 1].clone())
    }

    /// Begins a new cluster from a backup, with one node.
    pub async fn restore(&mut self, file: &Path) -> Result<u64, RestoreError> {
        let (config, listeners) = self.blank().await;
        restore(&config, Backup::read(file)?)?;
        Ok(self.begin(config, listeners))
    }

    /// A node that has no data, and is its only member.
    pub async fn blank(&self) -> (Config, Listeners) {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listeners = Listeners { api: bind().await, web: bind().await };
        let (id, web) = (self.nodes.len() as u64 + 1, listeners.web.local_addr().unwrap());
        let (site, address) = ("d".parse().unwrap(), listeners.api.local_addr().unwrap());
        let config = Config {
            id,
            members: vec![Member::new(id, Clone::clone(&site), address.to_string())],
            site,
            data_dir: self.folder.path().join(format!("controller-{id}")),
            listen_api: address,
            listen_web: web,
            ..self.nodes[0].config.clone()
        };
        (config, listeners)
    }

    /// Starts such a node.
    pub fn begin(&mut self, config: Config, listeners: Listeners) -> u64 {
        let (id, web) = (config.id, config.listen_web);
        self.nodes.push(Node { config, web, running: None });
        self.launch(id, listeners);
        id
    }

    /// Of a node, as it was given it.
    pub fn config(&self, id: u64) -> &Config {
        &self.nodes[id as usize - 1].config
    }

    /// Why a node has ended by itself.
    pub async fn end_of(&mut self, id: u64) -> ServerError {
        let (_stop, task) = self.node(id).running.take().unwrap();
        within("a node to end", task).await.unwrap().unwrap_err()
    }

    pub fn web(&self, id: u64) -> SocketAddr {
        self.nodes[id as usize - 1].web
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.config.listen_api.to_string()).collect()
    }

    pub fn channel(&self, id: u64) -> Channel {
        dial(&self.operator(), &self.addresses()[id as usize - 1])
    }

    pub fn operator(&self) -> Identity {
        Identity::load(&self.certificate("operator", "operator.pageport")).unwrap()
    }

    pub fn fleet(&self, id: u64) -> FleetServiceClient<Channel> {
        FleetServiceClient::new(self.channel(id))
    }

    pub fn replication(&self, id: u64) -> ReplicationServiceClient<Channel> {
        ReplicationServiceClient::new(self.channel(id))
    }

    pub fn migration(&self, id: u64) -> MigrationServiceClient<Channel> {
        MigrationServiceClient::new(self.channel(id))
    }

    pub fn quote(&self, id: u64) -> QuoteServiceClient<Channel> {
        QuoteServiceClient::new(self.channel(id))
    }

    pub async fn status(&self, id: u64) -> Option<v1::GetClusterStatusResponse> {
        let mut client = ClusterServiceClient::new(self.channel(id));
        client.get_cluster_status(v1::GetClusterStatusRequest {}).await.ok().map(|answer| answer.into_inner())
    }

    /// The leader that a majority of the running nodes agrees on.
    pub async fn leader(&self) -> u64 {
        eventually("a leader", async || {
            let mut said = vec![];
            for node in self.nodes.iter().filter(|node| node.running.is_some()) {
                let status = self.status(node.config.id).await?;
                if status.members.is_empty() {
                    // It waits to be added, and knows nobody.
                    continue;
                }
                said.push(status.members.iter().find(|member| member.leader)?.id);
            }
            let first = *said.first()?;
            let runs = self.nodes[first as usize - 1].running.is_some();
            (runs && said.iter().all(|leader| *leader == first)).then_some(first)
        })
        .await
    }

    pub async fn a_follower(&self) -> u64 {
        let leader = self.leader().await;
        let mut others = self.nodes.iter().filter(|node| node.running.is_some()).map(|node| node.config.id);
        others.find(|id| *id != leader).unwrap()
    }

    /// Waits until a node tells that the workers of two sites are connected.
    pub async fn both_sites(&self, node: u64) {
        eventually("both sites", async || {
            let sites = self.fleet(node).list_sites(v1::ListSitesRequest {}).await.ok()?.into_inner().sites;
            (sites.iter().filter(|site| site.reachable).count() == 2).then_some(())
        })
        .await;
    }
}

pub fn dial(identity: &Identity, address: &str) -> Channel {
    Endpoint::from_shared(format!("https://{address}"))
        .unwrap()
        .tls_config(identity.tonic_client(CONTROLLER_NAME))
        .unwrap()
        .connect_timeout(Duration::from_secs(2))
        .connect_lazy()
}

/// Waits with a limit.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

/// Asks again until there is an answer.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    })
    .await
}

pub fn request_id() -> String {
    pageport_proto::RequestId::generate().to_string()
}

pub fn spec(name: &str) -> v1::VmSpec {
    v1::VmSpec {
        name: name.to_owned(),
        memory_bytes: 64 << 20,
        vcpus: 1,
        disks: vec![v1::DiskSpec {
            name: "root".into(),
            path: format!("/images/{name}.raw"),
            format: "raw".into(),
            ..Default::default()
        }],
        ..v1::VmSpec::default()
    }
}

pub fn define(name: &str, site: &str) -> v1::DefineVmRequest {
    v1::DefineVmRequest { request_id: request_id(), spec: Some(spec(name)), site: site.to_owned() }
}
