//! The pages that a migration sends, into a file: at the source.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Batches that may wait to be written; each has 512 KiB of pages at most, or what was kept before.
const QUEUE: usize = 64;
/// What a file that is not complete ends in.
const UNFINISHED: &str = "part";

/// A file under way. Unless it is [`Self::finish`]ed it is deleted.
#[derive(Debug)]
pub struct Keeping {
    path: PathBuf,
    left_bytes: u64,
    /// Nothing: given up.
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Writer {
    pages: SyncSender<Vec<u8>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Keeping {
    /// Makes the file, which will have at most so many bytes.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn begin(path: PathBuf, limit_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(unfinished(&path))?;
        let (pages, queue) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("keep-memory".to_owned()).spawn(move || write(file, &queue))?;
        Ok(Self { path, left_bytes: limit_bytes, writer: Some(Writer { pages, thread }) })
    }

    /// The next pages. Does not wait: a disk that cannot keep up, or a guest that sends its memory more than once over, ends it.
    pub fn add(&mut self, pages: Vec<u8>) {
        let Some(writer) = &self.writer else { return };
        let left_bytes = self.left_bytes.checked_sub(pages.len() as u64);
        match left_bytes {
            Some(left_bytes) if writer.pages.try_send(pages).is_ok() => self.left_bytes = left_bytes,
            _ => {
                tracing::info!(file = %self.path.display(), "the guest's memory is no longer kept");
                self.give_up();
            }
        }
    }

    /// All pages have come, and the guest runs elsewhere.
    ///
    /// # Errors
    /// The system's; nothing is kept then.
    pub fn finish(mut self) -> io::Result<()> {
        let Some(Writer { pages, thread }) = self.writer.take() else { return Ok(()) };
        drop(pages);
        let written = thread.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread has ended")));
        let kept = written.and_then(|()| std::fs::rename(unfinished(&self.path), &self.path));
        if kept.is_err() {
            remove(&self.path);
        }
        kept
    }

    fn give_up(&mut self) {
        if let Some(Writer { pages, thread }) = self.writer.take() {
            drop(pages);
            remove(&self.path);
            // It ends with the queue; its file has no name any more.
            drop(thread);
        }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.give_up();
    }
}

fn unfinished(path: &Path) -> PathBuf {
    path.with_extension(UNFINISHED)
}

fn remove(path: &Path) {
    let path = unfinished(path);
    if let Err(error) = std::fs::remove_file(&path) {
        tracing::warn!(file = %path.display(), %error, "kept memory is not deleted");
    }
}

fn write(mut file: File, queue: &Receiver<Vec<u8>>) -> io::Result<()> {
    for pages in queue {
        file.write_all(&pages)?;
    }
    Ok(())
}
