//! Changes of files that are done once, so that a known amount of a disk has changed.
//!
//! | change | content | why |
//! |---|---|---|
//! | a rewritten block | the old one, an eighth of it replaced by random bytes | databases and logs change parts of blocks |
//! | a new file | an old one with a line put before it | nothing lies where the same bytes lie already, and it compresses as files do |

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::files;
use crate::memory::SplitMix;

const BLOCK_BYTES: u64 = 4096;
/// Words of a block that are replaced.
const REPLACED_WORDS: u64 = 64;

/// Changes `bytes` of whole blocks, each somewhere in the files below `folder`; a block may be hit twice.
///
/// # Errors
/// When a file cannot be read or written, or there is no file of a block's size.
pub fn rewrite_blocks(folder: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    let (mut random, mut blocks, mut ends) = (SplitMix(seed), 0, Vec::new());
    for path in files::list(folder)? {
        blocks += fs::metadata(&path)?.len() / BLOCK_BYTES;
        ends.push((blocks, path));
    }
    if blocks == 0 {
        return Err(io::Error::other("there is no file of a block's size"));
    }
    for _ in 0..bytes / BLOCK_BYTES {
        let block = random.next_word() % blocks;
        let at = ends.partition_point(|(end, _)| *end <= block);
        let before = at.checked_sub(1).map_or(0, |before| ends[before].0);
        rewrite(&ends[at].1, (block - before) * BLOCK_BYTES, &mut random)?;
    }
    Ok(())
}

fn rewrite(path: &Path, offset: u64, random: &mut SplitMix) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let first = random.next_word() % (BLOCK_BYTES / 8 - REPLACED_WORDS);
    // The kernel reads the rest of the block: what is written to the disk is all of it.
    let replaced: Vec<u8> = (0..REPLACED_WORDS).flat_map(|_| random.next_word().to_le_bytes()).collect();
    file.write_all_at(&replaced, offset + first * 8)
}

/// Writes new versions of files below `folder`, picked at random, to `into`, until the next would be too much.
///
/// # Errors
/// When a file cannot be read or written, or there is none to pick.
pub fn write_files(folder: &Path, into: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    fs::create_dir_all(into)?;
    let (mut random, mut written, mut number) = (SplitMix(seed), 0, 0);
    let files: Vec<PathBuf> = files::list(folder)?;
    if files.is_empty() {
        return Err(io::Error::other("there is no file to write a new version of"));
    }
    loop {
        let picked = usize::try_from(random.next_word()).unwrap_or(0) % files.len();
        let old = fs::read(&files[picked])?;
        let line = format!("# version {seed}, file {number}\n");
        written += (line.len() + old.len()) as u64;
        if written > bytes {
            return Ok(());
        }
        let mut file = File::create(into.join(format!("{number:06}")))?;
        file.write_all(line.as_bytes())?;
        file.write_all(&old)?;
        number += 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn folder_of_files() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, size) in [("a", 100), ("b", 3 * 4096), ("c", 4095), ("d", 4096 + 7)] {
            fs::write(folder.path().join(name), vec![0; size]).unwrap();
        }
        folder
    }

    #[test]
    fn blocks_are_changed_in_place_and_only_whole_ones() {
        let folder = folder_of_files();
        rewrite_blocks(folder.path(), 100 * 4096, 1).unwrap();
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        assert!(read("a").iter().chain(&read("c")).chain(&read("d")[4096..]).all(|byte| *byte == 0));
        let (b, d) = (read("b"), read("d"));
        assert_eq!((b.len(), d.len()), (3 * 4096, 4096 + 7));
        assert!(b.chunks(4096).chain([&d[..4096]]).all(|block| block.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn a_folder_without_whole_blocks_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small"), "x").unwrap();
        assert!(rewrite_blocks(folder.path(), 4096, 1).is_err());
    }

    #[test]
    fn new_versions_are_as_many_as_there_is_room_for_and_begin_with_their_line() {
        let (folder, into) = (folder_of_files(), tempfile::tempdir().unwrap());
        write_files(folder.path(), into.path(), 50_000, 2).unwrap();
        let files: Vec<_> = fs::read_dir(into.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        let bytes: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert!((30_000..=50_000).contains(&bytes), "{bytes}");
        assert!(files.iter().all(|path| fs::read(path).unwrap().starts_with(b"# version 2, file ")));
    }
}
