//! Random histories of a group, and a model of what must be found after each step of them.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::group::Group;
use super::super::{Change, ChangeDigest, JournalWriter, Limits, Lineage, MAX_LEASES, PointError, PointInfo};
use super::sim::Sim;

pub(super) const AMPLE: Limits = Limits { points_bytes: u64::MAX >> 1, held_bytes: u64::MAX >> 1, reserve_bytes: 0 };
/// Longer than any test.
pub(super) const FOR_EVER: i64 = i64::MAX;
/// Neither ends at a block.
pub(super) const DISKS: [(&str, usize); 2] = [("data", 40_000), ("root", 61_440 + 1234)];

pub(super) type Disks = BTreeMap<String, Vec<u8>>;

/// A change of one disk.
#[derive(Debug, Clone)]
pub(super) enum Edit {
    Write { disk: String, offset: usize, data: Vec<u8> },
    Zero { disk: String, offset: usize, length: usize },
    Grow { disk: String, size: usize },
}

/// What is done to a group.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Increment {
        edits: Vec<Edit>,
        keep: usize,
    },
    /// The link fails before the commit.
    Abandon(Vec<Edit>),
    Layer {
        /// Disks that are larger than they were at the newest point.
        grown: Vec<Edit>,
        batches: Vec<Vec<Edit>>,
        keep: bool,
    },
    Adopt,
    Forget,
    Reopen,
    Lease(u64),
    Release(u64),
}

/// What a group must hold.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) lineage: Option<Lineage>,
    pub(super) points: Vec<(PointInfo, Disks)>,
    /// So many of the newest points must be there; more may be.
    pub(super) kept: usize,
    /// Points that are held, whatever is kept.
    pub(super) held: BTreeSet<u64>,
    /// Room may have been needed for something else.
    pub(super) held_may_go: bool,
    /// The disks, where there are no points.
    pub(super) disks: Disks,
}

/// A group and all that may be true of it.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) sim: Sim,
    pub(super) limits: Limits,
    group: Option<Group>,
    /// One, except while an operation is under way.
    pub(super) possible: Vec<Model>,
    random: StdRng,
}

impl Model {
    pub(super) fn newest(&self) -> &Disks {
        self.points.last().map_or(&self.disks, |(_, disks)| disks)
    }

    pub(super) fn with_point(&self, lineage: Lineage, number: u64, disks: Disks, keep: usize) -> Self {
        let mut after = self.clone();
        after.lineage = Some(lineage);
        after.points.push((info(number), disks));
        after.kept = (after.kept + 1).min(keep);
        after
    }

    fn only(lineage: Lineage, disks: Disks) -> Self {
        Self { lineage: Some(lineage), points: vec![(info(1), disks.clone())], kept: 1, ..Self::without_points(disks) }
    }

    fn without_points(disks: Disks) -> Self {
        Self { lineage: None, points: Vec::new(), kept: 0, held: BTreeSet::new(), held_may_go: false, disks }
    }

    /// Whether the group holds this.
    pub(super) fn check(&self, group: &Group, sim: &Sim) -> Result<(), String> {
        group.apply().map_err(|error| format!("apply: {error}"))?;
        let state = group.state();
        if state.lineage != self.lineage || state.damaged.is_some() || state.layer || state.applying {
            return Err(format!("state {state:?}, expected lineage {:?}", self.lineage));
        }
        for (name, content) in self.newest() {
            let found = sim.disk(name);
            if found != *content {
                return Err(format!(
                    "disk {name} of {} bytes is not the newest point, of {}",
                    found.len(),
                    content.len()
                ));
            }
        }
        let newest = self.points.last().map(|(info, _)| info);
        if state.points.last() != newest || state.points.len() < self.kept {
            return Err(format!("points {:?}, expected {} up to {newest:?}", state.points, self.kept));
        }
        let held: BTreeSet<u64> = state.held.iter().map(|held| held.point.number).collect();
        if held != self.held && !(self.held_may_go && held.is_subset(&self.held)) {
            return Err(format!("held {held:?}, expected {:?}", self.held));
        }
        for found in state.points.iter().chain(state.held.iter().map(|held| &held.point)) {
            let known = self.points.iter().find(|(info, _)| info == found).ok_or(format!("{found:?} never was"))?;
            for (name, content) in &known.1 {
                if &read_point(group, found.number, name).map_err(|error| error.to_string())? != content {
                    return Err(format!("point {} of {name} reads wrong", found.number));
                }
            }
        }
        let numbers = || state.points.iter().map(|point| point.number).chain(held.iter().copied());
        let (oldest, newest) = (numbers().min().unwrap_or(1), numbers().max().unwrap_or(0));
        let expected = (oldest + 1..=newest).map(|point| format!("{point}.undo"));
        let (mut expected, mut files): (Vec<_>, _) = (expected.collect(), sim.file_names());
        expected.sort();
        files.sort();
        if files == expected { Ok(()) } else { Err(format!("files {files:?}, expected {expected:?}")) }
    }
}

