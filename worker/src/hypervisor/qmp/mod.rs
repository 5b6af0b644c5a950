//! A QMP client over a unix socket.
//!
//! ```text
//!   Qmp (clone-able) ──commands (bounded)──▶ one task ──▶ socket
//!        ▲  reply (oneshot)                     │  ◀──── socket
//!        └──────────────────────────────────────┤
//!   subscribers ◀──notices (broadcast, bounded)─┘
//! ```
//!
//! Guarantees: every command ends within its deadline; a reply that comes after its deadline is dropped and never taken
//! for another command's; when the socket closes every waiting command fails with [`QmpError::Closed`] and subscribers
//! get [`QmpNotice::Disconnected`]. When the last [`Qmp`] is dropped the connection ends, and QEMU takes the next one.
//!
//! Does not retry and does not reconnect: who owns the VM decides what a lost QEMU means.
//!
//! Why not the `qapi` crate (0.15): it has typed commands, but its reader ends the connection on any event that its
//! schema does not name (QEMU adds some with each release) and reports an error on a reply whose caller has given up,
//! which is what a deadline does; and a worker uses some twenty of its hundreds of generated types.

mod message;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::codec::{FramedRead, LinesCodec};

pub(crate) use message::qmp_command;
pub use message::{Command, Ignored, RawEvent, Refusal};
pub(crate) use message::{Received, format, parse};

/// How long a command may take unless its caller says otherwise.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Longest line that QEMU may send; a full `query-block` of many disks stays far below.
pub const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;
/// Events that a slow subscriber may lag behind before it loses the oldest.
const NOTICE_BACKLOG: usize = 1024;
/// Commands that may wait for the task.
const COMMAND_BACKLOG: usize = 32;

qmp_command!(
    /// Leaves QMP's negotiation mode.
    QmpCapabilities = "qmp_capabilities" -> Ignored {}
);

/// Why a command did not give its answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens, or the socket is not there.
    #[error("connect to QMP at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU did not say hello.
    #[error("no QMP greeting at {}: another client holds the monitor, or QEMU hangs", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
    },
    /// QEMU said no.
    #[error("QEMU refused {command}: {} ({})", refusal.desc, refusal.class)]
    Refused {
        /// The command.
        command: &'static str,
        /// Its words.
        refusal: Refusal,
    },
    /// No answer in time. Whether it took effect is not known.
    #[error("no answer to {command} within {:.1} s", deadline.as_secs_f64())]
    Deadline {
        /// The command.
        command: &'static str,
        /// The time it had.
        deadline: Duration,
    },
    /// The connection ended before the answer came.
    #[error("QMP connection closed during {command}")]
    Closed {
        /// The command.
        command: &'static str,
    },
    /// Command or answer do not have the expected form.
    #[error("unexpected form of {command}")]
    Form {
        /// The command.
        command: &'static str,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
}

/// What subscribers get.
#[derive(Debug, Clone)]
pub enum QmpNotice {
    /// An event, and when it was read here.
    Event(RawEvent, Instant),
    /// QEMU's side has closed; nothing follows.
    Disconnected,
}

struct Request {
    id: u64,
    line: String,
    reply: oneshot::Sender<Result<Value, Refusal>>,
}

/// A connection, and its notices from the first on.
pub type Connected = (Qmp, broadcast::Receiver<QmpNotice>);

/// A handle on one connection; see the module.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
    next_id: Arc<AtomicU64>,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation. The receiver misses nothing from the first event on.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Connected, QmpError> {
        let negotiate = async {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
            let (read, write) = stream.into_split();
            let mut lines = FramedRead::new(read, LinesCodec::new_with_max_length(MAX_LINE_BYTES));
            match lines.next().await {
                Some(Ok(line)) if parse(&line) == Some(Received::Greeting) => Ok((lines, write)),
                _ => Err(QmpError::NoGreeting { path: path.to_owned() }),
            }
        };
        let (lines, write) = tokio::time::timeout(deadline, negotiate)
            .await
            .map_err(|_| QmpError::NoGreeting { path: path.to_owned() })??;

        let (requests, inbox) = mpsc::channel(COMMAND_BACKLOG);
        let (notices, subscription) = broadcast::channel(NOTICE_BACKLOG);
        tokio::spawn(Connection { lines, write, inbox, notices, waiting: HashMap::new() }.run());
        let qmp = Self { requests, next_id: Arc::default() };
        qmp.execute_within(&QmpCapabilities {}, deadline).await?;
        Ok((qmp, subscription))
    }

    /// Runs a command with the usual deadline.
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Reply, QmpError> {
        self.execute_within(command, COMMAND_DEADLINE).await
    }

    /// Runs a command with a deadline of its own.
    pub async fn execute_within<C: Command>(&self, command: &C, deadline: Duration) -> Result<C::Reply, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let line = format(id, command).map_err(|source| QmpError::Form { command: C::NAME, source })?;
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.requests.send(Request { id, line, reply }).await.ok()?;
            answer.await.ok()
        };
        let value = tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| QmpError::Deadline { command: C::NAME, deadline })?
            .ok_or(QmpError::Closed { command: C::NAME })?
            .map_err(|refusal| QmpError::Refused { command: C::NAME, refusal })?;
        serde_json::from_value(value).map_err(|source| QmpError::Form { command: C::NAME, source })
    }
}

