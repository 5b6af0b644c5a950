//! The worker's configuration: `worker.toml`, validated. `deploy/config/worker.toml` is the commented example.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use pageport_common::config::ConfigError;
use pageport_common::telemetry::TelemetryConfig;
use pageport_common::tls::TlsPaths;
use pageport_proto::{PoolName, SiteName, WorkerName};
use serde::Deserialize;

use crate::hypervisor::{HugePages, keeper};
use crate::memory::KeepConfig;
use crate::pool::config::{PoolConfig, RawPool, pools};

/// The file as written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    name: String,
    site: String,
    data_dir: PathBuf,
    runtime_dir: PathBuf,
    controllers: Vec<String>,
    listen: RawListen,
    #[serde(default)]
    advertise: RawAdvertise,
    tls: TlsPaths,
    #[serde(default)]
    hypervisor: HypervisorConfig,
    #[serde(default)]
    replication: ReplicationConfig,
    #[serde(default)]
    pools: Vec<RawPool>,
    #[serde(default)]
    migration: RawMigration,
    #[serde(default)]
    drill: DrillConfig,
    #[serde(default)]
    telemetry: TelemetryConfig,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    grpc: SocketAddr,
    peer: SocketAddr,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAdvertise {
    grpc: Option<SocketAddr>,
    peer: Option<SocketAddr>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMigration {
    keep_memory: bool,
}

impl Default for RawMigration {
    fn default() -> Self {
        Self { keep_memory: true }
    }
}

/// Where others reach this worker: as it listens, unless `[advertise]` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advertised {
    /// For consoles.
    pub grpc: SocketAddr,
    /// For other workers.
    pub peer: SocketAddr,
}

/// `[hypervisor]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HypervisorConfig {
    /// The binary.
    pub qemu: String,
    /// The keeper's program: a path, or a name that is looked for beside the worker's program and in `PATH`.
    pub keeper: String,
    /// The tool that makes raw files of qcow2 images; needed only where there are such.
    pub qemu_img: String,
    /// What runs the guests.
    pub accelerator: AcceleratorChoice,
    /// What guests' memory is made of.
    pub huge_pages: HugePages,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".to_owned(),
            keeper: keeper::PROGRAM.to_owned(),
            qemu_img: "qemu-img".to_owned(),
            accelerator: AcceleratorChoice::Auto,
            huge_pages: HugePages::Never,
        }
    }
}

/// `[replication]`: how much disk may be used for it; bounds over all VMs are those of the default pool, `data_dir`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicationConfig {
    /// Old bytes kept while a point of a VM is copied away, in bytes; a point that needs more is given up and tried again.
    pub scratch_bytes: u64,
    /// Journals and older recovery points of one VM's replica, in bytes; the oldest points go first.
    pub points_bytes: u64,
    /// Scratch of all VMs together, in bytes; [`None`]: as much as each may have.
    pub all_scratch_bytes: Option<u64>,
    /// Journals and older recovery points of all VMs' replicas together, in bytes; [`None`]: as much as each may have.
    pub all_points_bytes: Option<u64>,
    /// All replicas that lie in `data_dir` together, in bytes; [`None`]: as much as there is.
    pub replicas_bytes: Option<u64>,
    /// Left free on the file system of `data_dir`, and of pools that say nothing else, in bytes.
    pub reserve_bytes: u64,
    /// The pool that scratch of the VMs that run here lies in; [`None`]: the default one.
    pub scratch_pool: Option<String>,
    /// Block devices, and folders of such, that replicas may be made on where an operator asks for it; absolute.
    pub devices: Vec<PathBuf>,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            scratch_bytes: 16 << 30,
            points_bytes: 64 << 30,
            all_scratch_bytes: None,
            all_points_bytes: None,
            replicas_bytes: None,
            reserve_bytes: 1 << 30,
            scratch_pool: None,
            devices: vec![],
        }
    }
}

/// `[drill]`: recovery points that are opened for reading.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrillConfig {
    /// Older states of one VM that are kept only because a point is open, in bytes; at the bound the oldest open point ends.
    pub held_bytes: u64,
    /// Addresses of this host on which open points may be read besides the loopback: by anyone who reaches them.
    pub listen: Vec<IpAddr>,
}

impl Default for DrillConfig {
    fn default() -> Self {
        Self { held_bytes: 16 << 30, listen: vec![] }
    }
}

/// `hypervisor.accelerator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM if a guest really runs under it, else software emulation.
    Auto,
    /// KVM, unchecked.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// A configuration that can work.
