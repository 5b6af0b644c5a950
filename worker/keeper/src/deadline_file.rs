//! The file that worker and keeper share: the lease, and what the keeper did about it.
//!
//! Two records, each with one writer, four little-endian words each:
//!
//! | at | writer | word 0 | word 1 | word 2 | word 3 |
//! |---|---|---|---|---|---|
//! | 0 | worker | `PPLEASE1` | 0 disarmed, 1 armed | deadline, ns since boot | FNV-1a of words 0 to 2 |
//! | 32 | keeper | `PPENDED1` | the deadline that passed | when it killed, ns since boot | the same |
//!
//! Why a plain file that is read again and again, and neither a mapped page nor one file renamed over another: a mapped
//! page needs `unsafe`, and a file that shrinks under it kills the reader. A rename needs room for a new file at each
//! extension: on a full file system the guests would die. Writing over 32 bytes that are there needs nothing.
//!
//! Guarantees: a record that was read in parts from two writes, or was never whole, does not pass its check and is an
//! error, never a deadline. Does not decide what an error means: see [`crate::keep`].

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::boot_time::BootTime;
use crate::record::{RECORD_BYTES, decode, encode};

const LEASE_MAGIC: u64 = u64::from_le_bytes(*b"PPLEASE1");
const EXPIRED_MAGIC: u64 = u64::from_le_bytes(*b"PPENDED1");
const LEASE_AT: u64 = 0;
const EXPIRED_AT: u64 = RECORD_BYTES as u64;
/// A reader that met a write looks again; three in a row is no longer a coincidence.
const READ_ATTEMPTS: usize = 3;

/// Until when QEMU may live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Without a limit.
    Disarmed,
    /// Until then.
    Until(BootTime),
}

/// The keeper's word that it killed QEMU because the lease had run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// The deadline that passed.
    pub deadline: BootTime,
    /// When the keeper killed.
    pub killed_at: BootTime,
}

/// Why a deadline file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DeadlineFileError {
    /// The system refused.
    #[error("{operation} the deadline file")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not a record.
    #[error("the deadline file holds no valid {record}")]
    Invalid {
        /// Which of the two.
        record: &'static str,
    },
}

/// An open deadline file.
#[derive(Debug)]
pub struct DeadlineFile {
    file: File,
}

