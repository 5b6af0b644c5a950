//! A folder whose power can end at any step, and whose device keeps any part of what was not synced, and of the last write any whole
//! sectors.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::super::medium::{Medium, Shelf};

const SECTOR: usize = 512;

/// What has happened to the device.
#[derive(Debug, Default)]
struct Device {
    files: BTreeMap<u16, Durable>,
    /// Steps until the power ends.
    fuel: Option<u64>,
    steps: u64,
    full: bool,
}

/// One file, as the device has it.
#[derive(Debug, Default, Clone)]
struct Durable {
    bytes: Vec<u8>,
    /// Written and not synced: sectors, in the order of the writes.
    pending: Vec<(usize, Vec<u8>)>,
}

/// A folder on the device. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct SimShelf(Arc<Mutex<Device>>);

#[derive(Debug)]
struct SimFile {
    device: SimShelf,
    disk: u16,
    /// As the worker sees it.
    bytes: Vec<u8>,
}

impl SimShelf {
    /// The power ends after this many more steps.
    pub fn limit(&self, steps: u64) {
        self.0.lock().unwrap().fuel = Some(steps);
    }

    /// The device has no space from now on.
    pub fn fill_up(&self) {
        self.0.lock().unwrap().full = true;
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.0.lock().unwrap().steps
    }

    /// Power is back. Of what was not synced the device has what `kept` says, write by write.
    pub fn after_power_loss(&self, mut kept: impl FnMut() -> bool) -> Self {
        let mut files = self.0.lock().unwrap().files.clone();
        for file in files.values_mut() {
            for (at, sector) in std::mem::take(&mut file.pending) {
                if kept() {
                    file.bytes[at..at + sector.len()].copy_from_slice(&sector);
                }
            }
        }
        Self(Arc::new(Mutex::new(Device { files, ..Device::default() })))
    }

    /// Another worker begins; the system lives, so nothing is lost.
    pub fn after_kill(&self) -> Self {
        self.after_power_loss(|| true)
    }

    /// Changes bytes of a file behind everybody's back.
    pub fn damage(&self, disk: u16, damage: impl FnOnce(&mut Vec<u8>)) {
        let mut device = self.0.lock().unwrap();
        let file = device.files.get_mut(&disk).unwrap();
        assert!(file.pending.is_empty(), "damage what is on the device");
        damage(&mut file.bytes);
    }

    /// A file as the device has it.
    pub fn bytes(&self, disk: u16) -> Option<Vec<u8>> {
        self.0.lock().unwrap().files.get(&disk).map(|file| file.bytes.clone())
    }

    fn step(&self) -> io::Result<()> {
        let mut device = self.0.lock().unwrap();
        if device.fuel == Some(0) {
            return Err(io::Error::other("the power has ended"));
        }
        device.fuel = device.fuel.map(|fuel| fuel - 1);
        device.steps += 1;
        Ok(())
    }
}

impl Shelf for SimShelf {
    fn list(&self) -> io::Result<Vec<u16>> {
        Ok(self.0.lock().unwrap().files.keys().copied().collect())
    }

    fn create(&self, disk: u16, length: u64) -> io::Result<Box<dyn Medium>> {
        self.step()?;
        let bytes = vec![0; length as usize];
        self.0.lock().unwrap().files.insert(disk, Durable { bytes: bytes.clone(), pending: vec![] });
        Ok(Box::new(SimFile { device: self.clone(), disk, bytes }))
    }

    fn open(&self, disk: u16) -> io::Result<Box<dyn Medium>> {
        let bytes = self.bytes(disk).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimFile { device: self.clone(), disk, bytes }))
    }

    fn remove(&self, disk: u16) -> io::Result<()> {
        self.step()?;
        self.0.lock().unwrap().files.remove(&disk);
        Ok(())
    }
}

impl Medium for SimFile {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.bytes.get(offset as usize..offset as usize + into.len());
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.device.step()?;
        if self.device.0.lock().unwrap().full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (offset, end) = (offset as usize, offset as usize + data.len());
        self.bytes[offset..end].copy_from_slice(data);
        let mut device = self.device.0.lock().unwrap();
        // A file that was made anew has this one's name no more.
        let Some(file) = device.files.get_mut(&self.disk).filter(|file| file.bytes.len() == self.bytes.len()) else {
            return Ok(());
        };
        for at in (offset - offset % SECTOR..end).step_by(SECTOR) {
            let sector_end = (at + SECTOR).min(self.bytes.len());
            file.pending.push((at, self.bytes[at..sector_end].to_vec()));
        }
        Ok(())
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // What is undefined is not zero.
        self.write_at(offset, &vec![0xdd; length as usize])
    }

    fn sync(&mut self) -> io::Result<()> {
        self.device.step()?;
        let mut device = self.device.0.lock().unwrap();
        let Some(file) = device.files.get_mut(&self.disk) else { return Ok(()) };
        for (at, sector) in std::mem::take(&mut file.pending) {
            file.bytes[at..at + sector.len()].copy_from_slice(&sector);
        }
        Ok(())
    }
}
