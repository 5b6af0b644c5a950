//! Pools of storage: where replicas, recovery points and scratch lie on this host, and how much of each there may be.
//!
//! | below a pool's path | what |
//! |---|---|
//! | `replicas/<vm>/<disk>.raw`, `replicas/<vm>/points/` | replicas that this worker made, and recovery points |
//! | `disks/<vm>/<disk>.raw` | disks that were added, and that this worker made where no path was given |
//! | `scratch/` | old bytes of disks while a point of them is copied; in one of the pools |
//! | `pageport-pool` | the [marker](MARKER): which pool of which worker this is |
//!
//! The pool `default` is `data_dir`, which has no marker: the worker's store lies there. The key `pool/<vm>` of that store names the pool of a VM's
//! replica; without it that is the default one. It is written before anything of the VM lies there.
//!
//! ```text
//!   look ─▶ marker is ours ──────────────────────────────────────────▶ good
//!       └─▶ no marker ─▶ no replica is recorded here ─▶ it is made ──▶ good
//!                    └─▶ one is: the file system is not mounted ─────▶ refused: only what lies in this pool stands still
//! ```
//! Guarantees: what is not there is never made anew on the file system underneath; each pool's bounds are its own. Does not notice a file system that is
//! unmounted lazily while files are open on it, nor judge what a replica needs: see [`crate::replica::store`].

pub mod config;

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pageport_common::store::{Batch, Store, StoreError};
use pageport_proto::v1;
use pageport_proto::{PoolName, StoreId, VmId};

use self::config::{PoolConfig, PoolLimits};
use crate::quota::Quota;
use crate::replica::points;
use crate::replica::store::free_bytes;

/// The file that tells a pool from the folder that its file system is mounted over.
pub const MARKER: &str = "pageport-pool";

/// Why a pool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The worker's store failed.
    #[error("look up or note in which pool the replica of vm {vm} lies")]
    Store {
        /// The VM.
        vm: VmId,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The worker's store failed.
    #[error("look up which pools hold replicas")]
    Scan(#[source] StoreError),
    /// There is none of that name.
    #[error(
        "this worker has no pool \"{name}\"; it has: {known}. Choose one of these, or name it under [[pools]] in the worker's worker.toml"
    )]
    Unknown {
        /// What was asked for, or recorded.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// Its marker is gone.
    #[error(
        "pool \"{name}\" at {} is not what it was: is its file system mounted? Replicas lie in it, and its file {MARKER} is missing. If they are lost for \
         good, take the pool out of the worker's worker.toml and delete them (\"pageportctl replica delete\")", path.display()
    )]
    Gone {
        /// The pool.
        name: PoolName,
        /// Where it is.
        path: PathBuf,
    },
    /// Its marker is another's.
    #[error(
        "{} is another pool, or another worker's, and not pool \"{name}\" of this one: give the pool a path of its own in worker.toml, or, if nobody needs \
         what lies there, remove its file {MARKER}", path.display()
    )]
    Foreign {
        /// The pool.
        name: PoolName,
        /// Where it is.
        path: PathBuf,
    },
    /// It cannot be made or read.
    #[error(
        "{operation} pool \"{name}\" at {}: let the worker's user write there, or change its path in worker.toml", path.display()
    )]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The pool.
        name: PoolName,
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where something lies, for people.
pub fn place(name: &PoolName) -> String {
    if name.is_default() { "in data_dir".to_owned() } else { format!("in pool \"{name}\"") }
}

/// The key of worker.toml that sets a bound of a pool, for people.
pub fn key(name: &PoolName, bound: &str) -> String {
    if name.is_default() { format!("replication.{bound}") } else { format!("{bound} of pool \"{name}\"") }
}

/// One pool.
#[derive(Debug)]
pub struct Pool {
    config: PoolConfig,
    /// What its marker says; [`None`]: it needs none.
    marker: Option<String>,
    making: Mutex<()>,
    /// What the points of all VMs occupy, those too that are not open; counted when it is first used.
    points: OnceLock<Arc<Quota<VmId>>>,
    /// Scratch of all frozen points, by a number that each has drawn.
    scratch: Arc<Quota<u64>>,
}

impl Pool {
    fn new(config: PoolConfig, marker: Option<String>) -> Self {
        let scratch = Quota::new(config.name.clone(), config.limits.all_scratch_bytes, HashMap::new());
        Self { config, marker, making: Mutex::default(), points: OnceLock::new(), scratch: Arc::new(scratch) }
    }

    /// Its name.
    pub fn name(&self) -> &PoolName {
        &self.config.name
    }

    /// Its bounds.
    pub fn limits(&self) -> &PoolLimits {
        &self.config.limits
    }

    /// The folder of all replicas in it.
    pub fn replicas(&self) -> PathBuf {
        self.config.path.join("replicas")
    }

    /// The folder of a VM's replica and recovery points.
    pub fn replica(&self, vm: VmId) -> PathBuf {
        self.replicas().join(vm.to_string())
    }

