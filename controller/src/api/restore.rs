//! A restore that is ordered over the network: of a controller without data, which waits for it.
//!
//! ```text
//!   --await-restore ─▶ this service alone ─▶ file, in parts ─▶ data ─▶ the same process goes on as a controller
//! ```
//! Guarantees: one restore at a time; nothing is made of a file that did not come whole. A controller that has data refuses.

use std::path::Path;
use std::sync::Arc;

use pageport_common::backup::Assembly;
use pageport_common::error::with_causes;
use pageport_proto::v1;
use pageport_proto::v1::restore_service_server::RestoreService;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::backup::{Backup, Restored, restore};
use crate::config::Config;
use crate::peer;

/// Longest file; a fleet of 10,000 VMs has some 10 MB.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Makes a controller's data, or refuses.
#[derive(Debug, Clone)]
pub struct Restores(Option<Arc<Awaiting>>);

/// A controller that waits for its data.
#[derive(Debug)]
struct Awaiting {
    config: Config,
    done: CancellationToken,
    turn: Mutex<()>,
}

impl Restores {
    /// Of a controller that has data.
    pub fn refused() -> Self {
        Self(None)
    }

    /// Of one that has none; `done` is cancelled when it has.
    pub fn awaited(config: Config, done: CancellationToken) -> Self {
        Self(Some(Arc::new(Awaiting { config, done, turn: Mutex::default() })))
    }
}

#[tonic::async_trait]
impl RestoreService for Restores {
    async fn restore(
        &self,
        request: Request<Streaming<v1::RestoreRequest>>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let operator = peer::operator(&request)?;
        let Some(awaiting) = self.0.clone() else { return Err(has_data()) };
        let file = collect(request.into_inner()).await?;
        let _turn = awaiting.turn.lock().await;
        if awaiting.done.is_cancelled() {
            return Err(has_data());
        }
        let config = awaiting.config.clone();
        let made =
            tokio::task::spawn_blocking(move || restore(&config, Backup::parse(&file, Path::new("as it was sent"))?));
        let made = made.await.map_err(|error| Status::internal(error.to_string()))?;
        let restored = made.map_err(|error| Status::failed_precondition(with_causes(&error)))?;
        tracing::warn!(operator, generation = restored.generation.0, vms = restored.vms, "restored from a backup");
        awaiting.done.cancel();
        Ok(Response::new(restored.into()))
    }
}

impl From<Restored> for v1::RestoreResponse {
    fn from(restored: Restored) -> Self {
        Self {
            generation: restored.generation.0.into(),
            vms_unknown: restored.vms as u32,
            awaited_workers: restored.workers,
        }
    }
}

fn has_data() -> Status {
    Status::failed_precondition(
        "this controller has data: a restore begins with one that has none and was started with \"pageport-controller --await-restore\"",
    )
}

async fn collect(mut parts: Streaming<v1::RestoreRequest>) -> Result<Vec<u8>, Status> {
    let mut assembly = Assembly::default();
    while let Some(v1::RestoreRequest { chunk, total_bytes, offset }) = parts.message().await? {
        if total_bytes > MAX_FILE_BYTES || assembly.take(offset, &chunk, total_bytes).is_err() {
            return Err(Status::invalid_argument("the parts of the backup do not fit together: send it again"));
        }
    }
    assembly.into_file().ok_or_else(|| Status::invalid_argument("the backup ended early: send it again"))
}
