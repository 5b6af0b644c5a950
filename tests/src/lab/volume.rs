//! A file system of its own for a folder, so that it can be filled without filling anything else. In memory.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system. Unmounted when dropped.
#[derive(Debug)]
pub(super) struct Volume {
    folder: PathBuf,
}

impl Volume {
    /// Mounts an empty file system of this size over the folder.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(super) fn mount(folder: &Path, bytes: u64) -> io::Result<Self> {
        let size = format!("size={bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "pageport-lab"]).arg(folder))?;
        Ok(Self { folder: folder.to_owned() })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "volume not unmounted");
        }
    }
}

/// Unmounts what a killed run has left mounted right below a folder.
pub(super) fn unmount_below(folder: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for place in places.filter(|place| place.parent() == Some(folder)) {
        if let Err(error) = unmount(place) {
            tracing::warn!(folder = %place.display(), %error, "what an earlier run has mounted stays");
        }
    }
}

/// Lazily: a process that has just been killed may still hold it for a moment.
fn unmount(folder: &Path) -> io::Result<()> {
    run(Command::new("umount").arg("-l").arg(folder))
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
