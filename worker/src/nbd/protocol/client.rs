//! The client's half: what it sends, and what it is told. Pure.
//!
//! Speaks what QEMU's server offers: fixed newstyle, structured replies, one meta context. Reads and block states are answered in chunks:
//!
//! ```text
//!   server ▶ u32 magic, u16 flags, u16 type, u64 cookie, u32 length, data      one or more for each request
//! ```

use bytes::{Buf, Bytes};

use super::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, INFO_EXPORT, MAX_PAYLOAD_BYTES, NBDMAGIC, OPTION_REPLY_MAGIC,
    ProtocolError, REPLY_MAGIC, REQUEST_HEADER_BYTES, REQUEST_MAGIC, take_u16, take_u32, take_u64,
};

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the header of an answer to an option.
pub const ANSWER_HEADER_BYTES: usize = 20;
/// Bytes that follow the first [`super::REPLY_HEADER_BYTES`] of a chunk's header.
pub const CHUNK_HEADER_REST_BYTES: usize = 4;
/// Most bytes of an answer to an option.
pub const MAX_ANSWER_BYTES: u32 = 4096;
/// Most bytes of a chunk: the longest read, with its place.
pub const MAX_CHUNK_BYTES: u32 = MAX_PAYLOAD_BYTES + 8;

const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_DONE: u16 = 1 << 0;
const FLAG_ERROR: u32 = 1 << 31;

/// What a client negotiates.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// Replies in chunks.
    StructuredReplies,
    /// The one context that block states are wanted of.
    Context {
        /// Of which export.
        export: &'a str,
        /// Its name.
        context: &'a str,
    },
    /// To begin transmission.
    Go {
        /// Of which export.
        export: &'a str,
    },
}

impl Ask<'_> {
    fn code(self) -> u32 {
        match self {
            Self::StructuredReplies => 8,
            Self::Context { .. } => 10,
            Self::Go { .. } => 7,
        }
    }

    /// Its bytes. Names are shorter than 4 GiB.
    pub fn format(self) -> Vec<u8> {
        let mut data = vec![];
        let mut text = |text: &str| {
            data.extend((text.len() as u32).to_be_bytes());
            data.extend(text.as_bytes());
        };
        match self {
            Self::StructuredReplies => {}
            Self::Context { export, context } => {
                text(export);
                let mut query = vec![];
                query.extend(1u32.to_be_bytes());
                query.extend((context.len() as u32).to_be_bytes());
                query.extend(context.as_bytes());
                data.extend(query);
            }
            Self::Go { export } => {
                text(export);
                data.extend(0u16.to_be_bytes());
            }
        }
        let mut bytes = vec![];
        bytes.extend(IHAVEOPT.to_be_bytes());
        bytes.extend(self.code().to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }
}

/// Checks the server's first bytes; gives the client's answer.
pub fn answer_greeting(mut bytes: &[u8]) -> Result<[u8; 4], ProtocolError> {
    for (what, expected) in [("greeting", NBDMAGIC), ("newstyle greeting", IHAVEOPT)] {
        let found = take_u64(&mut bytes);
        if found != expected {
            return Err(ProtocolError::Magic { what, found });
        }
    }
    let (offered, wanted) = (take_u16(&mut bytes), FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if offered & wanted != wanted {
        return Err(ProtocolError::ServerFlags { flags: offered });
    }
    Ok(u32::from(wanted).to_be_bytes())
}

/// What a server answers to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// The number of a context.
    Context(u32),
    /// The export's size in bytes.
    Size(u64),
    /// Something that was not asked for.
    Other,
    /// No.
    Refused(String),
}

/// The header of an answer to `ask`: the answer's type, and how much data follows.
pub fn parse_answer_header(ask: Ask<'_>, mut bytes: &[u8]) -> Result<(u32, u32), ProtocolError> {
    let magic = take_u64(&mut bytes);
    let (option, kind, length) = (take_u32(&mut bytes), take_u32(&mut bytes), take_u32(&mut bytes));
    if magic != OPTION_REPLY_MAGIC || option != ask.code() {
        return Err(ProtocolError::Magic { what: "answer to an option", found: magic });
    }
    if length > MAX_ANSWER_BYTES {
        let (length, limit) = (length.into(), MAX_ANSWER_BYTES.into());
        return Err(ProtocolError::TooLong { what: "answer to an option", length, limit });
    }
    Ok((kind, length))
}

