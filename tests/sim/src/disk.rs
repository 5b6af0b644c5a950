//! [`SimDisk`]: a controller's disk, which outlives its process and fails where it is told to.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use pageport_controller::consensus::disk::{Change, Disk, DiskError};

#[derive(Debug, Default, Clone)]
struct Contents {
    map: BTreeMap<Vec<u8>, Vec<u8>>,
    snapshot: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Inner {
    now: Contents,
    /// With a disk that lies: what is really on it.
    before: Option<Contents>,
    lies: bool,
    fail: Option<Failure>,
}

/// Where the machine goes down: at the n-th write from now, before or after it took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Writes until then.
    pub writes: u64,
    /// Whether that write is found on the disk.
    pub written: bool,
}

/// See the module; clones are the same disk.
#[derive(Debug, Default, Clone)]
pub struct SimDisk {
    inner: Rc<RefCell<Inner>>,
}

impl SimDisk {
    /// One that says that its last write is on stable storage, and lies.
    pub fn lying() -> Self {
        let disk = Self::default();
        disk.inner.borrow_mut().lies = true;
        disk
    }

    /// Goes down at a write that is to come.
    pub fn fail_at(&self, failure: Failure) {
        self.inner.borrow_mut().fail = Some(failure);
    }

    /// The machine lost its power: what was not on stable storage is gone.
    pub fn power_lost(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.fail = None;
        if let Some(before) = inner.before.take() {
            inner.now = before;
        }
    }

    /// The value of a key, for those who look from outside.
    pub fn peek(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.inner.borrow().now.map.get(key).cloned()
    }

    fn write(&self, change: impl FnOnce(&mut Contents)) -> Result<(), DiskError> {
        let mut inner = self.inner.borrow_mut();
        let due = match &mut inner.fail {
            Some(failure) if failure.writes == 0 => Some(failure.written),
            Some(failure) => {
                failure.writes -= 1;
                None
            }
            None => None,
        };
        if due != Some(false) {
            if inner.lies {
                inner.before = Some(inner.now.clone());
            }
            change(&mut inner.now);
        }
        match due {
            Some(_) => {
                inner.fail = None;
                Err(DiskError::Down)
            }
            None => Ok(()),
        }
    }
}

impl Disk for SimDisk {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.peek(key.as_bytes()))
    }

    fn scan(&self, prefix: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>, DiskError> {
        let inner = self.inner.borrow();
        let from = inner.now.map.range(prefix.as_bytes().to_vec()..);
        let pairs = from.take_while(|(key, _)| key.starts_with(prefix.as_bytes()));
        Ok(pairs.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&mut self, changes: Vec<Change>) -> Result<(), DiskError> {
        self.write(|contents| {
            for change in changes {
                match change {
                    Change::Put { key, value } => drop(contents.map.insert(key, value)),
                    Change::Remove(key) => drop(contents.map.remove(&key)),
                }
            }
        })
    }

    fn snapshot(&self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.inner.borrow().now.snapshot.clone())
    }

    fn replace_snapshot(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.write(|contents| contents.snapshot = Some(bytes.to_vec()))
    }
}
