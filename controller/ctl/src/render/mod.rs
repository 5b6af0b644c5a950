//! From messages to text: pure functions, and the one place that writes to the standard streams.
//!
//! | part | makes |
//! |---|---|
//! | [`units`] | sizes, rates, durations and counts as people read them |
//! | [`words`] | states as words |
//! | [`table`] | aligned columns |
//! | [`lists`] | what `list`, `get` and `status` show |
//! | [`cluster`] | the controllers themselves |
//! | [`progress`] | the live line of a migration, a seed or a first copy |
//! | [`protection`] | how protected VMs stand, links |
//! | [`preflight`] | what would hinder a move |
//! | [`point`] | recovery points, and those that are open for reading |
//! | [`pools`] | pools of storage of workers |
//! | [`record`] | what a finished migration was |
//! | [`json`] | any message as JSON |
//! | [`screen`] | draws progress: in place on a terminal, line by line elsewhere |
//! | [`sheet`] | draws a table again and again |

pub mod cluster;
pub mod fence;
pub mod json;
pub mod lists;
pub mod point;
pub mod pools;
pub mod preflight;
pub mod progress;
pub mod protection;
pub mod quote;
pub mod record;
pub mod schedule;
pub mod screen;
pub mod sheet;
pub mod table;
pub mod units;
pub mod words;

use std::io::{self, Write};

use crate::error::CtlError;

/// Standard output, as JSON or for people.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// `json` is the global option.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Are results printed as JSON?
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// One message: as one line of JSON, or as `human` puts it.
    ///
    /// # Errors
    /// When standard output fails.
    pub fn message<M: json::Wire>(&self, message: &M, human: impl FnOnce(&M) -> String) -> Result<(), CtlError> {
        if self.json { self.text(&json::line(message)?) } else { self.text(&human(message)) }
    }

    /// Text for people, whatever the format.
    ///
    /// # Errors
    /// When standard output fails.
    pub fn text(&self, text: &str) -> Result<(), CtlError> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        Ok(out.flush()?)
    }
}

/// A line on standard error. When that fails there is nobody left to tell.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
