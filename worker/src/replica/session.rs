//! The source's end of a disk stream: takes writes, sends only what the replica does not hold.
//!
//! ```text
//!   write ─▶ plan: cut at block boundaries, compare digests with the view ─▶ held: nothing to do
//!                                       └─▶ differs: forget in the view ─▶ send ─▶ done ─▶ confirm in the view
//! ```
//! A write has taken effect when it returns: the peer has acknowledged it. `flush` returns when everything acknowledged
//! is on stable storage there. When the stream ends, all that waits fails. What the view knows is then distrusted, or, within an
//! attempt ([`super::view`]), left to who began the attempt.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pageport_proto::v1::{
    DiskFlush, DiskHello, DiskReply, DiskRequest, DiskWrite, DiskZero, StreamHello, disk_reply, disk_request,
    stream_hello,
};
use pageport_teleport::{BlockDigest, PAGE_SIZE, is_zero};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::cap::Cap;
use super::change::{Change, Changes};
use super::points::ChangeDigest;
use super::serve::MAX_WRITE_BYTES;
use super::store::BLOCK_BYTES;
use super::view::{Confirmed, ReplicaState, ReplicaView};
use crate::transport::{
    MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority,
};

/// Requests sent and not yet acknowledged; the mirror's own limit is lower.
const QUEUE: usize = 64;
/// A peer that says nothing for this long while it owes an answer is given up.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Cheap enough never to be slower than a fast link.
const COMPRESSION_LEVEL: i32 = 1;

