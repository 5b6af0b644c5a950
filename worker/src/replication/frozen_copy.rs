//! The disks of a frozen point on their way into disk sessions: what a round and the last increment of a migration have in common.
//!
//! ```text
//!   frozen point ─ export ─▶ QEMU's NBD server ─▶ pull ─▶ sink ─▶ DiskSession        a pull and a sink per disk
//! ```
//! Guarantees: scratch stays within its bound; a copy that does not get on is given up; [`FrozenCopy::release`] leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageport_proto::PoolName;
use tokio::task::JoinSet;

use super::pull::{PullError, pull};
use super::throttle::Throttle;
use crate::hypervisor::freeze::{Consistency, FreezeDisk, Frozen, Outcome};
use crate::hypervisor::guest_agent::Quiescence;
use crate::hypervisor::{HypervisorError, Vm};
use crate::nbd::{ClientError, NbdClient, Sink, States};
use crate::node::Node;
use crate::pool::{Pool, PoolError, key, place};
use crate::quota::{Full, Share};
use crate::replica::cap::Cap;

/// Between two looks at scratch and progress.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A copy that does not get on for so long is given up.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at how the guest's writes fare.
const THROTTLE_INTERVAL: Duration = Duration::from_secs(1);
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// Why a frozen point was not copied.
#[derive(Debug, thiserror::Error)]
pub enum FrozenCopyError {
    /// The hypervisor.
    #[error("copy a frozen point")]
    Hypervisor(#[from] HypervisorError),
    /// The hypervisor's server.
    #[error("read frozen disk {disk}")]
    Read {
        /// Which disk.
        disk: String,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The pool that scratch lies in.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Scratch cannot be looked at.
    #[error("look at the scratch of a frozen point")]
    LookAtScratch(#[source] std::io::Error),
    /// The guest wrote more than scratch holds while the point was copied.
    #[error(
        "the guest overwrote more than the {limit_bytes} bytes of scratch while a point was copied: \
         raise replication.scratch_bytes in worker.toml, or give the link more bandwidth"
    )]
    ScratchFull {
        /// The bound.
        limit_bytes: u64,
    },
    /// All guests together wrote more than scratch may hold.
    #[error(
        "{used_bytes} of the {limit_bytes} bytes of scratch for all vms are used, and the guest overwrote more while a point was copied: \
         raise {} in worker.toml, or give the link more bandwidth",
        key(pool, "all_scratch_bytes")
    )]
    AllScratchFull {
        /// What all have.
        used_bytes: u64,
        /// The bound.
        limit_bytes: u64,
        /// Where it lies.
        pool: PoolName,
    },
    /// Too little is left on the file system of scratch.
    #[error(
        "{free_bytes} bytes are free where scratch lies, and {reserve_bytes} are to be left free: free some space {}, or lower {} in worker.toml",
        place(pool),
        key(pool, "reserve_bytes")
    )]
    NoSpace {
        /// What the file system has.
        free_bytes: u64,
        /// What is to be left.
        reserve_bytes: u64,
        /// Where it lies.
        pool: PoolName,
    },
    /// What was copied did not reach the destination.
    #[error("bring what was copied to the destination")]
    Sessions(#[source] std::io::Error),
    /// Its caller wanted that.
    #[error("the copy was stopped")]
    Stopped,
    /// Nothing moved.
    #[error("the copy did not get on for {} s", limit.as_secs())]
    Stalled {
        /// The limit.
        limit: Duration,
    },
}

/// How far the copies are, over all disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Looked at so far, in bytes.
    pub done_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

impl Copied {
    /// Still to look at.
    pub fn left_bytes(self) -> u64 {
        self.total_bytes.saturating_sub(self.done_bytes)
    }
}

/// A frozen point that is being copied. End it with [`Self::release`].
#[derive(Debug)]
pub struct FrozenCopy {
    qemu: Vm,
    frozen: Frozen,
    pulls: JoinSet<Result<(), FrozenCopyError>>,
    done_bytes: Arc<AtomicU64>,
    pace: Arc<Cap>,
    bounds: Bounds,
}

/// How much scratch there may be.
#[derive(Debug)]
struct Bounds {
    pool: Arc<Pool>,
    scratch_bytes: u64,
    /// In the scratch of all VMs.
    share: Share<u64>,
}

impl Drop for Bounds {
    fn drop(&mut self) {
        self.share.give_back();
    }
}

impl Bounds {
    fn check(&self, used_bytes: u64) -> Result<(), FrozenCopyError> {
        if used_bytes > self.scratch_bytes {
            return Err(FrozenCopyError::ScratchFull { limit_bytes: self.scratch_bytes });
        }
        let pool = || self.pool.name().clone();
        let full = |Full { used_bytes, limit_bytes }| FrozenCopyError::AllScratchFull {
            used_bytes,
            limit_bytes,
            pool: pool(),
        };
        self.share.take(used_bytes).map_err(full)?;
        let (free_bytes, reserve_bytes) = (self.pool.free_bytes()?, self.pool.limits().reserve_bytes);
        if free_bytes >= reserve_bytes {
            return Ok(());
        }
        Err(FrozenCopyError::NoSpace { free_bytes, reserve_bytes, pool: pool() })
    }
}

