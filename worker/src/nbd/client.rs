//! Reads an export of a local QEMU: its bytes, and what is dirty or zero there.
//!
//! ```text
//!   read, trim, extents ─▶ write task ─▶ socket ─▶ QEMU
//!     └── waits for ◀─ answers by cookie ◀─ read task ◀─┘
//! ```
//! Guarantees: the socket is read whatever callers do, so QEMU never waits for a reply to be taken by them; a call that is dropped
//! disturbs no other; when the connection ends every call fails with the reason. Dropping the client closes it.
//!
//! Does not write. Bounds nothing by itself: who calls bounds how much is asked for at once.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::protocol::client::{
    ANSWER_HEADER_BYTES, Answer, Ask, CHUNK_HEADER_REST_BYTES, Chunk, Command, GREETING_BYTES, ReplyHead,
    answer_greeting, format_request, parse_answer, parse_answer_header, parse_chunk, parse_chunk_length,
    parse_reply_head,
};
use super::protocol::{MAX_NAME_BYTES, MAX_PAYLOAD_BYTES, ProtocolError, REPLY_HEADER_BYTES, REQUEST_HEADER_BYTES};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Requests that may wait to be written.
const MAX_QUEUED: usize = 64;
/// Replies that are read at once, if they are small.
const BUFFER_BYTES: usize = 64 << 10;
/// What may be asked of block states at once: a request's length has 32 bits.
const MAX_STATES_BYTES: u64 = 1 << 31;
/// "Invalid": also what QEMU makes of errors that NBD has no number for.
const EINVAL: u32 = 22;

const STATE_ZERO: u32 = 1 << 1;
const STATE_DIRTY: u32 = 1 << 0;

/// Why an export is not read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The name is too long.
    #[error("NBD export name of {length} bytes, more than {MAX_NAME_BYTES}")]
    Name {
        /// Its length.
        length: usize,
    },
    /// No connection.
    #[error("connect to the NBD server at {}: {reason}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What came is no NBD.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The server does not offer what is needed.
    #[error("the NBD server does not offer {what}: {said}")]
    NotOffered {
        /// What.
        what: &'static str,
        /// Its words.
        said: String,
    },
    /// The server failed at it.
    #[error("the NBD server cannot {operation} {length} bytes at {offset}: {said}")]
    Failed {
        /// What was asked for.
        operation: &'static str,
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
        /// The error as NBD numbers them.
        error: u32,
        /// Its words.
        said: String,
    },
    /// The connection ended.
    #[error("the NBD connection ended: {reason}")]
    Ended {
        /// Why.
        reason: String,
    },
}

impl ClientError {
    /// Did the server refuse a request that makes sense?
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Failed { error: EINVAL, .. })
    }
}

/// What block states tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum States {
    /// Which blocks are zero.
    Zeroes,
    /// Which blocks this bitmap of the node says are dirty.
    Dirty {
        /// The bitmap's name.
        bitmap: String,
    },
}

/// What a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Bytes that are wanted.
    Data,
    /// Zeroes that are wanted.
    Zero,
    /// Not dirty: not wanted.
    Clean,
}

/// A range of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// What it is.
    pub state: State,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Data(Bytes),
    /// Nothing but zeroes.
    Zero,
}

