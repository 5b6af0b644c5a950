//! The second part of a connection: requests and replies.
//!
//! ```text
//!   read header ─▶ wait for a place ─▶ read payload ─▶ task ─▶ target ─▶ queue ─▶ writer ─▶ place is free
//! ```
//! A request holds its place, and as many bytes of the budget as it carries, until its reply is in the socket: so memory
//! is bounded whatever the client does. FLUSH takes *all* places: it begins when everything before it is answered, and
//! what comes after it waits.
//!
//! There is no idle limit: a mirror that has caught up may be silent for as long as the guest is. But a peer that has
//! begun to send a payload, or has an answer to take, must go on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::BlockTarget;
use super::negotiation::ConnectionError;
use super::protocol::{
    Action, MAX_PAYLOAD_BYTES, REQUEST_HEADER_BYTES, Request, WireError, format_reply, parse_request,
};

/// Most requests in flight.
pub const MAX_IN_FLIGHT: u32 = 16;
/// Most bytes of requests and replies in flight, in units of [`BUDGET_UNIT_BYTES`].
const BUDGET_UNITS: u32 = MAX_PAYLOAD_BYTES / BUDGET_UNIT_BYTES;
const BUDGET_UNIT_BYTES: u32 = 4096;
/// Time for a peer to send a payload it announced, or to take a reply.
const PACE_DEADLINE: Duration = Duration::from_secs(30);

/// Time for the target to do a request. QEMU waits for its mirror whenever the guest resets the disk's device (at boot, or
/// when its driver is loaded), with the whole guest: an error, which ends the mirror, is better than that.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// A request's place and bytes, given back when dropped.
struct Place {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

struct Reply {
    cookie: u64,
    result: Result<Bytes, WireError>,
    _place: Place,
}

/// Serves one client until it disconnects. Each call to the target runs as one of `requests`: they are cancelled when
/// this future is dropped, and have ended when that tracker is empty.
pub(super) async fn serve<S, T>(
    stream: S,
    target: Arc<T>,
    requests: TaskTracker,
    request_deadline: Duration,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    T: BlockTarget,
{
    let (read, write) = tokio::io::split(stream);
    let (replies, outbox) = mpsc::channel(MAX_IN_FLIGHT as usize);
    let writer = send_replies(write, outbox);
    tokio::pin!(writer);
    let reader = take_requests(read, target, replies, requests, request_deadline);
    tokio::pin!(reader);
    tokio::select! {
        // The peer has said goodbye: what is in flight is answered, then the queue closes.
        read = &mut reader => {
            read?;
            writer.await
        }
        written = &mut writer => written,
    }
}

async fn take_requests<S, T>(
    mut read: ReadHalf<S>,
    target: Arc<T>,
    replies: mpsc::Sender<Reply>,
    requests: TaskTracker,
    request_deadline: Duration,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    T: BlockTarget,
{
    let (size, access) = (target.size(), target.access());
    let places = Arc::new(Semaphore::new(MAX_IN_FLIGHT as usize));
    let budget = Arc::new(Semaphore::new(BUDGET_UNITS as usize));
    // Dropped with this future: whatever is in flight ends with the connection.
    let mut running = JoinSet::new();
    loop {
        let mut header = [0; REQUEST_HEADER_BYTES];
        match read.read_exact(&mut header).await {
            Ok(_) => {}
            // Not the polite way to leave, but a way.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error.into()),
        }
        let request = parse_request(&header, size, access)?;
        if request.action == Action::Disconnect {
            break;
        }
        let place = take_place(&places, &budget, &request).await?;
        let payload = read_payload(&mut read, request.payload).await?;
        let (target, replies) = (Arc::clone(&target), replies.clone());
        while running.try_join_next().is_some() {}
        running.spawn(requests.track_future(async move {
            let performed = perform(&*target, &request, payload);
            let result = match tokio::time::timeout(request_deadline, performed).await {
                Ok(result) => result,
                Err(_) => Err(failure("answer in time", &request, &io::ErrorKind::TimedOut.into())),
            };
            // A closed queue is a connection that has ended.
            let _ = replies.send(Reply { cookie: request.cookie, result, _place: place }).await;
        }));
    }
    while running.join_next().await.is_some() {}
    Ok(())
}

async fn take_place(
    places: &Arc<Semaphore>,
    budget: &Arc<Semaphore>,
    request: &Request,
) -> Result<Place, ConnectionError> {
    let count = if request.action == Action::Flush { MAX_IN_FLIGHT } else { 1 };
    let carried = if request.action == Action::Read { request.length } else { request.payload };
    let units = carried.div_ceil(BUDGET_UNIT_BYTES);
    // The semaphores are never closed.
    let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    let request = Arc::clone(places).acquire_many_owned(count).await.map_err(closed)?;
    let bytes = Arc::clone(budget).acquire_many_owned(units).await.map_err(closed)?;
    Ok(Place { _request: request, _bytes: bytes })
}

async fn read_payload<S: AsyncRead>(read: &mut ReadHalf<S>, length: u32) -> Result<Bytes, ConnectionError> {
    let mut payload = BytesMut::zeroed(length as usize);
    tokio::time::timeout(PACE_DEADLINE, read.read_exact(&mut payload))
        .await
        .map_err(|_| ConnectionError::Slow { operation: "send a payload" })??;
    Ok(payload.freeze())
}

async fn perform<T: BlockTarget>(target: &T, request: &Request, payload: Bytes) -> Result<Bytes, WireError> {
    let Request { offset, length, .. } = *request;
    let (done, fua) = match request.action {
        Action::Read => {
            let data = target.read(offset, length).await.map_err(|error| failure("read", request, &error))?;
            // A target that breaks its word must not shift the stream.
            return if data.len() == length as usize { Ok(data) } else { Err(WireError::Io) };
        }
        Action::Write { fua } => (target.write(offset, payload).await, fua),
        Action::WriteZeroes { fua } => (target.zero(offset, length).await, fua),
        Action::Flush => (target.flush().await, false),
        Action::Refused(error) => return Err(error),
        Action::Disconnect => return Err(WireError::Invalid),
    };
    done.map_err(|error| failure("change", request, &error))?;
    if fua {
        target.flush().await.map_err(|error| failure("flush", request, &error))?;
    }
    Ok(Bytes::new())
}

fn failure(operation: &'static str, request: &Request, error: &io::Error) -> WireError {
    tracing::warn!(operation, offset = request.offset, length = request.length, error = %error, "NBD target failed");
    match error.kind() {
        io::ErrorKind::PermissionDenied => WireError::Permission,
        io::ErrorKind::OutOfMemory => WireError::Memory,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => WireError::Space,
        io::ErrorKind::InvalidInput => WireError::Invalid,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => WireError::Shutdown,
        _ => WireError::Io,
    }
}

async fn send_replies<S: AsyncRead + AsyncWrite>(
    mut write: WriteHalf<S>,
    mut outbox: mpsc::Receiver<Reply>,
) -> Result<(), ConnectionError> {
    while let Some(reply) = outbox.recv().await {
        let (data, error) = match &reply.result {
            Ok(data) => (&data[..], None),
            Err(error) => (&[][..], Some(*error)),
        };
        let send = async {
            write.write_all(&format_reply(reply.cookie, error)).await?;
            write.write_all(data).await
        };
        tokio::time::timeout(PACE_DEADLINE, send)
            .await
            .map_err(|_| ConnectionError::Slow { operation: "take a reply" })??;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
