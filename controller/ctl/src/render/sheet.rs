//! Draws a page of text again and again on standard output: in place on a terminal; elsewhere below the last one, when it
//! differs and at most once a second.

use std::io::{self, IsTerminal};
use std::time::Instant;

use super::Output;
use super::screen::Pacer;
use crate::error::CtlError;

/// To the first cell, and nothing left below: lines may be wider than the terminal, so they cannot be counted.
const CLEAR: &str = "\x1b[H\x1b[J";
const ONLY_PHASE: &str = "";

/// Where a page is drawn.
pub struct Sheet {
    output: Output,
    in_place: bool,
    pacer: Pacer,
    start: Instant,
    last: Option<String>,
}

impl Sheet {
    /// In place when standard output is a terminal.
    pub fn open(output: Output) -> Self {
        let in_place = io::stdout().is_terminal();
        Self { output, in_place, pacer: Pacer::default(), start: Instant::now(), last: None }
    }

    /// Shows the page as it is now.
    ///
    /// # Errors
    /// When standard output fails.
    pub fn show(&mut self, page: String) -> Result<(), CtlError> {
        if self.last.as_ref() == Some(&page) || !self.pacer.is_due(ONLY_PHASE, self.start.elapsed()) {
            return Ok(());
        }
        let gap = match (self.in_place, &self.last) {
            (true, _) => CLEAR,
            (false, Some(_)) => "\n",
            (false, None) => "",
        };
        self.output.text(&format!("{gap}{page}"))?;
        self.last = Some(page);
        Ok(())
    }
}
