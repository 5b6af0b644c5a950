//! A VM's serial console, for many viewers at once.
//!
//! ```text
//!   console.sock ◀──▶ one task ──▶ the last 64 KiB, and broadcast ──▶ viewers
//!                        ◀────────── bounded queue ────────────────── viewers' keys
//! ```
//! The task always reads, so the guest never waits for a viewer; a viewer that is too slow loses output. A new viewer
//! first gets the backlog. Output from before the worker attached is not kept: QEMU drops it.
//!
//! The task ends when QEMU does, and then every viewer's receiver ends.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// Output that a new viewer gets at once.
pub const BACKLOG_BYTES: usize = 64 * 1024;
/// Pieces of output that a viewer may lag behind before it loses some.
const VIEWER_QUEUE: usize = 256;
/// Pieces of input that may wait for the guest.
const INPUT_QUEUE: usize = 64;
/// Largest piece read at once.
const READ_BYTES: usize = 4096;
/// Time for QEMU to take a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Most viewers of one console.
pub const MAX_VIEWERS: usize = 32;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// QEMU does not listen.
    #[error("connect to the console {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU has ended.
    #[error("the console has ended with its VM")]
    Ended,
    /// Enough.
    #[error("the console has {MAX_VIEWERS} viewers already")]
    Full,
}

struct Attach {
    reply: oneshot::Sender<Option<mpsc::Receiver<Bytes>>>,
}

/// A handle on one console; clones share it. The task ends with QEMU or when all handles and inputs are dropped.
#[derive(Debug, Clone)]
pub struct Console {
    attach: mpsc::Sender<Attach>,
    input: mpsc::Sender<Bytes>,
}

impl Console {
    /// Connects to the VM's serial port.
    pub async fn open(socket: &Path) -> Result<Self, ConsoleError> {
        let failed = |source| ConsoleError::Connect { path: socket.to_owned(), source };
        let stream = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(socket))
            .await
            .map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?
            .map_err(failed)?;
        let (read, write) = stream.into_split();
        let (attach, attaching) = mpsc::channel(4);
        let (input, keys) = mpsc::channel(INPUT_QUEUE);
        tokio::spawn(type_in(write, keys));
        tokio::spawn(Task { read, attaching, viewers: Vec::new(), backlog: VecDeque::new() }.run());
        Ok(Self { attach, input })
    }

    /// A viewer: its output, starting with the backlog, and its input.
    pub async fn attach(&self) -> Result<(mpsc::Receiver<Bytes>, mpsc::Sender<Bytes>), ConsoleError> {
        let (reply, answer) = oneshot::channel();
        self.attach.send(Attach { reply }).await.map_err(|_| ConsoleError::Ended)?;
        let output = answer.await.map_err(|_| ConsoleError::Ended)?.ok_or(ConsoleError::Full)?;
        Ok((output, self.input.clone()))
    }
}

struct Task {
    read: OwnedReadHalf,
    attaching: mpsc::Receiver<Attach>,
    viewers: Vec<mpsc::Sender<Bytes>>,
    backlog: VecDeque<u8>,
}

impl Task {
    async fn run(mut self) {
        let mut piece = vec![0; READ_BYTES];
        loop {
            tokio::select! {
                read = self.read.read(&mut piece) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(length) => self.show(&piece[..length]),
                },
                attach = self.attaching.recv() => match attach {
                    Some(attach) => self.add_viewer(attach),
                    None => return,
                },
            }
        }
    }

    fn show(&mut self, piece: &[u8]) {
        self.backlog.extend(piece);
        let excess = self.backlog.len().saturating_sub(BACKLOG_BYTES);
        self.backlog.drain(..excess);
        let piece = Bytes::copy_from_slice(piece);
        // A full queue loses this piece; a closed one is a viewer that has left.
        self.viewers
            .retain(|viewer| !matches!(viewer.try_send(piece.clone()), Err(mpsc::error::TrySendError::Closed(_))));
    }

    fn add_viewer(&mut self, attach: Attach) {
        self.viewers.retain(|viewer| !viewer.is_closed());
        if self.viewers.len() >= MAX_VIEWERS {
            let _ = attach.reply.send(None);
            return;
        }
        let (viewer, output) = mpsc::channel(VIEWER_QUEUE);
        if !self.backlog.is_empty() {
            // The queue is new and has room.
            let _ = viewer.try_send(self.backlog.iter().copied().collect());
        }
        if attach.reply.send(Some(output)).is_ok() {
            self.viewers.push(viewer);
        }
    }
}

// Apart from reading: a guest that does not take its input must not hold up its output.
async fn type_in(mut write: OwnedWriteHalf, mut keys: mpsc::Receiver<Bytes>) {
    while let Some(typed) = keys.recv().await {
        if write.write_all(&typed).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn console() -> (tempfile::TempDir, Console, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (console, guest) = tokio::join!(Console::open(&path), listener.accept());
        (dir, console.unwrap(), guest.unwrap().0)
    }

    async fn collect(output: &mut mpsc::Receiver<Bytes>, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend(output.recv().await.expect("the console ended"));
        }
        all
    }

    #[tokio::test]
    async fn a_late_viewer_gets_the_backlog_and_both_get_what_follows() {
        let (_dir, console, mut guest) = console().await;
        let (mut early, _) = console.attach().await.unwrap();
        guest.write_all(b"login: ").await.unwrap();
        assert_eq!(collect(&mut early, 7).await, b"login: ");
        let (mut late, keys) = console.attach().await.unwrap();
        assert_eq!(collect(&mut late, 7).await, b"login: ");
        keys.send(Bytes::from_static(b"root\n")).await.unwrap();
        let mut typed = [0; 5];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
        guest.write_all(b"# ").await.unwrap();
        assert_eq!((collect(&mut early, 2).await, collect(&mut late, 2).await), (b"# ".to_vec(), b"# ".to_vec()));
    }

    #[tokio::test]
    async fn the_backlog_is_bounded_and_a_viewer_who_does_not_read_holds_nothing_up() {
        let (_dir, console, mut guest) = console().await;
        let (_idle, _) = console.attach().await.unwrap();
        let flood = vec![b'x'; 4 << 20];
        guest.write_all(&flood).await.unwrap();
        guest.write_all(b"end").await.unwrap();
        let (mut viewer, _) = console.attach().await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"end") {
            seen.extend(viewer.recv().await.expect("the console ended"));
        }
        let (mut late, _) = console.attach().await.unwrap();
        let backlog = late.recv().await.expect("the console ended");
        assert_eq!(backlog.len(), BACKLOG_BYTES);
        assert!(backlog.ends_with(b"end"));
    }

    #[tokio::test]
    async fn viewers_are_told_when_the_vm_ends() {
        let (_dir, console, guest) = console().await;
        let (mut output, _) = console.attach().await.unwrap();
        drop(guest);
        assert_eq!(output.recv().await, None);
        assert!(matches!(console.attach().await, Err(ConsoleError::Ended)));
    }
}
