//! A part of a scrub: the replica compared with the disks as they are at one frozen moment, for as long as that may last.
//!
//! ```text
//!   connect ─▶ points? ─▶ freeze, with the bitmap of the newest point ─▶ piece after piece ─▶ release
//! ```
//! What the bitmap says was written since that point is left out: the next point brings it. Everything else must be in the replica's file as it
//! is in the disk.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pageport_proto::v1::{CompareBlocks, Compared, ReplicationAssignment, VmSpec};
use pageport_teleport::BlockDigest;
use pageport_teleport::index::IndexError;
use tokio::task::spawn_blocking;

use super::piece::{Disks, Piece, Written, differing, digest_of, digests};
use super::record::Progress;
use crate::hypervisor::freeze::{Consistency, Outcome};
use crate::hypervisor::{HypervisorError, Vm};
use crate::nbd::{Content, NbdClient, State};
use crate::node::Node;
use crate::replica::cap::Cap;
use crate::replica::copy::{CopyError, hellos};
use crate::replica::store::BLOCK_BYTES;
use crate::replica::view::ReplicaView;
use crate::replication::control::{Control, ControlError, Placement};
use crate::replication::frozen_copy::{FrozenCopy, FrozenCopyError, unreadable};
use crate::replication::mark::Mark;
use crate::replication::plan::{Plan, disks_of};
use crate::replication::throttle::Throttle;
use crate::transport::TransportError;

/// Read from the frozen disk at a time, in bytes.
const READ_BYTES: u64 = 1 << 20;
/// Kept in memory until the next point brings it; when there is more, that point is due.
const MAX_DIFFERENCES_BYTES: u64 = 64 << 20;
/// Between two looks at how the guest's writes fare.
const THROTTLE_INTERVAL: Duration = Duration::from_secs(1);

