//! The hypervisor's migration stream at its source: begun towards a socket of ours, and given up.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::convergence::USUAL_PAUSE;
use crate::hypervisor::migrate::{AutoConverge, SourceSettings};
use crate::hypervisor::{HypervisorError, Vm};

/// The hypervisor has this long to connect to our socket.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const CANCEL_LIMIT: Duration = Duration::from_secs(20);

/// Why the stream did not begin.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The socket.
    #[error("listen for the hypervisor's migration stream")]
    Socket(#[source] io::Error),
    /// The hypervisor.
    #[error("have the hypervisor migrate")]
    Hypervisor(#[from] HypervisorError),
    /// It did not come.
    #[error("the hypervisor's connection took longer than {} s", limit.as_secs())]
    TooLong {
        /// The limit.
        limit: Duration,
    },
}

/// Has the hypervisor connect to a socket of ours; it is to take the link to carry `first_bytes_per_s` until it is told more, and can
/// slow its guest down with [`AutoConverge::On`].
///
/// # Errors
/// The socket cannot be made, or the hypervisor does not come.
pub async fn begin(qemu: &Vm, first_bytes_per_s: u64, auto_converge: AutoConverge) -> Result<UnixStream, StreamError> {
    let path = qemu.paths().outgoing();
    remove_socket(&path)?;
    let listener = tokio::net::UnixListener::bind(&path).map_err(StreamError::Socket)?;
    let settings =
        SourceSettings { downtime_limit: USUAL_PAUSE, switchover_bandwidth: first_bytes_per_s, auto_converge };
    let accepted = tokio::time::timeout(CONNECT_LIMIT, async {
        let (ordered, accepted) = tokio::join!(qemu.migrate_to(&path, settings), listener.accept());
        ordered?;
        let (stream, _) = accepted.map_err(StreamError::Socket)?;
        let stream = stream.into_std().map_err(StreamError::Socket)?;
        stream.set_nonblocking(false).map_err(StreamError::Socket)?;
        Ok(stream)
    });
    let limit = CONNECT_LIMIT;
    let outcome = accepted.await.map_err(|_| StreamError::TooLong { limit })?;
    remove_socket(&path)?;
    outcome
}

/// Removes the socket, if it is there.
///
/// # Errors
/// The system's.
pub fn remove_socket(path: &Path) -> Result<(), StreamError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StreamError::Socket(error)),
        _ => Ok(()),
    }
}

/// Gives the hypervisor's migration up, wherever it is.
pub async fn cancel(qemu: &Vm) {
    let under_way = qemu.marks().borrow().migration.is_some_and(|status| !status.is_final());
    if !under_way {
        return;
    }
    if let Err(error) = qemu.cancel_migration().await {
        tracing::warn!(%error, "the hypervisor's migration could not be cancelled");
        return;
    }
    let ended = async { qemu.marks().wait_for(|marks| marks.migration.is_none_or(|s| s.is_final())).await.is_ok() };
    if tokio::time::timeout(CANCEL_LIMIT, ended).await.is_err() {
        tracing::warn!("the hypervisor's migration has not ended after it was cancelled");
    }
}
