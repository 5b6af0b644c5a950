//! Files, disks and a record in memory that lose what was not synced.
//!
//! Each change is one step. The step at which the power ends happens in part: a write is torn, a change of the folder or of
//! the record has happened or not. Afterwards [`Sim::power_on`] decides what of the unsynced rest is found.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use pageport_common::store::StoreError;
use pageport_proto::VmId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::group::{Group, Medium};
use super::super::medium::{Cell, Disk, Folder, PointFile};
use super::super::{Limits, PointError};
use crate::quota::Share;

const SECTOR_BYTES: usize = 512;
const BLOCK_BYTES: usize = 4096;

/// What becomes of unsynced bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// Only the process ended: all of them are found.
    Nothing,
    /// Each sector, length and name is found or not.
    Some,
    Everything,
}

/// What goes wrong at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    PowerOff,
    /// The step fails, and the ones after it do not.
    Error(io::ErrorKind),
}

#[derive(Debug, Default, Clone)]
struct Inode {
    durable: Vec<u8>,
    live: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Debug, Clone)]
enum Pending {
    Write { at: usize, data: Vec<u8> },
    Length(usize),
}

#[derive(Debug)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    pending_names: Vec<(String, Option<usize>)>,
    disks: BTreeMap<String, usize>,
    record: Option<Vec<u8>>,
    capacity_bytes: u64,
    disks_full: bool,
    steps: u64,
    trouble: Option<(u64, Trouble)>,
    off: bool,
    /// Counts the times that the power was switched on: what was opened before is dead.
    life: u64,
    random: StdRng,
}

#[derive(Debug, Clone)]
pub(super) struct Sim(Arc<Mutex<State>>);

/// Whether a step happens.
enum Step {
    Whole,
    /// Perhaps, or in part; then it fails.
    Part(io::Error),
}

