//! What a path takes, by trying: a stream of bytes that are worth nothing.
//!
//! The receiver counts, since what a sender has handed over may still lie in a queue. The first while does not count: a connection needs some
//! round trips to find its pace.

use std::time::{Duration, Instant};

use pageport_proto::v1::{ProbeHello, ProbeReply, StreamHello, stream_hello};

use super::{MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority};

/// For how long bytes are sent.
const SENDING: Duration = Duration::from_millis(1500);
/// Bytes that come sooner after the first ones do not count.
const SETTLING: Duration = Duration::from_millis(500);
/// Most bytes of a probe.
const MAX_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: usize = 64 << 10;
/// What is written ahead of what has been sent, at most: more would only have to be sent after the time is over.
const AHEAD_BYTES: u64 = 4 << 20;
const PAUSE: Duration = Duration::from_millis(2);
/// What lies in queues when the sender ends, and the answer, have this long.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Why a path could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The connection.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// What was said on it.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The bytes that are worth nothing could not be sent.
    #[error("write to the peer worker")]
    Write(#[from] quinn::WriteError),
    /// They broke off.
    #[error("read from the peer worker")]
    Read(#[from] quinn::ReadError),
    /// More came than a probe has.
    #[error("the peer worker's probe has more than {MAX_BYTES} bytes")]
    TooLong,
}

/// Sends to the peer for a while what it counts: bytes per second that the path takes; 0 when too little arrived to tell.
///
/// # Errors
/// The connection ends, or the peer does not answer.
pub async fn probe(connection: &PeerConnection) -> Result<u64, ProbeError> {
    let (send, recv) = connection.open_bi(priority::PROBE).await?;
    let mut writer = MessageWriter::new(send);
    writer
        .send(&StreamHello {
            protocol_version: PROTOCOL_VERSION,
            traceparent: String::new(),
            kind: Some(stream_hello::Kind::Probe(ProbeHello {})),
        })
        .await?;
    let mut stream = writer.into_stream();
    let (before, until) = (connection.sent_bytes(), Instant::now() + SENDING);
    let mut written = 0;
    while Instant::now() < until && written < MAX_BYTES {
        if written > connection.sent_bytes() - before + AHEAD_BYTES {
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        stream.write_all(&[0; CHUNK_BYTES]).await?;
        written += CHUNK_BYTES as u64;
    }
    // What was not sent in time need not come.
    let _ = stream.reset(0u32.into());
    let reply: ProbeReply = MessageReader::new(recv).receive_within(ANSWER_LIMIT).await?;
    Ok(per_second(reply.settled_bytes, Duration::from_micros(reply.settled_us)))
}

/// Counts what a peer sends, and tells it.
///
/// # Errors
/// The connection ends, or more comes than a probe sends.
pub async fn answer(reader: MessageReader, mut writer: MessageWriter) -> Result<(), ProbeError> {
    let mut stream = reader.into_stream();
    let (mut received, mut first, mut settled, mut last) = (0, None, None, Instant::now());
    loop {
        let chunk = match stream.read_chunk(CHUNK_BYTES, true).await {
            Ok(Some(chunk)) => chunk,
            Ok(None) | Err(quinn::ReadError::Reset(_)) => break,
            Err(error) => return Err(error.into()),
        };
        let now = Instant::now();
        last = now;
        received += chunk.bytes.len() as u64;
        if received > MAX_BYTES {
            return Err(ProbeError::TooLong);
        }
        let first = *first.get_or_insert(now);
        if now.duration_since(first) >= SETTLING {
            settled.get_or_insert((received, now));
        }
    }
    let reply = settled.map_or(ProbeReply::default(), |(bytes, at)| ProbeReply {
        settled_bytes: received - bytes,
        settled_us: last.duration_since(at).as_micros() as u64,
    });
    Ok(writer.send(&reply).await?)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    if time < Duration::from_millis(100) { 0 } else { (bytes as f64 / time.as_secs_f64()) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::ConnectedPair;

    #[tokio::test]
    async fn a_path_that_takes_something_is_told_how_much() {
        let pair = ConnectedPair::new().await;
        let far = pair.destination.clone();
        let counting = tokio::spawn(async move {
            let (send, recv) = far.accept_bi().await.unwrap();
            let (mut reader, writer) = (MessageReader::new(recv), MessageWriter::new(send));
            let hello: StreamHello = reader.receive().await.unwrap();
            assert!(matches!(hello.kind, Some(stream_hello::Kind::Probe(_))), "{hello:?}");
            answer(reader, writer).await.unwrap();
        });
        let bytes_per_s = probe(&pair.source).await.unwrap();
        assert!(bytes_per_s > 0);
        counting.await.unwrap();
    }

    #[test]
    fn what_came_within_no_time_tells_nothing() {
        assert_eq!(per_second(1000, Duration::ZERO), 0);
        assert_eq!(per_second(1000, Duration::from_millis(500)), 2000);
    }
}
