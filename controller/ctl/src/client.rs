//! Any controller that answers, with a deadline on everything.
//!
//! ```text
//!  call ─▶ controller 1 ──refused/unavailable──▶ controller 2 ── ... ──▶ all tried: wait a little, again ──▶ 15 s: give up
//!              └─ answer or a real refusal: done
//! ```
//! The caller's request is built once, so that a request id stays the same over all attempts and a command that was
//! taken but whose answer got lost is not applied twice. When no controller is reachable at all, one round is enough.
//!
//! Does not look for the leader: each controller forwards.

use std::time::Duration;

use pageport_common::tls::{CONTROLLER_NAME, Identity, TlsError};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::config::Settings;
use crate::reason::{self, Class, Reason};
use crate::trace::{Inject, Traced};

const CONNECT_DEADLINE: Duration = Duration::from_secs(4);
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// A leader election takes a few seconds.
const TOTAL_BUDGET: Duration = Duration::from_secs(15);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_DEADLINE: Duration = Duration::from_secs(5);

/// Why no controller did what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Our own certificate, key or authority cannot be used.
    #[error("load the operator's identity (--ca, --cert, --key)")]
    Identity {
        /// Which file, and why.
        #[from]
        source: TlsError,
    },
    /// An address that makes no URI, or TLS settings that cannot be used.
    #[error("set up the connection to {address}")]
    Endpoint {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// None could be reached, or none could take the command.
    #[error("no controller answered: {} (check --controllers, and that pageport-controller runs there)", list(tried))]
    NoAnswer {
        /// Each address with its reason.
        tried: Vec<(String, String)>,
    },
    /// A stream broke again and again.
    #[error("the watch was lost {} times in a row, last because: {reason}", crate::watch::MAX_LOSSES)]
    WatchLost {
        /// In an operator's words.
        reason: String,
    },
    /// A controller refused; its own words.
    #[error("{message}")]
    Refused {
        /// What it said.
        message: String,
    },
}

fn list(tried: &[(String, String)]) -> String {
    tried.iter().map(|(address, why)| format!("{address}: {why}")).collect::<Vec<_>>().join("; ")
}

/// A gRPC endpoint with mutual TLS, whose certificate must carry `server_name`.
///
/// # Errors
/// When the address makes no URI.
pub fn endpoint(address: &str, identity: &Identity, server_name: &str) -> Result<Endpoint, ClientError> {
    let failed = |source| ClientError::Endpoint { address: address.to_owned(), source };
    let endpoint = Endpoint::from_shared(format!("https://{address}")).map_err(failed)?;
    let endpoint = endpoint.tls_config(identity.tonic_client(server_name)).map_err(failed)?;
    Ok(endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_DEADLINE))
}

/// Connects within the deadline.
///
/// # Errors
/// The reason in an operator's words.
pub async fn connect(endpoint: &Endpoint) -> Result<Channel, Reason> {
    match timeout(CONNECT_DEADLINE, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(reason::explain(&error)),
        Err(_) => Err(Reason { text: "timed out".to_owned(), class: Class::Transient }),
    }
}

/// The controllers of one cluster.
pub struct Controllers {
    identity: Identity,
    endpoints: Vec<(String, Endpoint)>,
    // The one that answered last, with its open connection.
    current: usize,
    channel: Option<Channel>,
}

enum Attempt<T> {
    Answered(T),
    Unreachable(String),
    TryAgain(String),
}

impl Controllers {
    /// Reads the identity; connects to nobody yet.
    ///
    /// # Errors
    /// When the PEM files cannot be used.
    pub fn new(settings: &Settings) -> Result<Self, ClientError> {
        let identity = Identity::load(&settings.tls)?;
        let with_endpoint = |address: &String| Ok((address.clone(), endpoint(address, &identity, CONTROLLER_NAME)?));
        let endpoints = settings.controllers.iter().map(with_endpoint).collect::<Result<_, ClientError>>()?;
        Ok(Self { identity, endpoints, current: 0, channel: None })
    }

    /// Who we are, for connections to workers.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The controller that answered last proved unfit: begin with the next one.
    pub fn move_on(&mut self) {
        self.channel = None;
        self.current = (self.current + 1) % self.endpoints.len();
    }

    /// Asks one controller after the other until one answers. `operation` must ask the same each time.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with a controller's own words, or [`ClientError::NoAnswer`].
    pub async fn call<T, F, Fut>(&mut self, operation: F) -> Result<T, ClientError>
    where
        F: Fn(Traced) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + TOTAL_BUDGET;
        let mut backoff = FIRST_BACKOFF;
        loop {
            let mut tried = Vec::new();
            let mut somebody_lives = false;
            for _ in 0..self.endpoints.len() {
                let why = match self.attempt(&operation).await? {
                    Attempt::Answered(answer) => return Ok(answer),
                    Attempt::Unreachable(why) => why,
                    Attempt::TryAgain(why) => {
                        somebody_lives = true;
                        why
                    }
                };
                tried.push((self.endpoints[self.current].0.clone(), why));
                self.move_on();
            }
            if !somebody_lives || Instant::now() + backoff >= deadline {
                return Err(ClientError::NoAnswer { tried });
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    async fn attempt<T, F, Fut>(&mut self, operation: &F) -> Result<Attempt<T>, ClientError>
    where
        F: Fn(Traced) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => match connect(&self.endpoints[self.current].1).await {
                Ok(channel) => channel,
                Err(reason) => return Ok(Attempt::Unreachable(reason.text)),
            },
        };
        match timeout(CALL_DEADLINE, operation(Traced::new(channel.clone(), Inject))).await {
            Ok(Ok(response)) => {
                self.channel = Some(channel);
                Ok(Attempt::Answered(response.into_inner()))
            }
            Ok(Err(status)) => match judge(&status) {
                Verdict::Refused(message) => Err(ClientError::Refused { message }),
                Verdict::Failed(Reason { text, class: Class::Permanent }) => Ok(Attempt::Unreachable(text)),
                Verdict::Failed(Reason { text, class: Class::Transient }) => Ok(Attempt::TryAgain(text)),
            },
            Err(_) => Ok(Attempt::TryAgain(format!("no answer within {} s", CALL_DEADLINE.as_secs()))),
        }
    }
}

const UNKNOWN_COMMAND: &str = "it does not know this command: it is of another version, or a controller that waits for a backup \
                               (\"pageportctl cluster restore FILE --at HOST:PORT\")";

/// What a status means for us.
pub enum Verdict {
    /// The peer understood and said no.
    Refused(String),
    /// The peer did not get to answer, or could not just now.
    Failed(Reason),
}

/// Sorts a status into an answer and a failure to get one.
pub fn judge(status: &Status) -> Verdict {
    // A status with a source was made on our side, of a connection that broke.
    if let Some(source) = std::error::Error::source(status) {
        let mut reason = reason::explain(source);
        if status.code() == Code::Cancelled && reason.class == Class::Transient {
            // What is left of a TLS alert that came while the request was being written.
            reason.text = format!("it closed the connection ({}); it may not take our certificate", reason.text);
        }
        return Verdict::Failed(reason);
    }
    let message = match status.message() {
        "" if status.code() == Code::Unimplemented => UNKNOWN_COMMAND.to_owned(),
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    };
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted => {
            Verdict::Failed(Reason { text: message, class: Class::Transient })
        }
        _ => Verdict::Refused(message),
    }
}
