//! Waits for the moment of a case: a new file of a round at either side, and the delay behind it.
//!
//! Looks every millisecond: a round is over within a second or two, and the moment is to be the one that was drawn.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::plan::{Cue, Strike};

const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Rounds come every few seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Where rounds leave their files.
#[derive(Clone, Debug)]
pub struct Places {
    /// Scratch at the source.
    pub scratch: PathBuf,
    /// Journals and undo files at the destination.
    pub points: PathBuf,
}

impl Places {
    fn of(&self, cue: Cue) -> Option<(&Path, &'static str)> {
        match cue {
            Cue::Begun => Some((&self.points, ".journal")),
            Cue::Applying => Some((&self.points, ".undo")),
            Cue::Frozen => Some((&self.scratch, "")),
            Cue::Any => None,
        }
    }

    /// Blocks until the moment has come.
    ///
    /// # Errors
    /// What was waited for, when it does not come.
    pub fn wait(&self, strike: Strike) -> Result<(), String> {
        if let Some((folder, suffix)) = self.of(strike.cue) {
            let deadline = Instant::now() + LIMIT;
            let mut old = names(folder, suffix);
            loop {
                let now = names(folder, suffix);
                if now.iter().any(|name| !old.contains(name)) {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(format!("no new {suffix} in {} within {} s", folder.display(), LIMIT.as_secs()));
                }
                // A file of the same name that comes again is a new one.
                old = now;
                sleep(LOOK_INTERVAL);
            }
        }
        sleep(strike.delay);
        Ok(())
    }
}

fn names(folder: &Path, suffix: &str) -> BTreeSet<std::ffi::OsString> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    entries.filter(|name| name.to_string_lossy().ends_with(suffix)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_there_is_no_moment_and_one_that_comes_is() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("4.undo"), b"").unwrap();
        let places = Places { scratch: folder.path().join("none"), points: folder.path().to_owned() };
        let strike = Strike { cue: Cue::Applying, delay: Duration::ZERO, lasts: Duration::ZERO };
        let waiting = std::thread::spawn(move || places.wait(strike));
        std::fs::write(folder.path().join("5.journal"), b"").unwrap();
        while !waiting.is_finished() {
            std::fs::write(folder.path().join("5.undo"), b"").unwrap();
            sleep(LOOK_INTERVAL);
            std::fs::remove_file(folder.path().join("5.undo")).unwrap();
        }
        waiting.join().unwrap().unwrap();
    }
}
