//! Who keeps a VM, and what it keeps: found in `/proc`, held by pidfd.
//!
//! A keeper is known by its own `--deadline-file`, QEMU as its child: the guard needs no pid file, which may not be there yet
//! or may be wrong.
//!
//! Guarantees: what is signalled is what was checked. A pidfd is opened first, then the process is looked at; a child's
//! keeper is looked at before and after the child, so that neither number can have gone to another process between.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that was checked.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Every keeper of this deadline file that lives: one, unless something is very wrong.
    pub fn keepers_of(deadline_file: &Path) -> io::Result<Vec<Self>> {
        let mut found = vec![];
        for pid in processes()? {
            if is_keeper(pid, deadline_file)
                && let Some(keeper) = Self::open(pid)?
                && is_keeper(pid, deadline_file)
            {
                found.push(keeper);
            }
        }
        Ok(found)
    }

    /// What this keeper keeps: its children that have not ended.
    pub fn children(&self, deadline_file: &Path) -> io::Result<Vec<Self>> {
        let mut found = vec![];
        for pid in processes()? {
            if living_child_of(pid) == Some(self.pid)
                && let Some(child) = Self::open(pid)?
                && living_child_of(pid) == Some(self.pid)
                && is_keeper(self.pid, deadline_file)
            {
                found.push(child);
            }
        }
        Ok(found)
    }

    fn open(pid: i32) -> io::Result<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid) else { return Ok(None) };
        match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Self { pid, pidfd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// SIGKILL. A process that has ended is no error.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn processes() -> io::Result<Vec<i32>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// The parent of a process that is not dead; [`None`] when it is, or is gone.
fn living_child_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state, parent.
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    let state = words.next()?;
    if ["Z", "X"].contains(&state) { None } else { words.next()?.parse().ok() }
}

/// The command line of a process that is gone or dead is empty.
fn is_keeper(pid: i32, deadline_file: &Path) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    names(&arguments, deadline_file)
}

/// Whether these are the arguments of a keeper of this file. What follows the dashes is the kept program's own.
fn names(arguments: &[&[u8]], deadline_file: &Path) -> bool {
    let own = arguments.split(|argument| *argument == b"--").next().unwrap_or_default();
    let same = |given: &[u8]| {
        let given = Path::new(OsStr::from_bytes(given));
        given == deadline_file || given.file_name() == deadline_file.file_name() && same_folder(given, deadline_file)
    };
    own.windows(2).any(|pair| pair[0] == b"--deadline-file" && same(pair[1]))
}

/// The folder may be named in more than one way.
fn same_folder(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| path.parent().and_then(|folder| folder.canonicalize().ok());
    folder(one).is_some_and(|one| folder(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_is_known_by_its_own_option_however_the_folder_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let (run, alias) = (folder.path().join("run"), folder.path().join("alias"));
        std::fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&run, &alias).unwrap();
        let file = run.join("deadline");
        let by_alias = alias.join("deadline");
        let path = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let named = |words: &[&[u8]]| names(words, &file);
        assert!(named(&[b"pageport-keeper", b"--deadline-file", &path(&file), b"--", b"qemu"]));
        assert!(named(&[b"pageport-keeper", b"--deadline-file", &path(&by_alias), b"--", b"qemu"]));
        assert!(!named(&[b"pageport-keeper", b"--deadline-file", &path(&run.join("other")), b"--", b"qemu"]));
        assert!(!named(&[b"x", b"--", b"--deadline-file", &path(&file)]));
        assert!(!named(&[b"x", &path(&file)]));
        assert!(!named(&[b""]));
    }
}
