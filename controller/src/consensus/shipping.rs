//! Snapshots between controllers: in parts, each with a checksum, and from where the last attempt was cut off.
//!
//! ```text
//!   sender                                     receiver
//!     label: entry, size, checksum ──────────▶  has some of this very snapshot? ── have_bytes ──▶ sender begins there
//!     part, its checksum ────────────────────▶  `snapshot.part` on disk
//!     …                                         all of it, and the checksum of the whole fits: into the core ── done ──▶ sender
//! ```
//! Guarantees: a receiver keeps a part in memory, not the snapshot, until it is whole; what does not fit its checksum is never used. Each end
//! tells raft, which sends nothing more to a peer with a snapshot on its way until it hears of it. One snapshot at a time is received; a
//! restart begins again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use pageport_proto::v1::raft_transport_service_client::RaftTransportServiceClient;
use pageport_proto::v1::{RaftEnvelope, SnapshotPart, SnapshotProgress};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// One part; less at the end.
pub const PART_BYTES: usize = 64 << 10;
/// Largest snapshot that is taken in.
pub const MAX_SNAPSHOT_BYTES: u64 = 1 << 30;
/// Parts on their way to the connection.
const WINDOW: usize = 4;
/// A snapshot that gets no further for so long is given up; raft tries again.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);
/// Parts that have arrived, beside the snapshot.
pub const FILE: &str = "snapshot.part";

/// Which snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// The entry that it reaches to.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// All of it.
    pub total_bytes: u64,
    /// Of all of it.
    pub crc32: u32,
}

/// Why a snapshot, or a part of one, is not taken.
#[derive(Debug, thiserror::Error)]
pub enum DockError {
    /// The disk.
    #[error("keep a part of a snapshot in {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Above [`MAX_SNAPSHOT_BYTES`].
    #[error("a snapshot of {bytes} bytes is above the limit of {MAX_SNAPSHOT_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// A part that is not the next one, or goes beyond the end, or none was announced.
    #[error("a part at byte {offset} of a snapshot came where byte {expected} is the next")]
    NotNext {
        /// Where it begins.
        offset: u64,
        /// Where it should.
        expected: u64,
    },
    /// It changed on its way, or on the disk.
    #[error("a snapshot or a part of one does not fit its checksum")]
    Damaged,
}

/// Where parts arrive.
#[derive(Debug)]
pub struct Dock {
    path: PathBuf,
    begun: Option<Begun>,
}

#[derive(Debug)]
struct Begun {
    label: Label,
    file: File,
    have: u64,
}

impl Dock {
    /// In this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self { path: folder.join(FILE), begun: None }
    }

    /// A snapshot is announced: how much of this very one is here already.
    ///
    /// # Errors
    /// [`DockError`].
    pub fn begin(&mut self, label: Label) -> Result<u64, DockError> {
        if label.total_bytes > MAX_SNAPSHOT_BYTES {
            return Err(DockError::TooLarge { bytes: label.total_bytes });
        }
        match &self.begun {
            Some(begun) if begun.label == label => Ok(begun.have),
            _ => {
                self.begun = None;
                let file = File::options().create(true).truncate(true).read(true).write(true).open(&self.path);
                let file = file.map_err(|source| DockError::File { path: self.path.clone(), source })?;
                self.begun = Some(Begun { label, file, have: 0 });
                Ok(0)
            }
        }
    }

    /// The next part.
    ///
    /// # Errors
    /// [`DockError`]: what came before it stays.
    pub fn take(&mut self, offset: u64, chunk: &[u8], crc32: u32) -> Result<u64, DockError> {
        let Some(begun) = &mut self.begun else { return Err(DockError::NotNext { offset, expected: 0 }) };
        let end = offset.checked_add(chunk.len() as u64).filter(|end| *end <= begun.label.total_bytes);
        let Some(end) = end.filter(|_| offset == begun.have && !chunk.is_empty()) else {
            return Err(DockError::NotNext { offset, expected: begun.have });
        };
        if crc32fast::hash(chunk) != crc32 {
            return Err(DockError::Damaged);
        }
        let written = begun.file.write_all_at(chunk, offset);
        written.map_err(|source| DockError::File { path: self.path.clone(), source })?;
        begun.have = end;
        Ok(end)
    }

    /// All of it is here. What was kept of it is removed.
    ///
    /// # Errors
    /// [`DockError`]: the next attempt begins again.
    pub fn finish(&mut self) -> Result<Vec<u8>, DockError> {
        let Some(Begun { label, have, .. }) = self.begun.take() else { return Err(DockError::Damaged) };
        let read = fs::read(&self.path);
        let removed = fs::remove_file(&self.path);
        let fail = |source| DockError::File { path: self.path.clone(), source };
        let bytes = read.map_err(fail)?;
        removed.map_err(fail)?;
        let whole = have == label.total_bytes && bytes.len() as u64 == have && crc32fast::hash(&bytes) == label.crc32;
        if whole { Ok(bytes) } else { Err(DockError::Damaged) }
    }
}

impl From<DockError> for Status {
    fn from(error: DockError) -> Self {
        match &error {
            DockError::File { source, .. } => Self::unavailable(format!("{error}: {source}")),
            DockError::TooLarge { .. } => Self::resource_exhausted(error.to_string()),
            DockError::NotNext { .. } | DockError::Damaged => Self::data_loss(error.to_string()),
        }
    }
}

