//! [`Client`]: an operator's programs at one site, as one of them or many at once.
//!
//! A command is given again with the same request id until it is taken, as `pageportctl` does; each is one entry of the replicated log.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pageport_common::tls::{CONTROLLER_NAME, Identity};
use pageport_proto::RequestId;
use pageport_proto::v1::cluster_service_client::ClusterServiceClient;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::migration_service_client::MigrationServiceClient;
use pageport_proto::v1::replication_service_client::ReplicationServiceClient;
use pageport_proto::v1::schedule_service_client::ScheduleServiceClient;
use pageport_proto::v1::{
    DefineVmRequest, DrainRequest, GetClusterStatusRequest, GetClusterStatusResponse, ListMigrationsRequest,
    SeedReplicaRequest, Spot, StartVmRequest, StopVmRequest, UndrainRequest, spot,
};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::size::{EVACUATED, vm_name, vm_spec};
use super::{BenchError, Size};

/// How long anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// An attempt that says nothing for so long is given up.
const ATTEMPT: Duration = Duration::from_secs(10);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// Connections that many clients share.
const CONNECTIONS: usize = 8;
/// Round trips that are measured to each of the other sites.
const ROUND_TRIPS: usize = 10;

/// See the module. Made where it is used: its connections belong to that thread's runtime.
#[derive(Clone, Debug)]
pub struct Client {
    channels: Arc<Vec<Channel>>,
    next: Arc<AtomicUsize>,
}

impl Client {
    /// Of these controllers, with so many connections to each.
    fn with_connections(identity: &Identity, addresses: &[String], connections: usize) -> Result<Self, BenchError> {
        let mut channels = vec![];
        for address in addresses {
            let failed = |source| BenchError::Address { address: address.clone(), source };
            let endpoint = Endpoint::from_shared(format!("https://{address}"))
                .and_then(|endpoint| endpoint.tls_config(identity.tonic_client(CONTROLLER_NAME)))
                .map_err(failed)?
                .connect_timeout(CONNECT_DEADLINE)
                .tcp_nodelay(true);
            channels.extend((0..connections).map(|_| endpoint.connect_lazy()));
        }
        Ok(Self { channels: Arc::new(channels), next: Arc::default() })
    }

    /// One program that knows these controllers and asks one after the other.
    ///
    /// # Errors
    /// When an address is none.
    pub fn one(identity: &Identity, addresses: &[String]) -> Result<Self, BenchError> {
        Self::with_connections(identity, addresses, 1)
    }

    /// Many programs that ask one controller.
    ///
    /// # Errors
    /// When the address is none.
    pub fn many(identity: &Identity, address: &str) -> Result<Self, BenchError> {
        Self::with_connections(identity, &[address.to_owned()], CONNECTIONS)
    }

    fn channel(&self) -> Channel {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.channels[next % self.channels.len()].clone()
    }

    /// Asks until it is answered.
    async fn persist<T, F>(&self, what: &'static str, ask: impl Fn(Channel) -> F) -> Result<T, BenchError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let begin = Instant::now();
        let mut said = "nothing".to_owned();
        while begin.elapsed() < PATIENCE {
            match timeout(ATTEMPT, ask(self.channel())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => said = format!("{}: {}", status.code(), status.message()),
                Err(_) => said = "no answer in time".to_owned(),
            }
            sleep(RETRY_PAUSE).await;
        }
        Err(BenchError::Late { what, said })
    }

