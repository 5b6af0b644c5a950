//! The file-writing load: numbered records, each on the disk before the next is written, so a lost one can be told.
//!
//! A record is 4 KiB that follows from its number and the seed. The number of synced records is kept in memory, which moves
//! with the guest: after a move everything that was synced before it must still be in the file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::memory::{PAGE_WORDS, fill_page};

fn record(seed: u64, number: u64) -> Vec<u8> {
    let mut words = [0; PAGE_WORDS];
    fill_page(&mut words, seed, number, number);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A running load.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    seed: u64,
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

impl Records {
    /// Empties the file and starts to append.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn start(path: &Path, records_per_second: u64, seed: u64) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(path)?;
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let pause = Duration::from_secs(1) / u32::try_from(records_per_second.max(1)).unwrap_or(u32::MAX);
        let thread = std::thread::spawn({
            let (stop, synced) = (Arc::clone(&stop), Arc::clone(&synced));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    file.write_all(&record(seed, synced.load(Ordering::Relaxed)))?;
                    file.sync_data()?;
                    synced.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(pause);
                }
                Ok(())
            }
        });
        Ok(Self { path: path.to_owned(), seed, stop, synced, thread })
    }

    /// Stops, reads everything back, and says how many records were synced and how many of them are lost.
    ///
    /// # Errors
    /// When writing failed meanwhile or the file cannot be read.
    pub fn stop(self) -> io::Result<(u64, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| io::Error::other("the writing thread panicked"))??;
        let synced = self.synced.load(Ordering::Relaxed);
        Ok((synced, count_lost(&self.path, self.seed, synced)?))
    }
}

fn count_lost(path: &Path, seed: u64, synced: u64) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut found = vec![0; PAGE_WORDS * 8];
    for number in 0..synced {
        match file.read_exact(&mut found) {
            Ok(()) if found == record(seed, number) => {}
            Ok(()) => return Ok(1 + count_damaged(&mut file, seed, number + 1, synced)?),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(synced - number),
            Err(error) => return Err(error),
        }
    }
    Ok(0)
}

fn count_damaged(file: &mut File, seed: u64, from: u64, synced: u64) -> io::Result<u64> {
    let (mut found, mut damaged) = (vec![0; PAGE_WORDS * 8], 0);
    for number in from..synced {
        match file.read_exact(&mut found) {
            Ok(()) => damaged += u64::from(found != record(seed, number)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(damaged + synced - number),
            Err(error) => return Err(error),
        }
    }
    Ok(damaged)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_damaged_records_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("load/records");
        let load = Records::start(&path, 10_000, 4).unwrap();
        while load.synced.load(Ordering::Relaxed) < 10 {
            std::thread::yield_now();
        }
        let (synced, lost) = load.stop().unwrap();
        assert!(synced >= 10);
        assert_eq!(lost, 0);

        let mut content = fs::read(&path).unwrap();
        content[2 * 4096] ^= 1;
        content[5 * 4096] ^= 1;
        content.truncate(8 * 4096);
        fs::write(&path, content).unwrap();
        assert_eq!(count_lost(&path, 4, 10).unwrap(), 4);
    }
}
