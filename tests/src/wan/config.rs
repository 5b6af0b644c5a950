//! What the WAN emulator is told: sites with their devices, and the directed links between them.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::link::{Shape, ShapeError};

/// The device of each site that carries IP between hosts.
pub const TUN_DEVICE: &str = "ppwan";
/// The device of each site that carries the guests' Ethernet segment.
pub const TAP_DEVICE: &str = "ppseg";
/// Sites that one emulator serves at most.
pub const MAX_SITES: usize = 16;

/// An IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// Its first address.
    pub address: Ipv4Addr,
    /// Leading bits that its addresses share.
    pub prefix: u8,
}

impl Subnet {
    /// Whether `address` lies in it.
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        (self.address.to_bits() ^ address.to_bits()) & mask == 0
    }
}

/// A site and where its devices are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// Name of the site.
    pub name: String,
    /// Name of the network namespace that holds its devices; the emulator's own when absent.
    #[serde(default)]
    pub netns: Option<String>,
    /// Addresses that are reached through this site.
    pub subnet: Subnet,
}

/// One direction between two sites.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Source site.
    pub from: String,
    /// Destination site.
    pub to: String,
    /// What it is like.
    pub shape: Shape,
}

/// The whole emulator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WanConfig {
    /// The sites.
    pub sites: Vec<SiteConfig>,
    /// The directed links.
    pub links: Vec<LinkConfig>,
    /// Which packets are lost.
    #[serde(default)]
    pub seed: u64,
    /// Path of the unix socket that takes commands.
    pub control: PathBuf,
}

/// A configuration that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read wan configuration {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not such a configuration.
    #[error("parse wan configuration {path}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Too many sites.
    #[error("check wan configuration: {count} sites are more than {MAX_SITES}")]
    TooManySites {
        /// How many there are.
        count: usize,
    },
    /// A link names a site that is not there.
    #[error("check wan configuration: link {from} to {to} names a site that is not in `sites`")]
    UnknownSite {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
    },
    /// A link's numbers make no sense.
    #[error("check wan configuration: link {from} to {to}")]
    Shape {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
        /// Which number.
        #[source]
        source: ShapeError,
    },
}

impl WanConfig {
    /// A full mesh of equal links; site n (from 1) is 10.77.n.0/24.
    #[must_use]
    pub fn mesh<const N: usize>(names: [&str; N], shape: Shape, control: PathBuf) -> Self {
        let site = |(n, name): (u8, &&str)| SiteConfig {
            name: (*name).to_owned(),
            netns: None,
            subnet: Subnet { address: Ipv4Addr::new(10, 77, n, 0), prefix: 24 },
        };
        let pairs =
            names.iter().flat_map(|from| names.iter().map(move |to| (from, to))).filter(|(from, to)| from != to);
        Self {
            sites: (1..).zip(&names).map(site).collect(),
            links: pairs
                .map(|(from, to)| LinkConfig { from: (*from).to_owned(), to: (*to).to_owned(), shape })
                .collect(),
            seed: 1,
            control,
        }
    }

    /// Reads and validates a JSON file.
    ///
    /// # Errors
    /// When it cannot be read, parsed or served.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self =
            serde_json::from_slice(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.validate()?;
        Ok(config)
    }

    /// Whether it can be served.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.sites.len() > MAX_SITES {
            return Err(ConfigError::TooManySites { count: self.sites.len() });
        }
        for LinkConfig { from, to, shape } in &self.links {
            if ![from, to].iter().all(|name| self.sites.iter().any(|site| site.name == **name)) {
                return Err(ConfigError::UnknownSite { from: from.clone(), to: to.clone() });
            }
            shape.validate().map_err(|source| ConfigError::Shape { from: from.clone(), to: to.clone(), source })?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { rate_bps: 1_000_000, one_way_delay_ms: 5, loss: 0.0, queue_bytes: None };

    #[test]
    fn a_mesh_has_every_directed_pair_and_survives_json() {
        let config = WanConfig::mesh(["a", "b", "c"], SHAPE, "/tmp/x".into());
        assert_eq!(config.links.len(), 6);
        config.validate().unwrap();
        let text = serde_json::to_vec(&config).unwrap();
        assert_eq!(serde_json::from_slice::<WanConfig>(&text).unwrap(), config);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let mut config = WanConfig::mesh(["a", "b"], SHAPE, "/tmp/x".into());
        config.links[0].shape.loss = 1.5;
        assert!(matches!(config.validate(), Err(ConfigError::Shape { .. })));
        config.links[0].to = "x".into();
        assert!(matches!(config.validate(), Err(ConfigError::UnknownSite { .. })));
    }

    #[test]
    fn subnets_know_their_addresses() {
        let net = Subnet { address: Ipv4Addr::new(10, 77, 2, 0), prefix: 24 };
        assert!(net.contains(Ipv4Addr::new(10, 77, 2, 255)));
        assert!(!net.contains(Ipv4Addr::new(10, 77, 3, 0)));
        assert!(Subnet { prefix: 0, ..net }.contains(Ipv4Addr::LOCALHOST));
    }
}
