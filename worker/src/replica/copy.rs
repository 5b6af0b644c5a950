//! All disks of a running VM copied to a peer at once: what a seed does, and what a migration does while it moves memory.
//!
//! ```text
//!   QEMU ─blockdev-mirror─▶ NbdServer ─▶ DiskSession ═QUIC═▶ the peer's replica          one of each per disk
//! ```
//! Guarantees: no guest write waits for it; what the replica holds does not cross the link; after `finish` the replicas
//! hold what the disks held when it was called (with the guest stopped: what they hold), on stable storage.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pageport_common::telemetry;
use pageport_proto::VmId;
use pageport_proto::v1::{DiskHello, DiskSpec, ReplicationDisk, VmSpec};

use super::CopiesFrom;
use super::cap::Cap;
use super::session::{DiskSession, SessionError};
use super::store::ReplicaError;
use super::view::ReplicaView;
use crate::hypervisor::mirror::MirrorSync;
use crate::hypervisor::{HypervisorError, MirrorHandle, Vm};
use crate::nbd::{BlockTarget, ExportError, NbdServer};
use crate::node::Node;
use crate::transport::{PeerConnection, TransportError};

/// Time for the last writes to reach the peer once the mirror keeps up.
const FINISH_LIMIT: Duration = Duration::from_secs(20);
const CANCEL_LIMIT: Duration = Duration::from_secs(5);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Why the disks were not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] TransportError),
    /// A disk's stream did not begin.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A disk's stream ended.
    #[error("the copy of disk {disk:?} ended: {reason}")]
    Ended {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
    },
    /// The disk's image is not where it should be.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The image cannot be looked at.
    #[error("look at the image of disk {disk:?}")]
    Image {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The NBD server did not start.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The hypervisor's mirror failed.
    #[error(transparent)]
    Mirror(#[from] HypervisorError),
}

/// How far the copy is, over all disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyProgress {
    /// Looked at so far.
    pub done_bytes: u64,
    /// In all; grows with the guest's writes.
    pub total_bytes: u64,
    /// Sent by the transport.
    pub wan_bytes: u64,
    /// Of `wan_bytes`, lately.
    pub rate_bps: u64,
}

struct DiskCopy {
    name: String,
    session: Arc<DiskSession>,
    server: Option<NbdServer>,
    mirror: Option<MirrorHandle>,
}

/// The copies under way. [`Self::finish`] or [`Self::cancel`] ends them; dropped, their servers close, which ends the
/// hypervisor's jobs with an error that the guest does not notice.
pub struct DiskCopies {
    connection: PeerConnection,
    /// Memory moves over it too.
    shared: bool,
    disks: Vec<DiskCopy>,
}

impl DiskCopies {
    /// Connects, opens a session per disk and starts the mirrors, which look at the whole disks.
    ///
    /// # Errors
    /// Nothing is left running.
    pub async fn start(
        node: &Node,
        qemu: &Vm,
        spec: &VmSpec,
        peer: &str,
        address: &str,
        migration_id: &str,
        cap: Arc<Cap>,
    ) -> Result<Self, CopyError> {
        let mut copies = Self::over(node.endpoint.connect(peer, address).await?);
        for number in 0..spec.disks.len() {
            let started = async {
                let name = &spec.disks[number].name;
                let hello = DiskHello { migration_id: migration_id.to_owned(), ..hello(node, qemu.id(), name)? };
                let view = node.views.of(qemu.id(), peer).await;
                let session = copies.open(number as u16, hello, view, cap.clone()).await?;
                copies.mirror(qemu, name, session.clone(), session, MirrorSync::Full).await
            };
            if let Err(error) = started.await {
                copies.cancel().await;
                return Err(error);
            }
        }
        Ok(copies)
    }

    /// None yet, over a connection of their own, which ends with them.
    pub fn over(connection: PeerConnection) -> Self {
        Self { connection, shared: false, disks: Vec::new() }
    }

    /// None yet, over a connection that memory moves over too.
    pub fn beside_memory(connection: PeerConnection) -> Self {
        Self { connection, shared: true, disks: Vec::new() }
    }

    /// Opens a disk's session.
    ///
    /// # Errors
    /// The peer refuses it.
    pub async fn open(
        &self,
        number: u16,
        hello: DiskHello,
        view: Arc<ReplicaView>,
        cap: Arc<Cap>,
    ) -> Result<Arc<DiskSession>, CopyError> {
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        let copies = CopiesFrom::Now;
        Ok(Arc::new(DiskSession::open(&self.connection, number, hello, traceparent, view, copies, cap).await?))
    }

