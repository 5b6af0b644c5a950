//! A small QMP client for the baselines' own QEMUs: commands with deadlines, events kept in order.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

/// The longest message; replies to the commands used here have a few KiB.
const MAX_MESSAGE_BYTES: u64 = 4 * 1024 * 1024;
/// How long a command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// The pause between attempts to connect to a QEMU that starts.
const RETRY: Duration = Duration::from_millis(50);

/// Why QEMU did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error("connect to qemu at {path}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke; QEMU has probably ended.
    #[error("talk to qemu: {what}")]
    Talk {
        /// What was being done.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU refused a command.
    #[error("qemu refused {command}: {reason}")]
    Refused {
        /// Which command.
        command: String,
        /// Its words.
        reason: String,
    },
    /// Nothing came in time.
    #[error("wait for {what} from qemu: nothing within {seconds} s")]
    Late {
        /// What was awaited.
        what: String,
        /// How long.
        seconds: u64,
    },
}

/// Something that QEMU told by itself.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name, e.g. `STOP`.
    pub name: String,
    /// What it says.
    pub data: Value,
    /// When, by the host's clock, in microseconds.
    pub at_us: u64,
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    line: String,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects, trying again until `deadline` has passed: QEMU may still be starting.
    ///
    /// # Errors
    /// When it cannot be reached or does not speak QMP.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let end = Instant::now() + deadline;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= end => {
                    return Err(QmpError::Connect { path: path.to_owned(), source });
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        let mut qmp = Self { stream: BufReader::new(stream), line: String::new(), events: VecDeque::new() };
        qmp.read_message("the greeting", end).await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and hands back what it returns.
    ///
    /// # Errors
    /// When QEMU refuses, is late, or has ended.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let talk = |source| QmpError::Talk { what: command.to_owned(), source };
        self.stream.write_all(text.as_bytes()).await.map_err(talk)?;
        let end = Instant::now() + COMMAND_DEADLINE;
        loop {
            let mut message = self.read_message(command, end).await?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let reason = error["desc"].as_str().unwrap_or("no reason given").to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            }
            self.keep_event(&message);
        }
    }

    /// Waits for an event that fits; earlier ones that do not are dropped.
    ///
    /// # Errors
    /// When none came in time or QEMU has ended.
    pub async fn wait_for(
        &mut self,
        what: &str,
        deadline: Duration,
        fits: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let end = Instant::now() + deadline;
        loop {
            while let Some(event) = self.events.pop_front() {
                if fits(&event) {
                    return Ok(event);
                }
            }
            let message = self.read_message(what, end).await?;
            self.keep_event(&message);
        }
    }

    fn keep_event(&mut self, message: &Value) {
        if let Some(name) = message["event"].as_str() {
            let stamp = &message["timestamp"];
            let part = |key: &str| stamp[key].as_u64().unwrap_or(0);
            self.events.push_back(Event {
                name: name.to_owned(),
                data: message["data"].clone(),
                at_us: part("seconds") * 1_000_000 + part("microseconds"),
            });
        }
    }

    async fn read_message(&mut self, what: &str, end: Instant) -> Result<Value, QmpError> {
        let begin = Instant::now();
        let talk = |source| QmpError::Talk { what: what.to_owned(), source };
        self.line.clear();
        let mut limited = (&mut self.stream).take(MAX_MESSAGE_BYTES);
        let read = timeout_at(end, limited.read_line(&mut self.line)).await;
        let late = || QmpError::Late { what: what.to_owned(), seconds: (end - begin).as_secs() };
        if read.map_err(|_| late())?.map_err(talk)? == 0 {
            return Err(talk(std::io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&self.line).map_err(|error| talk(error.into()))
    }
}
