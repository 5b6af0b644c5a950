//! [`Lines`]: what is kept of runs, a line of JSON for each, with the commit that it is of.
//!
//! Lines are appended, never changed; of the same thing the newest line of a commit counts. So what is to be run can be run in pieces, goes on
//! where it was interrupted, and several processes may write at once. Whatever is no line is passed over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::faults::FaultsError;
use crate::paths;

/// One line.
pub trait Line: DeserializeOwned {
    /// Of which commit; ends in `+` when files differed from it.
    fn commit(&self) -> &str;
}

/// The lines of one file that are of one commit.
#[derive(Debug)]
pub struct Lines<L> {
    path: PathBuf,
    commit: String,
    kind: PhantomData<fn() -> L>,
}

impl<L: Line> Lines<L> {
    /// Those of a file, for the commit that is checked out. The folder is made.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: &Path, file: &str) -> Result<Self, FaultsError> {
        let failed = |source| FaultsError::File { operation: "make", path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        Ok(Self::of(folder.join(file), commit()))
    }

    /// Those of a file, for this commit.
    #[must_use]
    pub fn of(path: PathBuf, commit: String) -> Self {
        Self { path, commit, kind: PhantomData }
    }

    /// The commit.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of them, the oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<L> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<L>(line).ok());
        lines.filter(|line| line.commit() == self.commit).collect()
    }

    /// Appends one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&self, line: &L) -> Result<(), FaultsError>
    where
        L: Serialize,
    {
        let failed = |source| FaultsError::File { operation: "append to", path: self.path.clone(), source };
        let mut bytes = serde_json::to_vec(line).map_err(|source| failed(source.into()))?;
        bytes.push(b'\n');
        let mut file = File::options().create(true).append(true).open(&self.path).map_err(failed)?;
        file.write_all(&bytes).map_err(failed)
    }
}

/// Writes a sum, in place of an older one.
///
/// # Errors
/// When it cannot be written.
pub fn write_sum(path: PathBuf, sum: &impl Serialize) -> Result<(), FaultsError> {
    let text = serde_json::to_string_pretty(sum).map_err(io::Error::from);
    let written = text.and_then(|text| fs::write(&path, text + "\n"));
    written.map_err(|source| FaultsError::File { operation: "write", path, source })
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What is checked out; `unknown` outside of a repository.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(paths::root()).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|changes| !changes.is_empty());
    head + if changed { "+" } else { "" }
}