    /// Starts the mirror of a disk to `target`, which passes on to `session`.
    ///
    /// # Errors
    /// The mirror did not start; what was started stays for [`Self::cancel`].
    pub async fn mirror(
        &mut self,
        qemu: &Vm,
        name: &str,
        session: Arc<DiskSession>,
        target: Arc<impl BlockTarget>,
        sync: MirrorSync,
    ) -> Result<(), CopyError> {
        let socket = qemu.paths().nbd(name);
        let server = NbdServer::bind(&socket, name, target)?;
        self.disks.push(DiskCopy { name: name.to_owned(), session, server: Some(server), mirror: None });
        let mirror = qemu.start_mirror_of(sync, name, &socket, name).await?;
        if let Some(copy) = self.disks.last_mut() {
            copy.mirror = Some(mirror);
        }
        Ok(())
    }

    /// The sessions, in the order of the disks.
    pub fn sessions(&self) -> impl Iterator<Item = (&str, &Arc<DiskSession>)> {
        self.disks.iter().map(|copy| (copy.name.as_str(), &copy.session))
    }

    /// Waits until every mirror has caught up with its disk.
    ///
    /// # Errors
    /// A mirror or a session ended, or it took too long.
    pub async fn wait_ready(
        &mut self,
        limit: Duration,
        mut progress: impl FnMut(CopyProgress),
    ) -> Result<(), CopyError> {
        let mut rate = Rate::new(self.wan_bytes());
        let began = Instant::now();
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        loop {
            tick.tick().await;
            let wan_bytes = self.wan_bytes();
            let mut now = CopyProgress { wan_bytes, rate_bps: rate.bps(wan_bytes), ..CopyProgress::default() };
            let mut ready = true;
            for copy in &self.disks {
                let Some(mirror) = &copy.mirror else { continue };
                let job = mirror.progress().await.map_err(|error| copy.explain(error))?;
                now.done_bytes += job.done_bytes;
                now.total_bytes += job.total_bytes;
                ready &= job.ready;
            }
            progress(now);
            if ready {
                return Ok(());
            }
            if began.elapsed() > limit {
                let (disk, reason) = (String::new(), format!("it took longer than {} s", limit.as_secs()));
                return Err(CopyError::Ended { disk, reason });
            }
        }
    }

    /// Waits until the peer has on stable storage what has come to the sessions so far.
    ///
    /// # Errors
    /// A session failed.
    pub async fn flush(&self) -> Result<(), CopyError> {
        for copy in &self.disks {
            copy.session.flush().await.map_err(|error| copy.ended(error.to_string()))?;
        }
        Ok(())
    }

    /// What the mirrors have not copied yet, or the peer has not acknowledged, in bytes.
    ///
    /// # Errors
    /// A mirror ended.
    pub async fn lag_bytes(&self) -> Result<u64, CopyError> {
        let mut lag_bytes = 0;
        for copy in &self.disks {
            let Some(mirror) = &copy.mirror else { continue };
            let job = mirror.progress().await.map_err(|error| copy.explain(error))?;
            lag_bytes += job.total_bytes.saturating_sub(job.done_bytes) + copy.session.in_flight_bytes();
        }
        Ok(lag_bytes)
    }

    /// Once ready: ends the mirrors with their last writes, and brings the replicas to stable storage.
    ///
    /// # Errors
    /// A mirror or a session failed.
    pub async fn finish(&mut self) -> Result<(), CopyError> {
        for copy in &mut self.disks {
            let Some(mut mirror) = copy.mirror.take() else { continue };
            // The job drains all that is in flight before it ends; the limit bounds the guest's pause.
            if let Err(error) = mirror.finish(FINISH_LIMIT).await {
                copy.mirror = Some(mirror);
                return Err(copy.explain(error));
            }
        }
        self.flush().await?;
        for copy in &mut self.disks {
            if let Some(server) = copy.server.take() {
                server.close().await;
            }
        }
        Ok(())
    }

    /// Ends everything at once.
    pub async fn cancel(&mut self) {
        for mut copy in self.disks.drain(..) {
            // The socket goes first: a peer that hangs must not hold up the hypervisor.
            if let Some(server) = copy.server.take() {
                server.close().await;
            }
            if let Some(mut mirror) = copy.mirror.take()
                && let Err(error) = mirror.cancel(CANCEL_LIMIT).await
            {
                tracing::warn!(disk = copy.name, error = %crate::error::with_causes(&error), "mirror not cancelled");
            }
        }
        if !self.shared {
            self.connection.close("disk copy ended");
        }
    }

