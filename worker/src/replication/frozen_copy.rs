//! The disks of a frozen point on their way into disk sessions: what a round and the last increment of a migration have in common.
//!
//! ```text
//!   frozen point ─ job copy-DISK ─▶ NbdServer ─▶ target ─▶ DiskSession        one of each per disk
//! ```
//! Guarantees: scratch stays within its bound; a copy that does not get on is given up; [`FrozenCopy::release`] leaves nothing behind.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::hypervisor::freeze::{Consistency, CopyHandle, CopyTarget, FreezeDisk, Frozen, Outcome};
use crate::hypervisor::guest_agent::Quiescence;
use crate::hypervisor::{HypervisorError, Vm};
use crate::nbd::{BlockTarget, ExportError, NbdServer};
use crate::node::Node;
use crate::replica::store::free_bytes;

use super::throttle::Throttle;

/// Between two looks at the copies.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A copy that does not get on for so long is given up.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at how the guest's writes fare.
const THROTTLE_INTERVAL: Duration = Duration::from_secs(1);
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// What its sockets are called, so that they stand beside those of mirrors.
const SOCKET_SUFFIX: &str = "point";

/// Why a frozen point was not copied.
#[derive(Debug, thiserror::Error)]
pub enum FrozenCopyError {
    /// The hypervisor.
    #[error("copy a frozen point")]
    Hypervisor(#[from] HypervisorError),
    /// The NBD server did not start.
    #[error(transparent)]
    Export(#[from] ExportError),
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
    /// Too little is left on the file system of scratch.
    #[error(
        "{free_bytes} bytes are free where scratch lies, and {reserve_bytes} are to be left free: \
         free some space, or lower replication.reserve_bytes in worker.toml"
    )]
    NoSpace {
        /// What the file system has.
        free_bytes: u64,
        /// What is to be left.
        reserve_bytes: u64,
    },
    /// What was copied did not reach the destination.
    #[error("bring what was copied to the destination")]
    Sessions(#[source] std::io::Error),
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

/// A frozen point that is being copied. End it with [`Self::release`].
#[derive(Debug)]
pub struct FrozenCopy {
    qemu: Vm,
    frozen: Frozen,
    disks: Vec<Disk>,
    bounds: Bounds,
}

/// How much scratch there may be.
#[derive(Debug)]
struct Bounds {
    folder: PathBuf,
    scratch_bytes: u64,
    reserve_bytes: u64,
}

impl Bounds {
    fn check(&self, used_bytes: u64) -> Result<(), FrozenCopyError> {
        if used_bytes > self.scratch_bytes {
            return Err(FrozenCopyError::ScratchFull { limit_bytes: self.scratch_bytes });
        }
        let free_bytes = free_bytes(&self.folder).map_err(FrozenCopyError::LookAtScratch)?;
        let reserve_bytes = self.reserve_bytes;
        if free_bytes < reserve_bytes { Err(FrozenCopyError::NoSpace { free_bytes, reserve_bytes }) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct Disk {
    name: String,
    server: Option<NbdServer>,
    copy: Option<CopyHandle>,
    copied: Copied,
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
        let limits = &node.config.replication;
        let bounds = Bounds {
            folder: node.config.data_dir.clone(),
            scratch_bytes: limits.scratch_bytes,
            reserve_bytes: limits.reserve_bytes,
        };
        bounds.check(0)?;
        let disk = |name: &String| FreezeDisk { name: name.clone(), scratch: node.scratch(qemu.id(), name) };
        let disks: Vec<_> = names.iter().map(disk).collect();
        let frozen = qemu.freeze_with(&disks, since, next, consistency).await?;
        Ok(Self { qemu: qemu.clone(), frozen, disks: vec![], bounds })
    }

    /// Whether the guest's file systems were at rest at the moment; the second time nothing.
    pub fn take_quiescence(&mut self) -> Quiescence {
        self.frozen.take_quiescence()
    }

    /// A time at or just before the frozen moment.
    pub fn moment(&self) -> std::time::SystemTime {
        self.frozen.moment()
    }

    /// Starts to copy disks, each to its target; all in one call, so that none waits for what the others have in flight.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub async fn start<T: BlockTarget>(
        &mut self,
        targets: Vec<(String, Arc<T>)>,
        throttle: Option<&Throttle>,
    ) -> Result<(), FrozenCopyError> {
        let mut served = vec![];
        for (name, target) in targets {
            let socket = self.qemu.paths().nbd(&format!("{name}-{SOCKET_SUFFIX}"));
            let server = Some(NbdServer::bind(&socket, &name, target)?);
            let total_bytes = self.frozen.dirty_bytes_of(&name).unwrap_or_default();
            let copied = Copied { done_bytes: 0, total_bytes };
            served.push(CopyTarget { disk: name.clone(), nbd_socket: socket, export: name.clone() });
            self.disks.push(Disk { name, server, copy: None, copied });
        }
        let copies = self.frozen.copy(&served, throttle.map(Throttle::bytes_per_s)).await?;
        for (disk, copy) in self.disks.iter_mut().zip(copies) {
            disk.copy = Some(copy);
        }
        Ok(())
    }

    /// Waits until all disks are copied. Cancel-safe.
    ///
    /// # Errors
    /// A copy ended, does not get on, or scratch is full.
    pub async fn wait(
        &mut self,
        mut throttle: Option<Throttle>,
        mut progress: impl FnMut(Copied),
    ) -> Result<(), FrozenCopyError> {
        let (mut advanced, mut throttled) = ((Instant::now(), 0), Instant::now());
        loop {
            let ended = self.look().await?;
            let sum = self.copied();
            progress(sum);
            if ended {
                return Ok(());
            }
            let used = self.frozen.scratch_bytes().await.map_err(FrozenCopyError::LookAtScratch)?;
            self.bounds.check(used)?;
            if sum.done_bytes > advanced.1 {
                advanced = (Instant::now(), sum.done_bytes);
            } else if advanced.0.elapsed() > STALL_LIMIT {
                return Err(FrozenCopyError::Stalled { limit: STALL_LIMIT });
            }
            if let Some(throttle) = &mut throttle
                && throttled.elapsed() >= THROTTLE_INTERVAL
            {
                throttled = Instant::now();
                self.set_speed(throttle).await?;
            }
        }
    }

    /// Waits a little for the copies; `true`: all have ended.
    async fn look(&mut self) -> Result<bool, HypervisorError> {
        let mut all_ended = true;
        for disk in &mut self.disks {
            let Disk { copy, copied, .. } = disk;
            let Some(handle) = copy else { continue };
            let waited = handle.wait(LOOK_INTERVAL, |now| {
                *copied = Copied { done_bytes: now.done_bytes, total_bytes: now.total_bytes };
            });
            match waited.await {
                Ok(()) => {
                    copied.done_bytes = copied.total_bytes;
                    *copy = None;
                }
                Err(HypervisorError::Deadline { .. }) => {
                    if let Ok(now) = handle.progress().await {
                        *copied = Copied { done_bytes: now.done_bytes, total_bytes: now.total_bytes };
                    }
                    all_ended = false;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all_ended)
    }

    fn copied(&self) -> Copied {
        self.disks.iter().fold(Copied::default(), |sum, disk| Copied {
            done_bytes: sum.done_bytes + disk.copied.done_bytes,
            total_bytes: sum.total_bytes + disk.copied.total_bytes,
        })
    }

    async fn set_speed(&self, throttle: &mut Throttle) -> Result<(), HypervisorError> {
        let Some(bytes_per_s) = throttle.look(self.qemu.write_count().await?) else { return Ok(()) };
        for copy in self.disks.iter().filter_map(|disk| disk.copy.as_ref()) {
            // One that has just ended has no speed.
            if let Err(error) = copy.set_speed(Some(bytes_per_s)).await {
                tracing::debug!(%error, "speed not set");
            }
        }
        Ok(())
    }

    /// Ends copies that are not to be completed: from now on no session is written to.
    pub async fn close(&mut self) {
        for disk in &mut self.disks {
            // The socket goes first: a peer that hangs must not hold up the hypervisor.
            if let Some(server) = disk.server.take() {
                server.close().await;
            }
            if let Some(mut copy) = disk.copy.take()
                && let Err(error) = copy.cancel(RELEASE_LIMIT).await
            {
                tracing::warn!(disk = disk.name, error = %crate::error::with_causes(&error), "copy not cancelled");
            }
        }
    }

    /// Takes the frozen point out of the hypervisor, and settles its bitmaps.
    ///
    /// # Errors
    /// The hypervisor does not do so in time; the next freeze does it then.
    pub async fn release(mut self, outcome: Outcome) -> Result<(), HypervisorError> {
        // Copies that are complete let go of their servers only now.
        let released = self.frozen.release(outcome, RELEASE_LIMIT).await;
        self.close().await;
        released
    }
}
