//! What is kept of each size: one line in `controller.jsonl`, with the commit it was measured at. Of a size the newest line counts.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Size;
use super::report::FleetFigures;
use crate::faults::error::FaultsError;
use crate::faults::results::{append_line, commit};

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    commit: String,
    #[serde(flatten)]
    figures: FleetFigures,
}

/// The lines of one commit.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    commit: String,
}

impl Results {
    /// Those in `folder`, for the commit that is checked out.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, FaultsError> {
        let failed = |source| FaultsError::File { operation: "make", path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        Ok(Self { path: folder.join("controller.jsonl"), commit: commit() })
    }

    /// The commit; ends in `+` when files differ from it.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// What is known of a size.
    #[must_use]
    pub fn newest(&self, size: Size) -> Option<FleetFigures> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
        let of_size = |line: &Line| (line.figures.workers, line.figures.vms) == (size.workers, size.vms);
        lines.rfind(|line| line.commit == self.commit && of_size(line)).map(|line| line.figures)
    }

    /// Keeps what was measured.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&self, figures: &FleetFigures) -> Result<(), FaultsError> {
        append_line(&self.path, &Line { commit: self.commit.clone(), figures: figures.clone() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn of_a_size_the_newest_line_of_this_commit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let mut results = Results { commit: "then".into(), ..Results::open(folder.path()).unwrap() };
        let (small, large) = (Size { workers: 3, vms: 20 }, Size { workers: 30, vms: 20 });
        let figures = |rtt_ms| FleetFigures { workers: 3, vms: 20, rtt_ms, ..FleetFigures::default() };
        results.append(&figures(1.0)).unwrap();
        results.commit = "now".into();
        assert_eq!(results.newest(small), None);
        results.append(&figures(2.0)).unwrap();
        results.append(&figures(3.0)).unwrap();
        assert_eq!(results.newest(small), Some(figures(3.0)));
        assert_eq!(results.newest(large), None);
    }
}
