//! The disks by place: what is known of each part, and which slab of the table a part of digests is.

use crate::index::BlockRef;
use crate::index::digests::{DigestStore, PART_BLOCKS};
use crate::page::BlockDigest;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Unknown,
    Zero,
    Slab(u32),
}

#[derive(Debug)]
pub(super) struct Disk<S> {
    pub(super) blocks: u64,
    pub(super) parts: Vec<Part>,
    pub(super) store: S,
}

/// A part of digests, as the table names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slab {
    pub(super) disk: u16,
    pub(super) part: u32,
}

#[derive(Debug)]
pub(super) struct Disks<S> {
    /// By number of the disk.
    pub(super) all: Vec<Option<Disk<S>>>,
    pub(super) slabs: Vec<Option<Slab>>,
}

impl<S: DigestStore> Disks<S> {
    pub(super) fn disk(&self, disk: u16) -> Option<&Disk<S>> {
        self.all.get(usize::from(disk))?.as_ref()
    }

    pub(super) fn disk_mut(&mut self, disk: u16) -> Option<&mut Disk<S>> {
        self.all.get_mut(usize::from(disk))?.as_mut()
    }

    pub(super) fn part(&self, disk: u16, part: u32) -> Option<Part> {
        self.disk(disk)?.parts.get(part as usize).copied()
    }

    pub(super) fn set_part(&mut self, disk: u16, part: u32, to: Part) {
        if let Some(place) = self.disk_mut(disk).and_then(|disk| disk.parts.get_mut(part as usize)) {
            *place = to;
        }
    }

    /// The place that a position names.
    pub(super) fn place(&self, position: u32) -> Option<BlockRef> {
        let slab = (*self.slabs.get(position as usize / PART_BLOCKS)?)?;
        let block = u64::from(slab.part) * PART_BLOCKS as u64 + u64::from(position) % PART_BLOCKS as u64;
        Some(BlockRef { disk: slab.disk, block })
    }

    pub(super) fn digest_at(&self, position: u32) -> BlockDigest {
        let digest = self.place(position).and_then(|at| Some(self.disk(at.disk)?.store.digest(at.block)));
        digest.unwrap_or(BlockDigest::UNKNOWN)
    }
}
