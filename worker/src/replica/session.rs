//! The source's end of a disk stream: takes writes, sends only what the replica does not hold.
//!
//! ```text
//!   write ─▶ digests ─▶ plan: what differs (planner) ─▶ pack: compress ─▶ send ─▶ done ─▶ confirm in the view
//!                       └─ in the order in which they are sent ─┘
//! ```
//! A write returns once it is queued, with bounded bytes in flight. Changes take effect in their order; `flush` returns when all before it have,
//! and are on stable storage there. When the stream ends, all that waits fails, and so does every later write and flush. What the view knows is then distrusted, or, within an
//! attempt ([`super::view`]), left to who began the attempt.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, Ready, ready};
use pageport_proto::v1::{
    DiskCopy, DiskFlush, DiskHello, DiskReply, DiskRequest, DiskWrite, DiskZero, StreamHello, disk_reply, disk_request,
    stream_hello,
};
use pageport_teleport::BlockDigest;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio_util::task::AbortOnDropHandle;

use super::cap::Cap;
use super::change::{Change, Changes};
use super::in_flight::{InFlight, Number};
use super::planner::{Action, CopiesFrom, Learned, Planner, Step, digests_of};
use super::points::ChangeDigest;
use super::serve::compress;
use super::store::BLOCK_BYTES;
use super::view::{Confirmed, ReplicaState, ReplicaView};
use crate::nbd::Sink;
use crate::transport::{
    MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority,
};

/// Bytes of changes that are queued or sent and not yet acknowledged: more than a link holds, 50 ms at 5 Gbit/s. The hypervisor itself
/// has 16 requests in flight, which for small ones would leave most of a long link empty.
pub const IN_FLIGHT_BYTES: u64 = 32 << 20;
/// A change of less than a block counts as one.
const IN_FLIGHT_UNITS: usize = (IN_FLIGHT_BYTES / BLOCK_BYTES) as usize;
/// So much is hashed, planned and compressed at once: to hand it to another thread would take longer.
const SMALL_BYTES: usize = 16 << 10;
/// A peer that says nothing for this long while it owes an answer is given up.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

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
    packed: Packing,
    pending: Pending,
}

/// A request that another thread packs, or that was packed already.
type Packing = Either<Ready<Result<io::Result<Packed>, JoinError>>, JoinHandle<io::Result<Packed>>>;

/// One request, ready to be sent.
#[derive(Debug)]
struct Packed {
    request: disk_request::Kind,
    change: Option<Change>,
}

#[derive(Debug)]
struct Pending {
    learned: Learned,
    number: Option<Number>,
    done: oneshot::Sender<io::Result<()>>,
    room: OwnedSemaphorePermit,
}

