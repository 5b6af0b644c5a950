//! Takes QEMU's migration stream apart, at whatever places its bytes happen to be cut.
//!
//! ```text
//!  Magic ─▶ Configuration ─▶ Sections ──start of "ram"──▶ Blocks ─▶ Records ◀─part, end─ Sections
//!    │            │             │                           │        │  └─end of section─▶ Footer ─▶ Sections
//!    └────────────┴─────────────┴───────────────────────────┴────────┴─ not understood ─▶ PassingThrough
//!                                                              footer of RAM's end ─▶ DeviceState
//! ```
//! Guarantees: the items' bytes in order are the bytes pushed; at most one token (4 KiB and a header) is held back until
//! the rest of it arrives; no input is an error. What cannot be delimited passes through verbatim from there on, and
//! [`StreamParser::mode`] says why. Does not keep pages, does not know which pages matter.

use super::record::{
    BlockName, FLAG_END, FLAG_MEMORY_SIZE, FLAG_PAGE, FLAG_SAME_BLOCK, FLAG_ZERO, FLAGS_MASK, PageContent, PageRecord,
    RecordHeader,
};
use crate::page::PAGE_SIZE;

/// Longest machine name or uuid in the configuration section.
const CONFIGURATION_LENGTH_MAX: u32 = 4096;
/// Most RAM blocks that a machine may announce.
const RAM_BLOCKS_MAX: usize = 1024;

const MAGIC: u32 = 0x5145_564d;
const STREAM_VERSION: u32 = 3;
const RAM_SECTION: &[u8] = b"ram";
const RAM_VERSION: u32 = 4;
const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
/// The one command that is followed by more than the length it gives.
const COMMAND_PACKAGED: u16 = 7;
const FOOTER: u8 = 0x7e;

/// A piece of the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Item<'a> {
    /// Bytes that are no page.
    Verbatim(&'a [u8]),
    /// A page of the guest.
    Page(PageRecord<'a>),
}

/// What the parser makes of the stream at present.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Before the RAM section.
    Preamble,
    /// In the RAM section: pages are told apart.
    Ram,
    /// After the RAM section: everything is verbatim, as it should be.
    DeviceState,
    /// Something was not understood: everything since is verbatim.
    PassingThrough(PassThrough),
}

/// Why a stream passes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PassThrough {
    /// The first bytes are not those of a migration stream.
    #[error("the stream opens with {found:#010x}, not QEMU's magic")]
    Magic {
        /// What stood there.
        found: u32,
    },
    /// Another version of the stream.
    #[error("the stream is of version {found}")]
    Version {
        /// What stood there.
        found: u32,
    },
    /// A configuration section that changes the meaning of what follows, or is too long.
    #[error("the configuration section has a part that is not understood")]
    Configuration,
    /// A command that is followed by a whole stream of another kind.
    #[error("command {command} before the end of the ram section")]
    Command {
        /// The command.
        command: u16,
    },
    /// A section of a kind that has no length, before RAM's end.
    #[error("section kind {kind:#04x} before the end of the ram section")]
    SectionKind {
        /// The kind.
        kind: u8,
    },
    /// An iterable section other than RAM: it has no length.
    #[error("a foreign iterable section, number {id}")]
    ForeignSection {
        /// Its number.
        id: u32,
    },
    /// The RAM section is of another version.
    #[error("the ram section is of version {found}")]
    RamVersion {
        /// The version.
        found: u32,
    },
    /// The list of RAM blocks does not add up, or is too long.
    #[error("the list of ram blocks does not add up")]
    RamBlocks,
    /// A record with flags that are not understood: another format of pages.
    #[error("a record with flags {flags:#x}")]
    RecordFlags {
        /// The flags.
        flags: u64,
    },
    /// A record of a block that was not announced.
    #[error("a record of a ram block that was not announced")]
    UnknownBlock,
    /// A section did not end as it should.
    #[error("a section without its footer")]
    Footer,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Magic,
    Sections,
    BlocksTotal,
    Blocks { left: u64 },
    Records { last: bool },
    Footer { last: bool },
    Devices,
    PassingThrough(PassThrough),
}

