//! What is kept of each size: one line in `controller.jsonl`, with the commit it was measured at. Of a size the newest line counts.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Size;
use super::report::FleetFigures;
use crate::faults::FaultsError;
use crate::kept::{self, Lines};

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    commit: String,
    #[serde(flatten)]
    figures: FleetFigures,
}

impl kept::Line for Line {
    fn commit(&self) -> &str {
        &self.commit
    }
}

/// The lines of one commit.
#[derive(Debug)]
pub struct Results(Lines<Line>);

impl Results {
    /// Those in `folder`, for the commit that is checked out.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, FaultsError> {
        Lines::open(folder, "controller.jsonl").map(Self)
    }

    /// The commit; ends in `+` when files differ from it.
    #[must_use]
    pub fn commit(&self) -> &str {
        self.0.commit()
    }

    /// What is known of a size.
    #[must_use]
    pub fn newest(&self, size: Size) -> Option<FleetFigures> {
        let of_size = |line: &Line| (line.figures.workers, line.figures.vms) == (size.workers, size.vms);
        self.0.all().into_iter().rfind(of_size).map(|line| line.figures)
    }

    /// Keeps what was measured.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&self, figures: &FleetFigures) -> Result<(), FaultsError> {
        self.0.append(&Line { commit: self.0.commit().to_owned(), figures: figures.clone() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn of_a_size_the_newest_line_of_this_commit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let of = |commit: &str| Results(Lines::of(folder.path().join("controller.jsonl"), commit.into()));
        let (then, now) = (of("then"), of("now"));
        let (small, large) = (Size { workers: 3, vms: 20 }, Size { workers: 30, vms: 20 });
        let figures = |rtt_ms| FleetFigures { workers: 3, vms: 20, rtt_ms, ..FleetFigures::default() };
        then.append(&figures(1.0)).unwrap();
        assert_eq!(now.newest(small), None);
        now.append(&figures(2.0)).unwrap();
        now.append(&figures(3.0)).unwrap();
        assert_eq!(now.newest(small), Some(figures(3.0)));
        assert_eq!(now.newest(large), None);
    }
}