/// The task's state.
struct Connection {
    lines: FramedRead<OwnedReadHalf, LinesCodec>,
    write: OwnedWriteHalf,
    inbox: mpsc::Receiver<Request>,
    notices: broadcast::Sender<QmpNotice>,
    waiting: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>,
}

impl Connection {
    async fn run(mut self) {
        let mut out = std::io::Cursor::new(Vec::new());
        loop {
            let unsent = out.get_ref().len() as u64 > out.position();
            tokio::select! {
                line = self.lines.next() => match line {
                    Some(Ok(line)) => self.take(&line),
                    Some(Err(_)) | None => break,
                },
                sent = self.write.write_buf(&mut out), if unsent => if sent.is_err() {
                    break;
                },
                request = self.inbox.recv(), if !unsent => match request {
                    Some(request) => {
                        out = std::io::Cursor::new(request.line.into_bytes());
                        self.waiting.retain(|_, reply| !reply.is_closed());
                        self.waiting.insert(request.id, request.reply);
                    }
                    // Every handle is gone: leave the monitor to the next one.
                    None => return,
                },
            }
        }
        // No subscriber left is no error.
        let _ = self.notices.send(QmpNotice::Disconnected);
    }

    fn take(&mut self, line: &str) {
        match parse(line) {
            Some(Received::Event(event)) => {
                let _ = self.notices.send(QmpNotice::Event(event, Instant::now()));
            }
            Some(Received::Reply { id: Some(id), result }) => {
                if let Some(reply) = self.waiting.remove(&id) {
                    // The caller may have given up.
                    let _ = reply.send(result);
                }
            }
            Some(Received::Greeting | Received::Reply { id: None, .. }) | None => {
                tracing::warn!(bytes = line.len(), "QEMU sent a line that is no answer and no event");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    qmp_command!(Probe = "probe" -> Value {});

    const SOON: Duration = Duration::from_secs(5);

    /// A QEMU that follows a script: for each received line the lines to answer; closes at the end of the script.
    async fn scripted(path: PathBuf, script: Vec<Vec<&'static str>>) {
        let listener = UnixListener::bind(path).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        write.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
        for answers in script {
            lines.next_line().await.unwrap();
            for answer in answers {
                write.write_all(answer.as_bytes()).await.unwrap();
                write.write_all(b"\r\n").await.unwrap();
            }
        }
    }

    async fn connected(dir: &tempfile::TempDir, script: Vec<Vec<&'static str>>) -> Connected {
        let path = dir.path().join("qmp.sock");
        let listener = path.clone();
        tokio::spawn(scripted(listener, script));
        tokio::task::yield_now().await;
        Qmp::connect(&path, SOON).await.unwrap()
    }

    #[tokio::test]
    async fn a_late_reply_is_not_taken_for_the_next_commands() {
        let dir = tempfile::tempdir().unwrap();
        let script = vec![
            vec![r#"{"return": {}, "id": 0}"#],
            vec![],
            vec![r#"{"return": "late", "id": 1}"#, r#"{"return": "right", "id": 2}"#],
        ];
        let (qmp, _events) = connected(&dir, script).await;
        let late = qmp.execute_within(&Probe {}, Duration::from_millis(20)).await;
        assert!(matches!(late, Err(QmpError::Deadline { command: "probe", .. })), "{late:?}");
        assert_eq!(qmp.execute_within(&Probe {}, SOON).await.unwrap(), Value::from("right"));
    }

    #[tokio::test]
    async fn unknown_events_pass_and_a_closed_socket_is_an_error_and_a_notice() {
        let dir = tempfile::tempdir().unwrap();
        let script =
            vec![vec![r#"{"return": {}, "id": 0}"#, r#"{"event": "FROM_THE_FUTURE", "data": {"x": 1}}"#], vec![]];
        let (qmp, mut events) = connected(&dir, script).await;
        let closed = qmp.execute_within(&Probe {}, SOON).await;
        assert!(matches!(closed, Err(QmpError::Closed { .. })), "{closed:?}");
        let QmpNotice::Event(event, _) = events.recv().await.unwrap() else { panic!("no event") };
        assert_eq!(event.name, "FROM_THE_FUTURE");
        assert!(matches!(events.recv().await.unwrap(), QmpNotice::Disconnected));
        assert!(matches!(qmp.execute(&Probe {}).await, Err(QmpError::Closed { .. })));
    }

    #[tokio::test]
    async fn a_refusal_carries_qemus_words() {
        let dir = tempfile::tempdir().unwrap();
        let script = vec![
            vec![r#"{"return": {}, "id": 0}"#],
            vec![r#"{"id": 1, "error": {"class": "GenericError", "desc": "nope"}}"#],
        ];
        let (qmp, _events) = connected(&dir, script).await;
        let error = qmp.execute(&Probe {}).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused probe: nope (GenericError)");
    }
}
