//! The order to fence a worker, as a stream of how far it is.
//!
//! Guarantees: an order is taken only for a worker that does not answer, with its name typed again and a reason, from an
//! operator. It goes on when the client leaves; the same request joins it again.

use pageport_proto::{WorkerName, v1};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::watch::Views;
use super::{Api, Moment, clip, echo, request_id};
use crate::consensus::Status;
use crate::fence::desk::FenceOrder;
use crate::fence::job::{Fate, Phase, Progress};
use crate::model::Rejection;

const QUEUE: usize = 1;

impl Api {
    /// Begins or joins a fence.
    pub(super) async fn fence(
        &self,
        request: v1::FenceWorkerRequest,
        operator: String,
    ) -> Result<Views<v1::FenceWorkerResponse>, ApiError> {
        let id = request_id(&request.request_id)?;
        let moment = self.read().await?;
        let worker = known(&moment, &request.worker)?;
        self.desk.agent_for(&worker)?;
        match request.action() {
            v1::fence_worker_request::Action::Check => return Ok(self.check(&moment, worker)),
            v1::fence_worker_request::Action::Off => {}
            v1::fence_worker_request::Action::Unspecified => {
                return Err(ApiError::Missing { field: "action", fix: "say whether to turn the host off or to check" });
            }
        }
        if request.confirm_name != worker.as_str() {
            return Err(ApiError::WorkerNotConfirmed { typed: echo(&request.confirm_name), worker });
        }
        let reason = clip(request.reason.trim(), super::MAX_REASON_CHARS);
        if reason.is_empty() {
            return Err(ApiError::Missing { field: "reason", fix: "say why the host is to be turned off" });
        }
        if moment.observations.connected(&worker, moment.now).is_some() {
            return Err(ApiError::WorkerAnswers { worker });
        }
        let progress = self.desk.fence(FenceOrder { request: id, worker, by: operator, reason }).await?;
        Ok(follow(progress, self.consensus.watch_status()))
    }

    fn check(&self, moment: &Moment, worker: WorkerName) -> Views<v1::FenceWorkerResponse> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (desk, site) = (self.desk.clone(), moment.state.site_of(&worker).cloned());
        tokio::spawn(async move {
            let Some(site) = site else { return };
            let mut response = v1::FenceWorkerResponse {
                worker: worker.to_string(),
                phase: v1::fence_worker_response::Phase::Agent.into(),
                agent: desk.agent_for(&worker).map(|agent| agent.name.clone()).unwrap_or_default(),
                ..v1::FenceWorkerResponse::default()
            };
            // The client may be gone: then nobody needs the answer.
            let _ = sender.send(Ok(response.clone())).await;
            match desk.check(&worker, &site).await {
                Ok(output) => {
                    response.agent_output = output;
                    response.set_phase(v1::fence_worker_response::Phase::Done);
                }
                Err(error) => {
                    response.problem = error.to_string();
                    response.set_phase(v1::fence_worker_response::Phase::Failed);
                }
            }
            let _ = sender.send(Ok(response)).await;
        });
        ReceiverStream::new(receiver)
    }
}

fn known(moment: &Moment, name: &str) -> Result<WorkerName, ApiError> {
    let known = moment.state.workers.keys().find(|worker| worker.as_str() == name).cloned();
    match known {
        Some(worker) => Ok(worker),
        None => match name.parse() {
            Ok(worker) => Err(Rejection::WorkerUnknown { worker }.into()),
            Err(source) => Err(ApiError::BadId { field: "worker", source }),
        },
    }
}

/// Tells each change until the end, or until this node no longer leads: then the client asks the new leader.
fn follow(
    mut progress: watch::Receiver<Progress>,
    mut status: watch::Receiver<Status>,
) -> Views<v1::FenceWorkerResponse> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        loop {
            let now = progress.borrow_and_update().clone();
            let item = if now.phase == Phase::Void { Err(ApiError::LeaderChanged.into()) } else { Ok(view(&now)) };
            if sender.send(item).await.is_err() || now.phase.is_over() {
                return;
            }
            let leads = tokio::select! {
                () = sender.closed() => return,
                changed = progress.changed() => changed.is_ok(),
                left = status.wait_for(|status| !status.serving) => {
                    tracing::info!(stopping = left.is_err(), "a fence is no longer followed here");
                    false
                }
            };
            if !leads {
                // The client may be gone.
                let _ = sender.send(Err(ApiError::LeaderChanged.into())).await;
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

fn view(progress: &Progress) -> v1::FenceWorkerResponse {
    let (phase, problem) = match &progress.phase {
        Phase::Agent => (v1::fence_worker_response::Phase::Agent, String::new()),
        Phase::Takeover => (v1::fence_worker_response::Phase::Takeover, String::new()),
        Phase::Done => (v1::fence_worker_response::Phase::Done, String::new()),
        Phase::Failed { problem } => (v1::fence_worker_response::Phase::Failed, problem.clone()),
        Phase::Void => (v1::fence_worker_response::Phase::Unspecified, String::new()),
    };
    let vm = |(id, fate): (&pageport_proto::VmId, &Fate)| {
        let heir = fate.heir.as_ref();
        v1::FencedVm {
            vm_id: id.to_string(),
            name: fate.name.clone(),
            to_site: heir.map(|heir| heir.site.to_string()).unwrap_or_default(),
            to_worker: heir.map(|heir| heir.worker.to_string()).unwrap_or_default(),
            problem: heir.err().cloned().unwrap_or_default(),
            taken_over: fate.taken_over,
        }
    };
    v1::FenceWorkerResponse {
        phase: phase.into(),
        worker: progress.worker.to_string(),
        agent: progress.agent.clone(),
        agent_output: progress.output.clone(),
        problem,
        vms: progress.vms.iter().map(vm).collect(),
    }
}
