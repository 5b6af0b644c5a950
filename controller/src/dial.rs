//! [`Dialer`] and [`Directory`]: the ways to the other controllers, wherever they are now.
//!
//! A connection is made when it is first used, kept alive, and made again by itself. When a member's address changes the next
//! request goes to the new one.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pageport_common::tls::{CONTROLLER_NAME, Identity};
use tonic::transport::{Channel, Endpoint};

use crate::consensus::Consensus;

const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Between signs of life on a connection, on either side.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// An address or the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("prepare the connection to {address}")]
pub struct DialError {
    /// The address.
    address: String,
    /// Why.
    #[source]
    source: tonic::transport::Error,
}

/// Makes connections with this controller's certificate.
#[derive(Debug, Clone)]
pub struct Dialer {
    identity: Identity,
}

impl Dialer {
    /// With this certificate.
    pub fn new(identity: Identity) -> Self {
        Self { identity }
    }

    /// A lazy, kept-alive mTLS channel to a controller.
    ///
    /// # Errors
    /// [`DialError`].
    pub fn dial(&self, address: &str) -> Result<Channel, DialError> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| endpoint.tls_config(self.identity.tonic_client(CONTROLLER_NAME)))
            .map_err(|source| DialError { address: address.to_owned(), source })?;
        Ok(endpoint
            .connect_timeout(CONNECT_WITHIN)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy())
    }
}

/// Where the members are, with open connections.
#[derive(Debug)]
pub struct Directory {
    dialer: Dialer,
    consensus: Consensus,
    open: Mutex<BTreeMap<u64, (String, Channel)>>,
}

impl Directory {
    /// Of the members that this node knows.
    pub fn new(dialer: Dialer, consensus: Consensus) -> Self {
        Self { dialer, consensus, open: Mutex::default() }
    }

    /// A connection to a member; [`None`]: its address is not known here, or cannot be used.
    pub fn channel(&self, member: u64) -> Option<Channel> {
        let membership = self.consensus.membership();
        let (known, _) = membership.get(member)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((address, channel)) = open.get(&member)
            && *address == known.address
        {
            return Some(channel.clone());
        }
        match self.dialer.dial(&known.address) {
            Ok(channel) => {
                open.insert(member, (known.address.clone(), channel.clone()));
                Some(channel)
            }
            Err(error) => {
                tracing::error!(member, error = &error as &dyn std::error::Error, "controller not dialled");
                None
            }
        }
    }
}