/// A snapshot that is to be sent: the message that it belongs to, without it, and itself.
#[derive(Debug)]
pub struct Shipment {
    /// The message.
    pub envelope: RaftEnvelope,
    /// The snapshot.
    pub data: Bytes,
}

/// Sends a snapshot, and returns when the peer has all of it.
///
/// # Errors
/// What the peer or the connection said: the next attempt goes on from what it has.
pub async fn ship(channel: Channel, shipment: Shipment) -> Result<(), Status> {
    let Shipment { envelope, data } = shipment;
    let (parts, stream) = mpsc::channel(WINDOW);
    let label = SnapshotPart {
        envelope: Some(envelope),
        total_bytes: data.len() as u64,
        crc32: crc32fast::hash(&data),
        ..SnapshotPart::default()
    };
    push(&parts, label).await?;
    let mut client = RaftTransportServiceClient::new(channel);
    let answer = in_time(client.send_snapshot(ReceiverStream::new(stream))).await??;
    let mut progress = answer.into_inner();
    let mut offset = usize::try_from(next(&mut progress).await?.have_bytes).unwrap_or(usize::MAX);
    if offset > data.len() {
        return Err(Status::data_loss("the peer has more of the snapshot than there is"));
    }
    while offset < data.len() {
        let chunk = data.slice(offset..data.len().min(offset + PART_BYTES));
        let (crc32, end) = (crc32fast::hash(&chunk), offset + chunk.len());
        push(&parts, SnapshotPart { chunk, crc32, offset: offset as u64, ..SnapshotPart::default() }).await?;
        offset = end;
    }
    while !next(&mut progress).await?.done {}
    Ok(())
}

async fn push(parts: &mpsc::Sender<SnapshotPart>, part: SnapshotPart) -> Result<(), Status> {
    in_time(parts.send(part)).await?.map_err(|_| Status::unavailable("the peer ended the snapshot"))
}

/// The next word of a stream that is to go on.
///
/// # Errors
/// It has ended, or nothing came for [`STALLED_AFTER`].
pub async fn next<M>(stream: &mut Streaming<M>) -> Result<M, Status> {
    let message = in_time(stream.message()).await??;
    message.ok_or_else(|| Status::unavailable("the snapshot was cut off"))
}

async fn in_time<T>(future: impl Future<Output = T>) -> Result<T, Status> {
    let waited = tokio::time::timeout(STALLED_AFTER, future).await;
    waited.map_err(|_| Status::deadline_exceeded("the snapshot gets no further"))
}

/// How far the receiver is.
pub fn progress(have_bytes: u64, done: bool) -> SnapshotProgress {
    SnapshotProgress { have_bytes, done }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn label(data: &[u8]) -> Label {
        Label { index: 9, term: 2, total_bytes: data.len() as u64, crc32: crc32fast::hash(data) }
    }

    fn take(dock: &mut Dock, data: &[u8], from: usize, to: usize) -> Result<u64, DockError> {
        dock.take(from as u64, &data[from..to], crc32fast::hash(&data[from..to]))
    }

    #[test]
    fn what_was_cut_off_goes_on_where_it_was_and_another_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let mut dock = Dock::new(folder.path().to_owned());
        let data: Vec<u8> = (0..100).collect();
        assert_eq!(dock.begin(label(&data)).unwrap(), 0);
        assert_eq!(take(&mut dock, &data, 0, 40).unwrap(), 40);
        assert_eq!(dock.begin(label(&data)).unwrap(), 40, "the connection was cut, and this came again");
        assert_eq!(take(&mut dock, &data, 40, 100).unwrap(), 100);
        assert_eq!(dock.finish().unwrap(), data);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left of it");

        dock.begin(label(&data)).unwrap();
        take(&mut dock, &data, 0, 40).unwrap();
        let newer = Label { index: 10, ..label(&data) };
        assert_eq!(dock.begin(newer).unwrap(), 0);
        assert!(matches!(take(&mut dock, &data, 40, 100), Err(DockError::NotNext { offset: 40, expected: 0 })));
    }

    #[test]
    fn what_does_not_fit_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let mut dock = Dock::new(folder.path().to_owned());
        let data: Vec<u8> = (0..100).collect();
        assert!(take(&mut dock, &data, 0, 40).is_err(), "it was not announced");
        let large = Label { total_bytes: MAX_SNAPSHOT_BYTES + 1, ..label(&data) };
        assert!(matches!(dock.begin(large), Err(DockError::TooLarge { .. })));
        dock.begin(label(&data)).unwrap();
        assert!(matches!(dock.take(0, &data[..40], 7), Err(DockError::Damaged)));
        assert!(take(&mut dock, &data, 40, 80).is_err(), "a part is missing before it");
        assert!(dock.take(u64::MAX, &data, crc32fast::hash(&data)).is_err());
        take(&mut dock, &data, 0, 40).unwrap();
        assert!(take(&mut dock, &data, 0, 40).is_err(), "twice");
        assert!(matches!(dock.finish(), Err(DockError::Damaged)), "it is not whole");
        // Changed on the disk.
        dock.begin(label(&data)).unwrap();
        take(&mut dock, &data, 0, 100).unwrap();
        fs::write(folder.path().join(FILE), [0; 100]).unwrap();
        assert!(matches!(dock.finish(), Err(DockError::Damaged)));
        assert_eq!(dock.begin(label(&data)).unwrap(), 0, "and begins again");
    }
}
