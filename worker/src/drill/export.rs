//! One recovery point that is open, from its lease to its end.
//!
//! ```text
//!   lease ─▶ readers ─▶ NBD servers ─▶ noted ─▶ open ─┬─ closed, time over, or the lease ended
//!                                                     └─▶ servers closed ─▶ lease released ─▶ note removed
//! ```
//! A crash anywhere leaves the lease, with or without a note of it: [`super::exports`] finds both, and opens it again or releases it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pageport_common::store::Store;
use pageport_proto::v1::ExportedDisk;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::DrillError;
use super::order::LONGEST_TIME;
use super::record::Record;
use super::target::PointTarget;
use crate::clock::unix_ms_now;
use crate::error::with_causes;
use crate::nbd::{NbdServer, Place};
use crate::replica::groups::Groups;
use crate::replica::points::{Lease, PointError, PointInfo};
use crate::replica::store::ReplicaStore;

/// A disk's name, and the disk as it was.
type Target = (String, Arc<PointTarget>);

/// Where exports find what they need.
#[derive(Debug)]
pub struct Grounds {
    /// The worker's store.
    pub store: Arc<Store>,
    /// Disks and replicas.
    pub replicas: Arc<ReplicaStore>,
    /// Their recovery points.
    pub groups: Arc<Groups>,
    /// Of the sockets.
    pub folder: PathBuf,
}

/// What a running export is told.
#[derive(Debug)]
pub enum Told {
    /// End at another time, in milliseconds since 1970.
    Until(i64, oneshot::Sender<Result<(), PointError>>),
    /// End now.
    Close(oneshot::Sender<()>),
}

/// A recovery point that is open.
#[derive(Debug)]
pub struct Export {
    grounds: Arc<Grounds>,
    record: Record,
    lease: Lease,
    deadline: Instant,
    servers: Vec<NbdServer>,
    disks: Vec<ExportedDisk>,
}

impl Export {
    /// Opens what `record` says, and notes it.
    ///
    /// # Errors
    /// [`DrillError`]; nothing is held then.
    pub async fn start(grounds: Arc<Grounds>, record: Record) -> Result<Self, DrillError> {
        let (opening, wanted) = (grounds.clone(), record.clone());
        let (lease, targets) = spawn_blocking(move || hold(&opening, &wanted)).await??;
        let deadline = deadline(record.until_unix_ms);
        let mut export = Self { grounds, record, lease, deadline, servers: vec![], disks: vec![] };
        let outcome = match export.serve(targets) {
            Ok(()) => export.note(),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => Ok(export),
            Err(error) => {
                export.end().await;
                Err(error)
            }
        }
    }

    fn serve(&mut self, targets: Vec<Target>) -> Result<(), DrillError> {
        let Record { vm, point, name, listen, .. } = &self.record;
        make_folder(&self.grounds.folder)?;
        let socket = socket(&self.grounds.folder, &self.record);
        for place in [Some(Place::Socket(socket)), listen.map(Place::Address)].into_iter().flatten() {
            let exports = targets.iter().map(|(disk, target)| (format!("{name}/{disk}"), target.clone()));
            self.servers.push(NbdServer::offer(place, exports.collect())?);
        }
        let url = |server: &NbdServer, disk: &str| match server.place() {
            Place::Socket(path) => format!("nbd+unix:///{name}/{disk}?socket={}", path.display()),
            Place::Address(address) => format!("nbd://{address}/{name}/{disk}"),
        };
        let disk = |(disk, target): &Target| ExportedDisk {
            name: disk.clone(),
            size_bytes: crate::nbd::BlockTarget::size(&**target),
            urls: self.servers.iter().map(|server| url(server, disk)).collect(),
        };
        self.disks = targets.iter().map(disk).collect();
        tracing::info!(vm_id = %vm, point, "recovery point open for reading");
        Ok(())
    }

    fn note(&mut self) -> Result<(), DrillError> {
        // A port that the system chose is the same after a restart.
        let address = self.servers.iter().find_map(|server| match server.place() {
            Place::Address(address) => Some(*address),
            Place::Socket(_) => None,
        });
        self.record.listen = address;
        tokio::task::block_in_place(|| self.record.write(&self.grounds.store))
    }