/// One disk's way to its replica.
#[derive(Debug)]
pub struct DiskSession {
    size_bytes: u64,
    /// Held until what it planned is in the queue.
    planner: Arc<tokio::sync::Mutex<Planner>>,
    orders: mpsc::Sender<Order>,
    /// For what may be in flight.
    room: Arc<Semaphore>,
    failure: Arc<Mutex<Option<String>>>,
    /// Changes that no flush has covered yet; a flush of nothing costs no round trip.
    unflushed: AtomicU64,
    sent: Arc<Mutex<Changes>>,
    sent_bytes: Arc<AtomicU64>,
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
        copies: CopiesFrom,
        cap: Arc<Cap>,
    ) -> Result<Self, SessionError> {
        let (growing, name, size_bytes) = (view.clone(), hello.disk.clone(), hello.size_bytes);
        let grown = spawn_blocking(move || growing.grow(disk, &name, size_bytes)).await;
        if !matches!(grown, Ok(Ok(()))) {
            tracing::warn!(disk = hello.disk, "what is known of the replica does not grow with the disk");
        }
        let known = view.state_of(disk, &hello.disk, hello.size_bytes);
        (hello.known_instance, hello.known_version) = (known.instance, known.version);
        let (name, size_bytes) = (hello.disk.clone(), hello.size_bytes);
        let (send, recv) = connection.open_bi(priority::MEMORY).await?;
        let (mut writer, mut reader) = (MessageWriter::new(send), MessageReader::new(recv));
        let kind = Some(stream_hello::Kind::Disk(hello));
        writer.send(&StreamHello { protocol_version: PROTOCOL_VERSION, traceparent, kind }).await?;
        synchronise(&mut reader, disk, &name, size_bytes, known, &view).await?;

        let (orders, queue) = mpsc::channel(IN_FLIGHT_UNITS);
        let (pending, acknowledged) = mpsc::channel(IN_FLIGHT_UNITS);
        let (failure, sent_bytes) = (Arc::new(Mutex::new(None)), writer.sent_bytes());
        let sent = Arc::new(Mutex::new(Changes::new(&name, size_bytes)));
        let sending = tokio::spawn(send_orders(queue, pending, writer, sent.clone(), cap));
        let planner = Planner::new(view.clone(), disk, size_bytes, copies);
        let learner = Learner { view, disk, in_flight: planner.in_flight() };
        let receiving = tokio::spawn(receive_replies(acknowledged, reader, learner, failure.clone()));
        let tasks = [AbortOnDropHandle::new(sending), AbortOnDropHandle::new(receiving)];
        // An earlier session may have left changes unflushed.
        let unflushed = AtomicU64::new(1);
        let tasks = Mutex::new(Some(tasks));
        let planner = Arc::new(tokio::sync::Mutex::new(planner));
        let room = Arc::new(Semaphore::new(IN_FLIGHT_UNITS));
        Ok(Self { size_bytes, planner, orders, room, failure, unflushed, sent, sent_bytes, tasks })
    }

    /// Digest of all changes sent so far, in their order.
    pub fn change_digest(&self) -> ChangeDigest {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).digest()
    }

    /// Bytes of the disk that were sent so far, before compression, zeros included.
    pub fn changed_bytes(&self) -> u64 {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }

    /// Bytes of all that was sent so far, as the stream has it.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
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

    /// Brings the replica to hold `data` at `offset`, behind whatever was written before; [`Self::flush`] tells when that is so.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        // The planner is let go of once everything is in the queue.
        let (steps, _planner) = if data.len() <= SMALL_BYTES {
            let digests = digests_of(offset, &data);
            let mut planner = self.planner.clone().lock_owned().await;
            (planner.write(offset, &data, &digests)?, planner)
        } else {
            let hashing = data.clone();
            let digests = spawn_blocking(move || digests_of(offset, &hashing)).await.map_err(io::Error::other)?;
            let mut planner = self.planner.clone().lock_owned().await;
            let plan = move || planner.write(offset, &data, &digests).map(|steps| (steps, planner));
            spawn_blocking(plan).await.map_err(io::Error::other)??
        };
        for step in steps {
            self.send(step).await?;
        }
        Ok(())
    }

    /// Brings the replica to hold zeros, as [`Self::write`] brings it to hold data.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut planner = self.planner.lock().await;
        for step in planner.zero(offset, length)? {
            self.send(step).await?;
        }
        Ok(())
    }

    /// Bytes of changes that the peer has not acknowledged yet, at most [`IN_FLIGHT_BYTES`].
    pub fn in_flight_bytes(&self) -> u64 {
        (IN_FLIGHT_UNITS - self.room.available_permits()) as u64 * BLOCK_BYTES
    }

    /// Waits for everything written so far, and brings it to stable storage at the peer.
    ///
    /// # Errors
    /// The session has ended: see [`Self::failure`].
    pub async fn flush(&self) -> io::Result<()> {
        let unflushed = self.unflushed.load(Ordering::Acquire);
        if unflushed == 0 {
            return Ok(());
        }
        let done = self.send(Step { action: Action::Flush, learned: Learned::Nothing, number: None }).await?;
        done.await.map_err(|_| ended())??;
        // What came meanwhile is left for the next flush.
        self.unflushed.fetch_sub(unflushed, Ordering::AcqRel);
        Ok(())
    }

    /// Puts a step into the queue; what comes back ends when it is acknowledged.
    async fn send(&self, Step { action, learned, number }: Step) -> io::Result<oneshot::Receiver<io::Result<()>>> {
        let units = action.bytes().div_ceil(BLOCK_BYTES).max(1) as u32;
        let room = self.room.clone().acquire_many_owned(units).await.map_err(|_| ended())?;
        let changes = !matches!(action, Action::Flush);
        let (done, acknowledged) = oneshot::channel();
        let packed = if action.bytes() <= SMALL_BYTES as u64 {
            Either::Left(ready(Ok(pack(action))))
        } else {
            Either::Right(spawn_blocking(move || pack(action)))
        };
        let order = Order { packed, pending: Pending { learned, number, done, room } };
        self.orders.send(order).await.map_err(|_| ended())?;
        if changes {
            // Only now: a flush that counts it is behind it.
            self.unflushed.fetch_add(1, Ordering::AcqRel);
        }
        Ok(acknowledged)
    }
}

