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
    DiskCopy, DiskDigests, DiskDone, DiskFailure, DiskHello, DiskOpened, DiskReply, DiskRequest, disk_reply,
    disk_request,
};
use pageport_teleport::{BlockDigest, PAGE_SIZE, Page, is_zero};
use tokio::sync::mpsc;

use super::points::PointError;
use super::store::{BLOCK_BYTES, ReplicaDisk};
use super::view::ReplicaState;
use crate::transport::{MessageError, MessageReader, MessageWriter};

/// Largest write, in bytes of the disk.
pub const MAX_WRITE_BYTES: usize = 1 << 20;
/// Blocks of one `Digests` message: 64 KiB of digests.
const DIGEST_RUN_BLOCKS: usize = 4096;
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

/// Where the changes of a disk stream go: into the replica in place, or wherever a replication session says.
pub trait DiskTarget: Send + Sync + 'static {
    /// The replica as it is to be compared with.
    fn replica(&self) -> &Arc<ReplicaDisk>;

    /// Names its content.
    fn state(&self) -> ReplicaState;

    /// Takes `raw_length` bytes as one zstd frame.
    ///
    /// # Errors
    /// It is not that, or cannot be taken.
    fn write(&self, offset: u64, raw_length: u32, zstd: &[u8]) -> Result<(), ServeError>;

    /// Takes bytes.
    ///
    /// # Errors
    /// They cannot be taken.
    fn write_bytes(&self, offset: u64, data: &[u8]) -> Result<(), ServeError>;

    /// Takes a change to zeros.
    ///
    /// # Errors
    /// It cannot be taken.
    fn zero(&self, offset: u64, length: u64) -> Result<(), ServeError>;

    /// Brings to stable storage what is not kept elsewhere.
    ///
    /// # Errors
    /// The system's.
    fn flush(&self) -> Result<(), ServeError>;
}

/// A replica written in place.
#[derive(Debug)]
pub struct InPlace(pub Arc<ReplicaDisk>);

impl InPlace {
    fn failed(&self, source: io::Error) -> ServeError {
        ServeError::Disk { disk: self.0.to_string(), source }
    }
}

impl DiskTarget for InPlace {
    fn replica(&self) -> &Arc<ReplicaDisk> {
        &self.0
    }

    fn state(&self) -> ReplicaState {
        ReplicaState { instance: self.0.instance(), version: self.0.version() }
    }

    fn write(&self, offset: u64, raw_length: u32, zstd: &[u8]) -> Result<(), ServeError> {
        self.write_bytes(offset, &decompress(raw_length, zstd)?)
    }

    fn write_bytes(&self, offset: u64, data: &[u8]) -> Result<(), ServeError> {
        self.0.write(offset, data).map(drop).map_err(|source| self.failed(source))
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), ServeError> {
        self.0.zero(offset, length).map(drop).map_err(|source| self.failed(source))
    }

    fn flush(&self) -> Result<(), ServeError> {
        self.0.flush().map(drop).map_err(|source| self.failed(source))
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
    loop {
        let request: DiskRequest = match reader.receive().await {
            Err(MessageError::Closed) => return Ok(()),
            other => other?,
        };
        let kind = request.kind.ok_or(MessageError::Empty)?;
        let target = target.clone();
        let version = tokio::task::spawn_blocking(move || carry_out(&*target, kind))
            .await
            .map_err(|_| ServeError::Hostile { what: "a request that ended the thread that served it" })??;
        send(writer, disk_reply::Kind::Done(DiskDone { version })).await?;
    }
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

/// Returns the version of the replica after the request.
fn carry_out(target: &impl DiskTarget, kind: disk_request::Kind) -> Result<u64, ServeError> {
    match kind {
        disk_request::Kind::Write(write) => target.write(write.offset, write.raw_length, &write.zstd)?,
        disk_request::Kind::Zero(zero) => target.zero(zero.offset, zero.length)?,
        disk_request::Kind::Copy(copy) => target.write_bytes(copy.offset, &read_verified(target.replica(), &copy)?)?,
        disk_request::Kind::Flush(_) => target.flush()?,
    }
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
    if blocks.iter().zip(digests).any(|(block, digest)| BlockDigest::of(block).0 != *digest) {
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
    for (block, page) in (first_block..).zip(blocks) {
        if is_zero(page as &Page) {
            close(&mut run, run_start);
            run_start = block + 1;
        } else {
            run.extend_from_slice(&BlockDigest::of(page).0);
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
