//! What the guest's kernel says of its disk: the lines of its log that mean an I/O error, or a write that did not come back.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

/// What a line must contain to be trouble.
const SIGNS: [&str; 9] = [
    "I/O error",
    "blk_update_request",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Aborting journal",
    "Remounting filesystem read-only",
    "lost async page write",
    "lost sync page write",
    "blocked for more than",
];
/// The longest record that the kernel hands out.
const RECORD_BYTES: usize = 8192;

/// The lines of the log that are trouble, oldest first.
///
/// # Errors
/// When the log cannot be read.
pub fn trouble() -> io::Result<Vec<String>> {
    let mut log = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg")?;
    let (mut found, mut buffer) = (Vec::new(), vec![0; RECORD_BYTES]);
    loop {
        match log.read(&mut buffer) {
            Ok(0) => return Ok(found),
            Ok(read) => found.extend(trouble_in(&String::from_utf8_lossy(&buffer[..read]))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            // Lines were overwritten before they were read; the next ones come.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
}

/// A record is `priority,number,time,flags;text`, with lines of key and value behind it.
fn trouble_in(record: &str) -> Option<String> {
    let text = record.split_once(';')?.1.lines().next()?;
    SIGNS.iter().any(|sign| text.contains(sign)).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_and_hung_tasks_are_trouble_and_a_mount_is_not() {
        for line in [
            "3,400,123,-;Buffer I/O error on dev vda, logical block 5, lost async page write\n SUBSYSTEM=block\n",
            "3,1,1,-;INFO: task jbd2/vda-8:67 blocked for more than 120 seconds.",
            "2,7,7,-;EXT4-fs error (device vda): ext4_find_entry:1455: inode #2",
        ] {
            assert!(trouble_in(line).is_some(), "{line}");
        }
        for line in ["6,2,2,-;EXT4-fs (vda): recovery complete", "6,1,1,-;EXT4-fs (vda): mounted filesystem", ""] {
            assert_eq!(trouble_in(line), None, "{line}");
        }
    }
}