    /// The folder of a VM's disks that were added.
    pub fn disks(&self, vm: VmId) -> PathBuf {
        self.config.path.join("disks").join(vm.to_string())
    }

    /// The folder of scratch.
    pub fn scratch(&self) -> PathBuf {
        self.config.path.join("scratch")
    }

    /// What the points in it may occupy together. It must be there.
    pub fn points_quota(&self) -> &Arc<Quota<VmId>> {
        let counted = || Quota::new(self.name().clone(), self.limits().all_points_bytes, self.points_bytes());
        self.points.get_or_init(|| Arc::new(counted()))
    }

    /// What scratch in it may occupy together.
    pub fn scratch_quota(&self) -> &Arc<Quota<u64>> {
        &self.scratch
    }

    /// What its file system has left, in bytes.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn free_bytes(&self) -> Result<u64, PoolError> {
        free_bytes(&self.config.path).map_err(self.failed("look for space in"))
    }

    fn points_bytes(&self) -> HashMap<VmId, u64> {
        let folders = std::fs::read_dir(self.replicas()).into_iter().flatten().flatten();
        let used = folders.filter_map(|folder| {
            let vm = folder.file_name().to_str()?.parse().ok()?;
            let files = std::fs::read_dir(folder.path().join(points::FOLDER)).ok()?.flatten();
            Some((vm, files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()))
        });
        used.collect()
    }

    /// Makes it, for the worker's user alone, as the data folder is: its marker is on stable storage then.
    fn make(&self, marker: &str) -> Result<(), PoolError> {
        let path = &self.config.path;
        let made = || {
            for folder in ["replicas", "disks", "scratch"] {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path.join(folder))?;
            }
            let mut file = std::fs::File::create(path.join(MARKER))?;
            file.write_all(marker.as_bytes())?;
            file.sync_all()?;
            std::fs::File::open(path)?.sync_all()
        };
        made().map_err(self.failed("make"))?;
        tracing::info!(pool = %self.name(), path = %path.display(), "pool made");
        Ok(())
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> PoolError {
        let PoolConfig { name, path, .. } = self.config.clone();
        move |source| PoolError::Io { operation, name, path, source }
    }
}

/// All pools of this host.
#[derive(Debug)]
pub struct Pools {
    store: Arc<Store>,
    /// The default one is the first.
    all: Vec<Arc<Pool>>,
    scratch: Arc<Pool>,
    /// How they stood when they were last looked at.
    seen: Mutex<Vec<v1::Pool>>,
}

impl Pools {
    /// Those of a configuration, the default one first, and the one that scratch lies in. `id` is the store's. Nothing is looked at yet.
    ///
    /// # Errors
    /// [`PoolError::Unknown`]: scratch is to lie in none of them.
    pub fn new(
        store: Arc<Store>,
        id: StoreId,
        configured: &[PoolConfig],
        scratch: &PoolName,
    ) -> Result<Self, PoolError> {
        let pool = |config: &PoolConfig| {
            let marker = (!config.name.is_default()).then(|| format!("{id} {}\n", config.name));
            Arc::new(Pool::new(config.clone(), marker))
        };
        let all: Vec<_> = configured.iter().map(pool).collect();
        let scratch = named(&all, scratch.as_str())?;
        Ok(Self { store, all, scratch, seen: Mutex::default() })
    }

    /// Makes those that are new, once the store's id is on stable storage. One that is another's, or cannot be used though replicas lie in it, holds up
    /// nothing else, and is looked at again whenever it is needed.
    ///
    /// # Errors
    /// [`PoolError`] of one that cannot be made: the configuration is wrong.
    pub fn begin(&self) -> Result<(), PoolError> {
        for pool in &self.all {
            match self.look(pool) {
                Err(error) if matches!(error, PoolError::Foreign { .. }) || self.holds_replicas(pool)? => {
                    let error = crate::error::with_causes(&error);
                    tracing::warn!(pool = %pool.name(), error, "a pool cannot be used");
                }
                looked => looked?,
            }
        }
        Ok(())
    }

    /// The default one alone, without quotas.
    pub fn only(store: Arc<Store>, data_dir: &Path, reserve_bytes: u64) -> Self {
        let limits = PoolLimits { reserve_bytes, ..PoolLimits::default() };
        let config = PoolConfig { name: PoolName::default(), path: data_dir.to_owned(), limits };
        let pool = Arc::new(Pool::new(config, None));
        Self { store, all: vec![pool.clone()], scratch: pool, seen: Mutex::default() }
    }

    /// The pool of a VM's replica, whether it is there or not.
    ///
    /// # Errors
    /// The worker's store failed, or the configuration does not name it any more.
    pub fn of(&self, vm: VmId) -> Result<Arc<Pool>, PoolError> {
        match self.store.get(record_key(vm)).map_err(|source| PoolError::Store { vm, source })? {
            Some(name) => named(&self.all, &String::from_utf8_lossy(&name)),
            None => named(&self.all, PoolName::default().as_str()),
        }
    }

