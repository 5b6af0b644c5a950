//! The source's memory stream: hypervisor socket to QUIC.
//!
//! ```text
//!   QEMU ─unix socket─▶ [encode thread] ─1 batch─▶ [send task] ─▶ memory stream
//!                         asks the view              │ window   ◀─ acknowledged(sequence)
//!                                                    └─ retained ─▶ [fallback task] ─▶ fallback stream
//! ```
//! Nothing queues between the parts beyond one batch, so the hypervisor feels the link: back pressure is what makes its
//! own estimate of the switchover right. When the hypervisor's socket goes quiet the batch under way is sent.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pageport_proto::v1::{FallbackHello, MemoryHello, StreamHello, stream_hello};
use pageport_teleport::qemu::Mode;
use pageport_teleport::{EncodeError, EncodedBatch, Encoder, EncoderParams, PageCounts, encode_fallback, wire};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::window::{Outstanding, Window};
use crate::memory::arrived::{Arrived, Both};
use crate::memory::keeping::Keeping;
use crate::replica::cap::Cap;
use crate::replica::view::ReplicaView;
use crate::transport::{MessageError, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority};

/// Read from the hypervisor at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// A hypervisor quiet for this long gets its batch sent as it is.
const QUIET: Duration = Duration::from_millis(10);
/// Requests for fallback that wait; a batch can be asked for once.
const FALLBACK_QUEUE: usize = 4096;