/// Why a disk session could not begin.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No stream.
    #[error("open a disk stream")]
    Open(#[from] TransportError),
    /// The stream broke.
    #[error("begin a disk stream")]
    Stream(#[from] MessageError),
    /// The peer refused, and says why.
    #[error("the destination refused disk {disk:?}: {reason}")]
    Refused {
        /// The disk.
        disk: String,
        /// The peer's words.
        reason: String,
    },
    /// The peer's digests do not fit the disk.
    #[error("the destination's digests of disk {disk:?} make no sense")]
    Digests {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: pageport_teleport::index::IndexError,
    },
    /// The peer's digests are cut.
    #[error("the destination's digests of disk {disk:?} are cut")]
    CutDigests {
        /// The disk.
        disk: String,
    },
}

/// What is sent, and what the view learns when it is acknowledged.
#[derive(Debug)]
struct Order {
    step: Step,
    done: oneshot::Sender<io::Result<()>>,
}

/// One request, and what comes of it.
#[derive(Debug)]
pub(super) struct Step {
    request: disk_request::Kind,
    learned: Learned,
    change: Option<Change>,
}

#[derive(Debug)]
enum Learned {
    Nothing,
    Zero { first_block: u64, blocks: u64 },
    Digests { first_block: u64, digests: Vec<BlockDigest> },
}

#[derive(Debug)]
struct Pending {
    learned: Learned,
    done: oneshot::Sender<io::Result<()>>,
}

/// One disk's way to its replica.
#[derive(Debug)]
pub struct DiskSession {
    disk: u16,
    size_bytes: u64,
    view: Arc<ReplicaView>,
    orders: mpsc::Sender<Order>,
    failure: Arc<Mutex<Option<String>>>,
    /// Changes that no flush has covered yet; a flush of nothing costs no round trip.
    unflushed: AtomicU64,
    sent: Arc<Mutex<Changes>>,
    tasks: Mutex<Option<[AbortOnDropHandle<()>; 2]>>,
}

impl DiskSession {
    /// Opens the stream and brings the view up to date: by the peer's word that nothing changed, or by its digests.
    ///
    /// # Errors
    /// [`SessionError`]; once the peer has sent digests the view is then distrusted.
    pub async fn open(
        connection: &PeerConnection,
        disk: u16,
        mut hello: DiskHello,
        traceparent: String,
        view: Arc<ReplicaView>,
        cap: Arc<Cap>,
    ) -> Result<Self, SessionError> {
        let known = view.state_of(disk, &hello.disk, hello.size_bytes);
        (hello.known_instance, hello.known_version) = (known.instance, known.version);
        let (name, size_bytes) = (hello.disk.clone(), hello.size_bytes);
        let (send, recv) = connection.open_bi(priority::MEMORY).await?;
        let (mut writer, mut reader) = (MessageWriter::new(send), MessageReader::new(recv));
        let kind = Some(stream_hello::Kind::Disk(hello));
        writer.send(&StreamHello { protocol_version: PROTOCOL_VERSION, traceparent, kind }).await?;
        synchronise(&mut reader, disk, &name, size_bytes, known, &view).await?;

        let (orders, queue) = mpsc::channel(QUEUE);
        let (pending, acknowledged) = mpsc::channel(QUEUE);
        let failure = Arc::new(Mutex::new(None));
        let sent = Arc::new(Mutex::new(Changes::new(&name, size_bytes)));
        let sending = tokio::spawn(send_orders(queue, pending, writer, sent.clone(), cap));
        let receiving = tokio::spawn(receive_replies(acknowledged, reader, disk, view.clone(), failure.clone()));
        let tasks = [AbortOnDropHandle::new(sending), AbortOnDropHandle::new(receiving)];
        // An earlier session may have left changes unflushed.
        let unflushed = AtomicU64::new(1);
        let tasks = Mutex::new(Some(tasks));
        Ok(Self { disk, size_bytes, view, orders, failure, unflushed, sent, tasks })
    }

    /// Digest of all changes sent so far, in their order.
    pub fn change_digest(&self) -> ChangeDigest {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).digest()
    }

    /// Bytes of the disk that were sent so far, before compression, zeros included.
    pub fn changed_bytes(&self) -> u64 {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }

    /// Ends the stream; when this returns the view learns nothing from it any more.
    pub async fn end(&self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        for task in tasks.into_iter().flatten() {
            task.abort();
            // Aborted: that is how it is to end.
            let _ = task.await;
        }
    }

    /// Size of the disk, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Why the session ended, if it did.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings the replica to hold `data` at `offset`.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let sent = self.send_all(self.planned_write(offset, data).await?).await?;
        acknowledged(sent).await
    }

    pub(super) async fn planned_write(&self, offset: u64, data: Bytes) -> io::Result<Planned> {
        let (view, disk) = (self.view.clone(), self.disk);
        let planned = tokio::task::spawn_blocking(move || plan_write(&view, disk, offset, &data)).await;
        planned.map_err(io::Error::other)?
    }

    /// Brings the replica to hold zeros.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let sent = self.send_all(self.planned_zero(offset, length)?).await?;
        acknowledged(sent).await
    }

    pub(super) fn planned_zero(&self, offset: u64, length: u64) -> io::Result<Planned> {
        plan_zero(&self.view, self.disk, offset, length)
    }

    /// Brings everything acknowledged so far to stable storage at the peer.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn flush(&self) -> io::Result<()> {
        let unflushed = self.unflushed.load(Ordering::Acquire);
        if unflushed == 0 {
            return Ok(());
        }
        let flush = disk_request::Kind::Flush(DiskFlush {});
        let sent = self.send_all(vec![Step { request: flush, learned: Learned::Nothing, change: None }]).await?;
        acknowledged(sent).await?;
        // What came meanwhile is left for the next flush.
        self.unflushed.fetch_sub(unflushed, Ordering::AcqRel);
        Ok(())
    }

    /// Sends in this order; what comes back ends when all is acknowledged.
    pub(super) async fn send_all(&self, planned: Planned) -> io::Result<Sent> {
        let mut waiting = Vec::with_capacity(planned.len());
        for step in planned {
            if step.change.is_some() {
                self.unflushed.fetch_add(1, Ordering::AcqRel);
            }
            let (done, acknowledged) = oneshot::channel();
            self.orders.send(Order { step, done }).await.map_err(|_| ended())?;
            waiting.push(acknowledged);
        }
        Ok(waiting)
    }
}

/// What was sent and is not acknowledged yet.
pub(super) type Sent = Vec<oneshot::Receiver<io::Result<()>>>;

/// Waits until all of it is acknowledged.
pub(super) async fn acknowledged(sent: Sent) -> io::Result<()> {
    for one in sent {
        one.await.map_err(|_| ended())??;
    }
    Ok(())
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the disk stream to the destination has ended")
}

