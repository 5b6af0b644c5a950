//! NBD's bytes: what is parsed and formatted, and the limits. Pure. All integers are big-endian. This is the server's half; [`client`] is the
//! other.
//!
//! ```text
//!   server ▶ "NBDMAGIC" "IHAVEOPT" u16 flags                 (fixed newstyle, no zeroes)
//!   client ▶ u32 flags
//!   client ▶ "IHAVEOPT" u32 option, u32 length, data         until GO or ABORT
//!   server ▶ u64 magic, u32 option, u32 type, u32 length, data      one or more for each
//!   ─────────── transmission ───────────
//!   client ▶ u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length, data
//!   server ▶ u32 magic, u32 error, u64 cookie, data          (simple replies, in any order)
//! ```

pub mod client;

/// Most bytes that a request may read or write.
pub const MAX_PAYLOAD_BYTES: u32 = 32 * 1024 * 1024;
/// Most bytes of an option's data.
pub const MAX_OPTION_BYTES: u32 = 1024;
/// Longest export name.
pub const MAX_NAME_BYTES: usize = 256;
/// Most options before the client must have decided.
pub const MAX_OPTIONS: usize = 32;
/// Largest block size that is asked for: requests are whole blocks.
pub const MAX_BLOCK_BYTES: u32 = 4096;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Bytes of an option's header.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request's header.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Bytes of a reply's header.
pub const REPLY_HEADER_BYTES: usize = 16;

/// Flags, flush, FUA and write-zeroes; no TRIM: a target's holes are its own affair.
const READ_WRITE_FLAGS: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6;
/// Flags, read-only, flush; several connections see the same.
const READ_ONLY_FLAGS: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const COMMAND_FUA: u16 = 1 << 0;
const COMMAND_NO_HOLE: u16 = 1 << 1;
const COMMAND_FAST_ZERO: u16 = 1 << 4;

/// What a client may do with an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Only read: what would change it is refused.
    ReadOnly,
}

impl Access {
    fn flags(self) -> u16 {
        match self {
            Self::ReadWrite => READ_WRITE_FLAGS,
            Self::ReadOnly => READ_ONLY_FLAGS,
        }
    }
}

/// Bytes that are no NBD, or more of it than is taken. The connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A fixed value is another one.
    #[error("NBD {what} has magic {found:#x}")]
    Magic {
        /// Of what.
        what: &'static str,
        /// What came.
        found: u64,
    },
    /// The client does not speak fixed newstyle, or sets flags that were not offered.
    #[error("NBD client flags {flags:#x} do not fit")]
    ClientFlags {
        /// What came.
        flags: u32,
    },
    /// A length is beyond its limit.
    #[error("NBD {what} has {length} bytes, more than {limit}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// What came.
        length: u64,
        /// What may come.
        limit: u64,
    },
    /// The client negotiates without end.
    #[error("more than {MAX_OPTIONS} NBD options")]
    TooManyOptions,
    /// The client does not ask for an export in the way served here.
    #[error("the NBD client uses the old EXPORT_NAME option")]
    ExportName,
    /// The server does not speak fixed newstyle.
    #[error("NBD server flags {flags:#x} do not fit")]
    ServerFlags {
        /// What came.
        flags: u16,
    },
    /// Data that is too short, or of no known type.
    #[error("NBD {what} has no known form")]
    Malformed {
        /// What.
        what: &'static str,
    },
}

/// The server's first bytes.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// The client's answer to the greeting.
pub fn parse_client_flags(bytes: [u8; 4]) -> Result<(), ProtocolError> {
    let flags = u32::from_be_bytes(bytes);
    let offered = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    let fits = flags & !offered == 0 && flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
    if fits { Ok(()) } else { Err(ProtocolError::ClientFlags { flags }) }
}

/// What a client may ask for while negotiating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// End without transmission.
    Abort,
    /// Which exports are there?
    List,
    /// Tell about an export.
    Info,
    /// Tell about an export and begin transmission.
    Go,
    /// Anything else (TLS, structured replies, meta contexts): answered with "unsupported".
    Unknown(u32),
}

