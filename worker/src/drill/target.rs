//! A disk as it was at a recovery point, for NBD: only to be read.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::spawn_blocking;

use crate::nbd::{Access, BlockTarget};
use crate::replica::points::{PointError, PointReader};

/// Read at a time, in bytes: what puts points in place waits for a read, and must not wait long.
const PIECE_BYTES: usize = 1 << 20;

/// One disk.
#[derive(Debug)]
pub struct PointTarget(Arc<PointReader>);

impl PointTarget {
    /// Reads through this.
    pub fn new(reader: PointReader) -> Self {
        Self(Arc::new(reader))
    }
}

impl BlockTarget for PointTarget {
    fn size(&self) -> u64 {
        self.0.size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    async fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        let reader = self.0.clone();
        let reading = spawn_blocking(move || -> Result<Bytes, PointError> {
            let mut content = vec![0; length as usize];
            for (piece, at) in content.chunks_mut(PIECE_BYTES).zip((offset..).step_by(PIECE_BYTES)) {
                reader.read(at, piece)?;
            }
            Ok(content.into())
        });
        reading.await.map_err(io::Error::other)?.map_err(|error| match error {
            PointError::Gone { .. } => io::Error::new(io::ErrorKind::NotConnected, error),
            error => io::Error::other(error),
        })
    }

    async fn write(&self, _: u64, _: Bytes) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    async fn zero(&self, _: u64, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
