//! Protobuf messages on a QUIC stream: a length (u32, big-endian), then the message.
//!
//! The length is checked against [`MAX_MESSAGE_BYTES`] before anything is allocated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prost::Message;

/// Largest message: a disk write of 1 MiB that did not compress, with room for its headers.
pub const MAX_MESSAGE_BYTES: usize = (1 << 20) + (64 << 10);

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The stream ended in front of or inside a message.
    #[error("the peer worker closed the stream")]
    Closed,
    /// The stream broke while reading.
    #[error("read from the peer worker")]
    Read(#[from] quinn::ReadExactError),
    /// The stream broke while writing.
    #[error("write to the peer worker")]
    Write(#[from] quinn::WriteError),
    /// The peer announced, or this side tried, more than the limit.
    #[error("a message of {bytes} bytes is above the limit of {MAX_MESSAGE_BYTES}")]
    TooLarge {
        /// Announced length.
        bytes: usize,
    },
    /// The bytes are no such message.
    #[error("decode a message of the peer worker")]
    Decode(#[from] prost::DecodeError),
    /// The message has none of the contents that this build knows.
    #[error("a message of the peer worker has no known content")]
    Empty,
    /// Nothing came in time.
    #[error("the peer worker was silent for {} s", limit.as_secs())]
    Silent {
        /// The limit.
        limit: Duration,
    },
}

/// The sending half.
#[derive(Debug)]
pub struct MessageWriter {
    stream: quinn::SendStream,
    sent_bytes: Arc<AtomicU64>,
    buffer: BytesMut,
}

impl MessageWriter {
    /// Takes over a stream.
    pub fn new(stream: quinn::SendStream) -> Self {
        Self { stream, sent_bytes: Arc::default(), buffer: BytesMut::new() }
    }

    /// Sends one message; waits while the peer does not take it.
    ///
    /// # Errors
    /// [`MessageError::TooLarge`] or [`MessageError::Write`].
    pub async fn send(&mut self, message: &impl Message) -> Result<(), MessageError> {
        let length = message.encoded_len();
        if length > MAX_MESSAGE_BYTES {
            return Err(MessageError::TooLarge { bytes: length });
        }
        self.buffer.clear();
        self.buffer.extend_from_slice(&(length as u32).to_be_bytes());
        // BytesMut grows as needed, so encoding cannot run out of room.
        message.encode_raw(&mut self.buffer);
        self.stream.write_all(&self.buffer).await?;
        self.sent_bytes.fetch_add(self.buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes of the messages so far, with their lengths; it goes on counting.
    pub fn sent_bytes(&self) -> Arc<AtomicU64> {
        self.sent_bytes.clone()
    }

    /// The stream itself, for what follows in another format.
    pub fn into_stream(self) -> quinn::SendStream {
        self.stream
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct MessageReader {
    stream: quinn::RecvStream,
}

impl MessageReader {
    /// Takes over a stream.
    pub fn new(stream: quinn::RecvStream) -> Self {
        Self { stream }
    }

    /// The next message, however long it takes.
    ///
    /// # Errors
    /// [`MessageError`]; [`MessageError::Closed`] when the peer finished in front of a message.
    pub async fn receive<M: Message + Default>(&mut self) -> Result<M, MessageError> {
        let mut header = [0; 4];
        match self.stream.read_exact(&mut header).await {
            Err(quinn::ReadExactError::FinishedEarly(_)) => return Err(MessageError::Closed),
            other => other?,
        }
        let length = u32::from_be_bytes(header) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(MessageError::TooLarge { bytes: length });
        }
        let mut body = BytesMut::zeroed(length);
        self.stream.read_exact(&mut body).await?;
        Ok(M::decode(Bytes::from(body))?)
    }

    /// The next message, or [`MessageError::Silent`] after `limit`.
    ///
    /// # Errors
    /// [`MessageError`].
    pub async fn receive_within<M: Message + Default>(&mut self, limit: Duration) -> Result<M, MessageError> {
        tokio::time::timeout(limit, self.receive()).await.map_err(|_| MessageError::Silent { limit })?
    }

    /// The stream itself, for what follows in another format.
    pub fn into_stream(self) -> quinn::RecvStream {
        self.stream
    }
}
