//! Backups of the controllers, and a new cluster from one.
//!
//! ```text
//!   cluster backup: quorum round ─▶ state ─▶ file
//!   restore:        file ─▶ state of a new generation, every VM unknown ─▶ an empty data_dir ─▶ one controller, to which others are added
//! ```
//! Guarantees: a backup holds all that was answered before it was asked for. A restore writes only into a folder without data. It cannot
//! know that the controllers that were backed up are gone: those of them that are not must be stopped for good.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pageport_common::backup::{self, BackupError};
use pageport_ownership::Generation;
use pageport_proto::RestorationId;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::consensus::membership::{Member, Membership};
use crate::consensus::snapshot::{self, Snapshot, SnapshotError};
use crate::consensus::storage::{LogError, LogStorage};
use crate::model::State;

/// What is in a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backup {
    /// When it was taken.
    pub taken_unix_ms: i64,
    /// An entry of the log that the state reaches to, at least.
    pub index: u64,
    /// The term then.
    pub term: u64,
    /// Who the controllers were.
    pub membership: Membership,
    /// What they had agreed on.
    pub state: State,
}

/// Why there is no restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file.
    #[error("read the backup {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is none that can be used.
    #[error("{}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: BackupError,
    },
    /// It is whole, and not of this version.
    #[error("decode the backup {}: was it made by a newer version?", path.display())]
    Decode {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// This number was in use.
    #[error(
        "controller {id} was one of the controllers in the backup: give this one a number (id) that none of them had ({taken}), so that an old one that comes back is not taken for it"
    )]
    NumberTaken {
        /// Which.
        id: u64,
        /// All of them.
        taken: String,
    },
    /// There is something already.
    #[error("{} is not empty: a restore begins with an empty data_dir; move away what is there", path.display())]
    NotEmpty {
        /// Which.
        path: PathBuf,
    },
    /// The folder.
    #[error("prepare {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The snapshot.
    #[error("write the restored state")]
    Snapshot(#[from] SnapshotError),
    /// The log.
    #[error("begin the replicated log")]
    Log(#[from] LogError),
}

/// What a restore has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// How often the controllers were restored, this time included.
    pub generation: Generation,
    /// When the backup was taken.
    pub taken_unix_ms: i64,
    /// Its VMs, of which it is not known now who owns them.
    pub vms: usize,
    /// Its workers, which must report first.
    pub workers: Vec<String>,
}

impl Backup {
    /// The file.
    ///
    /// # Errors
    /// When the state cannot be written as JSON.
    pub fn to_file(&self) -> Result<Vec<u8>, serde_json::Error> {
        Ok(backup::seal(&serde_json::to_vec(self)?))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn read(path: &Path) -> Result<Self, RestoreError> {
        let bytes = fs::read(path).map_err(|source| RestoreError::Read { path: path.to_owned(), source })?;
        Self::parse(&bytes, path)
    }

    /// Of a file's content; `path` is for errors.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, RestoreError> {
        let content = backup::open(bytes).map_err(|source| RestoreError::Unusable { path: path.to_owned(), source })?;
        serde_json::from_slice(content).map_err(|source| RestoreError::Decode { path: path.to_owned(), source })
    }
}

/// Is there nothing yet where this controller keeps its data?
///
/// # Errors
/// [`RestoreError::Folder`].
pub fn is_blank(config: &Config) -> Result<bool, RestoreError> {
    let folder = &config.data_dir;
    let fail = |source| RestoreError::Folder { path: folder.clone(), source };
    fs::create_dir_all(folder).map_err(fail)?;
    Ok(fs::read_dir(folder).map_err(fail)?.next().is_none())
}

/// Makes the data of the first controller of a new cluster from a backup; it is not started.
///
/// # Errors
/// [`RestoreError`]: nothing is there, or (after an error of the file system) what is there is to be removed.
pub fn restore(config: &Config, backup: Backup) -> Result<Restored, RestoreError> {
    let taken: Vec<u64> = backup.membership.numbers();
    if taken.contains(&config.id) {
        let taken = taken.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        return Err(RestoreError::NumberTaken { id: config.id, taken });
    }
    let folder = &config.data_dir;
    if !is_blank(config)? {
        return Err(RestoreError::NotEmpty { path: folder.clone() });
    }
    let state = backup.state.restored(RestorationId::generate());
    let restored = Restored {
        generation: state.generation,
        taken_unix_ms: backup.taken_unix_ms,
        vms: state.recovering.len(),
        workers: state.workers.keys().map(ToString::to_string).collect(),
    };
    let membership = membership(config, &backup.membership, backup.index);
    let snapshot = Snapshot { index: backup.index, term: backup.term, membership: Some(membership), state };
    // The store first: a snapshot without one is taken for damage.
    drop(LogStorage::open(folder, Membership::default())?);
    snapshot::replace(folder, &snapshot::encode(&snapshot)?)?;
    Ok(restored)
}

/// This controller alone; numbers that were ever used stay used.
fn membership(config: &Config, before: &Membership, index: u64) -> Membership {
    let own = config.members.iter().find(|member| member.id == config.id);
    let address = own.map_or_else(|| config.listen_api.to_string(), |member| member.address.clone());
    let alone = Membership::first([Member::new(config.id, config.site.clone(), address)]);
    Membership { index, removed: before.numbers().into_iter().collect(), ..alone }
}