impl OptionKind {
    fn code(self) -> u32 {
        match self {
            Self::Abort => 2,
            Self::List => 3,
            Self::Info => 6,
            Self::Go => 7,
            Self::Unknown(code) => code,
        }
    }
}

/// An option's header: what, and how much data follows.
pub fn parse_option_header(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<(OptionKind, u32), ProtocolError> {
    let mut rest = &bytes[..];
    let (magic, code, length) = (take_u64(&mut rest), take_u32(&mut rest), take_u32(&mut rest));
    if magic != IHAVEOPT {
        return Err(ProtocolError::Magic { what: "option", found: magic });
    }
    if length > MAX_OPTION_BYTES {
        let (length, limit) = (length.into(), MAX_OPTION_BYTES.into());
        return Err(ProtocolError::TooLong { what: "option", length, limit });
    }
    let kind = match code {
        1 => return Err(ProtocolError::ExportName),
        2 => OptionKind::Abort,
        3 => OptionKind::List,
        6 => OptionKind::Info,
        7 => OptionKind::Go,
        other => OptionKind::Unknown(other),
    };
    Ok((kind, length))
}

/// The export name in the data of GO or INFO; `None` if the data has another form.
pub fn parse_export_name(data: &[u8]) -> Option<&str> {
    let (length, rest) = data.split_at_checked(4)?;
    let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
    if length > MAX_NAME_BYTES {
        return None;
    }
    let (name, rest) = rest.split_at_checked(length)?;
    let (count, requests) = rest.split_at_checked(2)?;
    let count = u16::from_be_bytes(count.try_into().ok()?) as usize;
    (requests.len() == count * 2).then_some(std::str::from_utf8(name).ok()).flatten()
}

/// What the server answers to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done.
    Ack,
    /// An export's name.
    Server(String),
    /// An export's size and abilities.
    Export {
        /// Bytes.
        size: u64,
        /// What may be done.
        access: Access,
    },
    /// What sizes requests may have.
    BlockSize {
        /// Requests are multiples of this.
        minimum: u32,
    },
    /// Not supported.
    Unsupported,
    /// Its data has no known form.
    Invalid,
    /// No such export.
    UnknownExport,
}

impl OptionReply {
    /// Its bytes.
    pub fn format(&self, option: OptionKind) -> Vec<u8> {
        let mut data = Vec::new();
        let code: u32 = match self {
            Self::Ack => 1,
            Self::Server(name) => {
                // Bounded by the limit on names.
                data.extend((name.len() as u32).to_be_bytes());
                data.extend(name.as_bytes());
                2
            }
            Self::Export { size, access } => {
                data.extend(INFO_EXPORT.to_be_bytes());
                data.extend(size.to_be_bytes());
                data.extend(access.flags().to_be_bytes());
                3
            }
            Self::BlockSize { minimum } => {
                data.extend(INFO_BLOCK_SIZE.to_be_bytes());
                data.extend(minimum.to_be_bytes());
                data.extend(MAX_BLOCK_BYTES.to_be_bytes());
                data.extend(MAX_PAYLOAD_BYTES.to_be_bytes());
                3
            }
            Self::Unsupported => 1 << 31 | 1,
            Self::Invalid => 1 << 31 | 3,
            Self::UnknownExport => 1 << 31 | 6,
        };
        let mut bytes = Vec::with_capacity(20 + data.len());
        bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend(option.code().to_be_bytes());
        bytes.extend(code.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }
}

/// The smallest unit of requests to an export: a power of two up to 4 KiB that divides its size.
pub fn block_size(size: u64) -> u32 {
    let largest = 1u64 << size.trailing_zeros().min(MAX_BLOCK_BYTES.trailing_zeros());
    largest as u32
}

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Bytes from the export.
    Read,
    /// Bytes into the export; they follow the header.
    Write {
        /// Answered only when on stable storage.
        fua: bool,
    },
    /// Zeroes into the export.
    WriteZeroes {
        /// Answered only when on stable storage.
        fua: bool,
    },
    /// What was answered before becomes stable.
    Flush,
    /// The end; no answer.
    Disconnect,
    /// Not served; answered with this error.
    Refused(WireError),
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub action: Action,
    /// Chosen by the client, repeated in the reply.
    pub cookie: u64,
    /// Where.
    pub offset: u64,
    /// How much.
    pub length: u32,
    /// Bytes that follow the header: a write's, whether it is served or refused.
    pub payload: u32,
}

