//! The destination's memory stream: QUIC to hypervisor socket.
//!
//! ```text
//!   memory stream ───▶ [read task] ─┐
//!                                   ├─▶ [decode thread] ─ in order ─▶ [write thread] ─▶ unix socket ─▶ QEMU
//!   fallback stream ─▶ [read task] ─┘        │ reads the replica           └─▶ BatchAck ─┐
//!                                            └─▶ FallbackRequest ────────────────────────┴▶ control stream
//! ```
//! The next batches are decoded while the hypervisor takes one.
//!
//! A batch that does not verify holds back only the *writing* of those behind it; they are decoded and kept, bounded by
//! the source's window ([`HELD_LIMIT_BYTES`] enforces it).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use bytes::Bytes;
use pageport_proto::v1::{BatchAck, FallbackRequest, to_source};
use pageport_teleport::{
    BlockRef, DecodeError, Decoded, Decoder, FrameError, FrameReader, KEPT_MEMORY, OutOfOrder, ReplicaRead,
    StreamDigest, Verified,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::window::RAW_LIMIT_BYTES;
use crate::memory::KeptPages;
use crate::memory::arrived::Arrived;
use crate::replica::store::{BLOCK_BYTES, ReplicaDisk};

/// Verified bytes that may wait for a batch before them: the source's window and one batch.
const HELD_LIMIT_BYTES: u64 = RAW_LIMIT_BYTES + (16 << 20);
/// Read from QUIC at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks between QUIC and the decoder.
const CHUNK_QUEUE: usize = 8;
/// Batches between the decoder and the hypervisor.
const WRITE_QUEUE: usize = 4;
/// A hypervisor that takes nothing for this long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// Why the memory stream ended early.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// QUIC failed.
    #[error("receive memory from the source")]
    Receive(#[from] quinn::ReadError),
    /// The stream is no stream of frames.
    #[error("read the frames of the source")]
    Frame(#[from] FrameError),
    /// A frame cannot be decoded.
    #[error("decode the migration stream")]
    Decode(#[from] DecodeError),
    /// The stream ends in the middle of a frame.
    #[error("the source's stream is cut off after batch {batches}")]
    Cut {
        /// Whole batches that came.
        batches: u64,
    },
    /// The hypervisor took nothing more.
    #[error("write the migration stream to the hypervisor")]
    Hypervisor(#[source] io::Error),
    /// The source sends beyond its window.
    #[error("the source sends more than {HELD_LIMIT_BYTES} bytes past a batch that does not verify")]
    BeyondWindow,
    /// Batches out of order: a bug.
    #[error("put the batches in order")]
    Order(#[from] OutOfOrder),
    /// The pipeline's thread ended on its own.
    #[error("the memory pipeline ended early")]
    Ended,
}

enum Input {
    Memory(Bytes),
    MemoryEnd,
    Fallback(Bytes),
    Failed(quinn::ReadError),
}

/// What the destination has that pages may refer to.
#[derive(Debug, Default)]
pub struct Held {
    /// The replicas, by number of the disk.
    pub disks: Vec<Arc<ReplicaDisk>>,
    /// Memory that was kept when the guest was here before.
    pub kept: Option<KeptPages>,
}

/// The whole stream.
#[derive(Debug)]
pub struct Written {
    /// Of all batches.
    pub digest: StreamDigest,
    /// What its source may have kept of it.
    pub arrived: Arrived,
}

/// The running pipeline. Dropping it ends it.
#[derive(Debug)]
pub struct Incoming {
    done: oneshot::Receiver<Result<Written, IncomingError>>,
    socket: UnixStream,
    _readers: [AbortOnDropHandle<()>; 2],
}

impl Incoming {
    /// Starts to write what the streams bring to `socket` (the hypervisor's, blocking). What the source must know goes
    /// to `answers`, which is bounded by the source's window.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn start(
        memory: quinn::RecvStream,
        fallback: quinn::RecvStream,
        socket: UnixStream,
        replica: Held,
        arrived: Arrived,
        answers: mpsc::UnboundedSender<to_source::Kind>,
    ) -> Result<Self, IncomingError> {
        socket.set_write_timeout(Some(WRITE_LIMIT)).map_err(IncomingError::Hypervisor)?;
        let writing = socket.try_clone().map_err(IncomingError::Hypervisor)?;
        let decoder = Decoder::new()?;
        let (inputs, received) = mpsc::channel(CHUNK_QUEUE);
        let readers = [
            AbortOnDropHandle::new(tokio::spawn(read(memory, inputs.clone(), Input::Memory, Some(Input::MemoryEnd)))),
            AbortOnDropHandle::new(tokio::spawn(read(fallback, inputs, Input::Fallback, None))),
        ];
        let (done_sender, done) = oneshot::channel();
        let rebuilding = Rebuilding { decoder, replica, answers, held: BTreeMap::new(), held_bytes: 0, next: 0 };
        tokio::task::spawn_blocking(move || {
            // Who waits may have given up.
            let _ = done_sender.send(rebuild(rebuilding, writing, arrived, received));
        });
        Ok(Self { done, socket, _readers: readers })
    }

    /// Waits until the whole stream is verified and written. Cancel-safe.
    ///
    /// # Errors
    /// Why it did not come to that.
    pub async fn written_all(&mut self) -> Result<Written, IncomingError> {
        (&mut self.done).await.map_err(|_| IncomingError::Ended)?
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // The hypervisor sees the end of the stream, and a thread that still writes wakes up.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

async fn read(
    mut stream: quinn::RecvStream,
    inputs: mpsc::Sender<Input>,
    wrap: fn(Bytes) -> Input,
    end: Option<Input>,
) {
    loop {
        let input = match stream.read_chunk(CHUNK_BYTES, true).await {
            Ok(Some(chunk)) => wrap(chunk.bytes),
            Ok(None) => break,
            Err(error) => Input::Failed(error),
        };
        let failed = matches!(input, Input::Failed(_));
        if inputs.send(input).await.is_err() || failed {
            return;
        }
    }
    if let Some(end) = end {
        // Without a thread to take it the end matters to nobody.
        let _ = inputs.send(end).await;
    }
}

impl ReplicaRead for Held {
    fn read(&mut self, at: BlockRef, _count: u32, into: &mut [u8]) -> io::Result<()> {
        if at.disk == KEPT_MEMORY {
            return self.kept.as_ref().ok_or(io::ErrorKind::NotFound)?.read(at.block, into);
        }
        let disk = self.disks.get(usize::from(at.disk)).ok_or(io::ErrorKind::NotFound)?;
        let offset = at.block.checked_mul(BLOCK_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        // The last block of a disk that ends inside it reads as if it went on with zeros.
        let held = disk.size_bytes().saturating_sub(offset).min(into.len() as u64) as usize;
        let (inside, beyond) = into.split_at_mut(held);
        beyond.fill(0);
        disk.read(offset, inside)
    }
}

/// Decodes and writes, each in a thread of its own.
fn rebuild(
    rebuilding: Rebuilding,
    socket: UnixStream,
    arrived: Arrived,
    received: mpsc::Receiver<Input>,
) -> Result<Written, IncomingError> {
    let answers = rebuilding.answers.clone();
    let (ready, queue) = std::sync::mpsc::sync_channel(WRITE_QUEUE);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write(socket, arrived, &queue, &answers));
        let decoded = rebuilding.run(received, ready);
        let written = writer.join().unwrap_or(Err(IncomingError::Ended));
        match decoded {
            // The writer has left, and knows why.
            Err(IncomingError::Ended) => written.and(Err(IncomingError::Ended)),
            decoded => decoded.and(written),
        }
    })
}

/// Writes what was verified to the hypervisor, until no more comes.
fn write(
    mut socket: UnixStream,
    mut arrived: Arrived,
    queue: &std::sync::mpsc::Receiver<Verified>,
    answers: &mpsc::UnboundedSender<to_source::Kind>,
) -> Result<Written, IncomingError> {
    let mut digest = StreamDigest::new();
    for batch in queue {
        socket.write_all(&batch.bytes).map_err(IncomingError::Hypervisor)?;
        digest.append(&batch.summary)?;
        arrived.add(&batch.memory_pages);
        // A control stream that is gone ends the migration by itself.
        let _ = answers.send(to_source::Kind::BatchAck(BatchAck { sequence: batch.summary.sequence }));
    }
    Ok(Written { digest, arrived })
}

struct Rebuilding {
    decoder: Decoder,
    replica: Held,
    answers: mpsc::UnboundedSender<to_source::Kind>,
    /// Verified, but behind a batch that is not.
    held: BTreeMap<u64, Verified>,
    held_bytes: u64,
    next: u64,
}

impl Rebuilding {
    /// Decodes what comes, and hands it on in order.
    fn run(mut self, mut received: mpsc::Receiver<Input>, ready: SyncSender<Verified>) -> Result<(), IncomingError> {
        let (mut memory, mut fallback) = (FrameReader::new(), FrameReader::new());
        let mut ended = false;
        while !(ended && self.decoder.pending() == 0) {
            match received.blocking_recv().ok_or(IncomingError::Ended)? {
                Input::Memory(bytes) => {
                    memory.push(&bytes);
                    while let Some(frame) = memory.next_frame()? {
                        match self.decoder.decode(&frame, &mut self.replica)? {
                            Decoded::Verified(batch) => self.take(batch, &ready)?,
                            Decoded::Mismatch { sequence, teleported_pages } => {
                                tracing::debug!(
                                    sequence,
                                    teleported_pages,
                                    "batch did not verify; asked for its bytes"
                                );
                                self.ask_for_bytes(sequence);
                            }
                        }
                    }
                }
                Input::Fallback(bytes) => {
                    fallback.push(&bytes);
                    while let Some(frame) = fallback.next_frame()? {
                        let batch = self.decoder.decode_fallback(&frame)?;
                        self.take(batch, &ready)?;
                    }
                }
                Input::MemoryEnd if !memory.is_at_boundary() => {
                    return Err(IncomingError::Cut { batches: self.next });
                }
                Input::MemoryEnd => ended = true,
                Input::Failed(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn take(&mut self, batch: Verified, ready: &SyncSender<Verified>) -> Result<(), IncomingError> {
        self.held_bytes += batch.bytes.len() as u64;
        self.held.insert(batch.summary.sequence, batch);
        while let Some(batch) = self.held.remove(&self.next) {
            self.held_bytes -= batch.bytes.len() as u64;
            ready.send(batch).map_err(|_| IncomingError::Ended)?;
            self.next += 1;
        }
        if self.held_bytes > HELD_LIMIT_BYTES { Err(IncomingError::BeyondWindow) } else { Ok(()) }
    }

    fn ask_for_bytes(&self, sequence: u64) {
        // A control stream that is gone ends the migration by itself.
        let _ = self.answers.send(to_source::Kind::FallbackRequest(FallbackRequest { sequence }));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use pageport_teleport::index::EmptyReplica;
    use pageport_teleport::{Encoder, EncoderParams, wire};

    use super::*;
    use crate::test_support::ConnectedPair;

    const STREAM: &[u8] = b"what a hypervisor says that the parser does not know";

    /// What a source sends for [`STREAM`].
    fn sent() -> Vec<u8> {
        let mut encoder = Encoder::new(EncoderParams::default()).unwrap();
        encoder.push(STREAM, &EmptyReplica).unwrap();
        encoder.finish(&EmptyReplica).unwrap();
        let mut sent = wire::stream_header().to_vec();
        while let Some(batch) = encoder.next_batch() {
            sent.extend(batch.frame);
        }
        sent
    }

    /// Sends these bytes over QUIC as the memory stream; hands back how it ended and what reached the hypervisor.
    async fn receive(memory_bytes: &[u8]) -> (Result<Written, IncomingError>, Vec<u8>) {
        let ConnectedPair { source, destination, .. } = &ConnectedPair::new().await;
        let (mut memory, mut fallback) = (source.open_uni(0).await.unwrap(), source.open_uni(0).await.unwrap());
        memory.write_all(memory_bytes).await.unwrap();
        memory.finish().unwrap();
        fallback.write_all(&wire::stream_header()).await.unwrap();
        let (memory, fallback) = (destination.accept_uni().await.unwrap(), destination.accept_uni().await.unwrap());
        let (ours, mut hypervisor) = UnixStream::pair().unwrap();
        let (answers, _answered) = mpsc::unbounded_channel();
        let mut incoming =
            Incoming::start(memory, fallback, ours, Held::default(), Arrived::default(), answers).unwrap();
        let outcome = incoming.written_all().await;
        drop(incoming);
        let mut reached = Vec::new();
        hypervisor.read_to_end(&mut reached).unwrap();
        (outcome, reached)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_whole_stream_reaches_the_hypervisor() {
        let (outcome, reached) = receive(&sent()).await;
        assert_eq!(outcome.unwrap().digest.raw_bytes(), STREAM.len() as u64);
        assert_eq!(reached, STREAM);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_that_is_cut_off_is_an_error() {
        let sent = sent();
        let (outcome, _) = receive(&sent[..sent.len() - 1]).await;
        assert!(matches!(outcome, Err(IncomingError::Cut { batches: 0 })), "{outcome:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn hostile_bytes_are_an_error_and_reach_no_hypervisor() {
        let (outcome, reached) = receive(b"GET / HTTP/1.1\r\n\r\n").await;
        assert!(matches!(outcome, Err(IncomingError::Frame(FrameError::Magic { .. }))), "{outcome:?}");
        assert!(reached.is_empty());
        let mut endless = wire::stream_header().to_vec();
        endless.extend([0xff; 64]);
        let (outcome, reached) = receive(&endless).await;
        assert!(matches!(outcome, Err(IncomingError::Frame(FrameError::TooLong { .. }))), "{outcome:?}");
        assert!(reached.is_empty());
    }
}