#[derive(Debug, Clone)]
pub struct Config {
    /// This worker.
    pub name: WorkerName,
    /// Its site.
    pub site: SiteName,
    /// Durable records and replicas.
    pub data_dir: PathBuf,
    /// Sockets and pid files; gone after a reboot.
    pub runtime_dir: PathBuf,
    /// `host:port` of every controller.
    pub controllers: Vec<String>,
    /// mTLS gRPC for operators (console).
    pub grpc: SocketAddr,
    /// QUIC for other workers.
    pub peer: SocketAddr,
    /// What the others are told.
    pub advertised: Advertised,
    /// This worker's identity.
    pub tls: TlsPaths,
    /// The hypervisor.
    pub hypervisor: HypervisorConfig,
    /// Disk for replication.
    pub replication: ReplicationConfig,
    /// Where it lies: the default pool first.
    pub pools: Vec<PoolConfig>,
    /// The one of them that scratch lies in.
    pub scratch_pool: PoolName,
    /// Memory of VMs that have moved away.
    pub keep_memory: KeepConfig,
    /// Open recovery points.
    pub drill: DrillConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

/// A unix socket's path must fit into 107 bytes; this is what the longest one adds to `runtime_dir`.
const LONGEST_SOCKET_BYTES: usize = "/vm/01234567-89ab-cdef-0123-456789abcdef/nbd-01234567890123456789.sock".len();
const SOCKET_PATH_LIMIT: usize = 107;

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let invalid = |key, problem: String| ConfigError::Invalid { key, problem };
        if raw.controllers.is_empty() {
            return Err(invalid("controllers", "name at least one controller, as \"IP:7400\"".to_owned()));
        }
        for (key, path) in [("data_dir", &raw.data_dir), ("runtime_dir", &raw.runtime_dir)] {
            if !path.is_absolute() {
                return Err(invalid(key, format!("{} is not an absolute path", path.display())));
            }
        }
        if let Some(path) = raw.replication.devices.iter().find(|path| !path.is_absolute()) {
            return Err(invalid("replication.devices", format!("{} is not an absolute path", path.display())));
        }
        let socket_bytes = raw.runtime_dir.as_os_str().len() + LONGEST_SOCKET_BYTES;
        if socket_bytes > SOCKET_PATH_LIMIT {
            let room = SOCKET_PATH_LIMIT - LONGEST_SOCKET_BYTES;
            let problem =
                format!("{} is too long for unix sockets below it: at most {room} bytes", raw.runtime_dir.display());
            return Err(invalid("runtime_dir", problem));
        }
        let (pools, scratch_pool) = pools(&raw.data_dir, &raw.replication, raw.pools)?;
        Ok(Self {
            name: raw.name.parse().map_err(|error| invalid("name", format!("{error}")))?,
            site: raw.site.parse().map_err(|error| invalid("site", format!("{error}")))?,
            data_dir: raw.data_dir,
            runtime_dir: raw.runtime_dir,
            controllers: raw.controllers,
            grpc: raw.listen.grpc,
            peer: raw.listen.peer,
            advertised: Advertised {
                grpc: raw.advertise.grpc.unwrap_or(raw.listen.grpc),
                peer: raw.advertise.peer.unwrap_or(raw.listen.peer),
            },
            tls: raw.tls,
            hypervisor: raw.hypervisor,
            keep_memory: KeepConfig { keep: raw.migration.keep_memory, reserve_bytes: raw.replication.reserve_bytes },
            replication: raw.replication,
            pools,
            scratch_pool,
            drill: raw.drill,
            telemetry: raw.telemetry,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../deploy/config/worker.toml");

    fn parse(text: &str) -> Config {
        read(text).unwrap()
    }

    fn read(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, text).unwrap();
        pageport_common::config::load::<RawConfig>(&path).unwrap().try_into()
    }

    #[test]
    fn open_points_are_read_on_the_loopback_only_unless_addresses_are_named() {
        assert_eq!(parse(EXAMPLE).drill, DrillConfig::default());
        let named = parse(&EXAMPLE.replace("# listen = [\"192.0.2.1\"]", "listen = [\"192.0.2.1\"]"));
        assert_eq!(named.drill.listen, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(named.drill.held_bytes, 16 << 30);
    }

    #[test]
    fn replicas_lie_on_no_devices_and_have_no_quota_unless_that_is_said() {
        assert_eq!(parse(EXAMPLE).replication, ReplicationConfig::default());
        let said = EXAMPLE.replace("# devices = [", "devices = [").replacen("# replicas_bytes", "replicas_bytes", 1);
        let ReplicationConfig { devices, replicas_bytes, .. } = parse(&said).replication;
        assert_eq!((devices, replicas_bytes), (vec![PathBuf::from("/dev/vg0/")], Some(1 << 40)));
        let relative = said.replace("/dev/vg0/", "vg0");
        let refused = read(&relative).unwrap_err().to_string();
        assert!(refused.contains("replication.devices") && refused.contains("absolute"), "{refused}");
    }

    fn with_replication(keys: &str) -> String {
        EXAMPLE.replace("\n[replication]\n", &format!("\n[replication]\n{keys}\n"))
    }

    const POOLS: &str = r#"
        [[pools]]
        name = "ssd"
        path = "/srv/ssd/pageport"
        replicas_bytes = 4096
        [[pools]]
        name = "hdd"
        path = "/srv/hdd"
        reserve_bytes = 0
    "#;

    #[test]
    fn pools_have_bounds_of_their_own_and_the_data_folder_is_the_first_of_them() {
        let alone = parse(EXAMPLE);
        let [of_data] = &alone.pools[..] else { panic!("{:?}", alone.pools) };
        assert_eq!((of_data.name.clone(), &of_data.path), (PoolName::default(), &alone.data_dir));
        assert!(alone.scratch_pool.is_default());
        let scratch = with_replication("scratch_pool = \"ssd\"\nreplicas_bytes = 1");
        let Config { pools, scratch_pool, .. } = parse(&format!("{scratch}{POOLS}"));
        let told: Vec<_> = pools.iter().map(|pool| (pool.name.as_str(), pool.limits.replicas_bytes)).collect();
        assert_eq!(told, [("default", Some(1)), ("ssd", Some(4096)), ("hdd", None)]);
        let reserves: Vec<_> = pools.iter().map(|pool| pool.limits.reserve_bytes).collect();
        assert_eq!((reserves, scratch_pool.as_str()), (vec![1 << 30, 1 << 30, 0], "ssd"));
    }

    #[test]
    fn the_commented_pool_of_the_example_parses() {
        let said = EXAMPLE.replace("# [[pools]]", "[[pools]]").replace("# name = \"ssd\"", "name = \"ssd\"");
        let said = said.replace("# path = ", "path = ").replace("# scratch_pool", "scratch_pool");
        let Config { pools, scratch_pool, .. } = parse(&said);
        assert_eq!((pools[1].name.as_str(), scratch_pool.as_str()), ("ssd", "ssd"));
    }

    #[test]
    fn pools_that_cannot_be_meant_are_refused_with_the_fix() {
        let cases = [
            ("\"hdd\"", "\"ssd\"", "two pools are called \"ssd\""),
            ("\"hdd\"", "\"default\"", "give this one another name"),
            ("\"hdd\"", "\"Fast One\"", "use 1 to 40 of a-z"),
            ("/srv/hdd", "srv/hdd", "not an absolute path"),
            ("/srv/hdd", "/srv/ssd/../ssd", "without \"..\""),
            ("/srv/hdd", "/srv/ssd", "of pool \"ssd\" lie in one another"),
            ("/srv/hdd", "/srv/ssd/pageport/hdd", "give each a folder of its own"),
            ("/srv/hdd", "/var/lib/pageport/worker/hdd", "of data_dir lie in one another"),
            ("/srv/hdd", "/var/lib", "of data_dir lie in one another"),
        ];
        for (from, to, words) in cases {
            let refused = read(&format!("{EXAMPLE}{}", POOLS.replace(from, to))).unwrap_err().to_string();
            assert!(refused.contains("`pools.") && refused.contains(words), "{refused}");
        }
        let pool = |number| format!("\n[[pools]]\nname = \"p{number}\"\npath = \"/srv/p{number}\"\n");
        let many = |count| read(&format!("{EXAMPLE}{}", (0..count).map(pool).collect::<String>()));
        assert_eq!(many(63).unwrap().pools.len(), 64);
        assert!(many(64).unwrap_err().to_string().contains("name 63 at most"));
        let unknown = with_replication("scratch_pool = \"tape\"");
        let refused = read(&format!("{unknown}{POOLS}")).unwrap_err().to_string();
        assert!(refused.contains("replication.scratch_pool") && refused.contains("default, ssd, hdd"), "{refused}");
    }

    #[test]
    fn a_worker_is_told_to_others_as_it_listens_unless_it_advertises_another_address() {
        let Config { grpc, peer, advertised, .. } = parse(EXAMPLE);
        assert_eq!(advertised, Advertised { grpc, peer });
        let config = parse(&format!("{EXAMPLE}\n[advertise]\npeer = \"198.51.100.7:9000\"\n"));
        assert_eq!(config.advertised, Advertised { grpc, peer: "198.51.100.7:9000".parse().unwrap() });
        assert_eq!(config.peer, peer);
    }
}