impl Driver {
    /// Starts with disks of random content and without points.
    pub(super) fn new(seed: u64, limits: Limits) -> Self {
        let sim = Sim::new(&DISKS, seed);
        let random = StdRng::seed_from_u64(seed);
        let group = sim.open(limits).unwrap();
        let possible = vec![Model::without_points(sim.disks())];
        Self { sim, limits, group: Some(group), possible, random }
    }

    pub(super) fn group(&self) -> &Group {
        self.group.as_ref().unwrap()
    }

    /// The group, unless the last attempt to open it failed.
    pub(super) fn open_group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    pub(super) fn model(&self) -> &Model {
        assert_eq!(self.possible.len(), 1);
        &self.possible[0]
    }

    pub(super) fn close(&mut self) {
        self.group = None;
    }

    pub(super) fn open(&mut self) -> Result<(), PointError> {
        self.group = None;
        self.group = Some(self.sim.open(self.limits)?);
        Ok(())
    }

    /// Asks that one of the possible is true, and goes on with that.
    pub(super) fn settle(&mut self) {
        let group = self.group.as_ref().unwrap();
        let mut reasons = Vec::new();
        let found =
            self.possible.iter().find(|model| model.check(group, &self.sim).map_err(|r| reasons.push(r)).is_ok());
        let found = found.cloned();
        self.possible = vec![found.unwrap_or_else(|| panic!("none of what is possible: {reasons:#?}"))];
    }

    /// An operation that fits what the group holds now.
    pub(super) fn draw(&mut self) -> Op {
        let disks = self.model().newest().clone();
        let fresh = self.model().lineage.is_none();
        let random = &mut self.random;
        match random.random_range(0..16) {
            0 if !fresh => Op::Forget,
            1 => Op::Adopt,
            2 => Op::Reopen,
            12..15 if !fresh && self.possible[0].held.len() < MAX_LEASES => {
                let open = self.group.as_ref().map(|group| group.state().points).unwrap_or_default();
                Op::Lease(open[random.random_range(0..open.len())].number)
            }
            15 => Op::Release(self.possible[0].held.iter().next().copied().unwrap_or(1)),
            3 => Op::Abandon(edits(random, &disks, true)),
            4..=6 if !fresh => {
                let mut grown = Vec::new();
                for (disk, content) in &disks {
                    if random.random_range(0..3) == 0 {
                        let size = content.len() + random.random_range(0..9000);
                        grown.push(Edit::Grow { disk: disk.clone(), size });
                    }
                }
                let disks = edited(&disks, &grown);
                let batches = random.random_range(1..4);
                let batches = (0..batches).map(|_| edits(random, &disks, false)).collect();
                Op::Layer { grown, batches, keep: random.random_range(0..3) == 0 }
            }
            _ if fresh && random.random() => Op::Adopt,
            _ => Op::Increment { edits: edits(random, &disks, true), keep: random.random_range(1..5) },
        }
    }

    /// Does it; after an error `possible` is what may have become of it.
    pub(super) fn act(&mut self, op: &Op) -> Result<(), PointError> {
        let before = self.possible[0].clone();
        let group = self.group.clone().unwrap();
        let lineage = before.lineage.unwrap_or_else(Lineage::generate);
        let number = before.points.last().map_or(7, |(info, _)| info.number + 1);
        match op {
            Op::Reopen => self.open(),
            Op::Lease(point) => {
                let mut after = before.clone();
                after.held.insert(*point);
                self.possible = vec![before, after.clone()];
                group.lease(*point, FOR_EVER)?;
                self.now(after)
            }
            Op::Release(point) => {
                let mut after = before.clone();
                after.held.remove(point);
                self.possible = vec![before, after.clone()];
                group.release(*point)?;
                self.now(after)
            }
            Op::Adopt => {
                let after = Model::only(Lineage::generate(), before.newest().clone());
                self.possible = vec![before, after.clone()];
                group.adopt(after.lineage.unwrap(), info(1))?;
                self.now(after)
            }
            Op::Forget => {
                let after = Model::without_points(before.newest().clone());
                self.possible = vec![before, after.clone()];
                group.forget()?;
                self.now(after)
            }
            Op::Abandon(edits) => {
                let journal = group.begin(lineage, number)?;
                send(&journal, edits).map(drop)
            }
            Op::Increment { edits, keep } => {
                let after = before.with_point(lineage, number, edited(before.newest(), edits), *keep);
                let journal = group.begin(lineage, number)?;
                let digest = send(&journal, edits)?;
                self.possible = vec![before, after.clone()];
                group.commit(&journal, info(number), digest, *keep)?;
                self.now(after)?;
                group.apply()
            }
            Op::Layer { grown, batches, keep } => {
                let layer = group.open_layer()?;
                for (name, disk) in &group.inner.medium.disks {
                    let sizes = grown.iter().filter_map(|edit| match edit {
                        Edit::Grow { disk, size } if disk == name => Some(*size),
                        _ => None,
                    });
                    for size in sizes {
                        disk.grow(size as u64).map_err(|source| PointError::Disk {
                            what: "grow",
                            disk: name.clone(),
                            source,
                        })?;
                    }
                }
                let mut disks = edited(before.newest(), grown);
                for batch in batches {
                    layer.change(&batch.iter().map(in_place).collect::<Vec<_>>())?;
                    disks = edited(&disks, batch);
                }
                if *keep {
                    let after = Model::without_points(disks);
                    self.possible = vec![before, after.clone()];
                    layer.keep()?;
                    self.now(after)
                } else {
                    layer.undo()
                }
            }
        }
    }