async fn synchronise(
    reader: &mut MessageReader,
    disk: u16,
    name: &str,
    size_bytes: u64,
    known: ReplicaState,
    view: &ReplicaView,
) -> Result<(), SessionError> {
    let nonsense = |source| SessionError::Digests { disk: name.to_owned(), source };
    // Until all digests are here the view is a mixture: a state is named only at the end. Both wait for files.
    let start_over = || tokio::task::block_in_place(|| view.start_over(disk, name, size_bytes)).map_err(nonsense);
    let learn = |first_block, digests: &[BlockDigest]| {
        let change = Confirmed::Digests { first_block, digests };
        tokio::task::block_in_place(|| view.confirm(disk, ReplicaState::default(), change)).map_err(nonsense)
    };
    let (mut fresh, mut digest_count) = (false, 0);
    loop {
        let reply: DiskReply = reader.receive_within(ANSWER_LIMIT).await?;
        match reply.kind.ok_or(MessageError::Empty)? {
            disk_reply::Kind::Digests(run) => {
                if !fresh {
                    start_over()?;
                    fresh = true;
                }
                let (digests, rest) = run.digests.as_chunks::<{ BlockDigest::LENGTH }>();
                if !rest.is_empty() {
                    return Err(SessionError::CutDigests { disk: name.to_owned() });
                }
                let digests: Vec<_> = digests.iter().map(|digest| BlockDigest(*digest)).collect();
                digest_count += digests.len();
                learn(run.first_block, &digests)?;
            }
            disk_reply::Kind::Opened(opened) => {
                let state = ReplicaState { instance: opened.instance, version: opened.version };
                if opened.digests_sent && !fresh {
                    start_over()?;
                }
                if !opened.digests_sent && state != known {
                    return Err(SessionError::CutDigests { disk: name.to_owned() });
                }
                let digests_sent = opened.digests_sent;
                tracing::info!(disk = name, digests_sent, digest_count, "disk session open");
                return view.confirm(disk, state, Confirmed::Nothing).map_err(nonsense);
            }
            disk_reply::Kind::Failure(failure) => {
                return Err(SessionError::Refused { disk: name.to_owned(), reason: failure.reason });
            }
            disk_reply::Kind::Done(_) => return Err(MessageError::Empty.into()),
        }
    }
}

async fn send_orders(
    mut queue: mpsc::Receiver<Order>,
    pending: mpsc::Sender<Pending>,
    mut writer: MessageWriter,
    sent: Arc<Mutex<Changes>>,
    cap: Arc<Cap>,
) {
    while let Some(Order { step: Step { request, learned, change }, done }) = queue.recv().await {
        if let Some(change) = &change {
            sent.lock().unwrap_or_else(PoisonError::into_inner).add(change);
        }
        if pending.send(Pending { learned, done }).await.is_err() {
            return;
        }
        let request = DiskRequest { kind: Some(request) };
        cap.take(request.encoded_len() as u64).await;
        if let Err(error) = writer.send(&request).await {
            tracing::debug!(%error, "disk stream ended while sending");
            return;
        }
    }
}

async fn receive_replies(
    mut acknowledged: mpsc::Receiver<Pending>,
    mut reader: MessageReader,
    disk: u16,
    view: Arc<ReplicaView>,
    failure: Arc<Mutex<Option<String>>>,
) {
    let reason = loop {
        // None: the session was dropped, and nobody waits any more.
        let Some(Pending { learned, done }) = acknowledged.recv().await else { return };
        let reply: Result<DiskReply, _> = reader.receive_within(ANSWER_LIMIT).await;
        let reason = match reply {
            Ok(DiskReply { kind: Some(disk_reply::Kind::Done(answer)) }) => {
                match learn(&view, disk, answer.version, &learned) {
                    Ok(()) => {
                        // Who asked may have given up; the view has learned all the same.
                        let _ = done.send(Ok(()));
                        continue;
                    }
                    Err(error) => crate::error::with_causes(&error),
                }
            }
            Ok(DiskReply { kind: Some(disk_reply::Kind::Failure(failure)) }) => failure.reason,
            Ok(_) => "the destination answered what was not asked".to_owned(),
            Err(error) => crate::error::with_causes(&error),
        };
        break reason;
    };
    tracing::warn!(disk, %reason, "disk stream ended");
    view.distrust(disk);
    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    // All that waits finds its oneshot dropped.
}

