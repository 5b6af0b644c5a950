//! The durable record of a group: which points there are, and what is under way.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::format::{FileId, FileKind};
use super::lease::{Held, HeldPoint};
use super::{GroupState, Lineage, PointInfo};

/// What is under way; decides what a crash leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// The replica is the newest point.
    Settled,
    /// The newest point is in a sealed journal; nothing of it is in place.
    Committed,
    /// The newest point is in a sealed journal and is being put in place.
    Applying {
        /// Whether there is a sealed undo file of it. Said here, so that damage is not taken for "not made yet".
        undo: bool,
    },
    /// A migration writes in place, behind `layer.undo`.
    Layer,
}

/// One VM's points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) lineage: Lineage,
    /// Oldest first, numbers without gaps. Empty only if damaged.
    pub(super) points: Vec<PointInfo>,
    /// How many to keep once the newest is in place.
    pub(super) keep: usize,
    /// What leases hold besides, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) held: Vec<Held>,
    /// Sizes of the disks at the newest point, in bytes.
    pub(super) disks: BTreeMap<String, u64>,
    /// The disks in the order of their numbers in files. Empty: in that of their names, as in records from before disks could be added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) order: Vec<String>,
    pub(super) phase: Phase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) damaged: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lost: Option<String>,
}

impl Record {
    /// The number of a disk in files.
    pub(super) fn number_of(&self, disk: &str) -> Option<usize> {
        match self.order.is_empty() {
            true => self.disks.keys().position(|known| known == disk),
            false => self.order.iter().position(|known| known == disk),
        }
    }

    pub(super) fn newest(&self) -> Option<u64> {
        self.points.last().map(|point| point.number)
    }

    /// The oldest point that can be gone back to, listed or held. Numbers have no gaps, so it says which undo files there are.
    pub(super) fn oldest(&self) -> Option<u64> {
        let listed = self.points.first()?.number;
        Some(self.held.iter().map(|held| held.point.number).fold(listed, u64::min))
    }

    /// A point that can be opened, listed or held.
    pub(super) fn find(&self, point: u64) -> Option<PointInfo> {
        let held = self.held.iter().map(|held| held.point);
        self.points.iter().copied().chain(held).find(|known| known.number == point)
    }

    /// The undo files that are there for leases only.
    pub(super) fn held_back(&self) -> Vec<FileId> {
        let (Some(oldest), Some(listed)) = (self.oldest(), self.points.first()) else { return vec![] };
        (oldest + 1..=listed.number).map(|point| self.undo(point)).collect()
    }

    /// Points were taken out: an undo file from which nothing older can be reached is of no use.
    pub(super) fn forget_useless_undo(&mut self) {
        let reaches = self.oldest() < self.newest();
        if let Phase::Applying { undo } = &mut self.phase {
            *undo &= reaches;
        }
    }

    pub(super) fn journal(&self, point: u64) -> FileId {
        FileId { kind: FileKind::Journal, lineage: self.lineage, point }
    }

    pub(super) fn undo(&self, point: u64) -> FileId {
        FileId { kind: FileKind::Undo, lineage: self.lineage, point }
    }

    pub(super) fn layer(&self) -> FileId {
        FileId { kind: FileKind::Layer, lineage: self.lineage, point: self.newest().unwrap_or_default() }
    }

    /// The undo files that lead from the newest point to those before it, oldest first.
    pub(super) fn undo_files(&self) -> Vec<FileId> {
        let (Some(oldest), Some(newest)) = (self.oldest(), self.newest()) else { return vec![] };
        let made = match self.phase {
            Phase::Committed | Phase::Applying { undo: false } => oldest + 1..newest,
            _ => oldest + 1..newest + 1,
        };
        made.map(|point| self.undo(point)).collect()
    }

    /// All files that the record speaks of.
    pub(super) fn files(&self) -> Vec<FileId> {
        let mut files = self.undo_files();
        match (self.phase, self.newest()) {
            (Phase::Committed | Phase::Applying { .. }, Some(newest)) => files.push(self.journal(newest)),
            (Phase::Layer, _) => files.push(self.layer()),
            _ => {}
        }
        files
    }

    pub(super) fn state(&self) -> GroupState {
        GroupState {
            lineage: Some(self.lineage),
            points: self.points.clone(),
            damaged: self.damaged.clone(),
            lost: self.lost.clone(),
            held: self.held.iter().map(HeldPoint::from).collect(),
            layer: self.phase == Phase::Layer,
            applying: matches!(self.phase, Phase::Committed | Phase::Applying { .. }),
        }
    }
}
