//! Listens on a unix socket and serves one export to whoever connects.
//!
//! Guarantees: the socket exists, and is listening, when [`NbdServer::bind`] returns; when [`NbdServer::close`] returns
//! every connection is closed, no call to the target is under way, and the socket's file is gone. Closing is also the way
//! to free a QEMU that waits for a target that hangs. A dropped server closes soon, in the background.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::BlockTarget;
use super::connection::{REQUEST_DEADLINE, serve};
use super::negotiation::{ConnectionError, Outcome, negotiate};
use super::protocol::MAX_NAME_BYTES;

/// Most clients at once: one mirror, and someone who looks.
const MAX_CONNECTIONS: usize = 4;
/// Time for a client to begin transmission.
const NEGOTIATION_DEADLINE: Duration = Duration::from_secs(10);

/// Why a disk is not offered.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The name is too long.
    #[error("NBD export name of {length} bytes, more than {MAX_NAME_BYTES}")]
    Name {
        /// Its length.
        length: usize,
    },
    /// The socket cannot be made.
    #[error("listen for NBD on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An export being served.
#[derive(Debug)]
pub struct NbdServer {
    socket: PathBuf,
    task: JoinHandle<()>,
    stop: DropGuard,
}

impl NbdServer {
    /// Starts to serve `target` as `export`. A socket file left there by an earlier worker is replaced.
    pub fn bind<T: BlockTarget>(socket: &Path, export: &str, target: Arc<T>) -> Result<Self, ExportError> {
        if export.len() > MAX_NAME_BYTES {
            return Err(ExportError::Name { length: export.len() });
        }
        let failed = |source| ExportError::Listen { path: socket.to_owned(), source };
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(failed)?;
        let stop = CancellationToken::new();
        let (stopped, path, export) = (stop.clone(), socket.to_owned(), export.to_owned());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let requests = TaskTracker::new();
            stopped.run_until_cancelled(accept(listener, export, target, &mut connections, &requests)).await;
            connections.shutdown().await;
            requests.close();
            requests.wait().await;
            let _ = std::fs::remove_file(&path);
        });
        Ok(Self { socket: socket.to_owned(), task, stop: stop.drop_guard() })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends every connection at once and stops listening.
    pub async fn close(self) {
        drop(self.stop);
        // The task ends at its next await, and does not fail.
        let _ = self.task.await;
    }
}

async fn accept<T: BlockTarget>(
    listener: UnixListener,
    export: String,
    target: Arc<T>,
    connections: &mut JoinSet<()>,
    requests: &TaskTracker,
) {
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, export.clone(), Arc::clone(&target), requests.clone()));
                }
                Err(error) => {
                    tracing::error!(error = %error, "NBD server cannot accept");
                    return;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse<T: BlockTarget>(mut stream: UnixStream, export: String, target: Arc<T>, requests: TaskTracker) {
    let talk = async {
        let agreed = tokio::time::timeout(NEGOTIATION_DEADLINE, negotiate(&mut stream, &export, target.size()))
            .await
            .map_err(|_| ConnectionError::Slow { operation: "negotiate" })??;
        match agreed {
            Outcome::Transmission => serve(stream, target, requests, REQUEST_DEADLINE).await,
            Outcome::Aborted => Ok(()),
        }
    };
    match talk.await {
        Ok(()) => tracing::debug!(export, "NBD client has left"),
        Err(error) => tracing::warn!(export, error = &error as &dyn std::error::Error, "NBD connection ended"),
    }
}
