//! Recovery points of a VM's replicas: the destination's end of standing replication.
//!
//! ```text
//!              begin, write…            commit                  apply
//!  settled ───────────────────▶ journal ──────▶ committed ──▶ undo sealed ──▶ in place ──▶ settled
//!     │ ▲                          └─ discarded: nothing happened
//!     │ └──────────── undo ───────────┐
//!     └─ open_layer ─▶ layer ─ change… ┴─ keep ─▶ no points: the replica is somebody's disk
//! ```
//! | file in `replicas/<vm>/` | holds |
//! |---|---|
//! | `<disk>.raw` | the newest point, in place |
//! | `points/<n>.journal` | what point n changes; until it is applied |
//! | `points/<n>.undo` | how to go from n back to n-1 |
//! | `points/layer.undo` | how to go back to the newest point from what a migration has written |
//!
//! The record `points/<vm>` of the worker's store says which points there are and what is under way. Saving it is the
//! one commit point of each step.
//!
//! - [`Group`]: the points of one VM; opening it recovers. `journal`, `apply`, `layer`, `reader`, `lease`, `space`: its operations.
//! - [`ChangeDigest`]: what source and destination agree on before a point is committed.
//! - `record`, `format`, `log_writer`, `log_reader`: what is on the disk. `medium`: the way there.
//!
//! Guarantees: a point whose commit returned is never lost to a crash or a power loss, and can be read byte for byte at
//! any time after. A commit that did not return has happened whole or not at all. What a layer wrote is undone, or kept
//! whole. Damage that a checksum shows is said, and never served as data.
//!
//! Does not: guard against somebody else who writes the disks; find damage in the replica itself; find damage of the very
//! last batch of a layer, or a layer's file that somebody has cut (they look like batches that never reached the disk).
//!
//! Everything here blocks on the disk: keep it off async threads.

mod apply;
mod digest;
mod error;
mod format;
mod group;
mod journal;
mod layer;
mod lease;
mod log_reader;
mod log_writer;
mod medium;
mod ranges;
mod reader;
mod record;
mod recovery;
mod space;
#[cfg(test)]
mod tests;

use pageport_proto::VmId;
use serde::{Deserialize, Serialize};

pub use self::digest::ChangeDigest;
pub use self::error::{Bound, PointError};
pub use self::group::Group;
pub use self::journal::JournalWriter;
pub use self::layer::{Change, Layer};
pub use self::lease::{HeldPoint, Lease, LeaseEnd};
pub use self::reader::PointReader;

/// The most points that a group keeps: its record must stay small.
pub const MAX_POINTS: usize = 256;
/// The most points of one VM that leases hold at a time.
pub const MAX_LEASES: usize = 8;
/// The largest disk, in bytes: what the usual file systems hold in one file.
pub const MAX_DISK_BYTES: u64 = 8 << 40;
/// The folder of the journals and undo files, beside the replicas.
pub(crate) const FOLDER: &str = "points";

/// Where the record of a VM's points lies in the worker's store.
pub(super) fn record_key(vm: VmId) -> String {
    format!("points/{vm}")
}

/// One recovery point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// Counts up within a lineage, without gaps.
    pub number: u64,
    /// When the source froze the disks: milliseconds since 1970, by the source's clock.
    pub taken_unix_ms: i64,
    /// What differs from the point before, in raw bytes.
    pub changed_bytes: u64,
    /// Whether the guest's file systems were quiesced.
    pub quiesced: bool,
    /// How many disks it has; 0: not known, of a point that an earlier version took.
    #[serde(default)]
    pub disks: u16,
}

/// Names one history of points of one replica: the same number in another lineage is another content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Lineage(std::num::NonZeroU64);

impl Lineage {
    /// A new one, drawn at random.
    pub fn generate() -> Self {
        Self(std::num::NonZeroU64::new(rand::random()).unwrap_or(std::num::NonZeroU64::MIN))
    }

    /// From its number; `None` for zero.
    pub fn from_u64(number: u64) -> Option<Self> {
        std::num::NonZeroU64::new(number).map(Self)
    }

    /// Its number; never zero.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl std::fmt::Display for Lineage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<Lineage> for String {
    fn from(lineage: Lineage) -> Self {
        lineage.to_string()
    }
}

/// A text that is no lineage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no lineage: it must be 16 hexadecimal digits, not all zero")]
pub struct LineageError {
    text: String,
}

impl std::str::FromStr for Lineage {
    type Err = LineageError;

    fn from_str(text: &str) -> Result<Self, LineageError> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        number.and_then(Self::from_u64).ok_or_else(|| LineageError { text: text.to_owned() })
    }
}

impl TryFrom<String> for Lineage {
    type Error = LineageError;

    fn try_from(text: String) -> Result<Self, LineageError> {
        text.parse()
    }
}

/// What a group holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupState {
    /// Whose points these are; `None` for a group that never had any, or has forgotten them.
    pub lineage: Option<Lineage>,
    /// The points that can be opened, oldest first; the last is the newest.
    pub points: Vec<PointInfo>,
    /// Why the newest point is not what the source was told. The replica must be compared whole, in place, and adopted.
    pub damaged: Option<String>,
    /// Why older points are gone before their time. The newest is whole. Said until the next commit.
    pub lost: Option<String>,
    /// What leases hold, oldest first; listed or not.
    pub held: Vec<HeldPoint>,
    /// A migration's layer is open.
    pub layer: bool,
    /// The newest point is committed and not yet in place.
    pub applying: bool,
}

/// How much room the points of one VM may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For journals and undo files together, in bytes.
    pub points_bytes: u64,
    /// Of that, for what only leases keep, in bytes.
    pub held_bytes: u64,
    /// Left free on their file system, in bytes.
    pub reserve_bytes: u64,
}