/// A connection to one export.
#[derive(Debug)]
pub struct NbdClient {
    size_bytes: u64,
    states: States,
    requests: mpsc::Sender<[u8; REQUEST_HEADER_BYTES]>,
    waiting: Arc<Waiting>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl NbdClient {
    /// Connects to `export` behind a unix socket.
    ///
    /// # Errors
    /// Nobody listens, there is no such export or bitmap, or the server does not answer in time.
    pub async fn connect(socket: &Path, export: &str, states: States) -> Result<Self, ClientError> {
        if export.len() > MAX_NAME_BYTES {
            return Err(ClientError::Name { length: export.len() });
        }
        let failed = |reason: String| ClientError::Connect { path: socket.to_owned(), reason };
        let connect = async {
            let mut stream = UnixStream::connect(socket).await.map_err(|error| failed(error.to_string()))?;
            let size_bytes = negotiate(&mut stream, export, &states).await?;
            Ok::<_, ClientError>((stream, size_bytes))
        };
        let connected = tokio::time::timeout(CONNECT_DEADLINE, connect).await;
        let (stream, size_bytes) = connected.map_err(|_| failed("no answer in time".to_owned()))??;
        let (read, write) = stream.into_split();
        let (requests, queue) = mpsc::channel(MAX_QUEUED);
        let waiting = Arc::new(Waiting::default());
        let tasks = [tokio::spawn(write_requests(queue, write)), tokio::spawn(read_replies(read, waiting.clone()))];
        Ok(Self { size_bytes, states, requests, waiting, _tasks: tasks.map(AbortOnDropHandle::new) })
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads `length` bytes, at most [`MAX_PAYLOAD_BYTES`].
    ///
    /// # Errors
    /// The server cannot, or the connection ended.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Content, ClientError> {
        match self.request(Command::Read, offset, length.min(MAX_PAYLOAD_BYTES)).await? {
            Collected::Content(content) => Ok(content),
            Collected::States(_) | Collected::Done => Err(malformed("answer to a read")),
        }
    }

    /// Says that a range will not be read again.
    ///
    /// # Errors
    /// The server cannot, or the connection ended.
    pub async fn trim(&self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.request(Command::Trim, offset, length).await.map(drop)
    }

    /// What the blocks from `offset` on are: ranges that follow each other, at least one.
    ///
    /// # Errors
    /// The server cannot, or the connection ended.
    pub async fn extents(&self, offset: u64) -> Result<Vec<Extent>, ClientError> {
        let length = self.size_bytes.saturating_sub(offset).min(MAX_STATES_BYTES);
        let Collected::States(states) = self.request(Command::BlockStatus, offset, length as u32).await? else {
            return Err(malformed("answer about block states"));
        };
        let mut extents = Vec::with_capacity(states.len());
        let (mut at, end) = (offset, offset + length);
        for (length, flags) in states {
            // The last may reach beyond what was asked for.
            let length = u64::from(length).min(end - at);
            if length > 0 {
                extents.push(Extent { offset: at, length, state: self.state_of(flags) });
            }
            at += length;
        }
        if extents.is_empty() { Err(malformed("answer about block states")) } else { Ok(extents) }
    }

    fn state_of(&self, flags: u32) -> State {
        match self.states {
            States::Zeroes if flags & STATE_ZERO != 0 => State::Zero,
            States::Dirty { .. } if flags & STATE_DIRTY == 0 => State::Clean,
            States::Zeroes | States::Dirty { .. } => State::Data,
        }
    }

    async fn request(&self, command: Command, offset: u64, length: u32) -> Result<Collected, ClientError> {
        let (cookie, answer) = self.waiting.add(command, offset, length)?;
        let queued = self.requests.send(format_request(command, cookie, offset, length)).await;
        if queued.is_err() {
            self.waiting.end("it takes no more requests");
        }
        // Whoever drops the other end has said why before.
        answer.await.unwrap_or_else(|_| Err(self.waiting.ended()))
    }
}

async fn negotiate(stream: &mut UnixStream, export: &str, states: &States) -> Result<u64, ClientError> {
    let mut greeting = [0; GREETING_BYTES];
    stream.read_exact(&mut greeting).await.map_err(ended)?;
    stream.write_all(&answer_greeting(&greeting)?).await.map_err(ended)?;
    let context = match states {
        States::Zeroes => "base:allocation".to_owned(),
        States::Dirty { bitmap } => format!("qemu:dirty-bitmap:{bitmap}"),
    };
    ask(stream, Ask::StructuredReplies, "structured replies").await?;
    let answers = ask(stream, Ask::Context { export, context: &context }, "its block states").await?;
    if !answers.iter().any(|answer| matches!(answer, Answer::Context(_))) {
        return Err(ClientError::NotOffered { what: "its block states", said: format!("it does not know {context}") });
    }
    let answers = ask(stream, Ask::Go { export }, "the export").await?;
    let size = answers.iter().find_map(|answer| if let Answer::Size(size) = answer { Some(*size) } else { None });
    size.ok_or_else(|| malformed("answer to GO"))
}

/// One option; gives the answers before the last, which is an acknowledgement.
async fn ask(stream: &mut UnixStream, ask: Ask<'_>, what: &'static str) -> Result<Vec<Answer>, ClientError> {
    stream.write_all(&ask.format()).await.map_err(ended)?;
    let mut answers = vec![];
    loop {
        let mut header = [0; ANSWER_HEADER_BYTES];
        stream.read_exact(&mut header).await.map_err(ended)?;
        let (kind, length) = parse_answer_header(ask, &header)?;
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await.map_err(ended)?;
        match parse_answer(kind, &data) {
            Answer::Ack => return Ok(answers),
            Answer::Refused(said) => return Err(ClientError::NotOffered { what, said }),
            answer => answers.push(answer),
        }
    }
}

fn ended(error: io::Error) -> ClientError {
    ClientError::Ended { reason: error.to_string() }
}

fn malformed(what: &'static str) -> ClientError {
    ProtocolError::Malformed { what }.into()
}

async fn write_requests(mut queue: mpsc::Receiver<[u8; REQUEST_HEADER_BYTES]>, mut write: OwnedWriteHalf) {
    let mut requests = Vec::with_capacity(MAX_QUEUED);
    while queue.recv_many(&mut requests, MAX_QUEUED).await > 0 {
        // The read task finds out, too, and says so to all.
        if write.write_all(requests.as_flattened()).await.is_err() {
            return;
        }
        requests.clear();
    }
}

async fn read_replies(read: OwnedReadHalf, waiting: Arc<Waiting>) {
    let mut read = BufReader::with_capacity(BUFFER_BYTES, read);
    let error = loop {
        if let Err(error) = read_reply(&mut read, &waiting).await {
            break error;
        }
    };
    waiting.end(&match error {
        ClientError::Ended { reason } => reason,
        other => other.to_string(),
    });
}

async fn read_reply(read: &mut BufReader<OwnedReadHalf>, waiting: &Waiting) -> Result<(), ClientError> {
    let mut head = [0; REPLY_HEADER_BYTES];
    read.read_exact(&mut head).await.map_err(ended)?;
    let (cookie, last, chunk) = match parse_reply_head(&head)? {
        ReplyHead::Simple { cookie, error: 0 } => (cookie, true, Chunk::Empty),
        ReplyHead::Simple { cookie, error } => {
            (cookie, true, Chunk::Error { error, message: format!("error {error}") })
        }
        ReplyHead::Chunk { cookie, last, kind } => {
            let mut rest = [0; CHUNK_HEADER_REST_BYTES];
            read.read_exact(&mut rest).await.map_err(ended)?;
            let mut data = BytesMut::zeroed(parse_chunk_length(rest)? as usize);
            read.read_exact(&mut data).await.map_err(ended)?;
            (cookie, last, parse_chunk(kind, data.freeze())?)
        }
    };
    waiting.take(cookie, last, chunk)
}

/// What a request has brought.
#[derive(Debug)]
enum Collected {
    Content(Content),
    States(Vec<(u32, u32)>),
    Done,
}

/// Requests that are not answered yet.
#[derive(Debug, Default)]
struct Waiting(Mutex<Requests>);

#[derive(Debug, Default)]
struct Requests {
    next: u64,
    by_cookie: HashMap<u64, Pending>,
    ended: Option<String>,
}

#[derive(Debug)]
struct Pending {
    command: Command,
    offset: u64,
    length: u32,
    read: Assembly,
    states: Vec<(u32, u32)>,
    error: Option<(u32, String)>,
    answer: oneshot::Sender<Result<Collected, ClientError>>,
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(
        &self,
        command: Command,
        offset: u64,
        length: u32,
    ) -> Result<(u64, oneshot::Receiver<Result<Collected, ClientError>>), ClientError> {
        let mut requests = self.lock();
        if let Some(reason) = &requests.ended {
            return Err(ClientError::Ended { reason: reason.clone() });
        }
        let (answer, answered) = oneshot::channel();
        let cookie = requests.next;
        requests.next += 1;
        let (read, states, error) = (Assembly::default(), vec![], None);
        requests.by_cookie.insert(cookie, Pending { command, offset, length, read, states, error, answer });
        Ok((cookie, answered))
    }