/// What the answer says.
pub fn parse_answer(kind: u32, mut data: &[u8]) -> Answer {
    match kind {
        1 => Answer::Ack,
        3 if data.len() >= 10 && take_u16(&mut data) == INFO_EXPORT => Answer::Size(take_u64(&mut data)),
        4 if data.len() >= 4 => Answer::Context(take_u32(&mut data)),
        kind if kind & FLAG_ERROR != 0 => {
            let said = String::from_utf8_lossy(data);
            Answer::Refused(if said.is_empty() { format!("error {}", kind & !FLAG_ERROR) } else { said.into_owned() })
        }
        _ => Answer::Other,
    }
}

/// What a client has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Bytes.
    Read = 0,
    /// A range that is no longer needed.
    Trim = 4,
    /// What a range's blocks are, in the context.
    BlockStatus = 7,
}

/// A request's bytes.
pub fn format_request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_HEADER_BYTES] {
    let mut bytes = [0; REQUEST_HEADER_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// How a reply begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// It is whole.
    Simple {
        /// Which request.
        cookie: u64,
        /// 0, or an error as NBD numbers them.
        error: u32,
    },
    /// [`CHUNK_HEADER_REST_BYTES`] more say how long the chunk is.
    Chunk {
        /// Which request.
        cookie: u64,
        /// The request's last.
        last: bool,
        /// What.
        kind: u16,
    },
}

/// Reads a reply's first [`super::REPLY_HEADER_BYTES`].
pub fn parse_reply_head(mut bytes: &[u8]) -> Result<ReplyHead, ProtocolError> {
    match take_u32(&mut bytes) {
        REPLY_MAGIC => {
            let error = take_u32(&mut bytes);
            Ok(ReplyHead::Simple { error, cookie: take_u64(&mut bytes) })
        }
        CHUNK_MAGIC => {
            let (flags, kind) = (take_u16(&mut bytes), take_u16(&mut bytes));
            Ok(ReplyHead::Chunk { cookie: take_u64(&mut bytes), last: flags & CHUNK_DONE != 0, kind })
        }
        found => Err(ProtocolError::Magic { what: "reply", found: found.into() }),
    }
}

/// A chunk's length.
pub fn parse_chunk_length(bytes: [u8; CHUNK_HEADER_REST_BYTES]) -> Result<u32, ProtocolError> {
    let length = u32::from_be_bytes(bytes);
    if length > MAX_CHUNK_BYTES {
        let (length, limit) = (length.into(), MAX_CHUNK_BYTES.into());
        return Err(ProtocolError::TooLong { what: "chunk", length, limit });
    }
    Ok(length)
}

/// A part of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// Bytes.
    Data {
        /// Where in the export.
        offset: u64,
        /// What.
        bytes: Bytes,
    },
    /// Zeroes.
    Hole {
        /// Where in the export.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Ranges that follow each other from the request's offset on: length and flags.
    States(Vec<(u32, u32)>),
    /// The request failed.
    Error {
        /// As NBD numbers them.
        error: u32,
        /// In words.
        message: String,
    },
    /// Nothing: the end.
    Empty,
}

/// Reads a chunk's data.
pub fn parse_chunk(kind: u16, mut data: Bytes) -> Result<Chunk, ProtocolError> {
    let malformed = ProtocolError::Malformed { what: "chunk" };
    match kind {
        0 => Ok(Chunk::Empty),
        1 if data.len() > 8 => Ok(Chunk::Data { offset: data.get_u64(), bytes: data }),
        2 if data.len() == 12 => Ok(Chunk::Hole { offset: data.get_u64(), length: data.get_u32() }),
        5 if data.len() > 4 && data.len() % 8 == 4 => {
            // One context was asked for.
            data.advance(4);
            let mut states = Vec::with_capacity(data.len() / 8);
            while data.has_remaining() {
                states.push((data.get_u32(), data.get_u32()));
            }
            Ok(Chunk::States(states))
        }
        kind if kind & (1 << 15) != 0 && data.len() >= 6 => {
            let (error, length) = (data.get_u32(), usize::from(data.get_u16()));
            let message = data.get(..length).ok_or(malformed)?;
            Ok(Chunk::Error { error, message: String::from_utf8_lossy(message).into_owned() })
        }
        _ => Err(malformed),
    }
}
