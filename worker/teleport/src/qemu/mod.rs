//! QEMU's migration stream: what of it is pages, and how a page is written.
//!
//! ```text
//! magic, version, configuration │ RAM: start, blocks │ RAM: part … part, end │ device state
//!          verbatim             │      verbatim      │  verbatim and pages   │   verbatim
//! ```
//! Guarantees: whatever is read, the items in their order are the bytes that were pushed. What the parser cannot
//! delimit is verbatim from there on. Nothing here interprets device state.

mod parser;
mod record;

pub use parser::{Item, Mode, PassThrough, StreamParser};
pub(crate) use record::RECORD_LENGTH_MAX;
pub use record::{BlockName, PageContent, PageRecord, RecordHeader};