fn learn(
    view: &ReplicaView,
    disk: u16,
    version: u64,
    learned: &Learned,
) -> Result<(), pageport_teleport::index::IndexError> {
    let state = ReplicaState { version, ..view.state(disk) };
    let change = match learned {
        Learned::Nothing => Confirmed::Nothing,
        Learned::Zero { first_block, blocks } => Confirmed::Zero { first_block: *first_block, blocks: *blocks },
        Learned::Digests { first_block, digests } => Confirmed::Digests { first_block: *first_block, digests },
    };
    view.confirm(disk, state, change)
}

pub(super) type Planned = Vec<Step>;

/// What must be sent so that the replica holds `data` at `offset`. Blocks that are to change are forgotten in the view.
fn plan_write(view: &ReplicaView, disk: u16, offset: u64, data: &[u8]) -> io::Result<Planned> {
    let mut planned = Vec::new();
    let head = ((BLOCK_BYTES - offset % BLOCK_BYTES) % BLOCK_BYTES).min(data.len() as u64) as usize;
    let (head_data, rest) = data.split_at(head);
    let (blocks, tail_data) = rest.as_chunks::<PAGE_SIZE>();
    let first_block = (offset + head as u64) / BLOCK_BYTES;
    plan_part_of_block(view, disk, offset, head_data, &mut planned)?;

    let mut at = 0;
    while at < blocks.len() {
        let block = first_block + at as u64;
        let digest = BlockDigest::of(&blocks[at]);
        if view.holds(disk, block, &digest) {
            at += 1;
        } else if is_zero(&blocks[at]) {
            let zeros = blocks[at..].iter().take_while(|page| is_zero(page)).count();
            planned.extend(plan_zero(view, disk, block * BLOCK_BYTES, zeros as u64 * BLOCK_BYTES)?);
            at += zeros;
        } else {
            let mut digests = vec![digest];
            for (next, page) in (block + 1..).zip(&blocks[at + 1..]) {
                let digest = BlockDigest::of(page);
                let ends = digests.len() * PAGE_SIZE == MAX_WRITE_BYTES || is_zero(page);
                if ends || view.holds(disk, next, &digest) {
                    break;
                }
                digests.push(digest);
            }
            let run = blocks[at..at + digests.len()].as_flattened();
            at += digests.len();
            view.forget_blocks(disk, block, digests.len() as u64).map_err(io::Error::other)?;
            planned.push(write_step(block * BLOCK_BYTES, run, Learned::Digests { first_block: block, digests })?);
        }
    }
    plan_part_of_block(view, disk, (first_block + blocks.len() as u64) * BLOCK_BYTES, tail_data, &mut planned)?;
    Ok(planned)
}

/// A part of a block is always sent; of the block as a whole nothing is known afterwards.
fn plan_part_of_block(
    view: &ReplicaView,
    disk: u16,
    offset: u64,
    data: &[u8],
    planned: &mut Planned,
) -> io::Result<()> {
    if !data.is_empty() {
        view.forget_blocks(disk, offset / BLOCK_BYTES, 1).map_err(io::Error::other)?;
        planned.push(write_step(offset, data, Learned::Nothing)?);
    }
    Ok(())
}

fn write_step(offset: u64, data: &[u8], learned: Learned) -> io::Result<Step> {
    let zstd = zstd::bulk::compress(data, COMPRESSION_LEVEL)?.into();
    let request = disk_request::Kind::Write(DiskWrite { offset, raw_length: data.len() as u32, zstd });
    Ok(Step { request, learned, change: Some(Change::data(offset, data)) })
}

