//! `qemu-img convert`: the whole image, each time, of a guest that does not run. What one has without bitmaps.

use std::path::Path;
use std::process::{Child, Stdio};

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::BenchError;
use super::export::Export;
use super::meter::{Cost, Reading, SOURCE, cpu_time};
use crate::lab::network::Network;

/// What is known of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// It is new: holes need not be sent.
    Zero,
    /// It holds something.
    Used,
}

/// Copies an image with as many requests under way as the tool allows.
///
/// # Errors
/// When the tool fails.
pub async fn convert(network: &Network, disk: &Path, export: &Export, target: Target) -> Result<Cost, BenchError> {
    let mut command = network.place(SOURCE).command("qemu-img");
    command.args(["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"]);
    if target == Target::Zero {
        command.arg("--target-is-zero");
    }
    command.arg(disk).arg(export.url()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let begin = Reading::take(network)?;
    let child = command.spawn().map_err(BenchError::Convert)?;
    let waited = tokio::task::spawn_blocking(move || wait(child)).await.map_err(std::io::Error::other);
    let cpu = waited.flatten().map_err(BenchError::Convert)?;
    let mut cost = begin.until_now(network)?;
    cost.cpu += cpu;
    Ok(cost)
}

/// Waits, and looks at the time that it took before the system forgets it.
fn wait(mut child: Child) -> std::io::Result<std::time::Duration> {
    let pid = i32::try_from(child.id()).map_err(std::io::Error::other)?;
    waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    let cpu = cpu_time(pid);
    let status = child.wait()?;
    if status.success() { cpu } else { Err(std::io::Error::other(format!("it ended with {status}"))) }
}
