//! What disks are copied to.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pageport_worker::nbd::{BlockTarget, Sink};
use tokio::sync::watch;

/// A target in memory that remembers the ranges it was given, and answers no change while it is held.
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    written: Mutex<Vec<(u64, u64)>>,
    zeroed: Mutex<Vec<(u64, u32)>>,
    /// How many more changes are answered.
    changes: watch::Sender<usize>,
}

impl Memory {
    pub fn with(bytes: Vec<u8>) -> Arc<Self> {
        let changes = watch::Sender::new(usize::MAX);
        Arc::new(Self { bytes: Mutex::new(bytes), written: Mutex::default(), zeroed: Mutex::default(), changes })
    }

    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub fn part(&self, offset: u64, length: u64) -> Vec<u8> {
        self.bytes.lock().unwrap()[offset as usize..(offset + length) as usize].to_vec()
    }

    /// Every range that was written or zeroed, in order.
    pub fn changed(&self) -> Vec<(u64, u64)> {
        self.written.lock().unwrap().clone()
    }

    pub fn zeroed(&self) -> Vec<(u64, u32)> {
        self.zeroed.lock().unwrap().clone()
    }

    /// Answers `changes` more, and then none.
    pub fn hold_after(&self, changes: usize) {
        self.changes.send_replace(changes);
    }

    /// Waits until a change is being held.
    pub async fn held(&self) {
        self.changes.subscribe().wait_for(|changes| *changes == 0).await.unwrap();
    }

    pub fn go_on(&self) {
        self.changes.send_replace(usize::MAX);
    }

    async fn may_change(&self) {
        let mut changes = self.changes.subscribe();
        loop {
            let mut granted = false;
            self.changes.send_if_modified(|left| {
                granted = *left > 0;
                *left = left.saturating_sub(1);
                granted
            });
            if granted {
                return;
            }
            changes.wait_for(|left| *left > 0).await.unwrap();
        }
    }

    fn change(&self, offset: u64, length: u64, change: impl FnOnce(&mut [u8])) {
        self.written.lock().unwrap().push((offset, length));
        change(&mut self.bytes.lock().unwrap()[offset as usize..(offset + length) as usize]);
    }
}

impl BlockTarget for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    async fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        let range = offset as usize..offset as usize + length as usize;
        Ok(Bytes::copy_from_slice(&self.bytes.lock().unwrap()[range]))
    }
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.may_change().await;
        self.change(offset, data.len() as u64, |range| range.copy_from_slice(&data));
        Ok(())
    }
    async fn zero(&self, offset: u64, length: u32) -> io::Result<()> {
        self.may_change().await;
        self.zeroed.lock().unwrap().push((offset, length));
        self.change(offset, length.into(), |range| range.fill(0));
        Ok(())
    }
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Memory {
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        BlockTarget::write(self, offset, data).await
    }
    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        BlockTarget::zero(self, offset, length as u32).await
    }
}
