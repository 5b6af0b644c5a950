//! Two sources for one disk stream, during a migration: the mirror brings what the guest writes now, a frozen point what it wrote
//! before. Where both have a block, the mirror's is newer and wins.
//!
//! ```text
//!   mirror ─▶ MirrorTarget ─ notes the blocks ──┐ one at a time, in the order
//!                                               ├─▶ of the stream ─▶ DiskSession
//!   point  ─▶ PointTarget ── skips noted blocks ┘
//! ```
//! Guarantees: a block that the mirror has sent is never overwritten by the point's. A mirror in the background copies whole blocks of
//! 4 KiB; one that would send a part of a block is refused, since the rest of it could not be told apart from the point's.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::session::{DiskSession, Sent, acknowledged};
use super::store::BLOCK_BYTES;
use crate::nbd::BlockTarget;

/// What both sources share.
#[derive(Debug)]
struct Merge {
    session: Arc<DiskSession>,
    /// Blocks that the mirror has sent.
    newer: Mutex<Blocks>,
}

/// The mirror's side.
#[derive(Debug, Clone)]
pub struct MirrorTarget(Arc<Merge>);

/// The point's side.
#[derive(Debug, Clone)]
pub struct PointTarget(Arc<Merge>);

/// Both sides of one stream.
pub fn merge(session: Arc<DiskSession>) -> (MirrorTarget, PointTarget) {
    let newer = Mutex::new(Blocks::new(session.size_bytes()));
    let merge = Arc::new(Merge { session, newer });
    (MirrorTarget(merge.clone()), PointTarget(merge))
}

impl BlockTarget for MirrorTarget {
    fn size(&self) -> u64 {
        self.0.session.size_bytes()
    }

    async fn read(&self, _offset: u64, _length: u32) -> io::Result<Bytes> {
        Err(not_read())
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let sent = {
            let mut newer = self.0.newer.lock().await;
            newer.note(offset, data.len() as u64)?;
            let planned = self.0.session.planned_write(offset, data).await?;
            self.0.session.send_all(planned).await?
        };
        acknowledged(sent).await
    }

    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        let sent = {
            let mut newer = self.0.newer.lock().await;
            newer.note(offset, length.into())?;
            self.0.session.send_all(self.0.session.planned_zero(offset, length.into())?).await?
        };
        acknowledged(sent).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.0.session.flush().await
    }
}

impl BlockTarget for PointTarget {
    fn size(&self) -> u64 {
        self.0.session.size_bytes()
    }

    async fn read(&self, _offset: u64, _length: u32) -> io::Result<Bytes> {
        Err(not_read())
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let mut all: Sent = vec![];
        {
            let newer = self.0.newer.lock().await;
            for (start, length) in newer.not_noted(offset, data.len() as u64) {
                let from = (start - offset) as usize;
                let part = data.slice(from..from + length as usize);
                let planned = self.0.session.planned_write(start, part).await?;
                all.extend(self.0.session.send_all(planned).await?);
            }
        }
        acknowledged(all).await
    }

    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        let mut all: Sent = vec![];
        {
            let newer = self.0.newer.lock().await;
            for (start, length) in newer.not_noted(offset, length.into()) {
                all.extend(self.0.session.send_all(self.0.session.planned_zero(start, length)?).await?);
            }
        }
        acknowledged(all).await
    }

    /// A flush would be waited for by the guest when the target is removed; the mirror's last one covers this too.
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn not_read() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a replica is not read back over the link")
}

/// A set of blocks of one disk.
#[derive(Debug)]
struct Blocks {
    size_bytes: u64,
    words: Vec<u64>,
}

impl Blocks {
    fn new(size_bytes: u64) -> Self {
        Self { size_bytes, words: vec![0; size_bytes.div_ceil(BLOCK_BYTES).div_ceil(64) as usize] }
    }

    /// Notes the blocks of a range, the last of which may be cut by the end of the disk.
    fn note(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        let whole = offset.is_multiple_of(BLOCK_BYTES) && (end.is_multiple_of(BLOCK_BYTES) || end == self.size_bytes);
        if !whole {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the mirror sent a part of a block"));
        }
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
        Ok(())
    }

    fn noted(&self, block: u64) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// The parts of a range whose blocks are not noted.
    fn not_noted(&self, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let end = offset + length;
        let mut parts: Vec<(u64, u64)> = vec![];
        let mut at = offset;
        while at < end {
            let next = (at - at % BLOCK_BYTES + BLOCK_BYTES).min(end);
            if !self.noted(at / BLOCK_BYTES) {
                match parts.last_mut() {
                    Some((start, length)) if *start + *length == at => *length += next - at,
                    _ => parts.push((at, next - at)),
                }
            }
            at = next;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_are_noted_and_what_is_left_of_a_range_is_found() {
        let mut blocks = Blocks::new(99 * BLOCK_BYTES + 512);
        blocks.note(3 * BLOCK_BYTES, 2 * BLOCK_BYTES).unwrap();
        blocks.note(98 * BLOCK_BYTES, BLOCK_BYTES + 512).unwrap();
        for (offset, length) in [(1, BLOCK_BYTES), (0, 512), (98 * BLOCK_BYTES + 512, BLOCK_BYTES)] {
            assert_eq!(blocks.note(offset, length).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let noted: Vec<u64> = (0..100).filter(|block| blocks.noted(*block)).collect();
        assert_eq!(noted, [3, 4, 98, 99]);
        assert_eq!(
            blocks.not_noted(2 * BLOCK_BYTES + 100, 4 * BLOCK_BYTES),
            [(2 * BLOCK_BYTES + 100, BLOCK_BYTES - 100), (5 * BLOCK_BYTES, BLOCK_BYTES + 100)]
        );
        assert_eq!(blocks.not_noted(3 * BLOCK_BYTES, 2 * BLOCK_BYTES), []);
        assert_eq!(blocks.not_noted(80 * BLOCK_BYTES, 18 * BLOCK_BYTES), [(80 * BLOCK_BYTES, 18 * BLOCK_BYTES)]);
    }
}
