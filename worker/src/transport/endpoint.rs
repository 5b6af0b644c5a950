//! The QUIC endpoint of a worker: one UDP socket, both server and client.
//!
//! A peer is known by its certificate: the dialling side verifies the name of the worker that it wants, the accepting
//! side demands a certificate of the same authority. Idle connections die after [`IDLE_LIMIT`], so a cut link is noticed
//! by both sides without a message.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use pageport_common::tls::{Identity, TlsError, certificate_ends, worker_name};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::CertificateDer;

/// A connection that hears nothing for this long is dead.
pub const IDLE_LIMIT: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(2);
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// What a stream's receiver lets the sender have in flight: more than a bandwidth-delay product of 1 Gbit/s and 100 ms.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// What a connection lets the peer have in flight, and what quinn buffers for sending: no stream may wait because another one has used this up. Each
/// bounds itself: by [`STREAM_WINDOW_BYTES`], by what the link carries (`migration::window`), by what a disk has in flight (`replica::session`).
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30;
/// Kernel buffers of the UDP socket, each way.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
const ALPN: &[&[u8]] = &[b"pageport/1"];

/// Why a peer could not be reached or heard.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The socket cannot be bound.
    #[error("bind the peer address {address}")]
    Bind {
        /// `listen.peer`.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The identity cannot be used.
    #[error("set up the peer endpoint")]
    Identity(#[from] TlsError),
    /// The identity's ciphers are not what QUIC needs.
    #[error("set up the peer endpoint")]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The address is not `IP:port`.
    #[error("peer address {address:?} of worker {worker} is not IP:port")]
    Address {
        /// The peer.
        worker: String,
        /// What was given.
        address: String,
    },
    /// Dialling could not even begin.
    #[error("dial worker {worker}")]
    Dial {
        /// The peer.
        worker: String,
        /// Why.
        #[source]
        source: quinn::ConnectError,
    },
    /// The handshake failed: unreachable, or a wrong certificate at either side.
    #[error("connect to worker {worker} at {address}")]
    Handshake {
        /// The peer.
        worker: String,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: quinn::ConnectionError,
    },
    /// No answer in time.
    #[error("worker {worker} at {address} did not answer within {} s: is the link up?", CONNECT_DEADLINE.as_secs())]
    Timeout {
        /// The peer.
        worker: String,
        /// Where.
        address: SocketAddr,
    },
    /// The connection ended while a stream was to be opened or accepted.
    #[error("the connection to the peer worker ended")]
    Lost(#[from] quinn::ConnectionError),
}

/// This worker's UDP socket for peers.
#[derive(Debug, Clone)]
pub struct PeerEndpoint {
    endpoint: quinn::Endpoint,
    client: quinn::ClientConfig,
    certificate_ends: Option<i64>,
}

impl PeerEndpoint {
    /// Binds the socket and starts to listen.
    ///
    /// # Errors
    /// [`TransportError::Bind`], or an identity that cannot be used.
    pub fn bind(address: SocketAddr, identity: &Identity) -> Result<Self, TransportError> {
        let transport = Arc::new(transport_config());
        let server_tls = QuicServerConfig::try_from(identity.rustls_server(ALPN)?)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server_tls));
        server.transport_config(transport.clone());
        let client_tls = QuicClientConfig::try_from(identity.rustls_client(ALPN)?)?;
        let mut client = quinn::ClientConfig::new(Arc::new(client_tls));
        client.transport_config(transport);
        let bound = bind_socket(address).and_then(|socket| {
            quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(server), socket, Arc::new(quinn::TokioRuntime))
        });
        let endpoint = bound.map_err(|source| TransportError::Bind { address, source })?;
        Ok(Self { endpoint, client, certificate_ends: identity.ends() })
    }

    /// Where it listens: the port, if it was bound to any.
    ///
    /// # Errors
    /// The system's.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// When this worker's certificate ends, in seconds since 1970; [`None`]: not known.
    pub fn certificate_ends(&self) -> Option<i64> {
        self.certificate_ends
    }

    /// Connects to a peer and verifies that it is the worker of that name.
    ///
    /// # Errors
    /// Unreachable, a wrong certificate, or no answer in time.
    pub async fn connect(&self, worker: &str, address: &str) -> Result<PeerConnection, TransportError> {
        let address: SocketAddr = address
            .parse()
            .map_err(|_| TransportError::Address { worker: worker.to_owned(), address: address.to_owned() })?;
        let connecting = self
            .endpoint
            .connect_with(self.client.clone(), address, &worker_name(worker))
            .map_err(|source| TransportError::Dial { worker: worker.to_owned(), source })?;
        match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(connection)) => Ok(PeerConnection { connection }),
            Ok(Err(source)) => Err(TransportError::Handshake { worker: worker.to_owned(), address, source }),
            Err(_) => Err(TransportError::Timeout { worker: worker.to_owned(), address }),
        }
    }

    /// The next peer that connects, after its handshake; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<PeerConnection> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let from = incoming.remote_address();
            match tokio::time::timeout(CONNECT_DEADLINE, incoming).await {
                Ok(Ok(connection)) => return Some(PeerConnection { connection }),
                Ok(Err(error)) => tracing::warn!(%from, %error, "peer refused"),
                Err(_) => tracing::warn!(%from, "peer did not finish its handshake"),
            }
        }
    }

    /// Closes all connections.
    pub fn close(&self) {
        self.endpoint.close(0u32.into(), b"worker stops");
    }
}