    /// A part of an answer.
    fn take(&self, cookie: u64, last: bool, chunk: Chunk) -> Result<(), ClientError> {
        let mut requests = self.lock();
        let pending = requests.by_cookie.get_mut(&cookie).ok_or_else(|| malformed("reply to no request"))?;
        pending.take(chunk)?;
        if last && let Some(pending) = requests.by_cookie.remove(&cookie) {
            pending.finish()?;
        }
        Ok(())
    }

    /// Everything that waits fails, and whatever is asked for from now on.
    fn end(&self, reason: &str) {
        let mut requests = self.lock();
        requests.ended.get_or_insert_with(|| reason.to_owned());
        requests.by_cookie.clear();
    }

    fn ended(&self) -> ClientError {
        ClientError::Ended { reason: self.lock().ended.clone().unwrap_or_default() }
    }
}

impl Pending {
    fn take(&mut self, chunk: Chunk) -> Result<(), ClientError> {
        match (self.command, chunk) {
            (_, Chunk::Empty) => {}
            (_, Chunk::Error { error, message }) => self.error = Some((error, message)),
            (Command::Read, Chunk::Data { offset, bytes }) => {
                self.read.data(self.place(offset, bytes.len() as u64)?, self.length, bytes);
            }
            (Command::Read, Chunk::Hole { offset, length }) => {
                self.place(offset, length.into())?;
                self.read.covered_bytes += u64::from(length);
            }
            (Command::BlockStatus, Chunk::States(states)) => self.states = states,
            _ => return Err(malformed("part of a reply")),
        }
        Ok(())
    }