impl Sink for DiskSession {
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        Self::write(self, offset, data).await
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        Self::zero(self, offset, length).await
    }
}

/// Makes a request of a step.
fn pack(action: Action) -> io::Result<Packed> {
    let (request, change) = match action {
        Action::Write { offset, data } => {
            let zstd = compress(&data)?.into();
            let request = DiskWrite { offset, raw_length: data.len() as u32, zstd };
            (disk_request::Kind::Write(request), Some(Change::data(offset, &data)))
        }
        Action::Zero { offset, length } => {
            (disk_request::Kind::Zero(DiskZero { offset, length }), Some(Change::zeros(offset, length)))
        }
        Action::Copy { offset, from_offset, data, digests } => {
            let digests = digests.iter().flat_map(|digest| digest.0).collect();
            let request = DiskCopy { offset, from_offset, digests };
            (disk_request::Kind::Copy(request), Some(Change::data(offset, &data)))
        }
        Action::Flush => (disk_request::Kind::Flush(DiskFlush {}), None),
    };
    Ok(Packed { request, change })
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
    while let Some(Order { packed, pending: waiting }) = queue.recv().await {
        let Packed { request, change } = match packed.await.map_err(io::Error::other).and_then(|packed| packed) {
            Ok(packed) => packed,
            Err(error) => {
                tracing::warn!(%error, "a change was not packed");
                return;
            }
        };
        if let Some(change) = &change {
            sent.lock().unwrap_or_else(PoisonError::into_inner).add(change);
        }
        if pending.send(waiting).await.is_err() {
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
    learner: Learner,
    failure: Arc<Mutex<Option<String>>>,
) {
    let (reason, refused) = loop {
        // None: the session was dropped, and nobody waits any more.
        let Some(Pending { learned, number, done, room }) = acknowledged.recv().await else { return };
        let reply: Result<DiskReply, _> = reader.receive_within(ANSWER_LIMIT).await;
        let reason = match reply {
            Ok(DiskReply { kind: Some(disk_reply::Kind::Done(answer)) }) => {
                match learner.learn(answer.version, number, &learned) {
                    Ok(()) => {
                        drop(room);
                        // Who asked may have given up; the view has learned all the same.
                        let _ = done.send(Ok(()));
                        continue;
                    }
                    Err(error) => crate::error::with_causes(&error),
                }
            }
            Ok(DiskReply { kind: Some(disk_reply::Kind::Failure(failure)) }) => {
                if failure.not_held {
                    learner.view.refute(learner.disk);
                }
                failure.reason
            }
            Ok(_) => "the destination answered what was not asked".to_owned(),
            Err(error) => crate::error::with_causes(&error),
        };
        break (reason, done);
    };
    tracing::warn!(disk = learner.disk, %reason, "disk stream ended");
    learner.view.distrust(learner.disk);
    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    // Only now all that waits finds its oneshot dropped, and can say why.
    drop(refused);
}

/// Brings into the view what is acknowledged.
struct Learner {
    view: Arc<ReplicaView>,
    disk: u16,
    in_flight: Arc<Mutex<InFlight>>,
}

impl Learner {
    /// A request is done.
    fn learn(
        &self,
        version: u64,
        number: Option<Number>,
        learned: &Learned,
    ) -> Result<(), pageport_teleport::index::IndexError> {
        let Self { view, disk, in_flight } = self;
        let state = ReplicaState { version, ..view.state(*disk) };
        // Held until the view has learned: what is planned meanwhile is forgotten after this.
        let mut in_flight = in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        for part in number.map(|number| in_flight.end(number)).unwrap_or_default() {
            let blocks = part.end - part.start;
            let change = match learned {
                Learned::Nothing => Confirmed::Nothing,
                Learned::Zero => Confirmed::Zero { first_block: part.start, blocks },
                Learned::Digests { first_block, digests } => {
                    let skipped = (part.start - first_block) as usize;
                    let digests = digests.get(skipped..skipped + blocks as usize).unwrap_or_default();
                    Confirmed::Digests { first_block: part.start, digests }
                }
            };
            view.confirm(*disk, state, change)?;
        }
        view.confirm(*disk, state, Confirmed::Nothing)
    }
}

#[cfg(test)]
mod tests;
