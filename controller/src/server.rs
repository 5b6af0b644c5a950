//! A controller, put together from its parts.
//!
//! ```text
//!   api port, mTLS:  [forward] fleet, replication, migration, quote, schedule, membership · cluster · worker link · raft
//!   web port:        gRPC-Web of the first five · UI
//! ```
//! Guarantees: [`run`] returns only when both ports are closed and the log is at rest; it fails when the log cannot go on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use pageport_common::tls::Identity;
use pageport_proto::v1::cluster_service_server::ClusterServiceServer;
use pageport_proto::v1::fleet_service_server::FleetServiceServer;
use pageport_proto::v1::membership_service_server::MembershipServiceServer;
use pageport_proto::v1::migration_service_server::MigrationServiceServer;
use pageport_proto::v1::quote_service_server::QuoteServiceServer;
use pageport_proto::v1::raft_transport_service_server::RaftTransportServiceServer;
use pageport_proto::v1::replication_service_server::ReplicationServiceServer;
use pageport_proto::v1::restore_service_server::RestoreServiceServer;
use pageport_proto::v1::schedule_service_server::ScheduleServiceServer;
use pageport_proto::v1::worker_link_service_server::WorkerLinkServiceServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::api::Api;
use crate::api::cluster::Cluster;
use crate::api::forward::{Forwarder, forward};
use crate::api::membership::Members;
use crate::api::restore::Restores;
use crate::config::{Config, FirstStart};
use crate::consensus::Consensus;
use crate::consensus::core::{CoreConfig, CoreError, inbox, start};
use crate::consensus::membership::Membership;
use crate::consensus::peers::{MAX_ENVELOPE_BYTES, Peers, RaftTransport};
use crate::dial::{Dialer, Directory, KEEP_ALIVE};
use crate::fence;
use crate::fence::Desk;
use crate::fence::job::Tools;
use crate::link::driver::drive;
use crate::link::leases::Leases;
use crate::link::observation::{Hub, hub};
use crate::link::service::WorkerLink;
use crate::web;

/// Streams that do not end by themselves are cut after this when the controller stops.
const STOP_WITHIN: Duration = Duration::from_secs(3);

