//! The guest agent's protocol: one JSON object per line, over a socket that QEMU joins to the guest's port.
//!
//! ```text
//!   ▶ 0xff {"execute":"guest-sync-delimited","arguments":{"id":n}}   ▶ {"execute":COMMAND}
//!   ◀ … stale … 0xff {"return":n}                                     ◀ {"return":…} or {"error":{"class","desc"}}
//! ```
//! Every command follows a sync with a number of its own, and only what comes after the answer to that counts: an answer that came too
//! late is never taken for another command's. The 0xff that is sent makes the agent drop half a command of an earlier client.
//!
//! The guest may be hostile: an answer has [`MAX_ANSWER_BYTES`], stale ones before it included, and each command a deadline. The agent takes
//! one client at a time, and so does its socket.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

/// Most bytes that are read for one answer.
pub const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Most characters that are repeated of what an agent says.
const MAX_REASON_CHARS: usize = 200;
const READ_BYTES: usize = 4096;
/// Ends whatever stands before it, in both directions.
const RESET: u8 = 0xff;

/// Why the agent did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// QEMU does not listen.
    #[error("connect to the guest agent's socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The socket failed.
    #[error("talk to the guest agent")]
    Talk(#[source] std::io::Error),
    /// No answer came in time.
    #[error("the guest agent does not answer \"{command}\"")]
    NoAnswer {
        /// What was asked.
        command: &'static str,
    },
    /// More than an answer can be.
    #[error("the guest agent answers \"{command}\" with more than {MAX_ANSWER_BYTES} bytes")]
    TooLong {
        /// What was asked.
        command: &'static str,
    },
    /// Not an answer.
    #[error("the guest agent answers \"{command}\" with something else")]
    Garbled {
        /// What was asked.
        command: &'static str,
    },
    /// The agent says no.
    #[error("the guest agent refuses \"{command}\": {reason}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// Its words, shortened.
        reason: String,
    },
}

impl AgentError {
    /// The connection is of no use any more.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Talk(_))
    }
}

/// Whether the guest's file systems are frozen, as the agent knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeStatus {
    /// They are.
    Frozen,
    /// They are not.
    Thawed,
}

/// A connection to a guest's agent, if there is one.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Agent {
    /// Connects to QEMU's end. That says nothing of whether an agent is there.
    ///
    /// # Errors
    /// QEMU does not listen, or not in time.
    pub async fn connect(socket: &Path, deadline: Instant) -> Result<Self, AgentError> {
        let failed = |source| AgentError::Connect { path: socket.to_owned(), source };
        let connected = timeout_at(deadline, UnixStream::connect(socket)).await;
        let stream = connected.map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Finds out whether somebody answers; nothing is left with the guest that could take effect later.
    ///
    /// # Errors
    /// Nobody does, until `deadline`.
    pub async fn sync(&mut self, deadline: Instant) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-sync-delimited";
        let id = sync_id();
        let mut budget = MAX_ANSWER_BYTES;
        self.send(&sync_line(id), COMMAND, deadline).await?;
        self.synced(id, COMMAND, &mut budget, deadline).await
    }

    /// Are the file systems frozen?
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn status(&mut self, deadline: Instant) -> Result<FreezeStatus, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-status";
        match self.ask(COMMAND, deadline).await?.as_str() {
            Some("frozen") => Ok(FreezeStatus::Frozen),
            Some("thawed") => Ok(FreezeStatus::Thawed),
            _ => Err(AgentError::Garbled { command: COMMAND }),
        }
    }

    /// Freezes all file systems that can be; returns how many. After an error they may be frozen all the same, or be so later.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn freeze(&mut self, deadline: Instant) -> Result<u64, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-freeze";
        self.ask(COMMAND, deadline).await?.as_u64().ok_or(AgentError::Garbled { command: COMMAND })
    }

    /// Thaws all file systems; no error if none is frozen. The order reaches a guest that answers nothing, too, once it reads again.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn thaw(&mut self, deadline: Instant) -> Result<(), AgentError> {
        self.ask("guest-fsfreeze-thaw", deadline).await.map(drop)
    }

    /// Sync and command go out together: the command does not wait for an answer to the sync.
    async fn ask(&mut self, command: &'static str, deadline: Instant) -> Result<Value, AgentError> {
        let id = sync_id();
        let mut lines = sync_line(id);
        lines.extend(json!({ "execute": command }).to_string().bytes());
        lines.push(b'\n');
        let mut budget = MAX_ANSWER_BYTES;
        self.send(&lines, command, deadline).await?;
        self.synced(id, command, &mut budget, deadline).await?;
        let (line, _) = self.line(command, &mut budget, deadline).await?;
        let garbled = AgentError::Garbled { command };
        let Ok(Value::Object(mut answer)) = serde_json::from_slice(&line) else { return Err(garbled) };
        if let Some(error) = answer.get("error") {
            let reason = printable(error.get("desc").and_then(Value::as_str).unwrap_or_default());
            return Err(AgentError::Refused { command, reason });
        }
        answer.remove("return").ok_or(garbled)
    }

    async fn send(&mut self, lines: &[u8], command: &'static str, deadline: Instant) -> Result<(), AgentError> {
        match timeout_at(deadline, self.stream.write_all(lines)).await {
            Ok(sent) => sent.map_err(AgentError::Talk),
            Err(_) => Err(AgentError::NoAnswer { command }),
        }
    }

    /// Skips everything up to the answer to the sync `id`.
    async fn synced(
        &mut self,
        id: u64,
        command: &'static str,
        budget: &mut usize,
        deadline: Instant,
    ) -> Result<(), AgentError> {
        loop {
            let (line, after_reset) = self.line(command, budget, deadline).await?;
            let answer: Option<Value> = serde_json::from_slice(&line).ok();
            if after_reset && answer.is_some_and(|answer| answer["return"].as_u64() == Some(id)) {
                return Ok(());
            }
        }
    }

    /// The next line, without what a reset before its end has made void; and whether there was such a reset.
    async fn line(
        &mut self,
        command: &'static str,
        budget: &mut usize,
        deadline: Instant,
    ) -> Result<(Vec<u8>, bool), AgentError> {
        let mut looked_at = 0;
        loop {
            if let Some(end) = self.received[looked_at..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.received.drain(..=looked_at + end).collect();
                let reset = line.iter().rposition(|byte| *byte == RESET);
                line.drain(..reset.map_or(0, |at| at + 1));
                return Ok((line, reset.is_some()));
            }
            looked_at = self.received.len();
            if *budget == 0 {
                // What comes next cannot be told from the rest of this.
                self.received.clear();
                return Err(AgentError::TooLong { command });
            }
            let mut piece = [0; READ_BYTES];
            let most = READ_BYTES.min(*budget);
            let read = match timeout_at(deadline, self.stream.read(&mut piece[..most])).await {
                Ok(Ok(0)) => return Err(AgentError::Talk(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => read.map_err(AgentError::Talk)?,
                Err(_) => return Err(AgentError::NoAnswer { command }),
            };
            *budget -= read;
            self.received.extend_from_slice(&piece[..read]);
        }
    }
}

/// JSON numbers are whole up to 53 bits everywhere.
fn sync_id() -> u64 {
    rand::random::<u64>() >> 11
}

fn sync_line(id: u64) -> Vec<u8> {
    let command = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    [&[RESET], command.to_string().as_bytes(), b"\n"].concat()
}

fn printable(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
