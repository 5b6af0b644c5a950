//! Listens in one place and serves exports to whoever connects.
//!
//! Guarantees: the place is listened at when [`NbdServer::bind`] or [`NbdServer::offer`] returns; when [`NbdServer::close`] returns
//! every connection is closed, no call to a target is under way, and a socket's file is gone. Closing is also the way
//! to free a QEMU that waits for a target that hangs. A dropped server closes soon, in the background.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::either::Either;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::BlockTarget;
use super::connection::{REQUEST_DEADLINE, serve};
use super::negotiation::{ConnectionError, Offer, Outcome, negotiate};
use super::protocol::MAX_NAME_BYTES;

/// Most clients at once, further ones wait: a mirror and someone who looks, or a reader for each of a VM's disks.
const MAX_CONNECTIONS: usize = 8;
/// A listener that cannot accept (too many open files, a client that left at once) tries again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
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
    /// Nobody can listen there.
    #[error("listen for NBD on {place}")]
    Listen {
        /// Where.
        place: Place,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A unix socket. A file left there by an earlier worker is replaced.
    Socket(PathBuf),
    /// TCP; port 0: the system chooses one.
    Address(SocketAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// Exports being served.
#[derive(Debug)]
pub struct NbdServer {
    place: Place,
    task: JoinHandle<()>,
    stop: DropGuard,
}

impl NbdServer {
    /// Starts to serve `target` as `export` on a unix socket.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn bind<T: BlockTarget>(socket: &Path, export: &str, target: Arc<T>) -> Result<Self, ExportError> {
        Self::offer(Place::Socket(socket.to_owned()), vec![(export.to_owned(), target)])
    }

    /// Starts to serve these exports, by their names.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn offer<T: BlockTarget>(place: Place, exports: Vec<(String, Arc<T>)>) -> Result<Self, ExportError> {
        if let Some((name, _)) = exports.iter().find(|(name, _)| name.len() > MAX_NAME_BYTES) {
            return Err(ExportError::Name { length: name.len() });
        }
        let (listener, place) = match Listener::bind(&place) {
            Ok(bound) => bound,
            Err(source) => return Err(ExportError::Listen { place, source }),
        };
        let stop = CancellationToken::new();
        let (stopped, listens) = (stop.clone(), place.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let requests = TaskTracker::new();
            stopped.run_until_cancelled(accept(listener, exports.into(), &mut connections, &requests)).await;
            connections.shutdown().await;
            requests.close();
            requests.wait().await;
            if let Place::Socket(path) = listens {
                let _ = std::fs::remove_file(path);
            }
        });
        Ok(Self { place, task, stop: stop.drop_guard() })
    }

    /// Where it listens; a port that the system chose is named.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Ends every connection at once and stops listening.
    pub async fn close(self) {
        drop(self.stop);
        // The task ends at its next await, and does not fail.
        let _ = self.task.await;
    }
}

/// Either kind of listener.
#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

type Stream = Either<UnixStream, TcpStream>;

impl Listener {
    fn bind(place: &Place) -> io::Result<(Self, Place)> {
        match place {
            Place::Socket(path) => {
                match std::fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                Ok((Self::Unix(UnixListener::bind(path)?), place.clone()))
            }
            Place::Address(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let place = Place::Address(listener.local_addr()?);
                Ok((Self::Tcp(TcpListener::from_std(listener)?), place))
            }
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Either::Left(stream)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Either::Right(stream))
            }
        }
    }
}

async fn accept<T: BlockTarget>(
    listener: Listener,
    exports: Arc<[(String, Arc<T>)]>,
    connections: &mut JoinSet<()>,
    requests: &TaskTracker,
) {
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok(stream) => drop(connections.spawn(converse(stream, exports.clone(), requests.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "NBD server cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse<T: BlockTarget>(mut stream: Stream, exports: Arc<[(String, Arc<T>)]>, requests: TaskTracker) {
    let offer =
        |(name, target): &(String, Arc<T>)| Offer { name: name.clone(), size: target.size(), access: target.access() };
    let offers: Vec<_> = exports.iter().map(offer).collect();
    let talk = async {
        let agreed = tokio::time::timeout(NEGOTIATION_DEADLINE, negotiate(&mut stream, &offers))
            .await
            .map_err(|_| ConnectionError::Slow { operation: "negotiate" })??;
        match agreed {
            Outcome::Transmission(chosen) => {
                let target = exports[chosen].1.clone();
                serve(stream, target, requests, REQUEST_DEADLINE).await
            }
            Outcome::Aborted => Ok(()),
        }
    };
    let exports = offers.iter().map(|offer| offer.name.as_str()).collect::<Vec<_>>().join(", ");
    match talk.await {
        Ok(()) => tracing::debug!(exports, "NBD client has left"),
        Err(error) => tracing::warn!(exports, error = &error as &dyn std::error::Error, "NBD connection ended"),
    }
}
