//! Requests on their way to the leader: any node takes them, the leader answers them.
//!
//! A node that does not lead passes the whole HTTP exchange on over mTLS, streams included, and marks it, so that two
//! nodes that take each other for the leader do not play ball. What a node answers itself is not layered with this.
//!
//! Guarantees: a request is passed on once at most; waiting for a leader has a limit. It does not repeat a request: the
//! client does, with the same request id.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::Response;
use tonic::Status;
use tonic::transport::Channel;
use tower::{Service, ServiceExt};

use crate::consensus::Consensus;
use crate::dial::Directory;
use crate::peer::{self, CALLER_KEY};

const FORWARDED: &str = "pageport-forwarded";
/// An election takes one to two seconds.
const LEADER_WITHIN: Duration = Duration::from_secs(4);

/// Knows the way to each member.
#[derive(Debug, Clone)]
pub struct Forwarder {
    consensus: Consensus,
    directory: Arc<Directory>,
}

impl Forwarder {
    /// Finds the others here.
    pub fn new(consensus: Consensus, directory: Directory) -> Self {
        Self { consensus, directory: Arc::new(directory) }
    }

    async fn leader(&self) -> Option<u64> {
        let mut status = self.consensus.watch_status();
        let found = tokio::time::timeout(LEADER_WITHIN, status.wait_for(|status| status.leader.is_some())).await;
        found.ok().and_then(Result::ok).and_then(|status| status.leader)
    }
}

/// Serves the request here, or passes it on.
pub async fn forward(State(forwarder): State<Forwarder>, request: Request, next: Next) -> Response {
    let Some(leader) = forwarder.leader().await else {
        let reason = "the controllers have no leader: is a majority of them running and connected?";
        return refusal(Status::unavailable(reason));
    };
    if leader == forwarder.consensus.status().id {
        return next.run(request).await;
    }
    if request.headers().contains_key(FORWARDED) {
        return refusal(Status::unavailable("the leader has just changed: try again"));
    }
    let Some(channel) = forwarder.directory.channel(leader) else {
        let reason =
            format!("controller {leader} leads, and its address is not known here yet: ask another controller");
        return refusal(Status::unavailable(reason));
    };
    pass_on(leader, channel, request).await
}

async fn pass_on(leader: u64, mut channel: Channel, mut request: Request) -> Response {
    let caller = peer::name_of(request.extensions());
    let headers = request.headers_mut();
    for name in [header::HOST, header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.remove(CALLER_KEY);
    headers.insert(FORWARDED, HeaderValue::from_static("1"));
    if let Some(caller) = caller.and_then(|name| HeaderValue::try_from(name).ok()) {
        headers.insert(CALLER_KEY, caller);
    }
    *request.version_mut() = Version::HTTP_2;
    let request = request.map(tonic::body::Body::new);
    let answer = match channel.ready().await {
        Ok(channel) => channel.call(request).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(response) => response.map(axum::body::Body::new),
        Err(error) => {
            tracing::info!(leader, %error, "a request could not be passed on");
            refusal(Status::unavailable(format!("the leading controller {leader} cannot be reached: try again")))
        }
    }
}

fn refusal(status: Status) -> Response {
    status.into_http::<axum::body::Body>()
}
