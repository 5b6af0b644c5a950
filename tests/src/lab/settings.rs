//! The daemons' configuration files: the examples of `deploy/config`, with what the lab must set put over them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::POOL;
use super::addresses::Addresses;
use super::network::SITES;
use super::tls::Identity;
use crate::paths;

/// Why a configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file cannot be read.
    #[error("read configuration {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is no TOML.
    #[error("parse configuration {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: toml::de::Error,
    },
}

/// What all daemons of a lab share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Where spans go.
    pub otlp_endpoint: Option<String>,
    /// What is logged.
    pub log: String,
    /// `auto`, `kvm` or `tcg`.
    pub accelerator: String,
    /// Whether guests get huge pages that are free.
    pub huge_pages: bool,
    /// How long a lease lasts.
    pub lease_ms: u32,
    /// What workers leave free on the file system of their data; [`None`]: as in the example.
    pub reserve_bytes: Option<u32>,
    /// Block devices that replicas may be made on.
    pub devices: Vec<PathBuf>,
    /// Where everybody is.
    pub addresses: Addresses,
}

/// The configuration of the controller at a site.
pub fn controller(site: &str, data: &Path, identity: &Identity, shared: &Shared) -> Result<String, SettingsError> {
    let mut config = example("controller")?;
    let addresses = shared.addresses.of(site);
    set(&mut config, "id", member_id(site));
    set(&mut config, "site", site);
    set(&mut config, "data_dir", path(data));
    set(&mut config, "listen", socket_addresses(&[("api", addresses.api), ("web", addresses.web)]));
    let members = SITES.iter().zip(shared.addresses.controllers()).map(|(site, address)| {
        let mut member = Table::new();
        set(&mut member, "id", member_id(site));
        set(&mut member, "site", *site);
        set(&mut member, "address", address);
        Value::Table(member)
    });
    set(&mut config, "members", members.collect::<Vec<_>>());
    set(section(&mut config, "lease"), "lease_ms", i64::from(shared.lease_ms));
    set_common(&mut config, identity, shared);
    Ok(config.to_string())
}

/// The configuration of a controller that takes the place of all others, made from that of the one at its site.
///
/// # Errors
/// [`SettingsError::Parse`].
pub fn only_controller(before: &Path, site: &str, data: &Path) -> Result<String, SettingsError> {
    let mut config = read(before)?;
    let id = member_id(site) + SITES.len() as i64;
    set(&mut config, "id", id);
    set(&mut config, "data_dir", path(data));
    let members = config.get("members").and_then(Value::as_array).cloned().unwrap_or_default();
    let itself = members.into_iter().filter_map(|member| match member {
        Value::Table(mut member) if member.get("site").and_then(Value::as_str) == Some(site) => {
            set(&mut member, "id", id);
            Some(Value::Table(member))
        }
        _ => None,
    });
    set(&mut config, "members", itself.collect::<Vec<_>>());
    Ok(config.to_string())
}

/// The configuration of the worker at a site.
pub fn worker(
    site: &str,
    data: &Path,
    runtime: &Path,
    identity: &Identity,
    shared: &Shared,
    pool: Option<&Path>,
) -> Result<String, SettingsError> {
    let mut config = example("worker")?;
    set(&mut config, "name", worker_name(site));
    set(&mut config, "site", site);
    set(&mut config, "data_dir", path(data));
    set(&mut config, "runtime_dir", path(runtime));
    set(&mut config, "controllers", shared.addresses.controllers());
    let addresses = shared.addresses.of(site);
    set(&mut config, "listen", socket_addresses(&[("grpc", addresses.grpc), ("peer", addresses.peer)]));
    if let Some(peer) = addresses.advertised_peer {
        set(&mut config, "advertise", socket_addresses(&[("peer", peer)]));
    }
    let hypervisor = section(&mut config, "hypervisor");
    set(hypervisor, "accelerator", shared.accelerator.as_str());
    set(hypervisor, "huge_pages", if shared.huge_pages { "if-free" } else { "never" });
    if let Some(bytes) = shared.reserve_bytes {
        set(section(&mut config, "replication"), "reserve_bytes", i64::from(bytes));
    }
    if !shared.devices.is_empty() {
        let devices: Vec<_> = shared.devices.iter().map(|device| path(device)).collect();
        set(section(&mut config, "replication"), "devices", devices);
    }
    if let Some(folder) = pool {
        let mut pool = Table::new();
        set(&mut pool, "name", POOL);
        set(&mut pool, "path", path(folder));
        set(&mut config, "pools", vec![Value::Table(pool)]);
    }
    set_common(&mut config, identity, shared);
    Ok(config.to_string())
}

/// The name of a site's controller.
#[must_use]
pub fn controller_name(site: &str) -> String {
    format!("controller-{}", member_id(site))
}

/// The name of a site's worker.
#[must_use]
pub fn worker_name(site: &str) -> String {
    format!("worker-{site}")
}

/// The id of a site's controller, from 1.
#[must_use]
pub fn member_id(site: &str) -> i64 {
    SITES.iter().zip(1..).find_map(|(name, id)| (*name == site).then_some(id)).unwrap_or(0)
}

