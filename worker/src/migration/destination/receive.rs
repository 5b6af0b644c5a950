//! Phase `receive`: rebuilds the source's stream into the hypervisor.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use pageport_proto::v1::{MigrationHello, StreamEnd, StreamHello, stream_hello};

use super::admit::Admitted;
use super::words::stream_end;
use super::{Arrival, DestinationError, RESUME_LIMIT};
use crate::memory::arrived::Arrived;
use crate::migration::incoming::{Held, Incoming, Written};
use crate::transport::MessageReader;

/// The source opens its streams right after its hypervisor has begun; its disks come first.
const STREAMS_LIMIT: Duration = Duration::from_secs(24 * 3600);

impl Arrival {
    /// What the source's pages may refer to.
    pub(super) fn held(&self, admitted: &Admitted, hello: &MigrationHello) -> Held {
        let migration = hello.kept_from_migration.parse().ok();
        let kept = migration.and_then(|migration| self.node.memory.open(admitted.vm.id(), migration));
        Held { disks: admitted.disks.clone(), kept }
    }

    pub(super) async fn receive(
        &mut self,
        admitted: &Admitted,
        hello: &MigrationHello,
        held: Held,
    ) -> Result<(StreamEnd, Arrived), DestinationError> {
        let migration = hello.migration_id.parse();
        let migration = migration.map_err(|_| DestinationError::Request { what: "the migration's id is none" })?;
        let arrived = Arrived::of(migration, &hello.source_worker);
        let (memory, fallback) = self.accept_streams().await?;
        let socket = UnixStream::connect(admitted.qemu.paths().incoming()).map_err(DestinationError::Socket)?;
        let mut incoming = Incoming::start(memory, fallback, socket, held, arrived, self.answers.clone())?;
        // The end may be announced before the last batch is written, or after.
        let (Written { digest, arrived }, end) = tokio::select! {
            written = incoming.written_all() => (written?, self.stream_end().await?),
            end = self.stream_end() => (incoming.written_all().await?, end?),
        };
        let agrees = end.digest[..] == digest.value()[..]
            && (end.batches, end.raw_bytes) == (digest.batches(), digest.raw_bytes());
        if agrees { Ok((end, arrived)) } else { Err(DestinationError::DigestMismatch) }
    }

    /// The memory and the fallback stream, in whichever order they come.
    async fn accept_streams(&mut self) -> Result<(quinn::RecvStream, quinn::RecvStream), DestinationError> {
        let (mut memory, mut fallback) = (None, None);
        let limit = STREAMS_LIMIT;
        let deadline = tokio::time::Instant::now() + limit;
        while memory.is_none() || fallback.is_none() {
            let connection = &self.connection;
            let accept = async {
                let mut reader = MessageReader::new(connection.accept_uni().await?);
                let hello: StreamHello = reader.receive_within(RESUME_LIMIT).await?;
                Ok::<_, DestinationError>((hello.kind, reader.into_stream()))
            };
            let (kind, stream) = tokio::select! {
                accepted = accept => accepted?,
                early = stream_end(&mut self.control) => {
                    early?;
                    return Err(DestinationError::Request { what: "the stream ends before it begins" });
                }
                () = tokio::time::sleep_until(deadline) => {
                    return Err(DestinationError::TooLong { what: "the beginning of the memory stream", limit });
                }
            };
            match kind {
                Some(stream_hello::Kind::Memory(_)) if memory.is_none() => memory = Some(stream),
                Some(stream_hello::Kind::Fallback(_)) if fallback.is_none() => fallback = Some(stream),
                _ => return Err(DestinationError::Request { what: "an unexpected stream" }),
            }
        }
        memory.zip(fallback).ok_or(DestinationError::Lost)
    }

    async fn stream_end(&mut self) -> Result<StreamEnd, DestinationError> {
        stream_end(&mut self.control).await
    }
}