/// What stands at the start of some bytes.
enum Step {
    /// At least so many bytes are needed to tell.
    Need(usize),
    /// So many bytes that are no page.
    Verbatim(usize),
    /// A record: the length of its name, its page and whether bytes follow.
    Record { page: u64, named: Option<usize>, has_bytes: bool, length: usize },
}

/// The grammar: one token at a time, from its first byte.
#[derive(Debug)]
struct Grammar {
    state: State,
    ram: Option<u32>,
    blocks: Vec<Vec<u8>>,
    in_block: bool,
    configurable: bool,
}

/// Incremental parser of one stream.
#[derive(Debug)]
pub struct StreamParser {
    grammar: Grammar,
    /// The bytes of a token that is not complete yet.
    pending: Vec<u8>,
    /// `pending` was handed out and is to be dropped.
    spent: bool,
}

impl Default for StreamParser {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamParser {
    /// A parser at the start of a stream.
    pub fn new() -> Self {
        let grammar =
            Grammar { state: State::Magic, ram: None, blocks: Vec::new(), in_block: false, configurable: false };
        Self { grammar, pending: Vec::new(), spent: false }
    }

    /// What the parser makes of the stream at present.
    pub fn mode(&self) -> Mode {
        match self.grammar.state {
            State::PassingThrough(reason) => Mode::PassingThrough(reason),
            State::Devices => Mode::DeviceState,
            _ if self.grammar.ram.is_some() => Mode::Ram,
            _ => Mode::Preamble,
        }
    }

    /// Takes one item from the front of `input`. Gives how many bytes of `input` are used up and the item; without an
    /// item all of `input` is used up. Call it until then.
    pub fn next<'a>(&'a mut self, input: &'a [u8]) -> (usize, Option<Item<'a>>) {
        if self.spent {
            self.pending.clear();
            self.spent = false;
        }
        if self.pending.is_empty() {
            if input.is_empty() {
                return (0, None);
            }
            return match self.grammar.step(input) {
                Step::Need(_) => {
                    self.pending.extend_from_slice(input);
                    (input.len(), None)
                }
                step => {
                    let (length, item) = item_of(&step, input);
                    (length, Some(item))
                }
            };
        }
        let mut used = 0;
        loop {
            match self.grammar.step(&self.pending) {
                Step::Need(length) => {
                    let more = length.saturating_sub(self.pending.len()).min(input.len() - used);
                    if more == 0 {
                        return (used, None);
                    }
                    self.pending.extend_from_slice(&input[used..used + more]);
                    used += more;
                }
                step => {
                    self.spent = true;
                    let (length, item) = item_of(&step, &self.pending);
                    debug_assert_eq!(length, self.pending.len(), "a token was fed more than it asked for");
                    return (used, Some(item));
                }
            }
        }
    }

    /// The bytes of a token whose rest never came: the stream has ended.
    pub fn finish(&mut self) -> Option<Item<'_>> {
        if self.spent || self.pending.is_empty() {
            return None;
        }
        self.spent = true;
        Some(Item::Verbatim(&self.pending))
    }
}