    /// Bytes that the transport sent for disks: of their connection, or of their streams where it is not theirs alone.
    pub fn wan_bytes(&self) -> u64 {
        if self.shared { self.streams_bytes() } else { self.connection.sent_bytes() }
    }

    /// Of [`Self::wan_bytes`] those that a connection which is not theirs alone counts too.
    pub fn shared_bytes(&self) -> u64 {
        if self.shared { self.streams_bytes() } else { 0 }
    }

    fn streams_bytes(&self) -> u64 {
        self.disks.iter().map(|copy| copy.session.sent_bytes()).sum()
    }
}

/// What a disk's stream begins with: which image it is.
///
/// # Errors
/// The image is not where it should be.
pub fn hello(node: &Node, vm: VmId, name: &str) -> Result<DiskHello, CopyError> {
    let missing = || ReplicaError::Missing { vm, disk: name.to_owned() };
    let image = node.replicas.locate(vm, name)?.ok_or_else(missing)?.image().map_err(ReplicaError::from)?;
    let bytes = || Ok((image.size_bytes()?, image.allocated_bytes()?));
    let (size_bytes, allocated_bytes) = bytes().map_err(|source| CopyError::Image { disk: name.to_owned(), source })?;
    let disk = name.to_owned();
    Ok(DiskHello { vm_id: vm.to_string(), disk, size_bytes, allocated_bytes, ..DiskHello::default() })
}

/// The images of a VM's disks, as a peer is told of them before any stream begins.
///
/// # Errors
/// An image is not where it should be.
pub fn images(node: &Node, vm: VmId, spec: &VmSpec) -> Result<Vec<ReplicationDisk>, CopyError> {
    let image = |disk: &DiskSpec| {
        let DiskHello { disk: name, size_bytes, allocated_bytes, .. } = hello(node, vm, &disk.name)?;
        Ok(ReplicationDisk { name, size_bytes, allocated_bytes, ..ReplicationDisk::default() })
    };
    tokio::task::block_in_place(|| spec.disks.iter().map(image).collect())
}

/// What the disk streams of a replication session begin with.
///
/// # Errors
/// A disk's image cannot be looked at.
pub fn hellos(node: &Node, vm: VmId, names: &[String], session: u64) -> Result<Vec<DiskHello>, CopyError> {
    let hello = |name: &String| Ok(DiskHello { session, ..hello(node, vm, name)? });
    tokio::task::block_in_place(|| names.iter().map(hello).collect())
}

impl DiskCopy {
    /// A session that ended says more than the mirror that it ended.
    fn explain(&self, error: HypervisorError) -> CopyError {
        match self.session.failure() {
            Some(reason) => CopyError::Ended { disk: self.name.clone(), reason },
            None => error.into(),
        }
    }

    fn ended(&self, reason: String) -> CopyError {
        CopyError::Ended { disk: self.name.clone(), reason: self.session.failure().unwrap_or(reason) }
    }
}

impl std::fmt::Debug for DiskCopies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.disks.iter().map(|copy| &copy.name).collect();
        f.debug_struct("DiskCopies").field("disks", &names).finish()
    }
}

impl BlockTarget for DiskSession {
    fn size(&self) -> u64 {
        self.size_bytes()
    }

    async fn read(&self, _offset: u64, _length: u32) -> io::Result<Bytes> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a replica is not read back over the link"))
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        Self::write(self, offset, data).await
    }

    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        Self::zero(self, offset, length.into()).await
    }

    async fn flush(&self) -> io::Result<()> {
        Self::flush(self).await
    }
}

/// Bits per second between two looks.
struct Rate {
    at: Instant,
    bytes: u64,
    bps: u64,
}

impl Rate {
    fn new(bytes: u64) -> Self {
        Self { at: Instant::now(), bytes, bps: 0 }
    }

    fn bps(&mut self, bytes: u64) -> u64 {
        let elapsed = self.at.elapsed();
        if elapsed >= Duration::from_secs(1) {
            self.bps = ((bytes - self.bytes) as f64 * 8.0 / elapsed.as_secs_f64()) as u64;
            *self = Self { at: Instant::now(), bytes, bps: self.bps };
        }
        self.bps
    }
}
