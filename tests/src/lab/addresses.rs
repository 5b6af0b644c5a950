//! Where the daemons of each site listen, and where others reach them.
//!
//! | | with namespaces | on the loopback |
//! |---|---|---|
//! | address | the site's own, 10.77.n.1 | 127.0.0.1 |
//! | ports | the usual ones | free ones, other ones in each run |
//! | worker's QUIC, for others | where it listens | the relay's face |
//! | QEMU's own migration | where it listens | the relay's door |

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use rand::Rng;

use super::network::{Network, SITES};
use crate::baseline::MIGRATION_PORT;

/// Port of the controllers' API.
pub const API_PORT: u16 = 7400;
/// Port of the controllers' web interface.
pub const WEB_PORT: u16 = 7480;
/// Port of the workers' gRPC.
pub const WORKER_PORT: u16 = 7500;
/// Port of the workers' QUIC, over which memory and disks travel.
pub const PEER_PORT: u16 = 7501;

/// Ports of the loopback are picked from here: below those that the system hands out by itself.
const FREE_PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Attempts to find a free one.
const MAX_ATTEMPTS: usize = 1000;

/// The addresses of one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteAddresses {
    /// The controller's API.
    pub api: SocketAddr,
    /// The controller's web interface.
    pub web: SocketAddr,
    /// The worker's gRPC.
    pub grpc: SocketAddr,
    /// The worker's QUIC.
    pub peer: SocketAddr,
    /// Where other workers reach it, when that is elsewhere.
    pub advertised_peer: Option<SocketAddr>,
    /// Where QEMU takes its own migrations.
    pub migration: SocketAddr,
}

/// The addresses of all sites, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses([SiteAddresses; SITES.len()]);

impl Addresses {
    /// Of sites with a namespace each.
    #[must_use]
    pub fn of_namespaces() -> Self {
        Self(SITES.map(|site| {
            let at = |port| SocketAddr::from((Network::host_address(site), port));
            SiteAddresses {
                api: at(API_PORT),
                web: at(WEB_PORT),
                grpc: at(WORKER_PORT),
                peer: at(PEER_PORT),
                advertised_peer: None,
                migration: at(MIGRATION_PORT),
            }
        }))
    }

    /// Of sites on the loopback: all different, and free just now.
    ///
    /// # Errors
    /// When there are not enough.
    pub fn on_loopback() -> io::Result<Self> {
        let mut taken = BTreeSet::new();
        let mut sites = Self::of_namespaces();
        for SiteAddresses { api, web, grpc, peer, migration, .. } in &mut sites.0 {
            for address in [api, web, grpc, peer, migration] {
                *address = free_address(&mut taken)?;
            }
        }
        Ok(sites)
    }

    /// Those of one site; the first's when there is no such site.
    #[must_use]
    pub fn of(&self, site: &str) -> &SiteAddresses {
        &self.0[position(site)]
    }

    /// Those of one site, to be changed.
    pub(super) fn of_mut(&mut self, site: &str) -> &mut SiteAddresses {
        &mut self.0[position(site)]
    }

    /// `host:port` of every controller's API.
    #[must_use]
    pub fn controllers(&self) -> Vec<String> {
        self.0.iter().map(|site| site.api.to_string()).collect()
    }
}

fn position(site: &str) -> usize {
    SITES.iter().position(|name| *name == site).unwrap_or_default()
}

fn free_address(taken: &mut BTreeSet<u16>) -> io::Result<SocketAddr> {
    for _ in 0..MAX_ATTEMPTS {
        let port = rand::rng().random_range(FREE_PORTS);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if !taken.contains(&port) && TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            taken.insert(port);
            return Ok(address);
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_the_loopback_are_all_different_and_can_be_had() {
        let addresses = Addresses::on_loopback().unwrap();
        let all: BTreeSet<_> = SITES
            .iter()
            .map(|site| addresses.of(site))
            .flat_map(|site| [site.api, site.web, site.grpc, site.peer, site.migration])
            .collect();
        assert_eq!(all.len(), 15);
        for address in all {
            assert!(address.ip().is_loopback());
            drop(TcpListener::bind(address).unwrap());
        }
    }
}
