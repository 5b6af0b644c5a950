//! The way to the controllers: finds the leader, and asks it.
//!
//! Any controller may be asked; a follower names the leader in the metadata key `pageport-leader`. Connections are kept. The
//! leader says who the controllers are, so that they can be replaced one after the other: those are asked first, then the
//! configuration's, which are all that is known after a restart. Those of a cluster that was given up for a backup come last.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageport_common::telemetry;
use pageport_common::tls::{CONTROLLER_NAME, Identity};
use pageport_proto::v1::worker_link_service_client::WorkerLinkServiceClient;
use pageport_proto::v1::{
    AskAuthorisationRequest, AskAuthorisationResponse, AskGrantRequest, AskGrantResponse, RenewLeaseRequest,
    RenewLeaseResponse, WorkerAssignment, WorkerReport,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::generation::{Generation, Joined};

const LEADER_KEY: &str = "pageport-leader";
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Questions go round all controllers so many times before they are given up.
const ROUNDS: usize = 3;
/// Between two rounds: an election takes about this long.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

type Client = WorkerLinkServiceClient<Channel>;

/// Why the controllers gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// None could be reached, or none is the leader.
    #[error("no controller answers as the leader (tried {tried})")]
    NoLeader {
        /// Their addresses.
        tried: String,
        /// What the last one said.
        #[source]
        source: Box<Status>,
    },
    /// The leader refused.
    #[error("the leader refused")]
    Refused(#[source] Box<Status>),
    /// It belongs to a cluster that was given up.
    #[error(
        "a controller of generation {generation} is not heard any more: the controllers were restored from a backup since, and it must be stopped"
    )]
    GivenUp {
        /// Its generation.
        generation: u32,
    },
    /// It was restored from the same backup as those that this worker has joined.
    #[error(
        "a controller of generation {generation} is not heard: controllers were restored twice from one backup, and this worker has joined the others; \
         all controllers of one of the two must be stopped"
    )]
    RestoredTwice {
        /// The generation of both.
        generation: u32,
    },
    /// An address in the configuration is no address.
    #[error("configuration key `controllers`: {address:?} is not IP:port")]
    Address {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// All controllers.
#[derive(Debug)]
pub struct Controllers {
    worker: String,
    identity: Identity,
    addresses: Vec<String>,
    joined: Arc<Joined>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    channels: HashMap<String, Channel>,
    leader: Option<String>,
    /// As the leader last named them.
    named: Vec<String>,
    /// Those that turned out to be of a cluster that was given up: asked last, since another may have taken the address.
    given_up: BTreeSet<String>,
}

impl Controllers {
    /// Knows the addresses; connects when asked.
    pub fn new(worker: &str, identity: Identity, addresses: Vec<String>, joined: Arc<Joined>) -> Self {
        Self { worker: worker.to_owned(), identity, addresses, joined, state: Mutex::default() }
    }

    /// This worker's name.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// May this worker load the image of a move?
    ///
    /// # Errors
    /// No leader answers, or it refuses the question.
    pub async fn ask_authorisation(
        &self,
        request: AskAuthorisationRequest,
    ) -> Result<AskAuthorisationResponse, ControllerError> {
        let answer = self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.ask_authorisation(request).await.map(Response::into_inner) }
        });
        self.heard(answer.await?, |answer| Generation::said(answer.generation, &answer.restoration_id))
    }

    /// May this worker run a VM?
    ///
    /// # Errors
    /// No leader answers, or it refuses the question.
    pub async fn ask_grant(&self, request: AskGrantRequest) -> Result<AskGrantResponse, ControllerError> {
        let answer = self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.ask_grant(request).await.map(Response::into_inner) }
        });
        self.heard(answer.await?, |answer| Generation::said(answer.generation, &answer.restoration_id))
    }

    /// Another lease for the VMs that fence themselves.
    ///
    /// # Errors
    /// No leader answers, or it refuses the question.
    pub async fn renew_lease(&self, request: RenewLeaseRequest) -> Result<RenewLeaseResponse, ControllerError> {
        let answer = self.ask(|mut client| {
            let request = with_deadline(request.clone());
            async move { client.renew_lease(request).await.map(Response::into_inner) }
        });
        self.heard(answer.await?, |answer| Generation::said(answer.generation, &answer.restoration_id))
    }

    /// Nothing is taken from controllers that this worker is deaf to; the next question goes elsewhere.
    fn heard<A>(&self, answer: A, of: impl Fn(&A) -> Generation) -> Result<A, ControllerError> {
        let generation = of(&answer);
        if self.joined.hears(generation) {
            return Ok(answer);
        }
        Err(self.give_up(generation))
    }

    /// Whoever answered last is of a cluster that was given up, or of one too many: others are asked first from now on.
    pub fn give_up(&self, those: Generation) -> ControllerError {
        let generation = those.number;
        let error = match self.joined.is_as_new(those) {
            true => ControllerError::RestoredTwice { generation },
            false => ControllerError::GivenUp { generation },
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leader) = state.leader.take() {
            tracing::warn!(address = leader, %error, "controller turned away");
            state.given_up.insert(leader);
        }
        error
    }

    /// Opens the link to the leader.
    ///
    /// # Errors
    /// No leader answers.
    pub async fn link(
        &self,
        reports: impl Fn() -> ReceiverStream<WorkerReport>,
    ) -> Result<Streaming<WorkerAssignment>, ControllerError> {
        self.ask(|mut client| {
            let reports = reports();
            async move {
                let opened = tokio::time::timeout(ANSWER_DEADLINE, client.link(reports)).await;
                opened
                    .map_err(|_| Status::deadline_exceeded("the link was not opened in time"))?
                    .map(Response::into_inner)
            }
        })
        .await
    }

    /// Asks whoever is the leader; follows hints.
    async fn ask<A, F>(&self, question: impl Fn(Client) -> F) -> Result<A, ControllerError>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let mut last = Status::unavailable("not asked yet");
        for round in 0..ROUNDS {
            if round > 0 {
                tokio::time::sleep(ROUND_PAUSE).await;
            }
            let mut next = self.candidates();
            let mut budget = next.len() + 1;
            while let Some(address) = next.pop()
                && budget > 0
            {
                budget -= 1;
                match question(WorkerLinkServiceClient::new(self.channel(&address)?)).await {
                    Ok(answer) => {
                        self.set_leader(Some(address));
                        return Ok(answer);
                    }
                    Err(status) => {
                        self.set_leader(None);
                        let hint = status.metadata().get(LEADER_KEY).and_then(|hint| hint.to_str().ok());
                        if let Some(hint) = hint.filter(|hint| *hint != address) {
                            next.push(hint.to_owned());
                        } else if !another_may_know(status.code()) {
                            return Err(ControllerError::Refused(Box::new(status)));
                        }
                        last = status;
                    }
                }
            }
        }
        Err(ControllerError::NoLeader { tried: self.addresses.join(", "), source: Box::new(last) })
    }

    /// The leader says that these are the controllers.
    pub fn learn(&self, addresses: &[String]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.named == addresses {
            return;
        }
        tracing::info!(?addresses, "the controllers, as the leader names them");
        state.named = addresses.to_vec();
        state.channels.retain(|address, _| self.addresses.contains(address) || addresses.contains(address));
    }

    fn candidates(&self) -> Vec<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        candidates(&self.addresses, &state.named, state.leader.as_ref(), &state.given_up)
    }

    fn channel(&self, address: &str) -> Result<Channel, ControllerError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = state.channels.get(address) {
            return Ok(found.clone());
        }
        let failed = |source| ControllerError::Address { address: address.to_owned(), source };
        let channel = Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| endpoint.tls_config(self.identity.tonic_client(CONTROLLER_NAME)))
            .map_err(failed)?
            .connect_timeout(CONNECT_DEADLINE)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .connect_lazy();
        state.channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    fn set_leader(&self, leader: Option<String>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).leader = leader;
    }
}

