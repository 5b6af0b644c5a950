//! `[[pools]]` of worker.toml, and the default pool, whose bounds stand in `[replication]`.

use std::path::{Component, Path, PathBuf};

use pageport_common::config::ConfigError;
use pageport_proto::PoolName;
use pageport_proto::ids::MAX_POOLS;
use serde::Deserialize;

use crate::config::ReplicationConfig;

/// How much may lie in a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolLimits {
    /// All replicas, in bytes; [`None`]: as much as there is.
    pub replicas_bytes: Option<u64>,
    /// Journals and older recovery points of all VMs, in bytes; [`None`]: as much as each may have.
    pub all_points_bytes: Option<u64>,
    /// Scratch of all VMs, in bytes; [`None`]: as much as each may have.
    pub all_scratch_bytes: Option<u64>,
    /// Left free on its file system, in bytes.
    pub reserve_bytes: u64,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Its name.
    pub name: PoolName,
    /// Its folder; absolute.
    pub path: PathBuf,
    /// How much may lie there.
    pub limits: PoolLimits,
}

/// `[[pools]]` as written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPool {
    name: String,
    path: PathBuf,
    replicas_bytes: Option<u64>,
    all_points_bytes: Option<u64>,
    all_scratch_bytes: Option<u64>,
    reserve_bytes: Option<u64>,
}

/// All pools, the default one first, and the one that scratch lies in.
///
/// # Errors
/// What cannot be meant, with the fix.
pub fn pools(
    data_dir: &Path,
    replication: &ReplicationConfig,
    raw: Vec<RawPool>,
) -> Result<(Vec<PoolConfig>, PoolName), ConfigError> {
    let limits = PoolLimits {
        replicas_bytes: replication.replicas_bytes,
        all_points_bytes: replication.all_points_bytes,
        all_scratch_bytes: replication.all_scratch_bytes,
        reserve_bytes: replication.reserve_bytes,
    };
    if raw.len() >= MAX_POOLS {
        let problem = format!("there are {} besides data_dir: name {} at most", raw.len(), MAX_POOLS - 1);
        return Err(invalid("pools", problem));
    }
    let mut pools = vec![PoolConfig { name: PoolName::default(), path: data_dir.to_owned(), limits }];
    for raw in raw {
        let pool = pool(raw, replication.reserve_bytes)?;
        must_be_apart(&pool, &pools)?;
        pools.push(pool);
    }
    let scratch = replication.scratch_pool.as_deref().map_or(Ok(PoolName::default()), str::parse);
    let scratch = scratch.map_err(|error| invalid("replication.scratch_pool", error.to_string()))?;
    if pools.iter().any(|pool| pool.name == scratch) {
        return Ok((pools, scratch));
    }
    let known = pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>().join(", ");
    let problem =
        format!("there is no pool \"{scratch}\"; there are: {known}. Choose one of these, or name it under [[pools]]");
    Err(invalid("replication.scratch_pool", problem))
}

fn pool(raw: RawPool, reserve_bytes: u64) -> Result<PoolConfig, ConfigError> {
    let RawPool { name, path, replicas_bytes, all_points_bytes, all_scratch_bytes, .. } = raw;
    let name: PoolName = name.parse().map_err(|error| invalid("pools.name", format!("{error}")))?;
    let plain = path.is_absolute() && path.components().all(|part| part != Component::ParentDir);
    if !plain {
        let problem = format!("{} of pool \"{name}\" is not an absolute path without \"..\"", path.display());
        return Err(invalid("pools.path", problem));
    }
    let reserve_bytes = raw.reserve_bytes.unwrap_or(reserve_bytes);
    Ok(PoolConfig {
        name,
        path,
        limits: PoolLimits { replicas_bytes, all_points_bytes, all_scratch_bytes, reserve_bytes },
    })
}

/// Neither its name nor its folder is another's.
fn must_be_apart(pool: &PoolConfig, others: &[PoolConfig]) -> Result<(), ConfigError> {
    let PoolConfig { name, path, .. } = pool;
    if name.is_default() {
        let problem = "the pool \"default\" is data_dir, with the bounds of [replication]: give this one another name";
        return Err(invalid("pools.name", problem.to_owned()));
    }
    if others.iter().any(|other| other.name == *name) {
        return Err(invalid("pools.name", format!("two pools are called \"{name}\": give each a name of its own")));
    }
    let overlaps = |other: &&PoolConfig| path.starts_with(&other.path) || other.path.starts_with(path);
    let Some(other) = others.iter().find(overlaps) else { return Ok(()) };
    let whose = if other.name.is_default() { "data_dir".to_owned() } else { format!("pool \"{}\"", other.name) };
    let (path, other) = (path.display(), other.path.display());
    let problem =
        format!("{path} of pool \"{name}\" and {other} of {whose} lie in one another: give each a folder of its own");
    Err(invalid("pools.path", problem))
}

fn invalid(key: &'static str, problem: String) -> ConfigError {
    ConfigError::Invalid { key, problem }
}
