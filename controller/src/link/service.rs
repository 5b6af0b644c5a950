//! The gRPC side of the worker link: one task per worker's stream, on the leader only.
//!
//! ```text
//!   report ──▶ hub            state, or a second has passed ──▶ assignment ──▶ worker
//! ```
//! Guarantees: an assignment is sent at once when it changes, and once a second as a sign of life; a stream without
//! reports is closed after [`IDLE`]; questions are answered after a quorum round, never from memory alone.

use std::sync::Arc;
use std::time::Duration;

use pageport_common::tls::worker_name;
use pageport_proto::v1;
use pageport_proto::v1::worker_link_service_server::WorkerLinkService;
use pageport_proto::{SiteName, WorkerName};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::answers;
use super::assignment::{Say, Telling};
use super::leases::Leases;
use super::observation::{Hub, Observed, is_bounded};
use super::questions::Asks;
use super::stakes::Stakes;
use crate::api::unix_ms;
use crate::consensus::{Consensus, ConsensusError};
use crate::model::State;
use crate::peer;

/// Metadata key of the leader's address.
pub const LEADER_KEY: &str = "pageport-leader";
/// A stream without a report for this long is closed.
pub const IDLE: Duration = Duration::from_secs(15);
const HEARTBEAT: Duration = Duration::from_secs(1);
const QUEUE: usize = 4;

/// Serves the workers.
#[derive(Debug, Clone)]
pub struct WorkerLink {
    consensus: Consensus,
    hub: Hub,
    leases: Arc<Leases>,
    stakes: Arc<Stakes>,
}

impl WorkerLink {
    /// Reports go to this hub, leases come from this book. Must be called on a runtime.
    pub fn new(consensus: Consensus, hub: Hub, leases: Arc<Leases>) -> Self {
        let stakes = Stakes::follow(consensus.watch_state());
        Self { consensus, hub, leases, stakes }
    }

    fn not_leader(&self) -> Status {
        let mut status = Status::failed_precondition("this controller is not the leader: connect to the leader");
        let leader = self.consensus.status().leader;
        let membership = self.consensus.membership();
        let member = leader.and_then(|leader| membership.get(leader));
        if let Some(address) = member.and_then(|(member, _)| member.address.parse().ok()) {
            status.metadata_mut().insert(LEADER_KEY, address);
        }
        status
    }

    /// The state after a quorum round, and the term in which this node led all through it.
    async fn read(&self) -> Result<(Arc<State>, u64), Status> {
        let term = self.serving_term()?;
        let state = self.consensus.read().await.map_err(|error| match error {
            ConsensusError::NotLeader => self.not_leader(),
            other => Status::unavailable(other.to_string()),
        })?;
        if self.serving_term()? != term {
            return Err(self.not_leader());
        }
        Ok((state, term))
    }

    fn serving_term(&self) -> Result<u64, Status> {
        let status = self.consensus.status();
        if status.serving { Ok(status.term) } else { Err(self.not_leader()) }
    }
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, Status>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl WorkerLinkService for WorkerLink {
    type LinkStream = ReceiverStream<Result<v1::WorkerAssignment, Status>>;

    async fn link(&self, request: Request<Streaming<v1::WorkerReport>>) -> Result<Response<Self::LinkStream>, Status> {
        if !self.consensus.status().serving {
            return Err(self.not_leader());
        }
        let (metadata, extensions, reports) = request.into_parts();
        let caller = Request::from_parts(metadata, extensions, ());
        let (assignments, stream) = mpsc::channel(QUEUE);
        let session = Session { link: self.clone(), assignments, telling: Telling::new(unix_ms().unsigned_abs()) };
        tokio::spawn(session.run(caller, reports));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn ask_authorisation(
        &self,
        request: Request<v1::AskAuthorisationRequest>,
    ) -> Result<Response<v1::AskAuthorisationResponse>, Status> {
        peer::require(&request, &worker_name(&request.get_ref().worker))?;
        let request = request.into_inner();
        let (worker, id) = (parse(&request.worker)?, parse(&request.vm_id)?);
        let (state, _) = self.read().await?;
        Ok(Response::new(answers::authorisation(&state, &worker, id, &request)))
    }

    async fn renew_lease(
        &self,
        request: Request<v1::RenewLeaseRequest>,
    ) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        peer::require(&request, &worker_name(&request.get_ref().worker))?;
        let request = request.into_inner();
        let worker: WorkerName = parse(&request.worker)?;
        let (state, term) = self.read().await?;
        let lease = answers::lease(&self.leases, term, &state, &worker, &request, Instant::now());
        Ok(Response::new(lease.ok_or_else(|| self.not_leader())?))
    }

    async fn ask_grant(&self, request: Request<v1::AskGrantRequest>) -> Result<Response<v1::AskGrantResponse>, Status> {
        peer::require(&request, &worker_name(&request.get_ref().worker))?;
        let request = request.into_inner();
        let (worker, id) = (parse(&request.worker)?, parse(&request.vm_id)?);
        let (state, term) = self.read().await?;
        Ok(Response::new(answers::grant(&self.leases, term, &state, &worker, id, &request, Instant::now())))
    }
}

/// One worker's stream.
struct Session {
    link: WorkerLink,
    assignments: mpsc::Sender<Result<v1::WorkerAssignment, Status>>,
    telling: Telling,
}

impl Session {
    async fn run(mut self, caller: Request<()>, reports: Streaming<v1::WorkerReport>) {
        if let Err(status) = self.serve(&caller, reports).await {
            tracing::info!(code = ?status.code(), reason = status.message(), "worker link ended");
            // The worker may be gone: then nobody needs the reason.
            let _ = self.assignments.try_send(Err(status));
        }
    }

