//! The source's end of the control stream.
//!
//! Acknowledgements and requests for fallback go straight to the memory pipeline; everything else waits in order for the
//! phase that expects it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pageport_proto::v1::{
    Accepted, ClockProbe, MigrationHello, StreamHello, ToDestination, ToSource, stream_hello, to_destination, to_source,
};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::outgoing::{Answers, OutgoingError};
use crate::clock::{Offset, now_ns};
use crate::transport::{
    MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority,
};

/// Replies that wait for their phase; the destination sends a handful.
const REPLY_QUEUE: usize = 64;
const PROBES: usize = 5;

/// Why the control stream does not bring what is waited for.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The stream could not be opened.
    #[error("open the control stream")]
    Open(#[from] TransportError),
    /// The stream broke.
    #[error("talk to the destination")]
    Stream(#[from] MessageError),
    /// The destination gave up, and says why.
    #[error("the destination gave up: {reason}")]
    Aborted {
        /// Its words.
        reason: String,
    },
    /// The destination answered out of turn.
    #[error("the destination answered out of turn while {expected} was awaited")]
    OutOfTurn {
        /// What was awaited.
        expected: &'static str,
    },
    /// The destination asked for what cannot be.
    #[error("answer the destination")]
    Memory(#[from] OutgoingError),
}

/// The control stream, seen from the source.
#[derive(Debug)]
pub struct Control {
    writer: MessageWriter,
    replies: mpsc::Receiver<Result<to_source::Kind, ControlError>>,
    memory: Arc<OnceLock<Answers>>,
    admitted: Option<Accepted>,
    _reader: AbortOnDropHandle<()>,
}

impl Control {
    /// Opens the stream and says what is to move.
    ///
    /// # Errors
    /// The stream could not be opened.
    pub async fn open(
        connection: &PeerConnection,
        hello: MigrationHello,
        traceparent: &str,
    ) -> Result<Self, ControlError> {
        let (send, recv) = connection.open_bi(priority::CONTROL).await?;
        let mut writer = MessageWriter::new(send);
        let kind = Some(stream_hello::Kind::Migration(hello));
        let traceparent = traceparent.to_owned();
        writer.send(&StreamHello { protocol_version: PROTOCOL_VERSION, traceparent, kind }).await?;
        let memory = Arc::new(OnceLock::new());
        let (sender, replies) = mpsc::channel(REPLY_QUEUE);
        let reading = tokio::spawn(read(MessageReader::new(recv), memory.clone(), sender));
        Ok(Self { writer, replies, memory, admitted: None, _reader: AbortOnDropHandle::new(reading) })
    }

    /// From now on acknowledgements go to this pipeline.
    pub fn attach(&self, answers: Answers) {
        // A migration has one pipeline; a second one would be a bug that the first `set` already settled.
        let _ = self.memory.set(answers);
    }

    /// Says something.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn send(&mut self, kind: to_destination::Kind) -> Result<(), ControlError> {
        Ok(self.writer.send(&ToDestination { kind: Some(kind) }).await?)
    }

    /// Waits for the next reply; `pick` takes what is expected.
    ///
    /// # Errors
    /// The destination gave up, is silent, or answers something else.
    pub async fn expect<T>(
        &mut self,
        expected: &'static str,
        limit: Duration,
        pick: impl FnOnce(to_source::Kind) -> Option<T>,
    ) -> Result<T, ControlError> {
        let reply = tokio::time::timeout(limit, self.replies.recv()).await;
        match reply.map_err(|_| MessageError::Silent { limit })? {
            None => Err(MessageError::Closed.into()),
            Some(Ok(to_source::Kind::Abort(abort))) => Err(ControlError::Aborted { reason: abort.reason }),
            Some(reply) => pick(reply?).ok_or(ControlError::OutOfTurn { expected }),
        }
    }

    /// Waits until the destination says something unasked for, which can only be bad news.
    pub async fn trouble(&mut self) -> ControlError {
        match self.replies.recv().await {
            None => MessageError::Closed.into(),
            Some(Ok(to_source::Kind::Abort(abort))) => ControlError::Aborted { reason: abort.reason },
            Some(Ok(_)) => ControlError::OutOfTurn { expected: "nothing" },
            Some(Err(error)) => error,
        }
    }

    /// Waits until the destination has admitted the move. Cancel-safe.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub async fn admission(&mut self, limit: Duration) -> Result<Accepted, ControlError> {
        if let Some(accepted) = self.admitted {
            return Ok(accepted);
        }
        let pick = |kind| if let to_source::Kind::Accepted(accepted) = kind { Some(accepted) } else { None };
        let accepted = self.expect("admission", limit, pick).await?;
        self.admitted = Some(accepted);
        Ok(accepted)
    }

    /// Compares the clocks.
    ///
    /// # Errors
    /// The destination does not answer.
    pub async fn probe_clock(&mut self, limit: Duration) -> Result<Offset, ControlError> {
        let mut offset = Offset::default();
        for _ in 0..PROBES {
            self.send(to_destination::Kind::ClockProbe(ClockProbe { source_ns: now_ns() })).await?;
            let reply = loop {
                match self.expect("a clock reply", limit, Some).await? {
                    to_source::Kind::ClockReply(reply) => break reply,
                    // The destination was quicker than the probes.
                    to_source::Kind::Accepted(accepted) => self.admitted = Some(accepted),
                    _ => return Err(ControlError::OutOfTurn { expected: "a clock reply" }),
                }
            };
            offset.observe(reply.source_ns, reply.destination_ns, now_ns());
        }
        Ok(offset)
    }
}

async fn read(
    mut reader: MessageReader,
    memory: Arc<OnceLock<Answers>>,
    replies: mpsc::Sender<Result<to_source::Kind, ControlError>>,
) {
    loop {
        let received = reader.receive::<ToSource>().await.map_err(ControlError::from);
        let reply = match received.and_then(|message| message.kind.ok_or(MessageError::Empty.into())) {
            Ok(to_source::Kind::BatchAck(ack)) => {
                if let Some(memory) = memory.get() {
                    memory.acknowledged(ack.sequence);
                }
                continue;
            }
            Ok(to_source::Kind::FallbackRequest(request)) => match memory.get() {
                Some(memory) => match memory.fall_back(request.sequence) {
                    Ok(()) => continue,
                    Err(error) => Err(error.into()),
                },
                None => Err(ControlError::OutOfTurn { expected: "nothing" }),
            },
            other => other,
        };
        let ended = reply.is_err();
        if replies.send(reply).await.is_err() || ended {
            return;
        }
    }
}