/// Why the memory stream ended early.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// The hypervisor's socket failed.
    #[error("read the hypervisor's migration stream")]
    Hypervisor(#[source] io::Error),
    /// The codec failed.
    #[error("encode the migration stream")]
    Encode(#[from] EncodeError),
    /// The streams could not be opened.
    #[error("open the memory streams")]
    Open(#[from] TransportError),
    /// The first message could not be sent.
    #[error("begin the memory streams")]
    Begin(#[from] MessageError),
    /// The connection broke.
    #[error("send memory to the destination")]
    Send(#[from] quinn::WriteError),
    /// A part of the pipeline ended on its own.
    #[error("the memory pipeline ended early")]
    Ended,
    /// The destination asked for a batch that it cannot lack.
    #[error("the destination asked again for batch {sequence}, which is not on its way")]
    NotOnItsWay {
        /// The batch.
        sequence: u64,
    },
}

/// How the stream ended, for the destination to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamTotals {
    /// Digest over all batches.
    pub digest: [u8; 32],
    /// Batches in all.
    pub batches: u64,
    /// Bytes of the hypervisor's stream.
    pub raw_bytes: u64,
}

/// What has been sent so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Pages by class, fallbacks already moved.
    pub pages: PageCounts,
    /// Bytes of the hypervisor's stream.
    pub raw_bytes: u64,
    /// Bytes of the frames that they became, without fallbacks.
    pub wire_bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    window: Mutex<Window>,
    sent: Mutex<Sent>,
    room: Notify,
}

impl Shared {
    fn window(&self) -> std::sync::MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self) -> std::sync::MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the destination holds that pages may refer to.
#[derive(Debug)]
pub struct Held {
    /// The replicas of the disks.
    pub disks: Arc<ReplicaView>,
    /// Memory that it has kept.
    pub kept: Option<Arc<Arrived>>,
}

/// What the destination answers goes here.
#[derive(Debug, Clone)]
pub struct Answers {
    shared: Arc<Shared>,
    fallbacks: mpsc::Sender<u64>,
}

impl Answers {
    /// The destination has verified and written all batches up to and including this one.
    pub fn acknowledged(&self, sequence: u64) {
        self.shared.window().acknowledged(sequence, Instant::now());
        self.shared.room.notify_one();
    }

    /// The destination needs this batch as bytes.
    ///
    /// # Errors
    /// It cannot be answered: the stream is to be given up.
    pub fn fall_back(&self, sequence: u64) -> Result<(), OutgoingError> {
        self.fallbacks.try_send(sequence).map_err(|_| OutgoingError::NotOnItsWay { sequence })
    }
}

/// The running pipeline. Dropping it ends it.
#[derive(Debug)]
pub struct Outgoing {
    shared: Arc<Shared>,
    answers: Answers,
    socket: UnixStream,
    sending: AbortOnDropHandle<Result<(StreamTotals, Option<Keeping>), OutgoingError>>,
    kept: Option<Keeping>,
    _fallback_task: AbortOnDropHandle<()>,
}

impl Outgoing {
    /// Starts to send what comes from `socket` (the hypervisor's, blocking), as fast as `cap` permits.
    ///
    /// # Errors
    /// The streams could not be opened.
    pub async fn start(
        connection: PeerConnection,
        migration_id: &str,
        traceparent: &str,
        socket: UnixStream,
        held: Held,
        keeping: Option<Keeping>,
        cap: Arc<Cap>,
    ) -> Result<Self, OutgoingError> {
        let hello = |kind| StreamHello {
            protocol_version: PROTOCOL_VERSION,
            traceparent: traceparent.to_owned(),
            kind: Some(kind),
        };
        let migration_id = migration_id.to_owned();
        let mut memory = MessageWriter::new(connection.open_uni(priority::MEMORY).await?);
        memory.send(&hello(stream_hello::Kind::Memory(MemoryHello { migration_id: migration_id.clone() }))).await?;
        let mut fallback = MessageWriter::new(connection.open_uni(priority::FALLBACK).await?);
        fallback.send(&hello(stream_hello::Kind::Fallback(FallbackHello { migration_id }))).await?;

        let shared = Arc::new(Shared::default());
        let (batches, encoded) = mpsc::channel(1);
        let reading = socket.try_clone().map_err(OutgoingError::Hypervisor)?;
        let encoding = tokio::task::spawn_blocking(move || encode(reading, &held, keeping, &batches));
        let sending = send(shared.clone(), connection.clone(), memory.into_stream(), encoded, cap);
        let sending = tokio::spawn(async move {
            let sent = sending.await;
            // Once nobody takes batches the encoder ends too; its own error says more than ours.
            let totals = encoding.await.map_err(|_| OutgoingError::Ended)??;
            sent.map(|()| totals)
        });
        let (fallbacks, asked) = mpsc::channel(FALLBACK_QUEUE);
        let answering = answer_fallbacks(shared.clone(), asked, fallback.into_stream());
        let broken = connection.clone();
        let answering = tokio::spawn(async move {
            if let Err(error) = answering.await {
                broken.close(&crate::error::with_causes(&error));
            }
        });
        Ok(Self {
            answers: Answers { shared: shared.clone(), fallbacks },
            shared,
            socket,
            sending: AbortOnDropHandle::new(sending),
            kept: None,
            _fallback_task: AbortOnDropHandle::new(answering),
        })
    }

    /// Where the destination's answers go.
    pub fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// What has been sent so far.
    pub fn sent(&self) -> Sent {
        *self.shared.sent()
    }

    /// So much of the hypervisor's pass is still to come: the queue on the wire shrinks with it.
    pub fn set_left(&self, left_bytes: u64) {
        self.shared.window().set_left(left_bytes);
        self.shared.room.notify_one();
    }

    /// Wire bytes acknowledged per second: lately, and at best.
    pub fn rates_bytes_per_s(&self) -> (u64, u64) {
        let mut window = self.shared.window();
        (window.rate_bytes_per_s(Instant::now()), window.peak_bytes_per_s())
    }

    /// Waits until the hypervisor has closed its socket and everything is handed to the transport. Cancel-safe.
    ///
    /// # Errors
    /// Why it did not come to that.
    pub async fn sent_all(&mut self) -> Result<StreamTotals, OutgoingError> {
        let (totals, kept) = (&mut self.sending).await.map_err(|_| OutgoingError::Ended)??;
        self.kept = kept;
        Ok(totals)
    }

    /// The memory that was sent, once all is; it is kept if the guest has gone.
    pub fn take_kept(&mut self) -> Option<Keeping> {
        self.kept.take()
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // Wakes the encode thread if it still reads; a socket already closed is fine.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Runs on a thread of its own until the hypervisor closes its socket or nobody takes batches.
fn encode(
    mut socket: UnixStream,
    held: &Held,
    mut keeping: Option<Keeping>,
    batches: &mpsc::Sender<EncodedBatch>,
) -> Result<(StreamTotals, Option<Keeping>), OutgoingError> {
    socket.set_read_timeout(Some(QUIET)).map_err(OutgoingError::Hypervisor)?;
    let params = EncoderParams { memory_pages: keeping.is_some(), ..EncoderParams::default() };
    let mut encoder = Encoder::new(params)?;
    let lookup = || Both(held.disks.index(), held.kept.as_deref());
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match socket.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => encoder.push(&chunk[..length], &lookup())?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => encoder.flush()?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(OutgoingError::Hypervisor(error)),
        }
        hand_over(&mut encoder, &mut keeping, batches)?;
    }
    encoder.finish(&lookup())?;
    hand_over(&mut encoder, &mut keeping, batches)?;
    if let Mode::PassingThrough(reason) = encoder.mode() {
        tracing::warn!(?reason, "the hypervisor's stream has parts that cannot be delimited; they were sent verbatim");
    }
    let digest = encoder.stream_digest();
    let totals = StreamTotals { digest: digest.value(), batches: digest.batches(), raw_bytes: digest.raw_bytes() };
    Ok((totals, keeping))
}

fn hand_over(
    encoder: &mut Encoder,
    keeping: &mut Option<Keeping>,
    batches: &mpsc::Sender<EncodedBatch>,
) -> Result<(), OutgoingError> {
    while let Some(mut batch) = encoder.next_batch() {
        let memory_pages = std::mem::take(&mut batch.memory_pages);
        if let Some(keeping) = keeping.as_mut().filter(|_| !memory_pages.is_empty()) {
            keeping.add(memory_pages);
        }
        batches.blocking_send(batch).map_err(|_| OutgoingError::Ended)?;
    }
    Ok(())
}

async fn send(
    shared: Arc<Shared>,
    connection: PeerConnection,
    mut stream: quinn::SendStream,
    mut encoded: mpsc::Receiver<EncodedBatch>,
    cap: Arc<Cap>,
) -> Result<(), OutgoingError> {
    stream.write_all(&wire::stream_header()).await?;
    loop {
        wait_for_room(&shared, &connection).await;
        let Some(batch) = encoded.recv().await else { break };
        let (raw_bytes, wire_bytes) = (u64::from(batch.summary.raw_length), batch.frame.len() as u64);
        cap.take(wire_bytes).await;
        let on_its_way =
            Outstanding { raw_bytes, wire_bytes, teleported_pages: batch.counts.teleported, retained: batch.retained };
        shared.window().sent(batch.summary.sequence, on_its_way);
        stream.write_chunk(Bytes::from(batch.frame)).await?;
        let mut sent = shared.sent();
        sent.pages += batch.counts;
        sent.raw_bytes += raw_bytes;
        sent.wire_bytes += wire_bytes;
    }
    // The peer may have closed the connection already, which its control stream tells better.
    let _ = stream.finish();
    Ok(())
}

async fn wait_for_room(shared: &Shared, connection: &PeerConnection) {
    loop {
        let acknowledged = shared.room.notified();
        if shared.window().has_room(connection.path_bytes_per_s(), connection.round_trip()) {
            return;
        }
        acknowledged.await;
    }
}

/// Ends only with the pipeline, or with a reason why the migration cannot go on.
async fn answer_fallbacks(
    shared: Arc<Shared>,
    mut asked: mpsc::Receiver<u64>,
    mut stream: quinn::SendStream,
) -> Result<(), OutgoingError> {
    stream.write_all(&wire::stream_header()).await?;
    while let Some(sequence) = asked.recv().await {
        let (retained, pages) =
            shared.window().take_retained(sequence).ok_or(OutgoingError::NotOnItsWay { sequence })?;
        let encoded = tokio::task::spawn_blocking(move || encode_fallback(&retained)).await;
        let frame = encoded.map_err(|_| OutgoingError::Ended)??;
        {
            let mut sent = shared.sent();
            sent.pages.teleported -= pages;
            sent.pages.fallback += pages;
        }
        stream.write_chunk(Bytes::from(frame)).await?;
    }
    Ok(())
}
