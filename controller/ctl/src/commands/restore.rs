//! `cluster restore`: what the controller's own program does, on its host.

use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::error::CtlError;
use crate::render::Output;

const CONTROLLER: &str = "pageport-controller";

/// Has the controller of this host make its data from a backup.
pub async fn run(output: Output, file: &Path, config: &Path) -> Result<(), CtlError> {
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
