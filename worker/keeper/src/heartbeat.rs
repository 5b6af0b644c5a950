//! The guard's sign of life: the file `guard` in the runtime folder, one record, written at each of its looks.
//!
//! | word 0 | word 1 | word 2 | word 3 |
//! |---|---|---|---|
//! | `PPGUARD1` | the guard's process | when it looked last, ns since boot | FNV-1a of words 0 to 2 |
//!
//! Guarantees: one guard at a time has the file of a folder, by a lock that goes with it. A record that was not read whole is
//! no sign of life, nor is one from the future (of an earlier boot). Says nothing about what the guard saw.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::boot_time::BootTime;
use crate::record::{RECORD_BYTES, decode, encode};

/// The file's name.
pub const FILE: &str = "guard";
/// A guard that has not looked for so long does not guard: fifteen looks.
pub const FRESH_FOR: Duration = Duration::from_secs(3);
const MAGIC: u64 = u64::from_le_bytes(*b"PPGUARD1");
/// The guard before may be about to end.
const LOCK_DEADLINE: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// Why there is no sign of life.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
    /// The system refused.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is a guard already.
    #[error("{} belongs to another guard", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
    },
    /// It was removed or replaced: whoever reads the name does not read what is written.
    #[error("{} is not the file that this guard made", path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
}

/// The file, while this guard has it.
#[derive(Debug)]
pub struct Heartbeat {
    file: File,
    path: PathBuf,
}

impl Heartbeat {
    /// Takes the file of a runtime folder.
    ///
    /// # Errors
    /// It cannot be made, or another guard has it.
    pub fn claim(runtime_dir: &Path) -> Result<Self, HeartbeatError> {
        let path = runtime_dir.join(FILE);
        let failed = |operation| {
            let path = path.clone();
            move |source| HeartbeatError::File { operation, path, source }
        };
        std::fs::create_dir_all(runtime_dir).map_err(failed("make the folder of"))?;
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(failed("open"))?;
        let give_up = BootTime::now() + LOCK_DEADLINE;
        while let Err(error) = file.try_lock() {
            match error {
                std::fs::TryLockError::WouldBlock if BootTime::now() < give_up => std::thread::sleep(LOCK_INTERVAL),
                std::fs::TryLockError::WouldBlock => return Err(HeartbeatError::Taken { path }),
                std::fs::TryLockError::Error(source) => return Err(failed("lock")(source)),
            }
        }
        Ok(Self { file, path })
    }

    /// The guard has looked.
    ///
    /// # Errors
    /// It cannot be written, or would be read by nobody.
    pub fn beat(&self, now: BootTime) -> Result<(), HeartbeatError> {
        let failed = |operation| move |source| HeartbeatError::File { operation, path: self.path.clone(), source };
        let record = encode(MAGIC, u64::from(std::process::id()), now.as_nanos());
        self.file.write_all_at(&record, 0).map_err(failed("write"))?;
        let ours = self.file.metadata().map_err(failed("look at"))?;
        let named =
            std::fs::metadata(&self.path).is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino()));
        if named { Ok(()) } else { Err(HeartbeatError::Replaced { path: self.path.clone() }) }
    }
}

/// Whether a guard watches the VMs of this runtime folder.
#[must_use]
pub fn is_guarded(runtime_dir: &Path) -> bool {
    let read = || {
        let mut record = [0; RECORD_BYTES];
        File::open(runtime_dir.join(FILE))?.read_exact_at(&mut record, 0)?;
        Ok::<_, io::Error>(record)
    };
    // A read that met a write: the next is whole.
    (0..2).any(|_| read().is_ok_and(|record| is_fresh(&record, BootTime::now())))
}

fn is_fresh(record: &[u8; RECORD_BYTES], now: BootTime) -> bool {
    let looked = decode(record, MAGIC).map(|(_, looked)| BootTime::from_nanos(looked));
    looked.is_some_and(|looked| looked <= now && now.saturating_since(looked) < FRESH_FOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_of_life_counts_for_a_while_and_one_that_is_old_torn_or_of_another_boot_does_not() {
        let at = BootTime::from_nanos;
        let record = encode(MAGIC, 1, 5_000_000_000);
        let limit = 5_000_000_000 + FRESH_FOR.as_nanos() as u64;
        for (now, fresh) in [(4_999_999_999, false), (5_000_000_000, true), (limit - 1, true), (limit, false)] {
            assert_eq!(is_fresh(&record, at(now)), fresh, "{now}");
        }
        for byte in 0..RECORD_BYTES {
            let mut torn = record;
            torn[byte] ^= 1;
            assert!(!is_fresh(&torn, at(5_000_000_001)), "{byte}");
        }
    }

    #[test]
    fn a_folder_is_guarded_from_the_first_beat_on_by_one_guard_and_notices_that_its_file_was_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_guarded(folder.path()));
        let heartbeat = Heartbeat::claim(folder.path()).unwrap();
        assert!(!is_guarded(folder.path()));
        heartbeat.beat(BootTime::now()).unwrap();
        assert!(is_guarded(folder.path()));
        assert!(matches!(Heartbeat::claim(folder.path()), Err(HeartbeatError::Taken { .. })));
        std::fs::remove_file(folder.path().join(FILE)).unwrap();
        assert!(matches!(heartbeat.beat(BootTime::now()), Err(HeartbeatError::Replaced { .. })));
        assert!(!is_guarded(folder.path()));
        let next = Heartbeat::claim(folder.path()).unwrap();
        next.beat(BootTime::now()).unwrap();
        assert!(is_guarded(folder.path()) && heartbeat.beat(BootTime::now()).is_err());
    }
}
