//! Whether two images are the same.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::BenchError;

/// Reads both images whole and compares their digests.
///
/// # Errors
/// When one cannot be read.
pub async fn same(disk: &Path, replica: &Path) -> Result<bool, BenchError> {
    let paths = [disk.to_owned(), replica.to_owned()];
    let digests = tokio::task::spawn_blocking(move || paths.map(|path| (digest(&path), path))).await;
    let [disk, replica] = digests.map_err(|join| BenchError::Read { path: disk.to_owned(), source: join.into() })?;
    Ok(named(disk)? == named(replica)?)
}

fn named((digest, path): (std::io::Result<blake3::Hash>, PathBuf)) -> Result<blake3::Hash, BenchError> {
    digest.map_err(|source| BenchError::Read { path, source })
}

fn digest(path: &Path) -> std::io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}
