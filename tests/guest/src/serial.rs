//! The control server over a serial port: for guests that have no network.
//!
//! ```text
//! asked:     <tag> {"cmd":"uptime"}        answered:     <tag> {"reply":"uptime",...}
//! ```
//! A serial port has no connections: whoever attaches sees what others were answered, and a line may begin with what was
//! typed before. So each command carries a tag of its asker's choice that comes back before its answer, and every line
//! that is not a tag and a JSON object is noise and skipped without an answer.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::protocol::MAX_LINE_BYTES;
use crate::server::Guest;

/// The longest tag.
pub const MAX_TAG_BYTES: usize = 64;

/// Opens a serial port, raw: no echo, no changed line ends.
///
/// # Errors
/// When it cannot be opened or is no serial port.
pub fn open(path: &Path) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(path)?;
    let mut settings = tcgetattr(&port)?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings)?;
    Ok(port)
}

/// The tag and the command of a line; none when it is noise.
fn parse(line: &[u8]) -> Option<(&str, &[u8])> {
    let line = line.trim_ascii();
    let space = line.iter().position(|byte| *byte == b' ')?;
    let (tag, command) = (&line[..space], &line[space + 1..]);
    let fits = tag.len() <= MAX_TAG_BYTES && tag.iter().all(u8::is_ascii_graphic) && command.starts_with(b"{");
    fits.then(|| std::str::from_utf8(tag).ok().map(|tag| (tag, command)))?
}

/// Answers until the port ends.
///
/// # Errors
/// When it cannot be read or written.
pub fn serve<P: Read + Write>(guest: &Guest, port: P) -> io::Result<()> {
    let mut reader = BufReader::new(port);
    let mut line = Vec::new();
    while (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? > 0 {
        if let Some((tag, command)) = parse(&line) {
            let mut text = format!("{tag} ").into_bytes();
            serde_json::to_writer(&mut text, &guest.answer_text(command))?;
            text.push(b'\n');
            reader.get_mut().write_all(&text)?;
        }
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct Port<'a>(&'a [u8], Vec<u8>);

    impl Read for Port<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Port<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn tagged_commands_are_answered_with_their_tag_and_noise_is_not() {
        let asked =
            b"\xff\xfel {x\r\n\n# ls\n7-1 {\"cmd\":\"sync\"}\r\n7-2 {\"cmd\":\"what\"}\nunfinished 7-3 {\"cmd\"";
        let mut port = Port(asked, Vec::new());
        serve(&Guest::new(Path::new("/nowhere")), &mut port).unwrap();
        let said = String::from_utf8(port.1).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 2, "{said}");
        assert_eq!(lines[0], r#"7-1 {"reply":"done"}"#);
        assert!(lines[1].starts_with(r#"7-2 {"reply":"refused""#), "{said}");
    }

    #[test]
    fn what_is_no_serial_port_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(open(file.path()).is_err());
    }
}
