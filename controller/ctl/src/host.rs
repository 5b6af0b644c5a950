//! The way to one worker, for what only it can do: consoles and drills.

use std::time::Duration;

use pageport_common::tls::{Identity, worker_name};
use pageport_proto::v1::Worker;
use pageport_proto::v1::host_service_client::HostServiceClient;
use tokio::time::timeout;
use tonic::{Response, Status};

use crate::client::{self, ClientError, Verdict, judge};
use crate::trace::{Inject, Traced};

/// Why a worker did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It cannot be reached.
    #[error("reach {worker} at {address}: {reason}")]
    Unreachable {
        /// The worker.
        worker: String,
        /// Its address.
        address: String,
        /// In an operator's words.
        reason: String,
    },
    /// It said no, or broke off.
    #[error("{worker}: {message}")]
    Refused {
        /// The worker.
        worker: String,
        /// Its words.
        message: String,
    },
    /// The connection cannot be set up.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Connects to a worker where it says that it listens.
///
/// # Errors
/// [`HostError`].
pub async fn connect(identity: &Identity, worker: &Worker) -> Result<HostServiceClient<Traced>, HostError> {
    let endpoint = client::endpoint(&worker.grpc_address, identity, &worker_name(&worker.name))?;
    let channel = client::connect(&endpoint).await.map_err(|reason| unreachable(worker, reason.text))?;
    Ok(HostServiceClient::with_interceptor(channel, Inject))
}

/// Waits for a worker's answer.
///
/// # Errors
/// [`HostError`]; also when there is none in time.
pub async fn answer<T>(
    worker: &Worker,
    limit: Duration,
    asked: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, HostError> {
    match timeout(limit, asked).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refusal(worker, &status)),
        Err(_) => Err(unreachable(worker, format!("no answer within {} s", limit.as_secs()))),
    }
}

/// What a worker said instead of an answer.
pub fn refusal(worker: &Worker, status: &Status) -> HostError {
    let message = match judge(status) {
        Verdict::Refused(message) => message,
        Verdict::Failed(reason) => reason.text,
    };
    HostError::Refused { worker: worker.name.clone(), message }
}

/// It cannot be reached, or does not answer.
pub fn unreachable(worker: &Worker, reason: String) -> HostError {
    HostError::Unreachable { worker: worker.name.clone(), address: worker.grpc_address.clone(), reason }
}