    async fn serve(&mut self, caller: &Request<()>, mut reports: Streaming<v1::WorkerReport>) -> Result<(), Status> {
        let first = tokio::time::timeout(IDLE, reports.message()).await;
        let Some(first) = first.map_err(|_| silent())?? else { return Ok(()) };
        let worker: &WorkerName = &parse(&first.worker)?;
        let site: SiteName = parse(&first.site)?;
        peer::require(caller, &worker_name(worker.as_str()))?;
        tracing::info!(%worker, %site, "worker connected");
        self.take(worker, first).await?;
        let bell = self.link.stakes.bell(worker);
        let mut status = self.link.consensus.watch_status();
        let mut asked = self.link.hub.questions.watch();
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_report = Instant::now();
        loop {
            tokio::select! {
                report = reports.message() => {
                    let Some(report) = report? else { return Ok(()) };
                    last_report = Instant::now();
                    self.take(worker, report).await?;
                }
                () = bell.notified() => self.send(worker, Say::News)?,
                changed = asked.changed() => {
                    changed.map_err(|_| stopping())?;
                    self.send(worker, Say::News)?;
                }
                changed = status.changed() => {
                    changed.map_err(|_| stopping())?;
                    if !status.borrow_and_update().serving {
                        return Err(self.link.not_leader());
                    }
                }
                _ = heartbeat.tick() => {
                    if last_report.elapsed() > IDLE {
                        return Err(silent());
                    }
                    self.send(worker, Say::Always)?;
                }
            }
        }
    }

    async fn take(&self, worker: &WorkerName, report: v1::WorkerReport) -> Result<(), Status> {
        if report.worker != worker.as_str() {
            return Err(Status::invalid_argument("a worker's stream reports under one name"));
        }
        if !is_bounded(&report) {
            return Err(Status::invalid_argument(
                "the report names too many VMs, migrations, seeds, replications, recovery points or findings",
            ));
        }
        let assigned = self.telling.told(report.assignment_seq);
        let observed = Observed { report: Arc::new(report), at: Instant::now(), at_unix_ms: unix_ms(), assigned };
        self.link.hub.put(worker.clone(), observed).await;
        Ok(())
    }

    /// A worker that does not read its assignments gets the newest one once it does.
    fn send(&mut self, worker: &WorkerName, say: Say) -> Result<(), Status> {
        let term = self.link.consensus.status().term;
        let membership = self.link.consensus.membership();
        let controllers = membership.members().map(|(member, _)| member.address.clone()).collect();
        self.telling.controllers_are(controllers);
        let Asks { quotes, preflights } = self.link.hub.questions.of(worker);
        let wanted = v1::WorkerAssignment { quotes, preflights, ..self.link.stakes.assignment(worker) };
        let next = self.telling.next(wanted, term, say);
        let Some(next) = next else { return Ok(()) };
        match self.assignments.try_send(Ok(next.clone())) {
            Ok(()) => self.telling.sent(next),
            Err(mpsc::error::TrySendError::Full(_)) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(Status::cancelled("the worker closed the stream")),
        }
        Ok(())
    }
}

fn stopping() -> Status {
    Status::unavailable("this controller is stopping")
}

fn silent() -> Status {
    Status::deadline_exceeded(format!("no report for {} s", IDLE.as_secs()))
}
