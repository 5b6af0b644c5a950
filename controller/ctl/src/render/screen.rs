//! Draws progress: one line rewritten in place on a terminal; elsewhere a plain line at each change of phase and
//! at most one per second between them.
//!
//! Progress goes to standard error, so that standard output holds results alone.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::{note, progress};

const PLAIN_INTERVAL: Duration = Duration::from_secs(1);
const ERASE_LINE: &str = "\r\x1b[2K";
const DEFAULT_CELLS: usize = 100;

/// When a plain line is due. Pure: time is passed in.
#[derive(Debug, Default)]
pub struct Pacer {
    last: Option<(String, Duration)>,
}

impl Pacer {
    /// Is a line due for this phase, this long after the start?
    pub fn is_due(&mut self, phase: &str, at: Duration) -> bool {
        let due = match &self.last {
            Some((last_phase, last_at)) => last_phase != phase || at.saturating_sub(*last_at) >= PLAIN_INTERVAL,
            None => true,
        };
        if due {
            self.last = Some((phase.to_owned(), at));
        }
        due
    }
}

enum Mode {
    InPlace { drawn: bool },
    Lines { pacer: Pacer, start: Instant },
}

/// Where progress is drawn. Leaves a clean line behind when dropped.
pub struct Screen {
    mode: Mode,
}

impl Screen {
    /// In place when standard error is a terminal.
    pub fn open() -> Self {
        let mode = if io::stderr().is_terminal() {
            Mode::InPlace { drawn: false }
        } else {
            Mode::Lines { pacer: Pacer::default(), start: Instant::now() }
        };
        Self { mode }
    }

    /// Shows the present state.
    pub fn show(&mut self, phase: &str, line: &str) {
        match &mut self.mode {
            Mode::InPlace { drawn } => {
                *drawn = true;
                write(&format!("{ERASE_LINE}{}", progress::fit(line, width())));
            }
            Mode::Lines { pacer, start } => {
                if pacer.is_due(phase, start.elapsed()) {
                    note(line);
                }
            }
        }
    }

    /// A line that stays.
    pub fn remark(&mut self, text: &str) {
        self.clear();
        note(text);
    }

    fn clear(&mut self) {
        if let Mode::InPlace { drawn } = &mut self.mode
            && std::mem::take(drawn)
        {
            write(ERASE_LINE);
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.clear();
    }
}

fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    // When the terminal is gone there is nobody left to draw for.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

fn width() -> usize {
    match rustix::termios::tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => DEFAULT_CELLS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_at_each_phase_and_then_once_a_second() {
        let mut pacer = Pacer::default();
        let steps = [
            ("connect", 0, true),
            ("connect", 400, false),
            ("memory", 500, true),
            ("memory", 1_499, false),
            ("memory", 1_500, true),
            ("memory", 1_600, false),
            ("completed", 1_601, true),
        ];
        for (phase, ms, due) in steps {
            assert_eq!(pacer.is_due(phase, Duration::from_millis(ms)), due, "{phase} at {ms} ms");
        }
    }
}
