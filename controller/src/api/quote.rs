//! Quotes: the VM's worker makes them, while the caller waits. Preflights are asked for beside them: see [`super::preflight`].

use std::time::Duration;

use pageport_proto::v1;
use pageport_proto::v1::quote_service_server::QuoteService;
use pageport_proto::{SiteName, VmId, WorkerName};
use tonic::{Request, Response, Status};

use super::error::ApiError;
use super::{Api, clip};
use crate::link::questions::Question;
use crate::model::apply::not_migrating;
use crate::model::state::Vm;
use crate::model::{Rejection, State};

/// A worker takes some five seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Longest words of a worker that are passed on, in characters.
const MAX_WORDS_CHARS: usize = 1000;

impl Api {
    async fn quote(&self, request: v1::QuoteMigrationRequest) -> Result<v1::Quote, ApiError> {
        let moment = self.read().await?;
        let (id, vm) = moment.vm(&request.vm)?;
        let site = moment.site(&request.to_site)?;
        moment.must_run(id, vm)?;
        not_migrating(vm)?;
        let name = || vm.spec.name.clone();
        if moment.state.site_of_vm(vm) == Some(&site) {
            return Err(Rejection::AlreadyThere { name: name(), site }.into());
        }
        let owner = vm.ownership.owner().0.clone();
        if moment.observations.connected(&owner, moment.now).is_none() {
            return Err(ApiError::WorkerLost { worker: owner });
        }
        let question = question(&moment.state, id, vm, site)?;
        let asked = self.hub.questions.ask(owner.clone(), Question::Quote(question));
        let asked = asked.ok_or(ApiError::TooManyQuestions)?;
        let answer = self.answer(&owner, ANSWER_WITHIN, |report| asked.quote(report)).await?;
        let reason = clip(&answer.failure, MAX_WORDS_CHARS);
        answer.quote.ok_or_else(|| ApiError::NoQuote { name: name(), reason })
    }

    /// Waits until it is in what the worker says.
    pub(super) async fn answer<T>(
        &self,
        worker: &WorkerName,
        limit: Duration,
        answer: impl Fn(&v1::WorkerReport) -> Option<T>,
    ) -> Result<T, ApiError> {
        let mut observations = self.hub.watch();
        let answered = async {
            loop {
                let report = observations.borrow_and_update().last(worker).map(|last| last.report.clone());
                if let Some(answer) = report.as_deref().and_then(&answer) {
                    return Ok(answer);
                }
                observations.changed().await.map_err(|_| ApiError::LeaderChanged)?;
            }
        };
        let in_time = tokio::time::timeout(limit, answered).await;
        in_time.unwrap_or_else(|_| Err(ApiError::NoAnswer { worker: worker.clone(), limit }))
    }
}

/// To the VM's worker, about the worker that holds the replica.
fn question(state: &State, id: VmId, vm: &Vm, site: SiteName) -> Result<v1::QuoteAssignment, ApiError> {
    let missing = || Rejection::NoReplica { name: vm.spec.name.clone(), site: site.clone() };
    let replica = vm.replicas.get(&site).ok_or_else(missing)?;
    Ok(v1::QuoteAssignment {
        seq: 0,
        vm_id: id.to_string(),
        to_site: site.to_string(),
        peer_worker: replica.worker.to_string(),
        peer_address: state.peer_address(&replica.worker),
    })
}

#[tonic::async_trait]
impl QuoteService for Api {
    async fn quote_migration(
        &self,
        request: Request<v1::QuoteMigrationRequest>,
    ) -> Result<Response<v1::QuoteMigrationResponse>, Status> {
        let quote = self.quote(request.into_inner()).await?;
        Ok(Response::new(v1::QuoteMigrationResponse { quote: Some(quote) }))
    }

    async fn preflight_migration(
        &self,
        request: Request<v1::PreflightMigrationRequest>,
    ) -> Result<Response<v1::PreflightMigrationResponse>, Status> {
        let findings = self.preflight(request.into_inner()).await?;
        Ok(Response::new(v1::PreflightMigrationResponse { findings }))
    }
}
