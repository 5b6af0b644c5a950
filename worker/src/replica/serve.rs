//! The destination's end of a disk stream: opens the replica, says what it holds, and writes what comes.
//!
//! ```text
//!   DiskHello ─▶ open ─▶ same state as the source remembers? ─yes─▶ Opened
//!                                   └─no─▶ scan, Digests… ─▶ Opened
//!   Write | Zero | Copy | Flush ─▶ done, in order ─▶ Done
//! ```
//! Requests take effect in the order in which they came. After an error the stream ends with `Failure`, and the
//! replica keeps what was written so far.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pageport_proto::v1::{
    DiskCopy, DiskDigests, DiskDone, DiskFailure, DiskHello, DiskOpened, DiskReply, DiskRequest, DiskWrite, DiskZero,
    disk_reply, disk_request,
};
use pageport_teleport::{BlockDigest, PAGE_SIZE};
use tokio::sync::mpsc;

use super::points::PointError;
use super::store::{BLOCK_BYTES, ReplicaDisk};
use super::view::ReplicaState;
use crate::transport::{MessageError, MessageReader, MessageWriter};

/// Largest write, in bytes of the disk.
pub const MAX_WRITE_BYTES: usize = 1 << 20;
/// Blocks of one `Digests` message: 64 KiB of digests.
const DIGEST_RUN_BLOCKS: usize = 4096;
/// Cheap enough never to be slower than a fast link.
const COMPRESSION_LEVEL: i32 = 1;
/// Requests that are carried out together if they have come: one wait for stable storage serves them all.
const BATCH: usize = 32;
/// Messages of digests between the scan and the stream.
const SCAN_QUEUE: usize = 4;
/// How long a new session waits for the one before it to be noticed as dead.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(15);

