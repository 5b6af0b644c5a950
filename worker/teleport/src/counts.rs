//! How many pages of each class a batch holds.

use std::ops::AddAssign;

/// Pages by class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageCounts {
    /// All-zero pages, however QEMU sent them, and pages of one other byte repeated.
    pub zero: u64,
    /// Sent as references into the replica.
    pub teleported: u64,
    /// Sent as bytes.
    pub literal: u64,
    /// Sent as references first, then as bytes, since the replica's blocks did not verify.
    pub fallback: u64,
}

impl PageCounts {
    /// All pages.
    pub fn total(&self) -> u64 {
        self.zero + self.teleported + self.literal + self.fallback
    }

    /// The same pages once those that were teleported had to be sent again as bytes.
    pub fn fallen_back(self) -> Self {
        Self { teleported: 0, fallback: self.fallback + self.teleported, ..self }
    }
}

impl AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.teleported += other.teleported;
        self.literal += other.literal;
        self.fallback += other.fallback;
    }
}
