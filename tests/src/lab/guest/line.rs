//! Lines to and from a guest, whatever carries them.
//!
//! | carrier | where | commands |
//! |---|---|---|
//! | TCP | from a site's namespace to the guest's address | one per line |
//! | the VM's console | `pageportctl vm console`, its input and output | with a tag (see [`pageport_guest::serial`]) |
//! | a unix socket | a QEMU of our own | with a tag |
//!
//! A tag makes an answer belong to its question: a console shows to everyone what was said before and to others.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};

use crate::{netns, paths};

/// The longest reply.
const MAX_REPLY_BYTES: u64 = 1024 * 1024;
/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// A guest's serial port.
#[derive(Clone, Debug)]
pub enum SerialPort {
    /// Of a VM of the lab: where it runs is found each time anew.
    Console {
        /// What `pageportctl` needs.
        environment: Vec<(&'static str, String)>,
        /// The VM's name.
        vm: String,
    },
    /// Of a QEMU of our own.
    Socket(PathBuf),
}

/// How questions and answers find each other.
#[derive(Debug)]
enum Framing {
    InOrder,
    Tagged { asker: u64, asked: u64 },
}

/// A line to a guest.
pub(super) struct Line {
    reader: BufReader<Box<dyn AsyncRead + Send + Sync + Unpin>>,
    writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    framing: Framing,
    /// Killed when dropped.
    _carrier: Option<Child>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("framing", &self.framing).finish_non_exhaustive()
    }
}

impl Line {
    fn new(
        reader: impl AsyncRead + Send + Sync + Unpin + 'static,
        writer: impl AsyncWrite + Send + Sync + Unpin + 'static,
        framing: Framing,
        carrier: Option<Child>,
    ) -> Self {
        Self { reader: BufReader::new(Box::new(reader)), writer: Box::new(writer), framing, _carrier: carrier }
    }

    /// Connects over TCP, from inside `namespace`.
    pub(super) async fn over_tcp(namespace: &str, address: SocketAddr) -> io::Result<Self> {
        let namespace = namespace.to_owned();
        let connect = move || std::net::TcpStream::connect_timeout(&address, CONNECT_DEADLINE);
        let stream = tokio::task::spawn_blocking(move || netns::within(&namespace, connect))
            .await
            .map_err(io::Error::other)?
            .and_then(|result| result)?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let (reader, writer) = TcpStream::from_std(stream)?.into_split();
        Ok(Self::new(reader, writer, Framing::InOrder, None))
    }

    /// Attaches to a serial port; whether a guest listens there is not known yet.
    pub(super) async fn over_serial(port: &SerialPort) -> io::Result<Self> {
        let framing = Framing::Tagged { asker: rand::random(), asked: 0 };
        match port {
            SerialPort::Socket(path) => {
                let (reader, writer) = UnixStream::connect(path).await?.into_split();
                Ok(Self::new(reader, writer, framing, None))
            }
            SerialPort::Console { environment, vm } => {
                let mut carrier = Command::new(paths::program("pageportctl"))
                    .args(["vm", "console", vm])
                    .envs(environment.iter().map(|(key, value)| (key, value)))
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .kill_on_drop(true)
                    .spawn()?;
                let (Some(reader), Some(writer)) = (carrier.stdout.take(), carrier.stdin.take()) else {
                    return Err(io::ErrorKind::BrokenPipe.into());
                };
                Ok(Self::new(reader, writer, framing, Some(carrier)))
            }
        }
    }

    /// Asks and waits for the answer.
    pub(super) async fn exchange(&mut self, question: &str) -> io::Result<String> {
        let Framing::Tagged { asker, asked } = &mut self.framing else {
            self.writer.write_all(format!("{question}\n").as_bytes()).await?;
            return self.read_line().await;
        };
        *asked += 1;
        let tag = format!("{asker:016x}-{asked} ");
        // What was typed before may not have ended its line.
        self.writer.write_all(format!("\n{tag}{question}\n").as_bytes()).await?;
        self.writer.flush().await?;
        loop {
            if let Some(answer) = self.read_line().await?.strip_prefix(&tag) {
                return Ok(answer.to_owned());
            }
        }
    }

    async fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        (&mut self.reader).take(MAX_REPLY_BYTES).read_until(b'\n', &mut line).await?;
        if !line.ends_with(b"\n") {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_found_among_what_others_were_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut port, _) = listener.accept().await.unwrap();
            port.write_all(b"half a li\xff\n7-1 {\"reply\":\"done\"}\n").await.unwrap();
            let (reader, mut writer) = port.split();
            let mut lines = BufReader::new(reader).lines();
            assert_eq!(lines.next_line().await.unwrap().unwrap(), "");
            let asked = lines.next_line().await.unwrap().unwrap();
            let (tag, question) = asked.split_once(' ').unwrap();
            assert_eq!(question, "{}");
            writer.write_all(format!("{tag} yes\r\n").as_bytes()).await.unwrap();
        });
        let mut line = Line::over_serial(&SerialPort::Socket(path)).await.unwrap();
        assert_eq!(line.exchange("{}").await.unwrap(), "yes");
        guest.await.unwrap();
        assert!(line.exchange("{}").await.is_err());
    }
}