/// Why a pass compared nothing more.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    /// A migration or the round of another replica needs the turn, or the order was withdrawn.
    #[error("interrupted")]
    Interrupted,
    /// Without the bitmap of the newest point a change of the guest cannot be told from damage.
    #[error("the next recovery point has to come first")]
    NoBitmap,
    /// No connection.
    #[error(transparent)]
    Connect(#[from] TransportError),
    /// A disk is not as it should be.
    #[error(transparent)]
    Disk(#[from] CopyError),
    /// The frozen moment.
    #[error(transparent)]
    Frozen(#[from] FrozenCopyError),
    /// The hypervisor.
    #[error("compare a frozen point")]
    Hypervisor(#[from] HypervisorError),
    /// The replica's worker.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// What it said.
    #[error("the replica's worker said of {blocks} blocks what {found} digests cannot")]
    Nonsense {
        /// What was asked.
        blocks: u64,
        /// What came.
        found: usize,
    },
    /// The block index.
    #[error("correct what is known of the replica")]
    View(#[from] IndexError),
    /// A thread ended.
    #[error("the thread that compared a piece ended")]
    Thread(#[from] tokio::task::JoinError),
}

/// Blocks of the replica that were not what they should be, as they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The disk.
    pub disk: String,
    /// Where, in bytes; at a block.
    pub offset: u64,
    /// The source's content.
    pub data: Bytes,
}

impl Difference {
    /// How many blocks.
    pub fn blocks(&self) -> u64 {
        (self.data.len() as u64).div_ceil(BLOCK_BYTES)
    }
}

/// What a pass needs.
pub struct Pass<'a> {
    /// This worker.
    pub node: &'a Node,
    /// The VM's hypervisor.
    pub qemu: &'a Vm,
    /// Its definition.
    pub spec: &'a VmSpec,
    /// The order.
    pub order: &'a ReplicationAssignment,
    /// No piece is begun after this.
    pub until: Instant,
}

/// What a pass brings; whole pieces only, whatever ends it.
#[derive(Debug, Default)]
pub struct Findings {
    /// How far the scrub is.
    pub progress: Progress,
    /// What differed.
    pub differences: Vec<Difference>,
    /// How fast the guest lets us read.
    pub throttle: Option<Throttle>,
}

impl Pass<'_> {
    /// Compares piece after piece, from where `findings` is; at least one. `tell` hears how far it is.
    ///
    /// # Errors
    /// [`ScrubError`]; what was compared before is in `findings`.
    pub async fn run(
        &self,
        findings: &mut Findings,
        interrupt: impl Future<Output = ()>,
        tell: impl FnMut(&Progress),
    ) -> Result<(), ScrubError> {
        let connection = self.node.endpoint.connect(&self.order.peer_worker, &self.order.peer_address).await?;
        let session = rand::random::<u64>().max(1);
        let names = disks_of(self.qemu, self.spec).await?;
        let hellos = hellos(self.node, self.qemu.id(), &names, session)?;
        let (mut control, points) = Control::open(&connection, session, &hellos, Placement::default()).await?;
        let disks = Disks(hellos.into_iter().map(|hello| (hello.disk, hello.size_bytes)).collect());
        let plan = Plan::make(self.qemu, &disks.names(), &points, &self.order.peer_worker).await?;
        let since = plan.since.filter(|_| !plan.in_place).ok_or(ScrubError::NoBitmap)?;
        // Not a point: it only ends the moment, and is removed with it.
        let worker = self.order.peer_worker.clone();
        let end = Mark { worker, lineage: plan.lineage, point: u64::MAX }.to_string();
        let frozen =
            FrozenCopy::freeze(self.node, self.qemu, &disks.names(), Some(&since), &end, Consistency::Crash).await?;
        let compared = tokio::select! {
            biased;
            () = interrupt => Err(ScrubError::Interrupted),
            compared = self.compare(&frozen, &mut control, &disks, findings, tell) => compared,
        };
        let released = frozen.release(Outcome::Failed).await;
        connection.close("a part of a scrub ended");
        compared?;
        Ok(released?)
    }

    async fn compare(
        &self,
        frozen: &FrozenCopy,
        control: &mut Control,
        disks: &Disks,
        findings: &mut Findings,
        mut tell: impl FnMut(&Progress),
    ) -> Result<(), ScrubError> {
        let view = self.node.views.of(self.qemu.id(), &self.order.peer_worker).await;
        let clients = frozen.readers(&disks.names()).await?;
        let mut pace = Pace::begin(self.qemu, &mut findings.throttle).await?;
        findings.progress.total_bytes = disks.total_bytes();
        while let Some(piece) = findings.progress.place.as_ref().and_then(|place| disks.piece_at(place)) {
            let client = &clients[usize::from(piece.number)];
            let ours = read(client, &piece, &mut pace).await?;
            let answer = control.compare(ours.question()).await?;
            let found = tokio::task::block_in_place(|| ours.judge(&view, &answer))?;
            // All at once: whoever interrupts finds whole pieces.
            let progress = &mut findings.progress;
            progress.different_blocks += found.iter().map(Difference::blocks).sum::<u64>();
            progress.compared_bytes += piece.length - ours.written.bytes(&piece);
            progress.passed_bytes += piece.length;
            progress.place = disks.after(&piece);
            findings.differences.extend(found);
            tell(progress);
            frozen.check_scratch().await?;
            let held: u64 = findings.differences.iter().map(|difference| difference.data.len() as u64).sum();
            if Instant::now() >= self.until || held >= MAX_DIFFERENCES_BYTES {
                return Ok(());
            }
        }
        findings.progress.place = None;
        Ok(())
    }
}

/// A piece of the frozen disk, and what of it was written since the newest point.
async fn read(client: &NbdClient, piece: &Piece, pace: &mut Pace<'_>) -> Result<Ours, ScrubError> {
    let failed = |error| unreadable(piece.disk.clone(), error);
    let end = piece.offset + piece.length;
    let (mut written, mut at) = (Written::default(), piece.offset);
    while at < end {
        let extents = client.extents(at).await.map_err(failed)?;
        for extent in extents.iter().filter(|extent| extent.state != State::Clean && extent.offset < end) {
            written.note(extent.offset, (extent.offset + extent.length).min(end));
        }
        at = extents.last().map_or(end, |last| last.offset + last.length);
    }
    let mut content = BytesMut::with_capacity(piece.length as usize);
    while (content.len() as u64) < piece.length {
        let length = (piece.length - content.len() as u64).min(READ_BYTES);
        pace.keep(length).await?;
        match client.read(piece.offset + content.len() as u64, length as u32).await.map_err(failed)? {
            Content::Data(data) => content.extend_from_slice(&data),
            Content::Zero => content.resize(content.len() + length as usize, 0),
        }
    }
    let (piece, content) = (piece.clone(), content.freeze());
    let hashing = content.clone();
    let digests = spawn_blocking(move || digests(&hashing)).await?;
    Ok(Ours { piece, content, digests, written })
}

/// A piece as the source has it.
#[derive(Debug)]
pub(super) struct Ours {
    pub(super) piece: Piece,
    pub(super) content: Bytes,
    pub(super) digests: Vec<BlockDigest>,
    pub(super) written: Written,
}

impl Ours {
    /// What the replica's worker is asked.
    pub(super) fn question(&self) -> CompareBlocks {
        CompareBlocks {
            disk: self.piece.disk.clone(),
            first_block: self.piece.first_block(),
            blocks: self.digests.len() as u64,
            digest: digest_of(&self.digests).to_vec().into(),
        }
    }

    /// Corrects the index by the answer, and finds what differs.
    pub(super) fn judge(&self, view: &ReplicaView, answer: &Compared) -> Result<Vec<Difference>, ScrubError> {
        let Self { piece, content, digests: ours, written } = self;
        let theirs = if answer.same { ours.clone() } else { self.digests_in(&answer.digests)? };
        let first_block = piece.first_block();
        let corrected = view.correct(piece.number, first_block, &theirs)?;
        let runs = differing(first_block, ours, &theirs, written);
        if corrected > 0 || !runs.is_empty() {
            let different: u64 = runs.iter().map(|run| run.end - run.start).sum();
            tracing::warn!(disk = piece.disk, offset = piece.offset, different, corrected, "the replica is damaged");
        }
        let difference = |run: Range<u64>| {
            let offset = run.start * BLOCK_BYTES;
            let end = (run.end * BLOCK_BYTES).min(piece.offset + piece.length);
            let data = &content[(offset - piece.offset) as usize..(end - piece.offset) as usize];
            // A copy, so that a block does not keep the piece.
            Difference { disk: piece.disk.clone(), offset, data: Bytes::copy_from_slice(data) }
        };
        Ok(runs.into_iter().map(difference).collect())
    }

    fn digests_in(&self, bytes: &[u8]) -> Result<Vec<BlockDigest>, ScrubError> {
        let (digests, rest) = bytes.as_chunks::<{ BlockDigest::LENGTH }>();
        if digests.len() != self.digests.len() || !rest.is_empty() {
            return Err(ScrubError::Nonsense { blocks: self.digests.len() as u64, found: digests.len() });
        }
        Ok(digests.iter().map(|digest| BlockDigest(*digest)).collect())
    }
}

/// Reads no faster than the guest's writes bear.
struct Pace<'a> {
    qemu: &'a Vm,
    throttle: &'a mut Throttle,
    cap: Cap,
    looked: Instant,
}

impl<'a> Pace<'a> {
    /// The throttle is kept from pass to pass.
    async fn begin(qemu: &'a Vm, throttle: &'a mut Option<Throttle>) -> Result<Self, ScrubError> {
        let count = qemu.write_count().await?;
        let throttle = throttle.get_or_insert_with(|| Throttle::new(count, count));
        let pace = Self { qemu, throttle, cap: Cap::none(), looked: Instant::now() };
        pace.set();
        Ok(pace)
    }

    fn set(&self) {
        self.cap.set(self.throttle.bytes_per_s().saturating_mul(8));
    }

    /// Waits until so much may be read.
    async fn keep(&mut self, bytes: u64) -> Result<(), ScrubError> {
        if self.looked.elapsed() >= THROTTLE_INTERVAL {
            self.looked = Instant::now();
            self.throttle.look(self.qemu.write_count().await?);
            self.set();
        }
        self.cap.take(bytes).await;
        Ok(())
    }
}