/// Why a controller did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A port is taken, or the address is not this host's.
    #[error("listen on {address} ({key})")]
    Listen {
        /// The configuration's key.
        key: &'static str,
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The data folder.
    #[error("create the data folder {}", path.display())]
    DataDir {
        /// The folder.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The api port.
    #[error("serve the api port")]
    Api(#[source] tonic::transport::Error),
    /// The web port.
    #[error("serve the web port")]
    Web(#[source] io::Error),
    /// The replicated log.
    #[error("keep the replicated log")]
    Core(#[from] CoreError),
}

impl ServerError {
    /// Will it end the same way whenever it is started again?
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Core(error) if error.is_final())
    }
}

/// Both ports, bound.
#[derive(Debug)]
pub struct Listeners {
    /// For daemons and pageportctl.
    pub api: TcpListener,
    /// For browsers.
    pub web: TcpListener,
}

impl Listeners {
    /// Binds what the configuration says.
    ///
    /// # Errors
    /// [`ServerError::Listen`].
    pub async fn bind(config: &Config) -> Result<Self, ServerError> {
        let bind = async |key, address| {
            TcpListener::bind(address).await.map_err(|source| ServerError::Listen { key, address, source })
        };
        Ok(Self {
            api: bind("listen.api", config.listen_api).await?,
            web: bind("listen.web", config.listen_web).await?,
        })
    }
}

/// Waits on the api port until an operator has sent a backup and this controller's data is made of it. `false`: it was told to stop before.
///
/// # Errors
/// [`ServerError::Api`].
pub async fn await_restore(
    config: &Config,
    identity: &Identity,
    api: TcpListener,
    stop: CancellationToken,
) -> Result<bool, ServerError> {
    let done = stop.child_token();
    let service = RestoreServiceServer::new(Restores::awaited(config.clone(), done.clone()));
    tracing::info!(id = config.id, "waiting for a backup: \"pageportctl cluster restore FILE --at HOST:PORT\"");
    serve_api(identity, api, Routes::new(service).prepare().into_axum_router(), done.clone()).await?;
    Ok(!stop.is_cancelled())
}

/// Runs a controller until it is told to stop.
///
/// # Errors
/// [`ServerError`].
pub async fn run(
    config: Config,
    identity: &Identity,
    listeners: Listeners,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    std::fs::create_dir_all(&config.data_dir)
        .map_err(|source| ServerError::DataDir { path: config.data_dir.clone(), source })?;
    let inbox = inbox();
    let dialer = Dialer::new(identity.clone());
    let peers = Peers::new(config.id, dialer.clone(), inbox.sender(), config.members.clone());
    let core = CoreConfig {
        id: config.id,
        first: match config.first_start {
            FirstStart::Found => Membership::first(config.members.clone()),
            FirstStart::Join => Membership::default(),
        },
        folder: config.data_dir.clone(),
        snapshot_every: config.log.snapshot_every,
        keep_entries: config.log.keep_entries,
    };
    // The log outlives the ports, so that nothing that was taken in is left without an answer.
    let stop_core = CancellationToken::new();
    let _stops_core = stop_core.clone().drop_guard();
    let (consensus, mut core_ended) = start(&core, inbox, peers, stop_core.clone())?;
    let hub = hub();
    let leases = Arc::new(Leases::new(config.lease, tokio::time::Instant::now()));
    let forwarder = Forwarder::new(consensus.clone(), Directory::new(dialer, consensus.clone()));
    let tools = Tools { consensus: consensus.clone(), hub: hub.clone(), leases: leases.clone() };
    let desk = fence::desk::start(config.fence.clone(), tools, stop.child_token());
    let transport = RaftTransport::new(consensus.clone(), config.data_dir.clone());
    let (public, internal) = routes(&consensus, &hub, &leases, transport, desk, forwarder);
    let driver = tokio::spawn(drive(consensus, hub, leases, stop.child_token()));

    let ports = stop.child_token();
    let api = serve_api(identity, listeners.api, public.clone().merge(internal), ports.clone());
    let web = serve_web(listeners.web, web::router(public), ports.clone());
    tracing::info!(id = config.id, site = %config.site, "controller runs");
    let served = tokio::select! {
        served = async { tokio::try_join!(api, web).map(|_| ()) } => served,
        ended = &mut core_ended => Err(ServerError::Core(match ended {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => CoreError::Panicked,
        })),
    };
    ports.cancel();
    driver.abort();
    stop_core.cancel();
    if served.is_ok() {
        return match core_ended.await {
            Ok(result) => Ok(result?),
            Err(_) => Err(ServerError::Core(CoreError::Panicked)),
        };
    }
    served
}

/// What clients may ask on both ports, and what only daemons ask.
fn routes(
    consensus: &Consensus,
    hub: &Hub,
    leases: &Arc<Leases>,
    transport: RaftTransport,
    desk: Desk,
    forwarder: Forwarder,
) -> (Router, Router) {
    let api = Api::new(consensus.clone(), hub.clone(), desk);
    let forwarded = Routes::new(FleetServiceServer::new(api.clone()))
        .add_service(ReplicationServiceServer::new(api.clone()))
        .add_service(MigrationServiceServer::new(api.clone()))
        .add_service(QuoteServiceServer::new(api.clone()))
        .add_service(ScheduleServiceServer::new(api))
        .add_service(MembershipServiceServer::new(Members::new(consensus.clone())))
        .prepare()
        .into_axum_router();
    let forwarded = forwarded.reset_fallback().layer(axum::middleware::from_fn_with_state(forwarder, forward));
    let cluster = ClusterServiceServer::new(Cluster::new(consensus.clone()));
    let cluster = Routes::new(cluster)
        .add_service(RestoreServiceServer::new(Restores::refused()))
        .prepare()
        .into_axum_router()
        .reset_fallback();
    let raft = RaftTransportServiceServer::new(transport);
    let link = WorkerLink::new(consensus.clone(), hub.clone(), leases.clone());
    let internal = Routes::new(raft.max_decoding_message_size(MAX_ENVELOPE_BYTES))
        .add_service(WorkerLinkServiceServer::new(link))
        .prepare()
        .into_axum_router();
    (forwarded.merge(cluster), internal)
}

async fn serve_api(
    identity: &Identity,
    listener: TcpListener,
    routes: Router,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    let server = Server::builder()
        .tls_config(identity.tonic_server())
        .map_err(ServerError::Api)?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE * 2))
        .tcp_nodelay(true)
        .add_routes(Routes::from(routes))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
    cut_after_stop(stop, server).await.unwrap_or(Ok(())).map_err(ServerError::Api)
}

async fn serve_web(listener: TcpListener, routes: Router, stop: CancellationToken) -> Result<(), ServerError> {
    let server = axum::serve(listener, routes).with_graceful_shutdown(stop.clone().cancelled_owned());
    cut_after_stop(stop, server.into_future()).await.unwrap_or(Ok(())).map_err(ServerError::Web)
}

/// The server's own end, or [`None`] when it did not end soon after it was told to.
async fn cut_after_stop<T>(stop: CancellationToken, server: impl Future<Output = T>) -> Option<T> {
    let deadline = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_WITHIN).await;
    };
    tokio::select! {
        ended = server => Some(ended),
        () = deadline => None,
    }
}