/// A connection to one peer.
#[derive(Debug, Clone)]
pub struct PeerConnection {
    connection: quinn::Connection,
}

impl PeerConnection {
    /// Opens a bidirectional stream.
    ///
    /// # Errors
    /// [`TransportError::Lost`].
    pub async fn open_bi(&self, priority: i32) -> Result<(quinn::SendStream, quinn::RecvStream), TransportError> {
        let (send, recv) = self.connection.open_bi().await?;
        set_priority(&send, priority);
        Ok((send, recv))
    }

    /// Opens a stream towards the peer.
    ///
    /// # Errors
    /// [`TransportError::Lost`].
    pub async fn open_uni(&self, priority: i32) -> Result<quinn::SendStream, TransportError> {
        let send = self.connection.open_uni().await?;
        set_priority(&send, priority);
        Ok(send)
    }

    /// The next bidirectional stream that the peer opens.
    ///
    /// # Errors
    /// [`TransportError::Lost`].
    pub async fn accept_bi(&self) -> Result<(quinn::SendStream, quinn::RecvStream), TransportError> {
        Ok(self.connection.accept_bi().await?)
    }

    /// The next unidirectional stream that the peer opens.
    ///
    /// # Errors
    /// [`TransportError::Lost`].
    pub async fn accept_uni(&self) -> Result<quinn::RecvStream, TransportError> {
        Ok(self.connection.accept_uni().await?)
    }

    /// When the peer's certificate ends, in seconds since 1970; [`None`]: not known.
    pub fn peer_certificate_ends(&self) -> Option<i64> {
        let chain = self.connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        certificate_ends(chain.first()?)
    }

    /// UDP payload bytes sent so far, retransmissions and acknowledgements included.
    pub fn sent_bytes(&self) -> u64 {
        self.connection.stats().udp_tx.bytes
    }

    /// Smoothed round-trip time.
    pub fn round_trip(&self) -> Duration {
        self.connection.rtt()
    }

    /// What the congestion controller holds the path to be able to carry, in bytes per second.
    pub fn path_bytes_per_s(&self) -> u64 {
        let path = self.connection.stats().path;
        let rtt = path.rtt.as_secs_f64().max(0.000_1);
        (path.cwnd as f64 / rtt) as u64
    }

    /// Packets that were lost on the way there so far.
    pub fn lost_packets(&self) -> u64 {
        self.connection.stats().path.lost_packets
    }

    /// Closes the connection; the peer learns the reason.
    pub fn close(&self, reason: &str) {
        self.connection.close(0u32.into(), reason.as_bytes());
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> quinn::ConnectionError {
        self.connection.closed().await
    }
}

/// The system's own buffers hold fewer than a hundred packets: a burst that arrives while the processors are busy would be
/// lost there, and the congestion controller would take that for a narrow link (734 such losses held a 200 Mbit/s link
/// with 50 ms of round trip at 60 Mbit/s).
fn bind_socket(address: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    // Beyond the system's limit only with privileges; without them as much as it allows.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_BYTES)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_BYTES)?;
    }
    Ok(socket)
}

fn set_priority(stream: &quinn::SendStream, priority: i32) {
    if stream.set_priority(priority).is_err() {
        tracing::debug!(priority, "stream already closed");
    }
}

fn transport_config() -> quinn::TransportConfig {
    let mut config = quinn::TransportConfig::default();
    config
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE_LIMIT).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(CONNECTION_WINDOW_BYTES.into());
    config
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::test_support::Authority;

    #[tokio::test]
    async fn a_peer_of_another_name_or_authority_is_refused() {
        let authority = Authority::new();
        let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let server = PeerEndpoint::bind(loopback, &authority.worker("worker-b")).unwrap();
        let address = server.local_address().unwrap().to_string();
        let accepting = tokio::spawn(async move { server.accept().await.is_some() });

        let client = PeerEndpoint::bind(loopback, &authority.worker("worker-a")).unwrap();
        let wrong_name = client.connect("worker-c", &address).await;
        assert!(matches!(wrong_name, Err(TransportError::Handshake { .. })), "{wrong_name:?}");

        let stranger = PeerEndpoint::bind(loopback, &Authority::new().worker("worker-a")).unwrap();
        assert!(stranger.connect("worker-b", &address).await.is_err());

        let connected = client.connect("worker-b", &address).await.unwrap();
        assert!(accepting.await.unwrap());
        // rcgen's end of a certificate that names none.
        let year_4096 = Some(67_090_118_400);
        assert_eq!((client.certificate_ends(), connected.peer_certificate_ends()), (year_4096, year_4096));
    }
}
