//! Talks to a guest, over TCP or a serial port: commands, and (over TCP) sessions with the counting server that survive moves.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use pageport_guest::protocol::{CONTROL_PORT, COUNTER_PORT, Reply, Request};
use tokio::time::{Instant, timeout, timeout_at};

use super::line::{Line, SerialPort};

/// The pause between attempts to reach a guest that boots.
const RETRY: Duration = Duration::from_millis(200);
/// How long a guest that listens to its serial port may take for its first answer.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// How long a guest's serial port may take to be found after a move.
const FOLLOW_DEADLINE: Duration = Duration::from_secs(30);

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
    /// Nobody answers at its serial port.
    #[error("reach guest over its serial port ({port:?})")]
    Attach {
        /// Which port.
        port: SerialPort,
        /// What the last attempt met.
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

async fn connect(namespace: &str, address: SocketAddr) -> Result<Line, GuestError> {
    Line::over_tcp(namespace, address).await.map_err(|source| GuestError::Connect { address, source })
}

/// A connection to the guest's control server.
#[derive(Debug)]
pub struct GuestClient {
    line: Line,
    port: Option<SerialPort>,
}

impl GuestClient {
    /// Connects from `namespace`, trying again until `deadline` has passed: the guest may still be booting.
    ///
    /// # Errors
    /// The last attempt's, when none succeeded.
    pub async fn connect(namespace: &str, guest: Ipv4Addr, deadline: Duration) -> Result<Self, GuestError> {
        let end = Instant::now() + deadline;
        loop {
            match connect(namespace, SocketAddr::from((guest, CONTROL_PORT))).await {
                Ok(line) => return Ok(Self { line, port: None }),
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Attaches to a guest's serial port and asks until it answers or `deadline` has passed: it may still be booting.
    ///
    /// # Errors
    /// What the last attempt met, when none succeeded.
    pub async fn attach(port: SerialPort, deadline: Duration) -> Result<Self, GuestError> {
        let end = Instant::now() + deadline;
        loop {
            match Self::attach_once(&port, end).await {
                Ok(line) => return Ok(Self { line, port: Some(port) }),
                Err(source) if Instant::now() >= end => return Err(GuestError::Attach { port, source }),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn attach_once(port: &SerialPort, end: Instant) -> io::Result<Line> {
        let mut line = Line::over_serial(port).await?;
        let question = serde_json::to_string(&Request::Uptime)?;
        loop {
            match timeout(FIRST_ANSWER, line.exchange(&question)).await {
                Ok(Ok(answer)) => {
                    serde_json::from_str::<Reply>(&answer)?;
                    return Ok(line);
                }
                Ok(Err(error)) => return Err(error),
                Err(_) if Instant::now() >= end => return Err(io::ErrorKind::TimedOut.into()),
                // It was not listening yet.
                Err(_) => {}
            }
        }
    }

    /// To be called after the guest has moved: a TCP connection has moved with it, a serial port is attached to anew.
    ///
    /// # Errors
    /// When the guest does not answer at its new place.
    pub async fn follow(&mut self) -> Result<(), GuestError> {
        if let Some(port) = self.port.clone() {
            *self = Self::attach(port, FOLLOW_DEADLINE).await?;
        }
        Ok(())
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// When the guest refuses, is late, or the connection breaks.
    pub async fn call(&mut self, request: &Request, deadline: Duration) -> Result<Reply, GuestError> {
        let what = format!("{request:?}");
        let talk = |source| GuestError::Talk { what: what.clone(), source };
        let line = serde_json::to_string(request).map_err(|error| talk(error.into()))?;
        let reply = timeout(deadline, self.line.exchange(&line))
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
    line: Line,
    last: Option<u64>,
}

impl CountingSession {
    /// Opens the session from `namespace`.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub async fn open(namespace: &str, guest: Ipv4Addr) -> Result<Self, GuestError> {
        let line = connect(namespace, SocketAddr::from((guest, COUNTER_PORT))).await?;
        Ok(Self { line, last: None })
    }

    /// Asks for the next number and checks that it follows the last one, since this is the only session.
    ///
    /// # Errors
    /// When the session broke, the answer is late, or a number was lost or given twice.
    pub async fn next(&mut self, deadline: Duration) -> Result<u64, GuestError> {
        let what = String::from("the next number");
        let late = GuestError::Late { what: what.clone(), seconds: deadline.as_secs() };
        let reply = timeout_at(Instant::now() + deadline, self.line.exchange("next")).await.map_err(|_| late)?;
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