/// Whom to ask, the last one first.
fn candidates(
    configured: &[String],
    named: &[String],
    leader: Option<&String>,
    given_up: &BTreeSet<String>,
) -> Vec<String> {
    let configured = configured.iter().rev().filter(|address| !named.contains(address));
    let mut all: Vec<String> = configured.chain(named.iter().rev()).chain(leader).cloned().collect();
    all.sort_by_key(|address| !given_up.contains(address));
    all
}

fn another_may_know(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::FailedPrecondition | Code::Unknown | Code::Cancelled
    )
}

fn with_deadline<M>(message: M) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_DEADLINE);
    telemetry::inject(request.metadata_mut());
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leader_is_asked_first_then_those_it_named_and_the_configured_are_never_given_up() {
        let all = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let asked = |named: &[&str], leader: Option<&str>, given_up: &[&str]| {
            let given_up = all(given_up).into_iter().collect();
            let leader = leader.map(str::to_owned);
            let mut next = candidates(&all(&["a", "b", "c"]), &all(named), leader.as_ref(), &given_up);
            next.reverse();
            next
        };
        assert_eq!(asked(&[], None, &[]), all(&["a", "b", "c"]));
        assert_eq!(asked(&["c", "d", "e"], Some("e"), &[]), all(&["e", "c", "d", "e", "a", "b"]));
        assert_eq!(asked(&["a", "b"], None, &["a"]), all(&["b", "c", "a"]), "those that were given up come last");
    }
}