    /// The pool of a VM's replica, which is there.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn ready(&self, vm: VmId) -> Result<Arc<Pool>, PoolError> {
        let pool = self.of(vm)?;
        self.look(&pool)?;
        Ok(pool)
    }

    /// The pool that what is to be removed of a VM lies in, which is there; [`None`]: the configuration does not name it any more, and what lies in it is left.
    ///
    /// # Errors
    /// [`PoolError`]: it would be left over.
    pub fn leaving(&self, vm: VmId) -> Result<Option<Arc<Pool>>, PoolError> {
        match self.ready(vm) {
            Err(PoolError::Unknown { name, .. }) => {
                tracing::warn!(vm_id = %vm, pool = name, "files are left in a pool that worker.toml does not name any more");
                Ok(None)
            }
            pool => pool.map(Some),
        }
    }

    /// The pool that scratch lies in, which is there, with its folder.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn for_scratch(&self) -> Result<Arc<Pool>, PoolError> {
        let pool = &self.scratch;
        self.look(pool)?;
        std::fs::create_dir_all(pool.scratch()).map_err(pool.failed("make a folder in"))?;
        Ok(pool.clone())
    }

    /// A VM's replica, of which nothing is here yet, is to lie in this pool.
    ///
    /// # Errors
    /// [`PoolError`]; it is not recorded then.
    pub fn choose(&self, vm: VmId, name: &PoolName) -> Result<(), PoolError> {
        self.look(&*named(&self.all, name.as_str())?)?;
        let mut batch = Batch::default();
        batch.put(record_key(vm), name.as_str());
        self.store.commit(batch).map_err(|source| PoolError::Store { vm, source })
    }

    /// How they stood when they were last looked at.
    pub fn reports(&self) -> Vec<v1::Pool> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at them, where the replicas in each occupy so much. May wait for a slow disk, which [`Self::reports`] does not.
    pub fn look_at_all(&self, replicas_bytes: impl Fn(&Pool) -> u64) {
        let seen = self.all.iter().map(|pool| self.report(pool, replicas_bytes(pool))).collect();
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }

    fn report(&self, pool: &Arc<Pool>, replicas_bytes: u64) -> v1::Pool {
        let PoolLimits { replicas_bytes: quota_bytes, all_points_bytes, all_scratch_bytes, reserve_bytes } =
            *pool.limits();
        let share = |used_bytes, quota_bytes| Some(v1::PoolUse { used_bytes, quota_bytes });
        let free_bytes = self.look(pool).and_then(|()| pool.free_bytes());
        let points_bytes = if free_bytes.is_ok() { pool.points_quota().used_bytes() } else { 0 };
        v1::Pool {
            name: pool.name().to_string(),
            path: pool.config.path.display().to_string(),
            replicas: share(replicas_bytes, quota_bytes),
            points: share(points_bytes, all_points_bytes),
            scratch: share(pool.scratch.used_bytes(), all_scratch_bytes),
            takes_scratch: Arc::ptr_eq(pool, &self.scratch),
            reserve_bytes,
            problem: free_bytes.as_ref().err().map(|error| crate::error::with_causes(error)).unwrap_or_default(),
            free_bytes: free_bytes.unwrap_or_default(),
        }
    }

    /// Is it what it was, or can be made?
    fn look(&self, pool: &Pool) -> Result<(), PoolError> {
        let Some(marker) = &pool.marker else { return Ok(()) };
        let _making = pool.making.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, path) = (pool.name().clone(), pool.config.path.clone());
        match std::fs::read_to_string(path.join(MARKER)) {
            Ok(found) if found == *marker => Ok(()),
            Ok(_) => Err(PoolError::Foreign { name, path }),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pool.failed("look at")(error)),
            Err(_) if self.holds_replicas(pool)? => Err(PoolError::Gone { name, path }),
            Err(_) => pool.make(marker),
        }
    }

    /// Does a VM's replica lie in it, by the worker's records?
    fn holds_replicas(&self, pool: &Pool) -> Result<bool, PoolError> {
        let recorded = self.store.scan(RECORDS).map_err(PoolError::Scan)?;
        Ok(recorded.iter().any(|(_, name)| name == pool.name().as_str().as_bytes()))
    }
}

const RECORDS: &str = "pool/";

/// Where the pool of a VM's replica is recorded in the worker's store.
pub fn record_key(vm: VmId) -> String {
    format!("{RECORDS}{vm}")
}

fn named(all: &[Arc<Pool>], name: &str) -> Result<Arc<Pool>, PoolError> {
    let known = || all.iter().map(|pool| pool.name().to_string()).collect::<Vec<_>>().join(", ");
    let pool = all.iter().find(|pool| pool.name().as_str() == name);
    pool.cloned().ok_or_else(|| PoolError::Unknown { name: name.to_owned(), known: known() })
}

#[cfg(test)]
mod tests;
