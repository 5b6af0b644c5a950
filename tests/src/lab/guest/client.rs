//! Talks to a guest from a site's namespace: commands, and sessions with the counting server that survive moves.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use pageport_guest::protocol::{CONTROL_PORT, COUNTER_PORT, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::netns;

/// The longest reply.
const MAX_REPLY_BYTES: u64 = 1024 * 1024;
/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// The pause between attempts to reach a guest that boots.
const RETRY: Duration = Duration::from_millis(200);

/// Why the guest did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It cannot be reached.
    #[error("reach guest at {address}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("talk to guest: {what}")]
    Talk {
        /// What was being done.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("wait for guest: no answer to {what} within {seconds} s")]
    Late {
        /// What was asked.
        what: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The guest said no.
    #[error("guest refused {what}: {reason}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why.
        reason: String,
    },
    /// An answer to another question.
    #[error("guest answered {what} with {reply}")]
    Unexpected {
        /// What was asked.
        what: String,
        /// What came.
        reply: String,
    },
}

#[derive(Debug)]
struct Lines {
    stream: BufReader<TcpStream>,
}

impl Lines {
    async fn connect(namespace: &str, address: SocketAddr) -> Result<Self, GuestError> {
        let error = |source| GuestError::Connect { address, source };
        let namespace = namespace.to_owned();
        let connect = move || std::net::TcpStream::connect_timeout(&address, CONNECT_DEADLINE);
        let stream = tokio::task::spawn_blocking(move || netns::within(&namespace, connect))
            .await
            .map_err(|join| error(io::Error::other(join)))?
            .and_then(|result| result)
            .map_err(error)?;
        stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).map_err(error)?;
        Ok(Self { stream: BufReader::new(TcpStream::from_std(stream).map_err(error)?) })
    }

    async fn exchange(&mut self, line: &str) -> io::Result<String> {
        self.stream.write_all(format!("{line}\n").as_bytes()).await?;
        let mut reply = String::new();
        (&mut self.stream).take(MAX_REPLY_BYTES).read_line(&mut reply).await?;
        if !reply.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(reply.trim_end().to_owned())
    }
}

/// A connection to the guest's control server.
#[derive(Debug)]
pub struct GuestClient {
    lines: Lines,
}

impl GuestClient {
    /// Connects from `namespace`, trying again until `deadline` has passed: the guest may still be booting.
    ///
    /// # Errors
    /// The last attempt's, when none succeeded.
    pub async fn connect(namespace: &str, guest: Ipv4Addr, deadline: Duration) -> Result<Self, GuestError> {
        let end = Instant::now() + deadline;
        loop {
            match Lines::connect(namespace, SocketAddr::from((guest, CONTROL_PORT))).await {
                Ok(lines) => return Ok(Self { lines }),
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// When the guest refuses, is late, or the connection breaks.
    pub async fn call(&mut self, request: &Request, deadline: Duration) -> Result<Reply, GuestError> {
        let what = format!("{request:?}");
        let talk = |source| GuestError::Talk { what: what.clone(), source };
        let line = serde_json::to_string(request).map_err(|error| talk(error.into()))?;
        let reply = timeout(deadline, self.lines.exchange(&line))
            .await
            .map_err(|_| GuestError::Late { what: what.clone(), seconds: deadline.as_secs() })?
            .map_err(talk)?;
        match serde_json::from_str(&reply).map_err(|error| talk(error.into()))? {
            Reply::Refused { reason } => Err(GuestError::Refused { what, reason }),
            reply => Ok(reply),
        }
    }

    /// Asks for a digest.
    ///
    /// # Errors
    /// As [`GuestClient::call`].
    pub async fn checksum(&mut self, request: &Request, deadline: Duration) -> Result<String, GuestError> {
        match self.call(request, deadline).await? {
            Reply::Checksum { blake3, .. } => Ok(blake3),
            reply => Err(unexpected(request, &reply)),
        }
    }

    /// One figure of `/proc/meminfo`, in bytes; 0 when the kernel does not give it.
    ///
    /// # Errors
    /// As [`GuestClient::call`].
    pub async fn meminfo(&mut self) -> Result<std::collections::BTreeMap<String, u64>, GuestError> {
        match self.call(&Request::Meminfo, Duration::from_secs(20)).await? {
            Reply::Meminfo { bytes } => Ok(bytes),
            reply => Err(unexpected(&Request::Meminfo, &reply)),
        }
    }

    /// Seconds since boot, what names the boot, and the kernel's release.
    ///
    /// # Errors
    /// As [`GuestClient::call`].
    pub async fn uptime(&mut self) -> Result<(f64, String, String), GuestError> {
        match self.call(&Request::Uptime, Duration::from_secs(20)).await? {
            Reply::Uptime { seconds, boot_id, kernel } => Ok((seconds, boot_id, kernel)),
            reply => Err(unexpected(&Request::Uptime, &reply)),
        }
    }
}

fn unexpected(request: &Request, reply: &Reply) -> GuestError {
    GuestError::Unexpected { what: format!("{request:?}"), reply: format!("{reply:?}") }
}

/// One TCP session with the counting server, to be kept over a move.
#[derive(Debug)]
pub struct CountingSession {
    lines: Lines,
    last: Option<u64>,
}

impl CountingSession {
    /// Opens the session from `namespace`.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub async fn open(namespace: &str, guest: Ipv4Addr) -> Result<Self, GuestError> {
        let lines = Lines::connect(namespace, SocketAddr::from((guest, COUNTER_PORT))).await?;
        Ok(Self { lines, last: None })
    }

    /// Asks for the next number and checks that it follows the last one, since this is the only session.
    ///
    /// # Errors
    /// When the session broke, the answer is late, or a number was lost or given twice.
    pub async fn next(&mut self, deadline: Duration) -> Result<u64, GuestError> {
        let what = String::from("the next number");
        let late = GuestError::Late { what: what.clone(), seconds: deadline.as_secs() };
        let reply = timeout_at(Instant::now() + deadline, self.lines.exchange("next")).await.map_err(|_| late)?;
        let reply = reply.map_err(|source| GuestError::Talk { what: what.clone(), source })?;
        match reply.parse() {
            Ok(number) if self.last.is_none_or(|last| last + 1 == number) => {
                self.last = Some(number);
                Ok(number)
            }
            _ => Err(GuestError::Unexpected { what: format!("{what} after {:?}", self.last), reply }),
        }
    }
}
