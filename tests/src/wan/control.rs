//! How a running emulator is steered and read: one JSON request and one JSON reply per line on a unix socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::flow::Counters;
use super::link::Shape;

/// The longest request or reply; replies with all counters of 16 sites stay far below.
pub const MAX_LINE_BYTES: u64 = 1024 * 1024;
/// How long a client waits for a reply.
pub const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Change a link for packets from now on.
    SetLink {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
        /// What it becomes.
        shape: Shape,
    },
    /// Let nothing through; what is under way is lost.
    Cut {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
    },
    /// Let packets through again.
    Heal {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
    },
    /// Read all counters.
    Counters,
    /// Carry nothing any more and end.
    Stop,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done,
    /// The figures.
    Counters {
        /// One entry per direction.
        links: Vec<Counters>,
        /// CPU time that the emulator has used.
        cpu_ms: u64,
    },
    /// Not done.
    Refused {
        /// Why.
        reason: String,
    },
}

/// Reads one line of at most [`MAX_LINE_BYTES`]; none at the end of the stream.
pub(super) fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = reader.take(MAX_LINE_BYTES).read_line(&mut line)?;
    match (read, line.ends_with('\n')) {
        (0, _) => Ok(None),
        (_, true) => Ok(Some(line)),
        (_, false) => Err(io::Error::new(io::ErrorKind::InvalidData, "line is cut short or too long")),
    }
}

/// A connection to a running emulator. Calls block, at most for [`REPLY_DEADLINE`].
#[derive(Debug)]
pub struct Control {
    reader: BufReader<UnixStream>,
}

impl Control {
    /// Connects to the emulator that listens at `path`.
    ///
    /// # Errors
    /// When nobody does.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(REPLY_DEADLINE))?;
        stream.set_write_timeout(Some(REPLY_DEADLINE))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// When the emulator is gone, late, or refuses.
    pub fn call(&mut self, request: &Request) -> io::Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line)?;
        let line = read_line(&mut self.reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match serde_json::from_str(&line)? {
            Reply::Refused { reason } => Err(io::Error::other(reason)),
            reply => Ok(reply),
        }
    }

    /// What every direction has carried.
    ///
    /// # Errors
    /// As [`Control::call`].
    pub fn counters(&mut self) -> io::Result<Vec<Counters>> {
        match self.call(&Request::Counters)? {
            Reply::Counters { links, .. } => Ok(links),
            reply => Err(io::Error::new(io::ErrorKind::InvalidData, format!("unexpected reply {reply:?}"))),
        }
    }

    /// What one direction has carried.
    ///
    /// # Errors
    /// As [`Control::call`], and when there is no such link.
    pub fn link(&mut self, from: &str, to: &str) -> io::Result<Counters> {
        self.counters()?.into_iter().find(|c| c.from == from && c.to == to).ok_or(io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_documented_json() {
        let text = r#"{"op":"set-link","from":"a","to":"b","shape":{"rate_bps":1000,"one_way_delay_ms":3}}"#;
        let shape = Shape { rate_bps: 1000, one_way_delay_ms: 3, loss: 0.0, queue_bytes: None };
        let expected = Request::SetLink { from: "a".into(), to: "b".into(), shape };
        assert_eq!(serde_json::from_str::<Request>(text).unwrap(), expected);
        assert_eq!(serde_json::to_string(&Request::Counters).unwrap(), r#"{"op":"counters"}"#);
    }

    #[test]
    fn endless_lines_are_refused() {
        let mut endless = BufReader::new(io::repeat(b'x'));
        assert_eq!(read_line(&mut endless).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_line(&mut &b""[..]).unwrap(), None);
    }
}
