//! Typed ids and names: parsed once at the edge, so that a VM's id is never taken for a migration's.
//!
//! | type | form |
//! |---|---|
//! | [`VmId`], [`MigrationId`], [`RequestId`], [`StoreId`], [`RestorationId`] | UUID (version 7 when made here, so ids sort by age) |
//! | [`SiteName`], [`WorkerName`], [`PoolName`] | `[a-z0-9-]`, 1 to 40 characters |

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest name of a site, worker, pool, VM or disk, in bytes.
pub const MAX_NAME_BYTES: usize = 40;

/// The most pools of storage of one worker.
pub const MAX_POOLS: usize = 64;

/// A text that is no id or name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// Not a UUID.
    #[error("\"{text}\" is not a {kind} id (a UUID)")]
    Uuid {
        /// What was expected.
        kind: &'static str,
        /// What came.
        text: String,
    },
    /// Not a name.
    #[error("\"{text}\" is not a {kind} name: use 1 to {MAX_NAME_BYTES} of a-z, 0-9 and \"-\"")]
    Name {
        /// What was expected.
        kind: &'static str,
        /// What came.
        text: String,
    },
}

/// Is this a well-formed name of a site, worker, pool, VM or disk?
pub fn is_name(text: &str) -> bool {
    let fits = (1..=MAX_NAME_BYTES).contains(&text.len());
    fits && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh id that sorts after those made before.
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                Uuid::parse_str(text).map(Self).map_err(|_| ParseIdError::Uuid { kind: $kind, text: text.to_owned() })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                if is_name(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(ParseIdError::Name { kind: $kind, text: text.to_owned() })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

uuid_id!(
    /// One virtual machine, for life.
    VmId,
    "VM"
);
uuid_id!(
    /// One live move.
    MigrationId,
    "migration"
);
uuid_id!(
    /// Chosen by a client so that a repeated command takes effect once.
    RequestId,
    "request"
);
uuid_id!(
    /// One worker's durable store, from its creation to its loss.
    StoreId,
    "store"
);
uuid_id!(
    /// One restore of the controllers from a backup.
    RestorationId,
    "restoration"
);
name_id!(
    /// A datacenter.
    SiteName,
    "site"
);
name_id!(
    /// A worker daemon, unique in the fleet.
    WorkerName,
    "worker"
);
name_id!(
    /// A pool of storage of a worker.
    PoolName,
    "pool"
);

impl PoolName {
    /// Is it the one that every worker has?
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for PoolName {
    /// The one that every worker has: its data folder.
    fn default() -> Self {
        Self("default".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_alphabet_are_refused() {
        for bad in ["", "A", "a b", "a/b", "ü", &"x".repeat(MAX_NAME_BYTES + 1)] {
            assert!(bad.parse::<SiteName>().is_err(), "{bad:?} was taken");
        }
        assert_eq!("dc-1".parse::<SiteName>().map(|s| s.to_string()), Ok("dc-1".to_owned()));
    }

    #[test]
    fn generated_ids_survive_their_text_form() {
        let id = VmId::generate();
        assert_eq!(id.to_string().parse(), Ok(id));
    }
}