impl Sim {
    pub(super) fn new(disks: &[(&str, usize)], seed: u64) -> Self {
        let inodes =
            disks.iter().map(|(_, size)| Inode { durable: vec![0; *size], live: vec![0; *size], pending: vec![] });
        let names = disks.iter().map(|(name, _)| (*name).to_owned());
        Self(Arc::new(Mutex::new(State {
            inodes: inodes.collect(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending_names: Vec::new(),
            disks: names.zip(0..).collect(),
            record: None,
            capacity_bytes: u64::MAX >> 1,
            disks_full: false,
            steps: 0,
            trouble: None,
            off: false,
            life: 0,
            random: StdRng::seed_from_u64(seed),
        })))
    }

    pub(super) fn open(&self, limits: Limits) -> Result<Group, PointError> {
        let life = self.state().life;
        let handle = |inode| Handle { sim: self.clone(), inode, life };
        let disks = self.state().disks.clone();
        let disks = disks.into_iter().map(|(name, inode)| (name, Arc::new(handle(inode)) as Arc<dyn Disk>)).collect();
        Group::over(
            Medium { folder: Box::new(handle(usize::MAX)), cell: Box::new(handle(usize::MAX)), disks },
            limits,
            Share::unlimited(VmId::generate()),
        )
    }

    pub(super) fn steps(&self) -> u64 {
        self.state().steps
    }

    /// Lets something go wrong `after` steps from now.
    pub(super) fn trouble(&self, after: u64, trouble: Trouble) {
        let mut state = self.state();
        state.trouble = Some((state.steps + after, trouble));
    }

    pub(super) fn no_trouble(&self) {
        self.state().trouble = None;
    }

    pub(super) fn is_off(&self) -> bool {
        self.state().off
    }

    pub(super) fn set_capacity(&self, bytes: u64) {
        self.state().capacity_bytes = bytes;
    }

    pub(super) fn set_disks_full(&self, full: bool) {
        self.state().disks_full = full;
    }

    /// Ends the power if it is on, and switches it on again.
    pub(super) fn power_on(&self, loss: Loss) {
        let state = &mut *self.state();
        for inode in &mut state.inodes {
            match loss {
                Loss::Nothing => inode.durable.clone_from(&inode.live),
                Loss::Everything => {}
                Loss::Some => {
                    for pending in inode.pending.drain(..) {
                        apply_some(&mut inode.durable, &pending, &mut state.random);
                    }
                }
            }
            inode.live.clone_from(&inode.durable);
            inode.pending.clear();
        }
        for (name, inode) in state.pending_names.drain(..) {
            if loss == Loss::Nothing || loss == Loss::Some && state.random.random() {
                set_name(&mut state.durable_names, name, inode);
            }
        }
        state.names.clone_from(&state.durable_names);
        (state.off, state.trouble) = (false, None);
        state.life += 1;
    }

    pub(super) fn disk(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        state.inodes[state.disks[name]].live.clone()
    }

    pub(super) fn disks(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state.disks.iter().map(|(name, inode)| (name.clone(), state.inodes[*inode].live.clone())).collect()
    }

    pub(super) fn file_names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// Changes a file behind the group's back, durably.
    pub(super) fn tamper(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let state = &mut *self.state();
        let inode = &mut state.inodes[state.names[name]];
        change(&mut inode.live);
        inode.durable.clone_from(&inode.live);
        inode.pending.clear();
    }

    /// Somebody else changes a disk.
    pub(super) fn set_disk(&self, name: &str, content: &[u8]) {
        let state = &mut *self.state();
        let inode = state.disks[name];
        state.inodes[inode] = Inode { durable: content.to_vec(), live: content.to_vec(), pending: Vec::new() };
    }

    pub(super) fn delete(&self, name: &str) {
        let state = &mut *self.state();
        state.names.remove(name);
        state.durable_names.remove(name);
    }

    /// A second world with the same content.
    pub(super) fn copy(&self) -> Self {
        let state = self.state();
        Self(Arc::new(Mutex::new(State {
            inodes: state.inodes.clone(),
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            pending_names: state.pending_names.clone(),
            disks: state.disks.clone(),
            record: state.record.clone(),
            trouble: None,
            random: state.random.clone(),
            ..*state
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

fn set_name(names: &mut BTreeMap<String, usize>, name: String, inode: Option<usize>) {
    match inode {
        Some(inode) => names.insert(name, inode),
        None => names.remove(&name),
    };
}

fn apply(content: &mut Vec<u8>, pending: &Pending) {
    match pending {
        Pending::Write { at, data } => {
            content.resize(content.len().max(at + data.len()), 0);
            content[*at..at + data.len()].copy_from_slice(data);
        }
        Pending::Length(length) => content.resize(*length, 0),
    }
}

/// Each sector of a write for itself.
fn apply_some(content: &mut Vec<u8>, pending: &Pending, random: &mut StdRng) {
    match pending {
        Pending::Write { at, data } => {
            let mut start = 0;
            while start < data.len() {
                let end = data.len().min(start + SECTOR_BYTES - (at + start) % SECTOR_BYTES);
                if random.random() {
                    apply(content, &Pending::Write { at: at + start, data: data[start..end].to_vec() });
                }
                start = end;
            }
        }
        Pending::Length(_) if random.random() => apply(content, pending),
        Pending::Length(_) => {}
    }
}

impl State {
    fn step(&mut self, life: u64) -> io::Result<Step> {
        self.alive(life)?;
        self.steps += 1;
        match self.trouble {
            Some((at, Trouble::PowerOff)) if self.steps >= at => {
                self.off = true;
                Ok(Step::Part(io::Error::other("the power is off")))
            }
            Some((at, Trouble::Error(kind))) if self.steps >= at => {
                self.trouble = None;
                Ok(Step::Part(kind.into()))
            }
            _ => Ok(Step::Whole),
        }
    }

    fn alive(&self, life: u64) -> io::Result<()> {
        if self.off || life != self.life { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }

    fn change(&mut self, inode: usize, life: u64, mut pending: Pending) -> io::Result<()> {
        let step = self.step(life)?;
        if let (Step::Part(_), Pending::Write { data, .. }) = (&step, &mut pending) {
            data.truncate(self.random.random_range(0..=data.len()));
        }
        apply(&mut self.inodes[inode].live, &pending);
        self.inodes[inode].pending.push(pending);
        outcome(step)
    }

    fn used_bytes(&self) -> u64 {
        self.names.values().map(|inode| self.inodes[*inode].live.len() as u64).sum()
    }

    fn name(&mut self, life: u64, name: &str, inode: Option<usize>) -> io::Result<()> {
        let step = self.step(life)?;
        if matches!(step, Step::Whole) || self.random.random() {
            set_name(&mut self.names, name.to_owned(), inode);
            self.pending_names.push((name.to_owned(), inode));
        }
        outcome(step)
    }
}

fn outcome(step: Step) -> io::Result<()> {
    match step {
        Step::Whole => Ok(()),
        Step::Part(error) => Err(error),
    }
}

/// A file, a disk, the folder or the record, since the power was last switched on.
#[derive(Debug)]
struct Handle {
    sim: Sim,
    inode: usize,
    life: u64,
}

impl Handle {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.sim.state();
        state.alive(self.life)?;
        act(&mut state)
    }

    fn get(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(|state| {
            let content = &state.inodes[self.inode].live;
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            let found = at.checked_add(into.len()).and_then(|end| content.get(at..end));
            into.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn sync_content(&self) -> io::Result<()> {
        self.with(|state| {
            let step = state.step(self.life)?;
            let inode = &mut state.inodes[self.inode];
            match step {
                Step::Whole => {
                    for pending in inode.pending.drain(..) {
                        apply(&mut inode.durable, &pending);
                    }
                    Ok(())
                }
                Step::Part(error) => {
                    // As with Linux: what a failed sync did not write is taken for written.
                    if !state.off {
                        inode.pending.clear();
                    }
                    Err(error)
                }
            }
        })
    }
}

impl PointFile for Handle {
    fn len(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.inodes[self.inode].live.len() as u64))
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.get(offset, into)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|state| {
            let growth = (offset + data.len() as u64).saturating_sub(state.inodes[self.inode].live.len() as u64);
            if state.used_bytes() + growth > state.capacity_bytes {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.change(self.inode, self.life, Pending::Write { at: offset as usize, data: data.to_vec() })
        })
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.with(|state| state.change(self.inode, self.life, Pending::Length(length as usize)))
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_content()
    }
}

impl Disk for Handle {
    fn size_bytes(&self) -> u64 {
        self.sim.state().inodes[self.inode].live.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.get(offset, into)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|state| {
            assert!(offset as usize + data.len() <= state.inodes[self.inode].live.len(), "a write past the end");
            if state.disks_full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.change(self.inode, self.life, Pending::Write { at: offset as usize, data: data.to_vec() })
        })
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.with(|state| {
            assert!((offset + length) as usize <= state.inodes[self.inode].live.len(), "a hole past the end");
            state.change(self.inode, self.life, Pending::Write { at: offset as usize, data: vec![0; length as usize] })
        })
    }

    fn grow(&self, size_bytes: u64) -> io::Result<()> {
        self.with(|state| {
            let larger = size_bytes as usize > state.inodes[self.inode].live.len();
            if larger { state.change(self.inode, self.life, Pending::Length(size_bytes as usize)) } else { Ok(()) }
        })
    }

    fn cut(&self, size_bytes: u64) -> io::Result<()> {
        self.with(|state| {
            let smaller = (size_bytes as usize) < state.inodes[self.inode].live.len();
            if smaller { state.change(self.inode, self.life, Pending::Length(size_bytes as usize)) } else { Ok(()) }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.sync_content()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        self.with(|state| {
            let content = &state.inodes[self.inode].live;
            let is_data =
                |block: &usize| content[block * BLOCK_BYTES..].iter().take(BLOCK_BYTES).any(|byte| *byte != 0);
            let blocks = content.len().div_ceil(BLOCK_BYTES);
            let start = (from as usize / BLOCK_BYTES..blocks).find(is_data);
            Ok(start.map(|start| {
                let end = (start..blocks).find(|block| !is_data(block)).unwrap_or(blocks);
                (from.max((start * BLOCK_BYTES) as u64), (end * BLOCK_BYTES).min(content.len()) as u64)
            }))
        })
    }
}

impl Folder for Handle {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let length = |state: &State, inode: &usize| state.inodes[*inode].live.len() as u64;
        self.with(|state| Ok(state.names.iter().map(|(name, inode)| (name.clone(), length(state, inode))).collect()))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn PointFile>> {
        self.with(|state| {
            let inode = state.inodes.len();
            state.inodes.push(Inode::default());
            state.name(self.life, name, Some(inode))?;
            Ok(Arc::new(Self { sim: self.sim.clone(), inode, life: self.life }) as Arc<dyn PointFile>)
        })
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn PointFile>> {
        self.with(|state| {
            let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(Arc::new(Self { sim: self.sim.clone(), inode, life: self.life }) as Arc<dyn PointFile>)
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.with(|state| if state.names.contains_key(name) { state.name(self.life, name, None) } else { Ok(()) })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state| {
            let step = state.step(self.life)?;
            if matches!(step, Step::Whole) {
                state.durable_names = state.names.clone();
                state.pending_names.clear();
            }
            outcome(step)
        })
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.capacity_bytes.saturating_sub(state.used_bytes())))
    }
}

impl Cell for Handle {
    fn load(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(|state| Ok(state.record.clone())).map_err(StoreError::Sync)
    }

    fn save(&self, value: Option<&[u8]>) -> Result<(), StoreError> {
        let saved = self.with(|state| {
            let step = state.step(self.life)?;
            if matches!(step, Step::Whole) || state.random.random() {
                state.record = value.map(<[u8]>::to_vec);
            }
            outcome(step)
        });
        saved.map_err(StoreError::Sync)
    }
}
