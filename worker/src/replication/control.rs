//! The source's end of a replication session's control stream.

use std::time::Duration;

use pageport_common::telemetry;
use pageport_proto::v1::{
    BeginLayer, BeginPoint, CommitPoint, Committed, CompareBlocks, Compared, DiskHello, DiskPlace, ReplicaPoints,
    ReplicationAssignment, ReplicationDisk, ReplicationHello, ReplicationReply, ReplicationRequest, StreamHello,
    replication_reply, replication_request, stream_hello,
};

use crate::transport::{
    MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority,
};

/// The destination opens its replica first, which may mean to write a journal into it.
const POINTS_LIMIT: Duration = Duration::from_secs(600);
const BEGIN_LIMIT: Duration = Duration::from_secs(60);
/// The destination brings the whole journal, or the disks, to stable storage.
const COMMIT_LIMIT: Duration = Duration::from_secs(600);

/// The destination reads a piece of its file, from a slow disk at worst.
const COMPARE_LIMIT: Duration = Duration::from_secs(60);

/// Why the destination did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No stream.
    #[error("open the replication stream")]
    Open(#[from] TransportError),
    /// The stream broke.
    #[error("talk to the replica's worker")]
    Stream(#[from] MessageError),
    /// The destination refused, and says why.
    #[error("the replica's worker refused: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// The destination answered out of turn.
    #[error("the replica's worker answered out of turn while {expected} was awaited")]
    OutOfTurn {
        /// What was awaited.
        expected: &'static str,
    },
}

/// Where a replica is to lie that is not there yet; by default wherever its worker makes it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Placement<'a> {
    /// Block devices of disks.
    pub disks: &'a [DiskPlace],
    /// The pool of all else; empty: none was ordered.
    pub pool: &'a str,
}

impl<'a> From<&'a ReplicationAssignment> for Placement<'a> {
    fn from(order: &'a ReplicationAssignment) -> Self {
        Self { disks: &order.places, pool: &order.pool }
    }
}

/// The control stream, seen from the source.
#[derive(Debug)]
pub struct Control {
    writer: MessageWriter,
    reader: MessageReader,
}

impl Control {
    /// Opens the stream, and learns which points the replica has.
    ///
    /// # Errors
    /// The stream could not be opened, or the destination does not take this VM.
    pub async fn open(
        connection: &PeerConnection,
        session: u64,
        disks: &[DiskHello],
        place: Placement<'_>,
    ) -> Result<(Self, ReplicaPoints), ControlError> {
        let place_of = |disk: &str| {
            let place = place.disks.iter().find(|place| place.disk == disk);
            place.map(|place| place.path.clone()).unwrap_or_default()
        };
        let vm_id = disks.first().map(|disk| disk.vm_id.clone()).unwrap_or_default();
        let disk = |disk: &DiskHello| ReplicationDisk {
            name: disk.disk.clone(),
            size_bytes: disk.size_bytes,
            allocated_bytes: disk.allocated_bytes,
            place: place_of(&disk.disk),
        };
        let (disks, pool) = (disks.iter().map(disk).collect(), place.pool.to_owned());
        let hello = ReplicationHello { vm_id, session, disks, pool };
        let (send, recv) = connection.open_bi(priority::CONTROL).await?;
        let (mut writer, reader) = (MessageWriter::new(send), MessageReader::new(recv));
        let traceparent = telemetry::traceparent_of(&tracing::Span::current());
        let kind = Some(stream_hello::Kind::Replication(hello));
        writer.send(&StreamHello { protocol_version: PROTOCOL_VERSION, traceparent, kind }).await?;
        let mut control = Self { writer, reader };
        let points = control
            .expect("its points", POINTS_LIMIT, |kind| match kind {
                replication_reply::Kind::Points(points) => Some(points),
                _ => None,
            })
            .await?;
        Ok((control, points))
    }

    /// What follows on the disks' streams is a new point; returns the lineage that it will belong to.
    ///
    /// # Errors
    /// The destination refuses, or does not answer.
    pub async fn begin(&mut self, begin: BeginPoint) -> Result<u64, ControlError> {
        self.ask(replication_request::Kind::Begin(begin)).await?;
        self.begun().await
    }

    /// What follows on the disks' streams can be undone until the VM has changed hands.
    ///
    /// # Errors
    /// The destination refuses, or does not answer.
    pub async fn begin_layer(&mut self) -> Result<(), ControlError> {
        self.ask(replication_request::Kind::Layer(BeginLayer {})).await?;
        self.begun().await.map(drop)
    }

    /// Makes what was sent a recovery point. After an error it may be one all the same: the next session tells.
    ///
    /// # Errors
    /// The destination refuses, or does not answer.
    pub async fn commit(&mut self, commit: CommitPoint) -> Result<Committed, ControlError> {
        self.ask(replication_request::Kind::Commit(commit)).await?;
        self.expect("its commit", COMMIT_LIMIT, |kind| match kind {
            replication_reply::Kind::Committed(committed) => Some(committed),
            _ => None,
        })
        .await
    }

    /// Has blocks of the replica's file read and compared; nothing is begun meanwhile.
    ///
    /// # Errors
    /// The destination refuses, or does not answer.
    pub async fn compare(&mut self, blocks: CompareBlocks) -> Result<Compared, ControlError> {
        self.ask(replication_request::Kind::Compare(blocks)).await?;
        self.expect("its comparison", COMPARE_LIMIT, |kind| match kind {
            replication_reply::Kind::Compared(compared) => Some(compared),
            _ => None,
        })
        .await
    }

    async fn begun(&mut self) -> Result<u64, ControlError> {
        self.expect("its beginning", BEGIN_LIMIT, |kind| match kind {
            replication_reply::Kind::Begun(begun) => Some(begun.lineage),
            _ => None,
        })
        .await
    }

    async fn ask(&mut self, kind: replication_request::Kind) -> Result<(), ControlError> {
        Ok(self.writer.send(&ReplicationRequest { kind: Some(kind) }).await?)
    }

    async fn expect<T>(
        &mut self,
        expected: &'static str,
        limit: Duration,
        pick: impl FnOnce(replication_reply::Kind) -> Option<T>,
    ) -> Result<T, ControlError> {
        let reply: ReplicationReply = self.reader.receive_within(limit).await?;
        match reply.kind.ok_or(MessageError::Empty)? {
            replication_reply::Kind::Failure(failure) => Err(ControlError::Refused { reason: failure.reason }),
            kind => pick(kind).ok_or(ControlError::OutOfTurn { expected }),
        }
    }
}
