//! The folders of a run, and those of runs that are over.

use std::fs;
use std::path::{Path, PathBuf};

use super::{LabError, network, volume};
use crate::paths;

/// Folders of past runs that are kept for their logs.
const KEPT_RUNS: usize = 10;

#[derive(Debug)]
pub(super) struct Folders {
    pub(super) run: PathBuf,
    pub(super) runtime: PathBuf,
}

impl Folders {
    /// Makes those of a run; its data folders are made by who needs them.
    ///
    /// # Errors
    /// One cannot be made.
    pub(super) fn make(run: &str) -> Result<Self, LabError> {
        let folders = Self { run: paths::lab().join(run), runtime: Path::new("/tmp").join(run) };
        make(&folders.runtime)?;
        for name in ["config", "logs", "disks"] {
            make(&folders.run.join(name))?;
        }
        Ok(folders)
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in [&self.runtime, &self.run.join("data"), &self.run.join("disks")] {
            // It may never have been made.
            fs::remove_dir_all(folder).ok();
        }
    }
}

/// Makes a folder and those above it.
///
/// # Errors
/// It cannot be made.
pub(super) fn make(path: &Path) -> Result<(), LabError> {
    fs::create_dir_all(path).map_err(|source| LabError::Io { operation: "make", path: path.to_owned(), source })
}

/// Removes what killed runs left in the file system, and the oldest logs.
pub(super) fn remove_old_runs() {
    let listed = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        entries
            .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(network::is_dead_run))
            .collect()
    };
    for runtime in listed(Path::new("/tmp")) {
        fs::remove_dir_all(runtime).ok();
    }
    let mut runs = listed(&paths::lab());
    runs.iter().for_each(|run| volume::unmount_below(&run.join("data")));
    runs.sort_by_key(|path| fs::metadata(path).and_then(|about| about.modified()).ok());
    let keep_from = runs.len().saturating_sub(KEPT_RUNS);
    for (n, run) in runs.into_iter().enumerate() {
        if n < keep_from {
            fs::remove_dir_all(run).ok();
        } else {
            for large in ["data", "disks"] {
                fs::remove_dir_all(run.join(large)).ok();
            }
        }
    }
}
