//! The names of dirty bitmaps: *what the guest has written since this point of this replica*.
//!
//! ```text
//!   pp-<worker that holds the replica>-<lineage, 16 hex digits>-<point>
//! ```
//! The name says all that is needed to find, after a restart of either worker, whether an increment can go on from it.

use std::fmt;

use pageport_proto::MigrationId;

const PREFIX: &str = "pp-";

/// A moment of a replica, and the bitmap of what was written since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The worker that holds the replica.
    pub worker: String,
    /// The history that the point belongs to.
    pub lineage: u64,
    /// The point's number.
    pub point: u64,
}

impl Mark {
    /// The mark that a bitmap's name stands for; [`None`]: it is not one of ours.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, point) = name.strip_prefix(PREFIX)?.rsplit_once('-')?;
        let (worker, lineage) = rest.rsplit_once('-')?;
        let lineage = u64::from_str_radix(lineage, 16).ok().filter(|_| lineage.len() == 16)?;
        Some(Self { worker: worker.to_owned(), lineage, point: point.parse().ok()? })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{:016x}-{}", self.worker, self.lineage, self.point)
    }
}

/// The lineage that begins when a migration hands a VM over: its first point is the disks as they were then. Both workers
/// know the migration, so they need not agree on it.
pub fn lineage_of(migration: MigrationId) -> u64 {
    let digest = blake3::hash(format!("lineage after migration {migration}").as_bytes());
    let (first, _) = digest.as_bytes().split_first_chunk().unwrap_or((&[1; 8], &[]));
    u64::from_be_bytes(*first).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_marks_and_others_do_not() {
        for worker in ["b", "worker-b", "a-1-2"] {
            let mark = Mark { worker: worker.to_owned(), lineage: 0xab, point: 17 };
            assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
        }
        for other in
            ["", "pp-", "pp-b-1-2", "pp-b-00000000000000zz-2", "pp-b-00000000000000ab-x", "b-00000000000000ab-1"]
        {
            assert_eq!(Mark::parse(other), None, "{other}");
        }
    }

    #[test]
    fn migrations_begin_lineages_of_their_own() {
        let (one, two) = (MigrationId::generate(), MigrationId::generate());
        assert_eq!(lineage_of(one), lineage_of(one));
        assert_ne!(lineage_of(one), lineage_of(two));
    }
}