/// Why a disk stream ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The stream broke.
    #[error("serve a disk stream")]
    Stream(#[from] MessageError),
    /// A request that no honest peer sends.
    #[error("the peer worker asked for what cannot be: {what}")]
    Hostile {
        /// What it was.
        what: &'static str,
    },
    /// The replica's file failed.
    #[error("write the replica {disk}")]
    Disk {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source is wrong about the replica.
    #[error("the replica {disk} does not hold at byte {offset} what was to be copied from there; it is compared anew")]
    NotHeld {
        /// The replica's path.
        disk: String,
        /// Where, in bytes.
        offset: u64,
    },
    /// Its recovery points failed.
    #[error(transparent)]
    Points(#[from] PointError),
    /// Someone else writes it.
    #[error("another copy of the same disk is under way; it has not ended within {} s", TAKE_OVER_LIMIT.as_secs())]
    Busy,
}

/// A change of a disk, as it comes.
#[derive(Debug, Clone)]
pub enum DiskChange {
    /// `raw_length` bytes as one zstd frame.
    Packed {
        /// Place, in bytes.
        offset: u64,
        /// Bytes of the disk.
        raw_length: u32,
        /// The frame.
        zstd: Bytes,
    },
    /// One that is not packed.
    Raw(RawChange),
}

/// A change of a disk, as it is carried out.
#[derive(Debug, Clone)]
pub enum RawChange {
    /// Bytes.
    Data {
        /// Place, in bytes.
        offset: u64,
        /// What is written.
        data: Vec<u8>,
    },
    /// Zeros.
    Zero {
        /// Place, in bytes.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

impl DiskChange {
    /// Its bytes, unpacked.
    ///
    /// # Errors
    /// [`ServeError::Hostile`].
    pub fn unpack(self) -> Result<RawChange, ServeError> {
        match self {
            Self::Packed { offset, raw_length, zstd } => {
                Ok(RawChange::Data { offset, data: decompress(raw_length, &zstd)? })
            }
            Self::Raw(raw) => Ok(raw),
        }
    }
}

/// Makes changes in place, in their order.
///
/// # Errors
/// One is not what it says, or the system's.
pub fn change_in_place(replica: &ReplicaDisk, changes: Vec<DiskChange>) -> Result<(), ServeError> {
    changes.into_iter().try_for_each(|change| {
        let changed = match change.unpack()? {
            RawChange::Zero { offset, length } => replica.zero(offset, length),
            RawChange::Data { offset, data } => replica.write(offset, &data),
        };
        changed.map(drop).map_err(|source| ServeError::Disk { disk: replica.to_string(), source })
    })
}

/// Where the changes of a disk stream go: into the replica in place, or wherever a replication session says.
pub trait DiskTarget: Send + Sync + 'static {
    /// The replica as it is to be compared with.
    fn replica(&self) -> &Arc<ReplicaDisk>;

    /// Names its content.
    fn state(&self) -> ReplicaState;

    /// Takes changes, in their order.
    ///
    /// # Errors
    /// One is not what it says, or cannot be taken; those before it may have been.
    fn change(&self, changes: Vec<DiskChange>) -> Result<(), ServeError>;

    /// Brings to stable storage what is not kept elsewhere.
    ///
    /// # Errors
    /// The system's.
    fn flush(&self) -> Result<(), ServeError>;
}

/// A replica written in place.
#[derive(Debug)]
pub struct InPlace(pub Arc<ReplicaDisk>);

impl DiskTarget for InPlace {
    fn replica(&self) -> &Arc<ReplicaDisk> {
        &self.0
    }

    fn state(&self) -> ReplicaState {
        ReplicaState { instance: self.0.instance(), version: self.0.version() }
    }

    fn change(&self, changes: Vec<DiskChange>) -> Result<(), ServeError> {
        change_in_place(&self.0, changes)
    }

    fn flush(&self) -> Result<(), ServeError> {
        let failed = |source| ServeError::Disk { disk: self.0.to_string(), source };
        self.0.flush().map(drop).map_err(failed)
    }
}

/// Serves one disk until the peer closes the stream.
///
/// # Errors
/// [`ServeError`]; the peer has been told, where it can be.
pub async fn serve_disk(
    hello: &DiskHello,
    target: Arc<impl DiskTarget>,
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
) -> Result<(), ServeError> {
    let outcome = serve(hello, &target, reader, writer).await;
    if let Err(error) = &outcome {
        let reason = crate::error::with_causes(error);
        let not_held = matches!(error, ServeError::NotHeld { .. });
        // The peer may be the reason why the stream ended; then there is nobody to tell.
        let _ = send(writer, disk_reply::Kind::Failure(DiskFailure { reason, not_held })).await;
    }
    outcome
}

async fn serve(
    hello: &DiskHello,
    target: &Arc<impl DiskTarget>,
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
) -> Result<(), ServeError> {
    let replica = target.replica();
    let turn = tokio::time::timeout(TAKE_OVER_LIMIT, replica.session_turn()).await;
    let _turn = turn.map_err(|_| ServeError::Busy)?;
    let state = target.state();
    let same = state == ReplicaState { instance: hello.known_instance, version: hello.known_version };
    if !same {
        send_digests(replica, writer).await?;
    }
    let opened = DiskOpened { instance: state.instance, version: state.version, digests_sent: !same };
    send(writer, disk_reply::Kind::Opened(opened)).await?;
    let (queue, mut requests) = mpsc::channel(BATCH);
    let reading = async move {
        loop {
            let request: DiskRequest = match reader.receive().await {
                Err(MessageError::Closed) => return Ok(()),
                other => other?,
            };
            if queue.send(request.kind.ok_or(MessageError::Empty)?).await.is_err() {
                return Ok(());
            }
        }
    };
    let working = async {
        let mut batch = vec![];
        while requests.recv_many(&mut batch, BATCH).await > 0 {
            let (target, batch) = (target.clone(), std::mem::take(&mut batch));
            let answers = batch.len();
            let version = tokio::task::spawn_blocking(move || carry_out(&*target, batch))
                .await
                .map_err(|_| ServeError::Hostile { what: "a request that ended the thread that served it" })??;
            for _ in 0..answers {
                send(writer, disk_reply::Kind::Done(DiskDone { version })).await?;
            }
        }
        Ok(())
    };
    tokio::pin!(working);
    tokio::select! {
        worked = &mut working => worked,
        // However the stream ended, what has come is carried out before the turn ends.
        read = reading => {
            working.await?;
            read
        }
    }
}

/// One zstd frame of these bytes, as a write carries them.
///
/// # Errors
/// The library's.
pub fn compress(data: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(data, COMPRESSION_LEVEL)
}

/// The bytes of a write.
///
/// # Errors
/// [`ServeError::Hostile`].
pub fn decompress(raw_length: u32, zstd: &[u8]) -> Result<Vec<u8>, ServeError> {
    let length = raw_length as usize;
    if length > MAX_WRITE_BYTES {
        return Err(ServeError::Hostile { what: "a write above the limit" });
    }
    let data = zstd::bulk::decompress(zstd, length).ok().filter(|data| data.len() == length);
    data.ok_or(ServeError::Hostile { what: "a write that does not decompress to its length" })
}

/// Carries requests out in their order, and returns the version of the replica after the last. Changes are handed on together as
/// far as nothing between them has to see those before it.
fn carry_out(target: &impl DiskTarget, batch: Vec<disk_request::Kind>) -> Result<u64, ServeError> {
    let mut changes = vec![];
    for request in batch {
        match request {
            disk_request::Kind::Write(DiskWrite { offset, raw_length, zstd }) => {
                changes.push(DiskChange::Packed { offset, raw_length, zstd });
            }
            disk_request::Kind::Zero(DiskZero { offset, length }) => {
                changes.push(DiskChange::Raw(RawChange::Zero { offset, length }));
            }
            disk_request::Kind::Copy(copy) => {
                target.change(std::mem::take(&mut changes))?;
                let data = read_verified(target.replica(), &copy)?;
                changes.push(DiskChange::Raw(RawChange::Data { offset: copy.offset, data }));
            }
            disk_request::Kind::Flush(_) => {
                target.change(std::mem::take(&mut changes))?;
                target.flush()?;
            }
        }
    }
    target.change(changes)?;
    Ok(target.state().version)
}

/// What is to be copied, if the replica holds it.
fn read_verified(replica: &ReplicaDisk, copy: &DiskCopy) -> Result<Vec<u8>, ServeError> {
    let (digests, rest) = copy.digests.as_chunks::<{ BlockDigest::LENGTH }>();
    let length = digests.len() * PAGE_SIZE;
    let aligned = copy.offset.is_multiple_of(BLOCK_BYTES) && copy.from_offset.is_multiple_of(BLOCK_BYTES);
    let inside = copy.from_offset.checked_add(length as u64).is_some_and(|end| end <= replica.size_bytes());
    if !rest.is_empty() || digests.is_empty() || length > MAX_WRITE_BYTES || !aligned || !inside {
        return Err(ServeError::Hostile { what: "a copy that no write could be" });
    }
    let mut data = vec![0; length];
    let failed = |source| ServeError::Disk { disk: replica.to_string(), source };
    replica.read(copy.from_offset, &mut data).map_err(failed)?;
    let (blocks, _) = data.as_chunks::<PAGE_SIZE>();
    if BlockDigest::of_each(blocks).iter().zip(digests).any(|(held, told)| held.0 != *told) {
        return Err(ServeError::NotHeld { disk: replica.to_string(), offset: copy.from_offset });
    }
    Ok(data)
}

async fn send(writer: &mut MessageWriter, kind: disk_reply::Kind) -> Result<(), MessageError> {
    writer.send(&DiskReply { kind: Some(kind) }).await
}

async fn send_digests(replica: &Arc<ReplicaDisk>, writer: &mut MessageWriter) -> Result<(), ServeError> {
    let (sender, mut runs) = mpsc::channel(SCAN_QUEUE);
    let disk = replica.clone();
    let scan = tokio::task::spawn_blocking(move || scan(&disk, |run| sender.blocking_send(run).is_ok()));
    while let Some(run) = runs.recv().await {
        send(writer, disk_reply::Kind::Digests(run)).await?;
    }
    let scanned = scan.await.map_err(|error| io::Error::other(error.to_string())).and_then(|done| done);
    scanned.map_err(|source| ServeError::Disk { disk: replica.to_string(), source })
}

/// Digests of all blocks that are not zero, in runs; stops when `emit` says that nobody listens.
fn scan(replica: &ReplicaDisk, mut emit: impl FnMut(DiskDigests) -> bool) -> io::Result<()> {
    let mut data = vec![0; DIGEST_RUN_BLOCKS * PAGE_SIZE];
    let mut at = 0;
    while let Some((start, end)) = replica.next_data(at)? {
        let mut offset = start - start % BLOCK_BYTES;
        while offset < end {
            let length = (end - offset).min(data.len() as u64) as usize;
            // A disk that ends inside a block is scanned as if it went on with zeros, as the source sees it.
            let whole = length.next_multiple_of(PAGE_SIZE);
            data[..whole].fill(0);
            replica.read(offset, &mut data[..length])?;
            for run in digest_runs(offset / BLOCK_BYTES, &data[..whole]) {
                if !emit(run) {
                    return Ok(());
                }
            }
            offset += whole as u64;
        }
        at = offset;
    }
    Ok(())
}

/// Splits blocks at those that are zero.
fn digest_runs(first_block: u64, data: &[u8]) -> Vec<DiskDigests> {
    let mut runs = Vec::new();
    let mut run = BytesMut::new();
    let mut run_start = first_block;
    let (blocks, _) = data.as_chunks::<PAGE_SIZE>();
    let mut close = |run: &mut BytesMut, first_block| {
        if !run.is_empty() {
            runs.push(DiskDigests { first_block, digests: Bytes::from(run.split()) });
        }
    };
    for (block, digest) in (first_block..).zip(BlockDigest::of_each(blocks)) {
        if digest == BlockDigest::ZERO {
            close(&mut run, run_start);
            run_start = block + 1;
        } else {
            run.extend_from_slice(&digest.0);
        }
    }
    close(&mut run, run_start);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_skip_zero_blocks_and_name_their_first_block() {
        let mut data = vec![0; 6 * PAGE_SIZE];
        for block in [1, 2, 5] {
            data[block * PAGE_SIZE] = block as u8;
        }
        let runs = digest_runs(100, &data);
        let shape: Vec<_> = runs.iter().map(|run| (run.first_block, run.digests.len() / BlockDigest::LENGTH)).collect();
        assert_eq!(shape, [(101, 2), (105, 1)]);
        assert!(digest_runs(0, &[0; PAGE_SIZE]).is_empty());
    }
}