impl DeadlineFile {
    /// Makes the file, or makes it new. Not while a keeper reads it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: &Path, lease: Lease) -> Result<Self, DeadlineFileError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        let new = Self { file: file.map_err(failed("create"))? };
        // Both records' room is taken now, so that neither writer needs any later.
        new.file.write_all_at(&[0; 2 * RECORD_BYTES], LEASE_AT).map_err(failed("write"))?;
        new.set_lease(lease)?;
        Ok(new)
    }

    /// Opens a file that is there.
    ///
    /// # Errors
    /// It is not, or not for us.
    pub fn open(path: &Path) -> Result<Self, DeadlineFileError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed("open"))?;
        Ok(Self { file })
    }

    /// The lease.
    ///
    /// # Errors
    /// The file cannot be read, is too short, or holds something else.
    pub fn lease(&self) -> Result<Lease, DeadlineFileError> {
        let invalid = DeadlineFileError::Invalid { record: "lease" };
        match self.read_record(LEASE_AT, LEASE_MAGIC)?.ok_or(invalid)? {
            (0, _) => Ok(Lease::Disarmed),
            (1, deadline) => Ok(Lease::Until(BootTime::from_nanos(deadline))),
            _ => Err(DeadlineFileError::Invalid { record: "lease" }),
        }
    }

    /// Replaces the lease, whatever it was.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_lease(&self, lease: Lease) -> Result<(), DeadlineFileError> {
        let (armed, deadline) = match lease {
            Lease::Disarmed => (0, BootTime::ZERO),
            Lease::Until(deadline) => (1, deadline),
        };
        let record = encode(LEASE_MAGIC, armed, deadline.as_nanos());
        self.file.write_all_at(&record, LEASE_AT).map_err(failed("write"))
    }

    /// Whether the keeper killed because the lease had run out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn expired(&self) -> Result<Option<Expired>, DeadlineFileError> {
        let record = self.read_record(EXPIRED_AT, EXPIRED_MAGIC)?;
        Ok(record.map(|(deadline, killed_at)| Expired {
            deadline: BootTime::from_nanos(deadline),
            killed_at: BootTime::from_nanos(killed_at),
        }))
    }

    /// The keeper's: says that it killed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_expired(&self, expired: Expired) -> Result<(), DeadlineFileError> {
        let record = encode(EXPIRED_MAGIC, expired.deadline.as_nanos(), expired.killed_at.as_nanos());
        self.file.write_all_at(&record, EXPIRED_AT).map_err(failed("write"))
    }

    /// Locks the file until it is dropped; `false` when another process holds it: while a keeper lives, it does.
    ///
    /// # Errors
    /// The file system has no locks.
    pub fn try_lock(&self) -> Result<bool, DeadlineFileError> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(source)) => Err(DeadlineFileError::File { operation: "lock", source }),
        }
    }

    fn read_record(&self, at: u64, magic: u64) -> Result<Option<(u64, u64)>, DeadlineFileError> {
        for _ in 0..READ_ATTEMPTS {
            let mut record = [0; RECORD_BYTES];
            match self.file.read_exact_at(&mut record, at) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(source) => return Err(DeadlineFileError::File { operation: "read", source }),
            }
            if let Some(words) = decode(&record, magic) {
                return Ok(Some(words));
            }
        }
        Ok(None)
    }
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> DeadlineFileError {
    move |source| DeadlineFileError::File { operation, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Lease = Lease::Until(BootTime::from_nanos(0x0102_0304_0506_0708));

    fn file(lease: Lease) -> (tempfile::TempDir, DeadlineFile) {
        let folder = tempfile::tempdir().unwrap();
        let file = DeadlineFile::create(&folder.path().join("deadline"), lease).unwrap();
        (folder, file)
    }

    #[test]
    fn what_one_side_writes_the_other_reads() {
        let (folder, worker) = file(Lease::Disarmed);
        let keeper = DeadlineFile::open(&folder.path().join("deadline")).unwrap();
        assert_eq!((keeper.lease().unwrap(), worker.expired().unwrap()), (Lease::Disarmed, None));
        worker.set_lease(SOME).unwrap();
        assert_eq!(keeper.lease().unwrap(), SOME);
        let expired = Expired { deadline: BootTime::from_nanos(5), killed_at: BootTime::from_nanos(6) };
        keeper.set_expired(expired).unwrap();
        assert_eq!((keeper.lease().unwrap(), worker.expired().unwrap()), (SOME, Some(expired)));
    }

    #[test]
    fn a_file_that_is_short_or_something_else_is_an_error() {
        let (folder, file) = file(SOME);
        for content in [&b""[..], b"PPLEASE1", &[0xff; 64], &encode(LEASE_MAGIC, 2, 0), &encode(EXPIRED_MAGIC, 1, 1)] {
            std::fs::write(folder.path().join("deadline"), content).unwrap();
            assert!(matches!(file.lease(), Err(DeadlineFileError::Invalid { record: "lease" })), "{content:?}");
            assert_eq!(file.expired().unwrap(), None, "{content:?}");
        }
    }

    #[test]
    fn a_reader_beside_a_busy_writer_sees_only_what_was_written() {
        let (folder, worker) = file(Lease::Until(BootTime::from_nanos(u64::MAX)));
        let reader = DeadlineFile::open(&folder.path().join("deadline")).unwrap();
        let writing = std::thread::spawn(move || {
            for round in 0..200_000u64 {
                let word = if round % 2 == 0 { 0 } else { u64::MAX };
                worker.set_lease(Lease::Until(BootTime::from_nanos(word))).unwrap();
            }
        });
        while !writing.is_finished() {
            if let Ok(Lease::Until(deadline)) = reader.lease() {
                assert!([0, u64::MAX].contains(&deadline.as_nanos()), "{deadline:?}");
            }
        }
        writing.join().unwrap();
    }

    #[test]
    fn only_one_holds_the_lock_and_it_goes_with_its_holder() {
        let (folder, first) = file(Lease::Disarmed);
        let second = DeadlineFile::open(&folder.path().join("deadline")).unwrap();
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        drop(first);
        assert!(second.try_lock().unwrap());
    }
}