/// Errors as NBD numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum WireError {
    /// Not allowed.
    Permission = 1,
    /// The storage failed.
    Io = 5,
    /// No memory for it.
    Memory = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// The storage is full, or ends before.
    Space = 28,
    /// Not served.
    Unsupported = 95,
    /// The server ends.
    Shutdown = 108,
}

/// Reads a request's header and checks it against an export of `size` bytes.
pub fn parse_request(bytes: &[u8; REQUEST_HEADER_BYTES], size: u64, access: Access) -> Result<Request, ProtocolError> {
    let mut rest = &bytes[..];
    let magic = take_u32(&mut rest);
    if magic != REQUEST_MAGIC {
        return Err(ProtocolError::Magic { what: "request", found: magic.into() });
    }
    let (flags, code) = (take_u16(&mut rest), take_u16(&mut rest));
    let (cookie, offset, length) = (take_u64(&mut rest), take_u64(&mut rest), take_u32(&mut rest));
    let is_write = code == 1;
    if is_write && length > MAX_PAYLOAD_BYTES {
        let (length, limit) = (length.into(), MAX_PAYLOAD_BYTES.into());
        return Err(ProtocolError::TooLong { what: "write", length, limit });
    }
    let fua = flags & COMMAND_FUA != 0;
    let (action, known_flags) = match code {
        0 => (Action::Read, COMMAND_FUA),
        1 => (Action::Write { fua }, COMMAND_FUA),
        2 => (Action::Disconnect, COMMAND_FUA),
        3 => (Action::Flush, COMMAND_FUA),
        6 if flags & COMMAND_FAST_ZERO != 0 => (Action::Refused(WireError::Unsupported), u16::MAX),
        6 => (Action::WriteZeroes { fua }, COMMAND_FUA | COMMAND_NO_HOLE),
        _ => (Action::Refused(WireError::Invalid), u16::MAX),
    };
    let action = match action {
        Action::Disconnect => action,
        _ if flags & !known_flags != 0 => Action::Refused(WireError::Invalid),
        Action::Write { .. } | Action::WriteZeroes { .. } if access == Access::ReadOnly => {
            Action::Refused(WireError::Permission)
        }
        Action::Read | Action::Write { .. } | Action::WriteZeroes { .. } => {
            check_range(action, offset, length, size).map_or(action, Action::Refused)
        }
        other => other,
    };
    Ok(Request { action, cookie, offset, length, payload: if is_write { length } else { 0 } })
}

fn check_range(action: Action, offset: u64, length: u32, size: u64) -> Option<WireError> {
    let block = u64::from(block_size(size));
    let too_long = action == Action::Read && length > MAX_PAYLOAD_BYTES;
    if length == 0 || too_long || !offset.is_multiple_of(block) || !u64::from(length).is_multiple_of(block) {
        return Some(WireError::Invalid);
    }
    let inside = offset.checked_add(length.into()).is_some_and(|end| end <= size);
    match action {
        _ if inside => None,
        Action::Read => Some(WireError::Invalid),
        _ => Some(WireError::Space),
    }
}

/// A reply's header; a successful read's bytes follow.
pub fn format_reply(cookie: u64, error: Option<WireError>) -> [u8; REPLY_HEADER_BYTES] {
    let mut bytes = [0; REPLY_HEADER_BYTES];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

// The callers' arrays are long enough by their type; a short one would read as zeroes.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((head, tail)) => {
            *rest = tail;
            *head
        }
        None => [0; N],
    }
}

fn take_u16(rest: &mut &[u8]) -> u16 {
    u16::from_be_bytes(take(rest))
}

fn take_u32(rest: &mut &[u8]) -> u32 {
    u32::from_be_bytes(take(rest))
}

fn take_u64(rest: &mut &[u8]) -> u64 {
    u64::from_be_bytes(take(rest))
}

#[cfg(test)]
mod tests;