impl FrozenCopy {
    /// Freezes these disks at one moment; nothing is copied yet.
    ///
    /// # Errors
    /// Nothing is left then.
    pub async fn freeze(
        node: &Node,
        qemu: &Vm,
        names: &[String],
        since: Option<&str>,
        next: &str,
        consistency: Consistency,
    ) -> Result<Self, FrozenCopyError> {
        let pool = node.pools.for_scratch()?;
        let (folder, share) = (pool.scratch(), Share::new(pool.scratch_quota().clone(), rand::random()));
        let bounds = Bounds { pool, scratch_bytes: node.config.replication.scratch_bytes, share };
        bounds.check(0)?;
        let file = |name: &str| folder.join(format!("{}-{name}", qemu.id()));
        let disk = |name: &String| FreezeDisk { name: name.clone(), scratch: file(name) };
        let disks: Vec<_> = names.iter().map(disk).collect();
        let frozen = qemu.freeze_with(&disks, since, next, consistency).await?;
        let (pulls, done_bytes, pace) = (JoinSet::new(), Arc::default(), Arc::new(Cap::none()));
        Ok(Self { qemu: qemu.clone(), frozen, pulls, done_bytes, pace, bounds })
    }

    /// Whether the guest's file systems were at rest at the moment; the second time nothing.
    pub fn take_quiescence(&mut self) -> Quiescence {
        self.frozen.take_quiescence()
    }

    /// A time at or just before the frozen moment.
    pub fn moment(&self) -> std::time::SystemTime {
        self.frozen.moment()
    }

    /// Starts to copy disks, each to its sink.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub async fn start<T: Sink>(
        &mut self,
        sinks: Vec<(String, Arc<T>)>,
        throttle: Option<&Throttle>,
    ) -> Result<(), FrozenCopyError> {
        self.set_pace(throttle);
        let (disks, sinks): (Vec<_>, Vec<_>) = sinks.into_iter().unzip();
        let clients = self.readers(&disks).await?;
        for ((disk, sink), client) in disks.into_iter().zip(sinks).zip(clients) {
            let pulled = pull(client, sink, self.pace.clone(), self.done_bytes.clone());
            self.pulls.spawn(async move { pulled.await.map_err(|error| explain(disk, error)) });
        }
        Ok(())
    }

    /// Connections to these disks as they were at the moment, with what the bitmap says of them. Once; they must be closed before the release.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub async fn readers(&self, disks: &[String]) -> Result<Vec<NbdClient>, FrozenCopyError> {
        let socket = self.frozen.export().await?;
        let mut clients = vec![];
        for disk in disks {
            let states =
                self.frozen.since().map_or(States::Zeroes, |bitmap| States::Dirty { bitmap: bitmap.to_owned() });
            let client = NbdClient::connect(&socket, disk, states).await;
            clients.push(client.map_err(|source| FrozenCopyError::Read { disk: disk.clone(), source })?);
        }
        Ok(clients)
    }

    /// Whether scratch is within its bound.
    ///
    /// # Errors
    /// It is not, or cannot be looked at.
    pub async fn check_scratch(&self) -> Result<(), FrozenCopyError> {
        let used = self.frozen.scratch_bytes().await.map_err(FrozenCopyError::LookAtScratch)?;
        self.bounds.check(used)
    }

    /// Waits until all disks are copied. Cancel-safe.
    ///
    /// # Errors
    /// A copy failed, does not get on, or scratch is full.
    pub async fn wait(
        &mut self,
        mut throttle: Option<Throttle>,
        mut progress: impl FnMut(Copied),
    ) -> Result<(), FrozenCopyError> {
        let (mut advanced, mut throttled) = ((Instant::now(), 0), Instant::now());
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                pulled = self.pulls.join_next() => match pulled {
                    // A copy that panicked, or whose runtime ends, has not passed everything on.
                    Some(pulled) => pulled.map_err(|error| FrozenCopyError::Sessions(error.into()))??,
                    None => {
                        progress(self.copied());
                        return Ok(());
                    }
                },
                _ = look.tick() => {
                    let copied = self.copied();
                    progress(copied);
                    self.check_scratch().await?;
                    if copied.done_bytes > advanced.1 {
                        advanced = (Instant::now(), copied.done_bytes);
                    } else if advanced.0.elapsed() > STALL_LIMIT {
                        return Err(FrozenCopyError::Stalled { limit: STALL_LIMIT });
                    }
                    if let Some(throttle) = &mut throttle
                        && throttled.elapsed() >= THROTTLE_INTERVAL
                    {
                        throttled = Instant::now();
                        if throttle.look(self.qemu.write_count().await?).is_some() {
                            self.set_pace(Some(throttle));
                        }
                    }
                }
            }
        }
    }

    /// How far the copies are.
    pub fn copied(&self) -> Copied {
        let done_bytes = self.done_bytes.load(Ordering::Relaxed);
        Copied { done_bytes, total_bytes: self.frozen.dirty_bytes().max(done_bytes) }
    }

    fn set_pace(&self, throttle: Option<&Throttle>) {
        self.pace.set(throttle.map_or(0, |throttle| throttle.bytes_per_s().saturating_mul(8)));
    }

    /// Ends copies that are not to be completed: from now on no session is written to.
    pub async fn close(&mut self) {
        self.pulls.shutdown().await;
    }

    /// Takes the frozen point out of the hypervisor, and settles its bitmaps.
    ///
    /// # Errors
    /// The hypervisor does not do so in time; the next freeze does it then.
    pub async fn release(mut self, outcome: Outcome) -> Result<(), HypervisorError> {
        self.close().await;
        self.frozen.release(outcome, RELEASE_LIMIT).await
    }
}

/// A point that broke refuses to be read.
fn explain(disk: String, error: PullError) -> FrozenCopyError {
    match error {
        PullError::Read(error) => unreadable(disk, error),
        PullError::Sink(error) => FrozenCopyError::Sessions(error),
    }
}

/// Why a frozen disk could not be read.
pub fn unreadable(disk: String, source: ClientError) -> FrozenCopyError {
    match source.is_refusal() {
        true => HypervisorError::PointBroken { disk }.into(),
        false => FrozenCopyError::Read { disk, source },
    }
}
