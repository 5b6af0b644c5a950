//! Raw mode for the user's terminal, given back however we leave.
//!
//! [`RawTerminal`] restores on drop, so also when a panic unwinds through its owner. A process killed by a signal that
//! it does not handle leaves raw mode behind; `reset` helps then.

use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The byte that Ctrl-] sends.
const ESCAPE: u8 = 0x1d;

/// Standard input in raw mode.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Enters raw mode; `None` when standard input is no terminal.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// What of the typed bytes is for the guest, and whether the user wants to leave.
pub fn until_escape(typed: &[u8]) -> (&[u8], bool) {
    match typed.iter().position(|byte| *byte == ESCAPE) {
        Some(at) => (&typed[..at], true),
        None => (typed, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_ends_what_is_sent() {
        assert_eq!(until_escape(b"ls\r"), (&b"ls\r"[..], false));
        assert_eq!(until_escape(b"ls\x1drm"), (&b"ls"[..], true));
        assert_eq!(until_escape(b"\x1d"), (&b""[..], true));
        assert_eq!(until_escape(b""), (&b""[..], false));
    }
}
