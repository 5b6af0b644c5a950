//! `cluster restore`: what the controller's own program does on its host, or a controller that waits for it elsewhere.

use std::ops::Range;
use std::path::{Path, PathBuf};

use pageport_common::backup;
use pageport_proto::v1;
use pageport_proto::v1::restore_service_client::RestoreServiceClient;
use tokio::process::Command;

use super::Context;
use crate::error::CtlError;
use crate::render::{Output, cluster};

const CONTROLLER: &str = "pageport-controller";

/// Sends a backup to the controller that waits for it.
pub(super) async fn there(context: &mut Context, file: &Path) -> Result<(), CtlError> {
    let bytes = std::fs::read(file).map_err(|source| CtlError::NoBackup { path: file.to_owned(), source })?;
    let damaged = |source| CtlError::BackupUnusable { path: file.to_owned(), source };
    backup::open(&bytes).map_err(damaged)?;
    let response = context.controllers.call(|channel| {
        let parts = parts(&bytes);
        async move { RestoreServiceClient::new(channel).restore(tokio_stream::iter(parts)).await }
    });
    let response = response.await?;
    context.output.message(&response, cluster::restored_elsewhere)
}

fn parts(file: &[u8]) -> Vec<v1::RestoreRequest> {
    let part = |part: Range<usize>| v1::RestoreRequest {
        offset: part.start as u64,
        total_bytes: file.len() as u64,
        chunk: file[part].to_vec().into(),
    };
    backup::parts(file.len()).map(part).collect()
}

/// Has the controller of this host make its data from a backup.
pub async fn here(output: Output, file: &Path, config: &Path) -> Result<(), CtlError> {
    let program = controller();
    let mut command = Command::new(&program);
    command.arg("--config").arg(config).arg("--restore").arg(file).env_remove("RUST_BACKTRACE");
    let done = command.output().await.map_err(|source| CtlError::NoController { program, source })?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !done.status.success() {
        let said = said(&done.stderr);
        return Err(CtlError::NotRestored { said: said.strip_prefix("Error: ").unwrap_or(&said).to_owned() });
    }
    let said = said(&done.stdout);
    if output.is_json() {
        return output.text(&format!("{}\n", serde_json::json!({ "restored": true, "said": said })));
    }
    output.text(&format!("{said}\n"))
}

/// The one that was installed beside this program, else the one that the shell would find.
fn controller() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|itself| itself.with_file_name(CONTROLLER));
    beside.filter(|program| program.exists()).unwrap_or_else(|| CONTROLLER.into())
}
