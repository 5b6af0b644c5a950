//! What source and destination say to each other on the control stream.

use pageport_proto::v1::{ClockReply, StreamEnd, ToDestination, ToSource, to_destination, to_source};
use tokio::sync::mpsc;

use super::DestinationError;
use crate::clock::now_ns;
use crate::transport::{MessageError, MessageReader, MessageWriter};

pub(super) async fn write_answers(mut writer: MessageWriter, mut queue: mpsc::UnboundedReceiver<to_source::Kind>) {
    while let Some(kind) = queue.recv().await {
        if writer.send(&ToSource { kind: Some(kind) }).await.is_err() {
            return;
        }
    }
}

/// Answers clock probes at once; everything else waits in order for its phase.
pub(super) async fn read_control(
    mut reader: MessageReader,
    answers: mpsc::UnboundedSender<to_source::Kind>,
    words: mpsc::Sender<Result<to_destination::Kind, MessageError>>,
) {
    loop {
        let message = reader.receive::<ToDestination>().await;
        let word = match message.and_then(|message| message.kind.ok_or(MessageError::Empty)) {
            Ok(to_destination::Kind::ClockProbe(probe)) => {
                let reply = ClockReply { source_ns: probe.source_ns, destination_ns: now_ns() };
                if answers.send(to_source::Kind::ClockReply(reply)).is_err() {
                    return;
                }
                continue;
            }
            other => other,
        };
        let ended = word.is_err();
        if words.send(word).await.is_err() || ended {
            return;
        }
    }
}

/// While the image is not complete: the end of the stream, or a reason to stop. Cancel-safe.
pub(super) async fn stream_end(
    control: &mut mpsc::Receiver<Result<to_destination::Kind, MessageError>>,
) -> Result<StreamEnd, DestinationError> {
    match control.recv().await {
        None | Some(Err(MessageError::Closed)) => Err(DestinationError::Lost),
        Some(Err(error)) => Err(error.into()),
        Some(Ok(to_destination::Kind::StreamEnd(end))) => Ok(end),
        Some(Ok(to_destination::Kind::Abort(abort))) => Err(DestinationError::SourceAborted { reason: abort.reason }),
        Some(Ok(to_destination::Kind::Release(_) | to_destination::Kind::ClockProbe(_))) => {
            Err(DestinationError::Request { what: "a message out of turn" })
        }
    }
}