fn set_common(config: &mut Table, identity: &Identity, shared: &Shared) {
    let mut tls = Table::new();
    for (key, file) in [("ca", &identity.ca), ("cert", &identity.cert), ("key", &identity.key)] {
        set(&mut tls, key, path(file));
    }
    set(config, "tls", tls);
    let telemetry = section(config, "telemetry");
    set(telemetry, "log", shared.log.as_str());
    match &shared.otlp_endpoint {
        Some(endpoint) => set(telemetry, "otlp_endpoint", endpoint.as_str()),
        None => drop(telemetry.remove("otlp_endpoint")),
    }
}

fn section<'a>(config: &'a mut Table, key: &str) -> &'a mut Table {
    let entry = config.entry(key).or_insert_with(|| Value::Table(Table::new()));
    if !entry.is_table() {
        *entry = Value::Table(Table::new());
    }
    match entry {
        Value::Table(table) => table,
        _ => unreachable!("it was made a table just now"),
    }
}

fn socket_addresses(addresses: &[(&str, SocketAddr)]) -> Table {
    addresses.iter().map(|(key, address)| ((*key).to_owned(), Value::from(address.to_string()))).collect()
}

fn set(table: &mut Table, key: &str, value: impl Into<Value>) {
    table.insert(key.to_owned(), value.into());
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn example(daemon: &str) -> Result<Table, SettingsError> {
    read(&paths::root().join(format!("deploy/config/{daemon}.toml")))
}

fn read(path: &Path) -> Result<Table, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.into(), source })?;
    text.parse().map_err(|source| SettingsError::Parse { path: path.into(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { ca: "/t/ca.pem".into(), cert: "/t/x.pem".into(), key: "/t/x.key".into() }
    }

    fn shared() -> Shared {
        let addresses = Addresses::of_namespaces();
        let (log, accelerator) = ("debug".into(), "auto".into());
        Shared {
            otlp_endpoint: None,
            log,
            accelerator,
            huge_pages: false,
            lease_ms: 10_000,
            reserve_bytes: None,
            devices: vec![],
            addresses,
        }
    }

    #[test]
    fn a_controller_knows_itself_and_all_members() {
        let shared = shared();
        let config: Table = controller("b", Path::new("/d"), &identity(), &shared).unwrap().parse().unwrap();
        assert_eq!(config["id"].as_integer(), Some(2));
        assert_eq!(config["listen"]["api"].as_str(), Some("10.77.2.1:7400"));
        let members = config["members"].as_array().unwrap();
        assert_eq!(members.len(), 3);
        assert_eq!(members[2]["address"].as_str(), Some("10.77.3.1:7400"));
        assert_eq!(config["telemetry"]["log"].as_str(), Some("debug"));
        assert!(config["telemetry"].get("otlp_endpoint").is_none());
    }

    #[test]
    fn a_controller_that_is_alone_has_another_number_and_knows_only_itself() {
        let before = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(before.path(), controller("b", Path::new("/d"), &identity(), &shared()).unwrap()).unwrap();
        let config: Table = only_controller(before.path(), "b", Path::new("/n")).unwrap().parse().unwrap();
        let members = config["members"].as_array().unwrap();
        assert_eq!((config["id"].as_integer(), members.len()), (Some(5), 1));
        assert_eq!((members[0]["id"].as_integer(), members[0]["address"].as_str()), (Some(5), Some("10.77.2.1:7400")));
        assert_eq!((config["data_dir"].as_str(), config["site"].as_str()), (Some("/n"), Some("b")));
    }

    #[test]
    fn a_worker_knows_every_controller() {
        let mut shared = Shared { accelerator: "tcg".into(), otlp_endpoint: Some("http://x:1".into()), ..shared() };
        let text = worker("c", Path::new("/d"), Path::new("/r"), &identity(), &shared, None).unwrap();
        let config: Table = text.parse().unwrap();
        assert_eq!(config["name"].as_str(), Some("worker-c"));
        assert_eq!(config["controllers"].as_array().unwrap().len(), 3);
        assert_eq!(config["listen"]["peer"].as_str(), Some("10.77.3.1:7501"));
        assert_eq!(config["hypervisor"]["accelerator"].as_str(), Some("tcg"));
        assert_eq!(config["telemetry"]["otlp_endpoint"].as_str(), Some("http://x:1"));
        assert_eq!(config["tls"]["key"].as_str(), Some("/t/x.key"));
        assert!(config.get("advertise").is_none());

        shared.addresses.of_mut("c").advertised_peer = Some(SocketAddr::from(([127, 0, 0, 1], 9)));
        let pool = Some(Path::new("/p"));
        let text = worker("c", Path::new("/d"), Path::new("/r"), &identity(), &shared, pool).unwrap();
        let config: Table = text.parse().unwrap();
        assert_eq!(config["pools"][0]["path"].as_str(), Some("/p"));
        assert_eq!(config["advertise"]["peer"].as_str(), Some("127.0.0.1:9"));
    }
}
