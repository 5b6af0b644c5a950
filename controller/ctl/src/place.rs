//! Places of replicas, as operators write them: `root=/dev/vg0/web`.

use std::str::FromStr;

use pageport_proto::v1::DiskPlace;

/// Where the replica of a disk is to lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The disk's name.
    pub disk: String,
    /// Absolute path of a block device at the replica's host.
    pub path: String,
}

/// A text that is no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is no place: write the disk's name and the absolute path of a block device, like root=/dev/vg0/web"
)]
pub struct ParsePlaceError {
    /// What was given.
    text: String,
}

impl FromStr for Place {
    type Err = ParsePlaceError;

    fn from_str(text: &str) -> Result<Self, ParsePlaceError> {
        let parts = text.split_once('=').filter(|(disk, path)| !disk.is_empty() && path.starts_with('/'));
        let (disk, path) = parts.ok_or_else(|| ParsePlaceError { text: text.to_owned() })?;
        Ok(Self { disk: disk.to_owned(), path: path.to_owned() })
    }
}

impl From<Place> for DiskPlace {
    fn from(Place { disk, path }: Place) -> Self {
        Self { disk, path }
    }
}
