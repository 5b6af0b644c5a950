//! What the guest's control server is asked and answers: one JSON object per line, over TCP port [`CONTROL_PORT`] or, with
//! a tag before it (see [`crate::serial`]), over a serial port.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where commands are taken.
pub const CONTROL_PORT: u16 = 7001;
/// Where each line is answered with the next number of the connection-independent counter.
pub const COUNTER_PORT: u16 = 7000;
/// The longest line either server reads.
pub const MAX_LINE_BYTES: u64 = 64 * 1024;
/// The largest region that a load may ask for.
pub const MAX_REGION_BYTES: u64 = 64 << 30;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who and since when.
    Uptime,
    /// `/proc/meminfo`.
    Meminfo,
    /// Read files in order until so many bytes were read: fills the page cache.
    Warm {
        /// How many.
        bytes: u64,
    },
    /// As `warm`; asked again it shows how fast warm files are.
    Reread {
        /// How many.
        bytes: u64,
    },
    /// Let go of the page cache.
    DropCaches,
    /// Write everything dirty to the disk.
    Sync,
    /// Fill a region that stays as it is, for checksums. Replaces the former one.
    StaticStart {
        /// Its size.
        bytes: u64,
        /// Its content.
        seed: u64,
    },
    /// Digest of the static region.
    ChecksumMemory,
    /// Keep changing the pages of an anonymous region.
    DirtyStart {
        /// Its size.
        bytes: u64,
        /// Changes per second.
        pages_per_second: u64,
        /// Which pages, which content.
        seed: u64,
    },
    /// Look at the load that runs.
    DirtyStatus,
    /// Stop changing and check every page of the region.
    DirtyStop,
    /// Append numbered records to a file, each synced before the next.
    WriteStart {
        /// Records per second, at most.
        records_per_second: u64,
        /// Content of the records.
        seed: u64,
    },
    /// Stop appending and check all records.
    WriteStop,
    /// Change a part of so many blocks of the static files, at random places; all is on the disk when this is answered.
    RewriteBlocks {
        /// How many bytes the blocks have together.
        bytes: u64,
        /// Which blocks, which content.
        seed: u64,
    },
    /// Write new versions of static files, beside them; all is on the disk when this is answered.
    WriteFiles {
        /// How many bytes at most.
        bytes: u64,
        /// Of which files.
        seed: u64,
    },
    /// Begin the history load: answered once its files are on the disk.
    HistoryStart {
        /// Operations per second, at most.
        operations_per_second: u64,
        /// What they do.
        seed: u64,
        /// The file system is trimmed after so many; 0: never.
        trim_every: u64,
        /// Devices of disks, whole, that hold a part of the blocks; what is on them is lost.
        disks: Vec<String>,
    },
    /// Look at the history load that runs.
    HistoryStatus,
    /// Stop it.
    HistoryStop,
    /// The lines of the kernel's log that tell of I/O errors or of writes that hang.
    KernelTrouble,
    /// Digest of all static files with their names, in order; or of every n-th file.
    ChecksumFiles {
        /// 1: all.
        every: u64,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// Not done.
    Refused {
        /// Why.
        reason: String,
    },
    /// To `uptime`.
    Uptime {
        /// Seconds since boot.
        seconds: f64,
        /// Differs for every boot.
        boot_id: String,
        /// The kernel's release.
        kernel: String,
    },
    /// To `meminfo`.
    Meminfo {
        /// Bytes by the kernel's name for them.
        bytes: BTreeMap<String, u64>,
    },
    /// To `warm` and `reread`.
    Read {
        /// How many bytes were read.
        bytes: u64,
        /// From how many files.
        files: u64,
        /// In which time.
        milliseconds: u64,
    },
    /// To the checksum commands.
    Checksum {
        /// BLAKE3, in hex.
        blake3: String,
        /// Of how many bytes.
        bytes: u64,
    },
    /// To `dirty-status` and `dirty-stop`.
    Dirty {
        /// Changes so far; never shrinks.
        writes: u64,
        /// Pages that are not what they must be; counted by `dirty-stop` only.
        corrupt_pages: u64,
    },
    /// To `write-stop`.
    Written {
        /// Records that were synced.
        synced: u64,
        /// Records found missing or damaged.
        lost: u64,
    },
    /// To `history-status` and `history-stop`.
    History {
        /// Operations that are on the disk.
        done: u64,
        /// The slowest write with its sync, in milliseconds.
        slowest_write_ms: u64,
        /// Why it has ended early.
        failure: Option<String>,
    },
    /// To `kernel-trouble`.
    KernelTrouble {
        /// Oldest first.
        lines: Vec<String>,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_documented_json() {
        let warm: Request = serde_json::from_str(r#"{"cmd":"warm","bytes":7}"#).unwrap();
        assert_eq!(warm, Request::Warm { bytes: 7 });
        let text = r#"{"cmd":"dirty-start","bytes":4096,"pages_per_second":3,"seed":9}"#;
        let dirty = Request::DirtyStart { bytes: 4096, pages_per_second: 3, seed: 9 };
        assert_eq!(serde_json::from_str::<Request>(text).unwrap(), dirty);
        assert!(serde_json::from_str::<Request>(r#"{"cmd":"warm"}"#).is_err());
    }
}