    fn now(&mut self, model: Model) -> Result<(), PointError> {
        self.possible = vec![model];
        Ok(())
    }
}

pub(super) fn info(number: u64) -> PointInfo {
    PointInfo {
        number,
        taken_unix_ms: 1000 + number as i64,
        changed_bytes: number * 10,
        quiesced: number.is_multiple_of(2),
        disks: 2,
    }
}

pub(super) fn read_point(group: &Group, point: u64, disk: &str) -> Result<Vec<u8>, PointError> {
    let reader = group.reader(point, disk)?;
    let mut content = vec![0; reader.size_bytes() as usize];
    // In pieces that fit nothing.
    for (piece, start) in content.chunks_mut(7001).zip((0..).step_by(7001)) {
        reader.read(start, piece)?;
    }
    Ok(content)
}

/// Sends changes into a journal, and computes the digest as the source does.
pub(super) fn send(journal: &JournalWriter, edits: &[Edit]) -> Result<[u8; 32], PointError> {
    let mut digest = ChangeDigest::default();
    for edit in edits {
        match edit {
            Edit::Write { disk, offset, data } => {
                digest.data(disk, *offset as u64, data);
                journal.write(disk, *offset as u64, data.len() as u32, &zstd::bulk::compress(data, 1).unwrap())?;
            }
            Edit::Zero { disk, offset, length } => {
                digest.zero(disk, *offset as u64, *length as u64);
                journal.zero(disk, *offset as u64, *length as u64)?;
            }
            Edit::Grow { disk, size } => {
                digest.resize(disk, *size as u64);
                journal.resize(disk, *size as u64)?;
            }
        }
    }
    Ok(digest.finish())
}

pub(super) fn in_place(edit: &Edit) -> Change<'_> {
    match edit {
        Edit::Write { disk, offset, data } => Change::Write { disk, offset: *offset as u64, data },
        Edit::Zero { disk, offset, length } => Change::Zero { disk, offset: *offset as u64, length: *length as u64 },
        Edit::Grow { .. } => panic!("a layer does not grow disks"),
    }
}

pub(super) fn edited(disks: &Disks, edits: &[Edit]) -> Disks {
    let mut disks = disks.clone();
    for edit in edits {
        match edit {
            Edit::Write { disk, offset, data } => {
                disks.get_mut(disk).unwrap()[*offset..offset + data.len()].copy_from_slice(data);
            }
            Edit::Zero { disk, offset, length } => disks.get_mut(disk).unwrap()[*offset..offset + length].fill(0),
            Edit::Grow { disk, size } => disks.get_mut(disk).unwrap().resize(*size, 0),
        }
    }
    disks
}

/// A write of bytes that do not compress to nothing.
pub(super) fn write(random: &mut StdRng, disk: &str, offset: usize, length: usize) -> Edit {
    let data = (0..length).map(|_| random.random_range(0..16)).collect();
    Edit::Write { disk: disk.to_owned(), offset, data }
}

/// A few changes anywhere, overlapping or not.
pub(super) fn edits(random: &mut StdRng, disks: &Disks, may_grow: bool) -> Vec<Edit> {
    let mut sizes: BTreeMap<_, _> = disks.iter().map(|(name, content)| (name.clone(), content.len())).collect();
    let count = random.random_range(0..5);
    (0..count)
        .map(|_| {
            let disk = if random.random() { "data" } else { "root" };
            let size = sizes[disk];
            let offset = random.random_range(0..size);
            let length = random.random_range(1..=(size - offset).min(20_000));
            match random.random_range(0..8) {
                0 if may_grow => {
                    let size = size + random.random_range(0..6000);
                    sizes.insert(disk.to_owned(), size);
                    Edit::Grow { disk: disk.to_owned(), size }
                }
                1 | 2 => Edit::Zero { disk: disk.to_owned(), offset, length },
                _ => write(random, disk, offset, length),
            }
        })
        .collect()
}