    /// Defines a VM.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn define(&self, vm: usize) -> Result<(), BenchError> {
        let site = Size::site_of(vm).to_owned();
        let request = DefineVmRequest { request_id: request_id(), spec: Some(vm_spec(vm)), site };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { FleetServiceClient::new(channel).define_vm(request).await.map(drop) }
        };
        self.persist("define a vm", ask).await
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn start(&self, vm: usize) -> Result<(), BenchError> {
        let request = StartVmRequest { request_id: request_id(), vm: vm_name(vm) };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { FleetServiceClient::new(channel).start_vm(request).await.map(drop) }
        };
        self.persist("start a vm", ask).await
    }

    /// Has a VM copied to a site, once it runs.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn seed(&self, vm: usize, to: &str) -> Result<(), BenchError> {
        let request = SeedReplicaRequest { request_id: request_id(), vm: vm_name(vm), to_site: to.to_owned() };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { ReplicationServiceClient::new(channel).seed_replica(request).await.map(drop) }
        };
        self.persist("seed a replica", ask).await
    }

    /// The small command that is measured: a stopped VM is told to be stopped, which changes the number of its order.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn write(&self, vm: usize) -> Result<(), BenchError> {
        let request = StopVmRequest { request_id: request_id(), vm: vm_name(vm), force: false };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { FleetServiceClient::new(channel).stop_vm(request).await.map(drop) }
        };
        self.persist("stop a vm", ask).await
    }

    /// How a controller stands.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn status(&self) -> Result<GetClusterStatusResponse, BenchError> {
        let ask = |channel: Channel| async move {
            let answer = ClusterServiceClient::new(channel).get_cluster_status(GetClusterStatusRequest {}).await;
            answer.map(tonic::Response::into_inner)
        };
        self.persist("ask for the cluster's status", ask).await
    }

    /// How many VMs a drain of the evacuated site would order to leave now.
    ///
    /// # Errors
    /// When the controllers do not say.
    pub async fn movable(&self) -> Result<usize, BenchError> {
        let request = DrainRequest { spot: Some(evacuated()), dry_run: true, ..DrainRequest::default() };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { ScheduleServiceClient::new(channel).drain(request).await }
        };
        let answer = self.persist("plan a drain", ask).await?.into_inner();
        Ok(answer.status.map_or(0, |status| status.planned.len()))
    }

    /// Drains the evacuated site.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn drain(&self) -> Result<(), BenchError> {
        let request = DrainRequest { request_id: request_id(), spot: Some(evacuated()), ..DrainRequest::default() };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { ScheduleServiceClient::new(channel).drain(request).await.map(drop) }
        };
        self.persist("drain a site", ask).await
    }

    /// Ends that.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn undrain(&self) -> Result<(), BenchError> {
        let request = UndrainRequest { request_id: request_id(), spot: Some(evacuated()) };
        let ask = |channel: Channel| {
            let request = request.clone();
            async move { ScheduleServiceClient::new(channel).undrain(request).await.map(drop) }
        };
        self.persist("undrain a site", ask).await
    }

    /// Moves that there are.
    ///
    /// # Errors
    /// When the controllers do not say.
    pub async fn migrations(&self) -> Result<usize, BenchError> {
        let ask = |channel: Channel| async move {
            MigrationServiceClient::new(channel).list_migrations(ListMigrationsRequest::default()).await
        };
        Ok(self.persist("list migrations", ask).await?.into_inner().migrations.len())
    }
}

fn request_id() -> String {
    RequestId::generate().to_string()
}

fn evacuated() -> Spot {
    Spot { place: Some(spot::Place::Site(EVACUATED.to_owned())) }
}

/// Lets so many clients do jobs, by number, until there are no more or `time` is up; says how many were done.
///
/// # Errors
/// When a job fails.
pub async fn in_parallel<F>(
    clients: usize,
    jobs: usize,
    time: Duration,
    job: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Result<usize, BenchError>
where
    F: Future<Output = Result<(), BenchError>> + Send + 'static,
{
    let (next, end) = (Arc::new(AtomicUsize::new(0)), Instant::now() + time);
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (next, job) = (next.clone(), job.clone());
        tasks.spawn(async move {
            let mut done = 0;
            while Instant::now() < end {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= jobs {
                    break;
                }
                job(number).await?;
                done += 1;
            }
            Ok::<usize, BenchError>(done)
        });
    }
    let mut done = 0;
    while let Some(ended) = tasks.join_next().await {
        done += ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    }
    Ok(done)
}

/// Lets so many clients do all of these jobs.
///
/// # Errors
/// When a job fails, or they are not all done in time.
pub async fn all_in_parallel<F>(
    clients: usize,
    jobs: usize,
    job: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Result<(), BenchError>
where
    F: Future<Output = Result<(), BenchError>> + Send + 'static,
{
    let done = in_parallel(clients, jobs, PATIENCE, job).await?;
    if done == jobs {
        return Ok(());
    }
    Err(BenchError::Late { what: "give commands", said: format!("{done} of {jobs} are taken") })
}

/// The median round trip to these addresses: a connection is one.
///
/// # Errors
/// When one cannot be reached.
pub async fn round_trip(addresses: &[String]) -> std::io::Result<Duration> {
    let mut taken = vec![];
    for address in addresses {
        for _ in 0..ROUND_TRIPS {
            let begin = Instant::now();
            drop(TcpStream::connect(address).await?);
            taken.push(begin.elapsed());
        }
    }
    taken.sort_unstable();
    Ok(taken[taken.len() / 2])
}
