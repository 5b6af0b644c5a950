//! The static files: read in order to fill the page cache, or digested.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const BUFFER_BYTES: usize = 256 * 1024;

fn sorted_files(folder: &Path, into: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sorted_files(&entry.path(), into)?;
        } else if kind.is_file() {
            into.push(entry.path());
        }
    }
    Ok(())
}

/// All regular files below `folder`, in the order of their names.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    sorted_files(folder, &mut files)?;
    Ok(files)
}

/// Reads files in order until `limit` bytes were read; says how many bytes of how many files.
///
/// # Errors
/// When a file cannot be read.
pub fn read_some(folder: &Path, limit: u64) -> io::Result<(u64, u64)> {
    let (mut bytes, mut files, mut buffer) = (0, 0, vec![0; BUFFER_BYTES]);
    for path in list(folder)? {
        if bytes >= limit {
            break;
        }
        let mut file = File::open(path)?.take(limit - bytes);
        files += 1;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => bytes += read as u64,
            }
        }
    }
    Ok((bytes, files))
}

/// Digest over name, length and content of every `every`-th file, and the content's size.
///
/// # Errors
/// When a file cannot be read.
pub fn checksum(folder: &Path, every: u64) -> io::Result<(String, u64)> {
    let (mut hasher, mut bytes, mut buffer) = (blake3::Hasher::new(), 0, vec![0; BUFFER_BYTES]);
    for path in list(folder)?.iter().step_by(usize::try_from(every.max(1)).unwrap_or(usize::MAX)) {
        let name = path.strip_prefix(folder).unwrap_or(path).as_os_str().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name);
        let mut file = File::open(path)?;
        hasher.update(&file.metadata()?.len().to_le_bytes());
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            hasher.update(&buffer[..read]);
        }
    }
    Ok((hasher.finalize().to_hex().to_string(), bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit_and_checksums_see_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        for (name, size) in [("a", 1000), ("d/b", 500_000), ("e", 10)] {
            fs::write(folder.path().join(name), vec![1; size]).unwrap();
        }
        assert_eq!(read_some(folder.path(), 100_000).unwrap(), (100_000, 2));
        assert_eq!(read_some(folder.path(), u64::MAX).unwrap(), (501_010, 3));
        let (before, bytes) = checksum(folder.path(), 1).unwrap();
        assert_eq!(bytes, 501_010);
        let sampled = checksum(folder.path(), 2).unwrap();
        fs::write(folder.path().join("d/b"), vec![2; 500_000]).unwrap();
        assert_ne!(checksum(folder.path(), 1).unwrap().0, before);
        assert_eq!(checksum(folder.path(), 2).unwrap(), sampled);
    }
}
