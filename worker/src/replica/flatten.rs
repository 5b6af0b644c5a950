//! Makes raw files of the qcow2 images of VMs that this worker no longer owns, so that they can be replicas.
//!
//! ```text
//!   claim ─▶ convert (progress, room) ─▶ sync, rename ─▶ record: the raw file is the disk ─▶ qcow2 file goes ─▶ recovery point
//!                                                         └ under the VM's own lock, while no hypervisor has it
//! ```
//! Each step may be done again after a crash: see [`super::store::flattening`]. What failed is tried again after a while, and told meanwhile.
//! One task of a VM at a time; it has ended when [`Flattenings::end`] returns.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pageport_proto::VmId;
use pageport_proto::v1::Flattening;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::store::flattening::{Step, sync_folder_of, written};
use super::store::{ReplicaError, ReplicaStore, free_bytes};
use crate::error::with_causes;
use crate::failpoint;
use crate::hypervisor::end_writers_of;
use crate::image::convert::{ConvertError, convert};
use crate::image::{Format, Image, ImageError};
use crate::vms::{ManagedVm, VmError};

/// What failed is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_secs(30);

/// Why an image is not raw yet.
#[derive(Debug, thiserror::Error)]
pub enum FlattenError {
    /// What is on stable storage about it, or the way there.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Not enough room.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// A file could not be handled.
    #[error("{operation} {}", path.display())]
    File {
        /// What was done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tool.
    #[error("convert {}", path.display())]
    Convert {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: ConvertError<RoomError>,
    },
    /// It is no longer to be raw.
    #[error("the image is a vm's disk again")]
    Cancelled,
}

/// Too little room for a raw file.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// Before it begins, or meanwhile.
    #[error(
        "no space to flatten {}: {needed_bytes} bytes are needed, {free_bytes} are free, and {reserve_bytes} are to be left free; free some space, or \
         lower replication.reserve_bytes in worker.toml", path.display()
    )]
    NoSpace {
        /// The raw file.
        path: PathBuf,
        /// What is still to be written, about.
        needed_bytes: u64,
        /// What the file system has.
        free_bytes: u64,
        /// What is to be left.
        reserve_bytes: u64,
    },
    /// The file system cannot be looked at.
    #[error("look at the room for {}", path.display())]
    Look {
        /// The raw file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The VMs whose images are becoming raw.
#[derive(Debug)]
pub struct Flattenings {
    tool: String,
    reserve_bytes: u64,
    changed: Arc<Notify>,
    all: Mutex<HashMap<VmId, Job>>,
}

#[derive(Debug)]
struct Job {
    cancel: CancellationToken,
    shown: Arc<Mutex<Shown>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shown {
    report: Flattening,
    /// When it failed.
    failed: Option<Instant>,
}

impl Flattenings {
    /// None yet. `tool` is `qemu-img`; `reserve_bytes` are left free on the file systems of the images.
    pub fn new(tool: String, reserve_bytes: u64, changed: Arc<Notify>) -> Self {
        Self { tool, reserve_bytes, changed, all: Mutex::default() }
    }

    /// What is reported of a VM; [`None`]: all its images are raw, or it runs on them.
    pub fn report(&self, vm: VmId) -> Option<Flattening> {
        let all = self.lock();
        let shown = all.get(&vm)?.shown.lock().unwrap_or_else(PoisonError::into_inner);
        Some(shown.report.clone())
    }

    /// Begins, or goes on after a while with what failed, for a VM that this worker does not own.
    pub fn follow(self: &Arc<Self>, vm: &Arc<ManagedVm>) {
        let mut all = self.lock();
        if let Some(job) = all.get(&vm.id()) {
            let failed = job.shown.lock().unwrap_or_else(PoisonError::into_inner).failed;
            if !job.task.is_finished() || failed.is_some_and(|failed| failed.elapsed() < RETRY_PAUSE) {
                return;
            }
        }
        if vm.replicas().must_be_flat(vm.id()).is_ok() {
            if all.remove(&vm.id()).is_some() {
                self.changed.notify_one();
            }
            return;
        }
        let (cancel, shown) = (CancellationToken::new(), Arc::new(Mutex::default()));
        let work = Work { all: self.clone(), vm: vm.clone(), cancel: cancel.clone(), shown: shown.clone() };
        all.insert(vm.id(), Job { cancel, shown, task: tokio::spawn(work.run()) });
    }

    /// Ends what is under way for a VM; when this returns nothing has its images open.
    pub async fn end(&self, vm: VmId) {
        let Some(job) = self.lock().remove(&vm) else { return };
        job.cancel.cancel();
        if let Err(error) = job.task.await {
            tracing::error!(vm_id = %vm, %error, "the flattening of a vm's images ended badly");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Job>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one task works on.
struct Work {
    all: Arc<Flattenings>,
    vm: Arc<ManagedVm>,
    cancel: CancellationToken,
    shown: Arc<Mutex<Shown>>,
}

impl Work {
    async fn run(self) {
        let outcome = self.flatten_all().await;
        let vm_id = self.vm.id();
        match &outcome {
            Ok(()) => tracing::info!(%vm_id, "the vm's images are raw"),
            Err(FlattenError::Cancelled) => tracing::info!(%vm_id, "flattening ended: the vm is here again, or gone"),
            Err(error) => {
                let problem = with_causes(error);
                tracing::warn!(%vm_id, problem, "an image is not raw yet");
                self.show(|shown| {
                    shown.report.problem = problem;
                    shown.failed = Some(Instant::now());
                });
            }
        }
        self.all.changed.notify_one();
    }

    async fn flatten_all(&self) -> Result<(), FlattenError> {
        let vm = self.vm.id();
        for disk in blocking(|| self.replicas().unflattened(vm)) {
            tracing::info!(vm_id = %vm, disk, "an image is flattened from qcow2 to raw");
            self.flatten(&disk).await?;
        }
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(FlattenError::Cancelled),
            adopted = self.vm.adopt_flat_disks() => Ok(adopted?),
        }
    }

    async fn flatten(&self, disk: &str) -> Result<(), FlattenError> {
        let (replicas, vm) = (self.replicas(), self.vm.id());
        let step = match blocking(|| replicas.flattening_step(vm, disk))? {
            Some(step) => step,
            None => {
                let Some(location) = blocking(|| replicas.locate(vm, disk))? else {
                    return Err(FlattenError::Cancelled);
                };
                blocking(|| replicas.begin_flattening(vm, disk, &location.path))?
            }
        };
        let step = match step {
            Step::Converting { from, to } => {
                // A whole file has its name only once it is on stable storage.
                if !to.exists() {
                    self.write(&from, &to).await?;
                }
                tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => return Err(FlattenError::Cancelled),
                    recorded = self.vm.record_flat_disk(disk, &from, &to) => match recorded {
                        Err(VmError::DisksTaken { .. }) if blocking(|| replicas.flattening_step(vm, disk))?.is_none() => {
                            // The disks were removed; this was not among them yet.
                            std::fs::remove_file(&to).map_err(failed("remove", &to))?;
                            return Err(FlattenError::Cancelled);
                        }
                        recorded => recorded?,
                    },
                }
            }
            recorded => recorded,
        };
        match step {
            Step::Recorded { from } => Ok(blocking(|| replicas.end_flattening(vm, disk, &from))?),
            Step::Converting { .. } => Err(FlattenError::Cancelled),
        }
    }

    /// Writes the raw file, whole or not at all.
    async fn write(&self, from: &Path, to: &Path) -> Result<(), FlattenError> {
        let partial = written(to);
        end_writers_of(&partial).await.map_err(failed("look for writers of", &partial))?;
        match std::fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &partial)(error));
            }
            _ => {}
        }
        let image = blocking(|| Image::open(from, Format::Qcow2))?;
        let size_bytes = image.size_bytes().map_err(failed("look at", from))?;
        let needed_bytes = image.allocated_bytes().map_err(failed("look at", from))?;
        self.check_room(&partial, needed_bytes)?;
        let look = |share: f64| {
            self.show(|shown| {
                shown.report.done_bytes = (size_bytes as f64 * share) as u64;
                shown.report.total_bytes = size_bytes;
            });
            self.check_room(&partial, 0)
        };
        match convert(&self.all.tool, &image, &partial, &self.cancel, look).await {
            Ok(()) => {}
            Err(error) => {
                // What cannot be removed is removed before the next attempt.
                let _ = std::fs::remove_file(&partial);
                return Err(match error {
                    ConvertError::Cancelled => FlattenError::Cancelled,
                    ConvertError::Forbidden(room) => room.into(),
                    source => FlattenError::Convert { path: from.to_owned(), source },
                });
            }
        }
        failpoint::reach("replica", "flattened").await;
        blocking(|| std::fs::rename(&partial, to).and_then(|()| sync_folder_of(to)))
            .map_err(failed("move into place", to))
    }

    fn check_room(&self, path: &Path, needed_bytes: u64) -> Result<(), RoomError> {
        let reserve_bytes = self.all.reserve_bytes;
        let free = free_bytes(path.parent().unwrap_or(Path::new("/")));
        let free_bytes = free.map_err(|source| RoomError::Look { path: path.to_owned(), source })?;
        if free_bytes < needed_bytes.saturating_add(reserve_bytes) {
            return Err(RoomError::NoSpace { path: path.to_owned(), needed_bytes, free_bytes, reserve_bytes });
        }
        Ok(())
    }

    fn replicas(&self) -> &ReplicaStore {
        self.vm.replicas()
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
        self.all.changed.notify_one();
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FlattenError {
    let path = path.to_owned();
    move |source| FlattenError::File { operation, path, source }
}

fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

#[cfg(test)]
mod tests;