    /// Where in the answer a part belongs.
    fn place(&self, offset: u64, length: u64) -> Result<usize, ClientError> {
        let at = offset.checked_sub(self.offset).filter(|at| at.saturating_add(length) <= self.length.into());
        at.map(|at| at as usize).ok_or_else(|| malformed("place of a part of a reply"))
    }

    fn finish(self) -> Result<(), ClientError> {
        let answer = match (self.error, self.command) {
            (Some((error, said)), command) => {
                let operation = match command {
                    Command::Read => "read",
                    Command::Trim => "trim",
                    Command::BlockStatus => "tell the state of",
                };
                let (offset, length) = (self.offset, self.length.into());
                Err(ClientError::Failed { operation, offset, length, error, said })
            }
            (None, Command::Read) if self.read.covered_bytes != u64::from(self.length) => {
                return Err(malformed("incomplete answer to a read"));
            }
            (None, Command::Read) => Ok(Collected::Content(self.read.content())),
            (None, Command::BlockStatus) => Ok(Collected::States(self.states)),
            (None, Command::Trim) => Ok(Collected::Done),
        };
        // Who asked may have gone.
        let _ = self.answer.send(answer);
        Ok(())
    }
}

/// An answer to a read, from its parts. What no part brings is zero.
#[derive(Debug, Default)]
struct Assembly {
    covered_bytes: u64,
    whole: Option<Bytes>,
    parts: Option<BytesMut>,
}

impl Assembly {
    fn data(&mut self, at: usize, length: u32, bytes: Bytes) {
        self.covered_bytes += bytes.len() as u64;
        if bytes.len() == length as usize {
            self.whole = Some(bytes);
            return;
        }
        let parts = self.parts.get_or_insert_with(|| BytesMut::zeroed(length as usize));
        parts[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    fn content(self) -> Content {
        let bytes = self.whole.or_else(|| self.parts.map(BytesMut::freeze));
        bytes.map_or(Content::Zero, Content::Data)
    }
}

#[cfg(test)]
mod tests;
