//! [`Epoch`]: a number per VM that only grows; whoever holds the newest may run the VM.
//!
//! Compares as (generation, n): the generation sits in the high bits and is raised when controllers are restored from
//! a backup, so that everything granted afterwards is newer than anything that the lost controllers granted.

use std::fmt;

use serde::{Deserialize, Serialize};

const N_BITS: u32 = 48;

/// An ownership epoch. [`Epoch::ZERO`] is never granted: "nothing seen yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch(u64);

impl Epoch {
    /// Older than any epoch that is granted.
    pub const ZERO: Self = Self(0);

    /// The epoch `n` of a generation.
    pub fn new(generation: u16, n: u64) -> Self {
        Self((u64::from(generation) << N_BITS) | (n & ((1 << N_BITS) - 1)))
    }

    /// As it is stored and sent.
    pub fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// As it is stored and sent.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The next newer one of the same generation.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// How often controllers were restored from a backup.
    pub fn generation(self) -> u64 {
        self.0 >> N_BITS
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0 & ((1 << N_BITS) - 1);
        match self.generation() {
            0 => write!(f, "{n}"),
            generation => write!(f, "{generation}.{n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_generation_is_newer_than_any_epoch_before_it() {
        assert!(Epoch::new(1, 0) > Epoch::new(0, u64::MAX));
        assert!(Epoch::ZERO.next() > Epoch::ZERO);
        assert_eq!(Epoch::new(2, 7).to_string(), "2.7");
        assert_eq!(Epoch::new(0, 7).to_string(), "7");
    }
}