fn item_of<'a>(step: &Step, bytes: &'a [u8]) -> (usize, Item<'a>) {
    match *step {
        Step::Need(length) | Step::Verbatim(length) => (length, Item::Verbatim(&bytes[..length])),
        Step::Record { page, named, has_bytes, length } => {
            let (block, content_at) = match named {
                Some(name) => (BlockName::Named(&bytes[9..9 + name]), 9 + name),
                None => (BlockName::Same, 8),
            };
            let content = match bytes[content_at..length].first_chunk::<PAGE_SIZE>() {
                Some(page) if has_bytes => PageContent::Bytes(page),
                _ => PageContent::Fill(bytes[content_at]),
            };
            (length, Item::Page(PageRecord { header: RecordHeader { page, block }, content }))
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|word| u64::from_be_bytes(*word))
}

/// The name behind a length byte at `at`, and where it ends.
fn name_at(bytes: &[u8], at: usize) -> Result<(&[u8], usize), Step> {
    let Some(length) = bytes.get(at) else { return Err(Step::Need(at + 1)) };
    let end = at + 1 + usize::from(*length);
    bytes.get(at + 1..end).map(|name| (name, end)).ok_or(Step::Need(end))
}

impl Grammar {
    /// What stands at the start of `bytes`, which are not empty. The state moves on only with a whole token.
    fn step(&mut self, bytes: &[u8]) -> Step {
        let step = match self.state {
            State::Records { last } => self.record(bytes, last),
            State::Magic => self.magic(bytes),
            State::Sections => self.section(bytes),
            State::BlocksTotal => self.blocks_total(bytes),
            State::Blocks { left } => self.block(bytes, left),
            State::Footer { last } => self.footer(bytes, last),
            State::Devices | State::PassingThrough(_) => Ok(Step::Verbatim(bytes.len())),
        };
        step.unwrap_or_else(|reason| {
            self.state = State::PassingThrough(reason);
            Step::Verbatim(bytes.len())
        })
    }

    fn magic(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        let (Some(found), Some(version)) = (u32_at(bytes, 0), u32_at(bytes, 4)) else { return Ok(Step::Need(8)) };
        if found != MAGIC {
            return Err(PassThrough::Magic { found });
        }
        if version != STREAM_VERSION {
            return Err(PassThrough::Version { found: version });
        }
        self.state = State::Sections;
        self.configurable = true;
        Ok(Step::Verbatim(8))
    }

    fn section(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        match (bytes[0], self.ram) {
            (CONFIGURATION, None) if self.configurable => self.configuration(bytes),
            (SUBSECTION, None) if self.configurable => self.subsection(bytes),
            (COMMAND, _) => command(bytes),
            (SECTION_START, _) => self.section_start(bytes),
            (kind @ (SECTION_PART | SECTION_END), Some(ram)) => {
                let Some(id) = u32_at(bytes, 1) else { return Ok(Step::Need(5)) };
                if id != ram {
                    return Err(PassThrough::ForeignSection { id });
                }
                self.state = State::Records { last: kind == SECTION_END };
                Ok(Step::Verbatim(5))
            }
            (kind, _) => Err(PassThrough::SectionKind { kind }),
        }
    }

    fn configuration(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        let Some(length) = u32_at(bytes, 1) else { return Ok(Step::Need(5)) };
        if length > CONFIGURATION_LENGTH_MAX {
            return Err(PassThrough::Configuration);
        }
        Ok(whole(5 + length as usize, bytes))
    }

    /// The parts of the configuration that may follow it; they have no length of their own.
    fn subsection(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        let (name, end) = match name_at(bytes, 1) {
            Ok(found) => found,
            Err(need) => return Ok(need),
        };
        let body = end + 4;
        match name {
            b"configuration/uuid" => Ok(whole(body + 16, bytes)),
            b"configuration/target-page-bits" => match u32_at(bytes, body) {
                None => Ok(Step::Need(body + 4)),
                Some(bits) if 1_u64.checked_shl(bits) == Some(PAGE_SIZE as u64) => Ok(Step::Verbatim(body + 4)),
                Some(_) => Err(PassThrough::Configuration),
            },
            // Capabilities are listed when one of them changes the format.
            _ => Err(PassThrough::Configuration),
        }
    }

    fn section_start(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        let (name, end) = match name_at(bytes, 5) {
            Ok(found) => found,
            Err(need) => return Ok(need),
        };
        let (Some(id), Some(version)) = (u32_at(bytes, 1), u32_at(bytes, end + 4)) else {
            return Ok(Step::Need(end + 8));
        };
        if name != RAM_SECTION || self.ram.is_some() {
            return Err(PassThrough::ForeignSection { id });
        }
        if version != RAM_VERSION {
            return Err(PassThrough::RamVersion { found: version });
        }
        self.ram = Some(id);
        self.state = State::BlocksTotal;
        Ok(Step::Verbatim(end + 8))
    }

    fn blocks_total(&mut self, bytes: &[u8]) -> Result<Step, PassThrough> {
        let Some(word) = u64_at(bytes, 0) else { return Ok(Step::Need(8)) };
        if word & FLAGS_MASK != FLAG_MEMORY_SIZE {
            return Err(PassThrough::RamBlocks);
        }
        self.blocks_left(word & !FLAGS_MASK);
        Ok(Step::Verbatim(8))
    }

    fn blocks_left(&mut self, left: u64) {
        self.state = if left == 0 { State::Records { last: false } } else { State::Blocks { left } };
        self.in_block = false;
    }

    fn block(&mut self, bytes: &[u8], left: u64) -> Result<Step, PassThrough> {
        let (name, end) = match name_at(bytes, 0) {
            Ok(found) => found,
            Err(need) => return Ok(need),
        };
        let Some(length) = u64_at(bytes, end) else { return Ok(Step::Need(end + 8)) };
        let left = left.checked_sub(length).ok_or(PassThrough::RamBlocks)?;
        if self.blocks.len() == RAM_BLOCKS_MAX {
            return Err(PassThrough::RamBlocks);
        }
        self.blocks.push(name.to_vec());
        self.blocks_left(left);
        Ok(Step::Verbatim(end + 8))
    }

    fn record(&mut self, bytes: &[u8], last: bool) -> Result<Step, PassThrough> {
        let Some(word) = u64_at(bytes, 0) else { return Ok(Step::Need(8)) };
        let flags = word & FLAGS_MASK;
        if word == FLAG_END {
            self.state = State::Footer { last };
            return Ok(Step::Verbatim(8));
        }
        let has_bytes = match flags & !FLAG_SAME_BLOCK {
            FLAG_ZERO => false,
            FLAG_PAGE => true,
            _ => return Err(PassThrough::RecordFlags { flags }),
        };
        let (named, content_at) = if flags & FLAG_SAME_BLOCK != 0 {
            if !self.in_block {
                return Err(PassThrough::UnknownBlock);
            }
            (None, 8)
        } else {
            let (name, end) = match name_at(bytes, 8) {
                Ok(found) => found,
                Err(need) => return Ok(need),
            };
            if !self.blocks.iter().any(|known| known == name) {
                return Err(PassThrough::UnknownBlock);
            }
            (Some(name.len()), end)
        };
        let length = content_at + if has_bytes { PAGE_SIZE } else { 1 };
        if bytes.len() < length {
            return Ok(Step::Need(length));
        }
        self.in_block = true;
        Ok(Step::Record { page: word / PAGE_SIZE as u64, named, has_bytes, length })
    }

    fn footer(&mut self, bytes: &[u8], last: bool) -> Result<Step, PassThrough> {
        if bytes[0] != FOOTER {
            return Err(PassThrough::Footer);
        }
        let Some(id) = u32_at(bytes, 1) else { return Ok(Step::Need(5)) };
        if Some(id) != self.ram {
            return Err(PassThrough::Footer);
        }
        self.state = if last { State::Devices } else { State::Sections };
        Ok(Step::Verbatim(5))
    }
}

/// A command between sections, such as the announcement of the switchover (QEMU >= 10): it gives its length.
fn command(bytes: &[u8]) -> Result<Step, PassThrough> {
    let Some(word) = u32_at(bytes, 1) else { return Ok(Step::Need(5)) };
    let (command, length) = ((word >> 16) as u16, word as u16);
    if command == COMMAND_PACKAGED {
        return Err(PassThrough::Command { command });
    }
    Ok(whole(5 + usize::from(length), bytes))
}

fn whole(length: usize, bytes: &[u8]) -> Step {
    if bytes.len() < length { Step::Need(length) } else { Step::Verbatim(length) }
}
