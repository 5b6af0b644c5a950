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

use super::blocks::Blocks;
use super::session::DiskSession;
use crate::nbd::{BlockTarget, Sink};

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
        Err(io::Error::new(io::ErrorKind::Unsupported, "a replica is not read back over the link"))
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let mut newer = self.0.newer.lock().await;
        newer.note(offset, data.len() as u64)?;
        self.0.session.write(offset, data).await
    }

    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        let mut newer = self.0.newer.lock().await;
        newer.note(offset, length.into())?;
        self.0.session.zero(offset, length.into()).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.0.session.flush().await
    }
}

impl Sink for PointTarget {
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let newer = self.0.newer.lock().await;
        for (start, length) in newer.not_noted(offset, data.len() as u64) {
            let from = (start - offset) as usize;
            self.0.session.write(start, data.slice(from..from + length as usize)).await?;
        }
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let newer = self.0.newer.lock().await;
        for (start, length) in newer.not_noted(offset, length) {
            self.0.session.zero(start, length).await?;
        }
        Ok(())
    }
}