    /// What is open.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The point.
    pub fn point(&self) -> PointInfo {
        self.lease.point()
    }

    /// Where its disks are read.
    pub fn disks(&self) -> &[ExportedDisk] {
        &self.disks
    }

    /// Serves until it is to end, and ends it; returns why, and what who closed it waits for.
    pub async fn run(mut self, mut orders: mpsc::Receiver<Told>) -> (String, Option<oneshot::Sender<()>>) {
        let mut asked = None;
        let reason = loop {
            tokio::select! {
                why = self.lease.ended() => break why.to_string(),
                () = tokio::time::sleep_until(self.deadline) => break "its time was over".to_owned(),
                told = orders.recv() => match told {
                    Some(Told::Until(until_unix_ms, answer)) => drop(answer.send(self.renew(until_unix_ms))),
                    Some(Told::Close(done)) => {
                        asked = Some(done);
                        break "it was closed".to_owned();
                    }
                    None => break "the worker ends".to_owned(),
                },
            }
        };
        tracing::info!(vm_id = %self.record.vm, point = self.record.point, reason, "recovery point open no longer");
        self.end().await;
        (reason, asked)
    }

    fn renew(&mut self, until_unix_ms: i64) -> Result<(), PointError> {
        tokio::task::block_in_place(|| self.lease.renew(until_unix_ms))?;
        (self.record.until_unix_ms, self.deadline) = (until_unix_ms, deadline(until_unix_ms));
        if let Err(error) = tokio::task::block_in_place(|| self.record.write(&self.grounds.store)) {
            // Until the worker ends it is as asked.
            tracing::warn!(error = %with_causes(&error), "the new end of an export is not noted");
        }
        Ok(())
    }

    async fn end(self) {
        for server in self.servers {
            server.close().await;
        }
        let released = tokio::task::block_in_place(|| self.lease.release());
        match released {
            // Who closed the points has taken the lease with them.
            Ok(()) | Err(PointError::Closed) => {}
            Err(error) => {
                tracing::warn!(error = %with_causes(&error), "a recovery point is held until its time is over")
            }
        }
        if let Err(error) = tokio::task::block_in_place(|| self.record.remove(&self.grounds.store)) {
            tracing::warn!(error = %with_causes(&error), "the note of an export is left behind");
        }
    }
}

/// The socket of an export.
pub fn socket(folder: &Path, record: &Record) -> PathBuf {
    folder.join(format!("{}-{}.sock", record.vm, record.point))
}

/// Only the worker's user may enter it: whoever can connect to a socket reads the disks.
fn make_folder(folder: &Path) -> Result<(), DrillError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(DrillError::Folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(DrillError::Folder)
}

/// The lease, and each disk of the point as it was.
fn hold(grounds: &Grounds, record: &Record) -> Result<(Lease, Vec<Target>), DrillError> {
    let points = grounds.groups.open_existing(&grounds.replicas, record.vm)?;
    let lease = points.group().lease(record.point, record.until_unix_ms)?;
    let open = |disk: &str| match lease.reader(disk) {
        Ok(reader) => Some(Ok((disk.to_owned(), Arc::new(PointTarget::new(reader))))),
        // It was added after the point.
        Err(PointError::NoDisk { .. }) => None,
        Err(error) => Some(Err(error)),
    };
    match points.disks().filter_map(open).collect::<Result<Vec<_>, PointError>>() {
        Ok(targets) => Ok((lease, targets)),
        Err(error) => {
            lease.release()?;
            Err(error.into())
        }
    }
}

/// The moment on the monotonic clock; however the other clock is set, no later than an export may last.
fn deadline(until_unix_ms: i64) -> Instant {
    let left_ms = u64::try_from(until_unix_ms.saturating_sub(unix_ms_now())).unwrap_or_default();
    Instant::now() + Duration::from_millis(left_ms).min(LONGEST_TIME)
}