fn plan_zero(view: &ReplicaView, disk: u16, offset: u64, length: u64) -> io::Result<Planned> {
    let mut planned = Vec::new();
    let end = offset + length;
    let first_whole = offset.div_ceil(BLOCK_BYTES);
    let end_whole = (end / BLOCK_BYTES).max(first_whole);
    let head_end = end.min(first_whole * BLOCK_BYTES);
    let zeros = [0; PAGE_SIZE];
    plan_part_of_block(view, disk, offset, &zeros[..(head_end - offset) as usize], &mut planned)?;
    let mut block = first_whole;
    while block < end_whole {
        if view.holds_zeros(disk, block, 1) {
            block += 1;
            continue;
        }
        let run = (block..end_whole).take_while(|block| !view.holds_zeros(disk, *block, 1)).count() as u64;
        view.forget_blocks(disk, block, run).map_err(io::Error::other)?;
        let (offset, length) = (block * BLOCK_BYTES, run * BLOCK_BYTES);
        planned.push(Step {
            request: disk_request::Kind::Zero(DiskZero { offset, length }),
            learned: Learned::Zero { first_block: block, blocks: run },
            change: Some(Change::zeros(offset, length)),
        });
        block += run;
    }
    let tail_start = end_whole * BLOCK_BYTES;
    if end > tail_start && tail_start >= offset {
        plan_part_of_block(view, disk, tail_start, &zeros[..(end - tail_start) as usize], &mut planned)?;
    }
    Ok(planned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u16 = 0;

    fn view_of(blocks: u64) -> ReplicaView {
        let view = ReplicaView::default();
        view.start_over(DISK, "root", blocks * BLOCK_BYTES).unwrap();
        view
    }

    fn acknowledge(view: &ReplicaView, planned: &Planned) {
        for step in planned {
            learn(view, DISK, 1, &step.learned).unwrap();
        }
    }

    /// Carries requests out on a plain buffer, as the destination would.
    fn apply(planned: &Planned, replica: &mut [u8]) {
        for step in planned {
            match &step.request {
                disk_request::Kind::Write(write) => {
                    let data = zstd::bulk::decompress(&write.zstd, write.raw_length as usize).unwrap();
                    replica[write.offset as usize..][..data.len()].copy_from_slice(&data);
                }
                disk_request::Kind::Zero(zero) => replica[zero.offset as usize..][..zero.length as usize].fill(0),
                disk_request::Kind::Flush(_) => {}
            }
        }
    }

    #[test]
    fn what_the_replica_holds_is_not_sent_again() {
        let view = view_of(8);
        let data: Vec<u8> = (0..4 * PAGE_SIZE).map(|at| (at / PAGE_SIZE) as u8).collect();
        let first = plan_write(&view, DISK, BLOCK_BYTES, &data).unwrap();
        assert_eq!(first.len(), 1, "block 0 of the data is zero and held; the other three are one write");
        acknowledge(&view, &first);
        assert!(plan_write(&view, DISK, BLOCK_BYTES, &data).unwrap().is_empty());
        assert_eq!(plan_zero(&view, DISK, 0, 8 * BLOCK_BYTES).unwrap().len(), 1);
    }

    #[test]
    fn an_unacknowledged_write_is_sent_again() {
        let view = view_of(2);
        let data = [1; PAGE_SIZE];
        plan_write(&view, DISK, 0, &data).unwrap();
        assert_eq!(plan_write(&view, DISK, 0, &data).unwrap().len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn any_sequence_of_writes_leaves_the_replica_equal_to_the_disk(
            steps in proptest::collection::vec((0u64..16 * BLOCK_BYTES, 0usize..3 * PAGE_SIZE, 0u8..4, proptest::bool::ANY), 1..40)
        ) {
            let size = 16 * BLOCK_BYTES;
            let view = view_of(16);
            let (mut disk, mut replica) = (vec![0; size as usize], vec![0; size as usize]);
            for (offset, length, fill, aligned) in steps {
                let offset = if aligned { offset - offset % BLOCK_BYTES } else { offset };
                let length = length.min((size - offset) as usize);
                let planned = if fill == 3 {
                    disk[offset as usize..][..length].fill(0);
                    plan_zero(&view, DISK, offset, length as u64).unwrap()
                } else {
                    disk[offset as usize..][..length].fill(fill);
                    plan_write(&view, DISK, offset, &vec![fill; length]).unwrap()
                };
                apply(&planned, &mut replica);
                acknowledge(&view, &planned);
            }
            proptest::prop_assert!(disk == replica);
        }
    }
}
