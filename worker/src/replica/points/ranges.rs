//! Byte ranges of a disk: which are in a set, and what a set of them leaves out.

use std::collections::BTreeMap;

/// A set of byte ranges; those that touch are merged.
#[derive(Debug, Default, Clone)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..end`.
    pub(super) fn insert(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        while let Some((&from, &to)) = self.0.range(..=end).next_back()
            && to >= start
        {
            self.0.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.0.insert(start, end);
    }

    /// The ranges, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(&start, &end)| (start, end))
    }
}

/// A part of a range, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part<T> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) value: Option<T>,
}

/// Ranges that do not overlap, each with a value; the first value that is given to a byte stays.
#[derive(Debug, Clone)]
pub(super) struct Segments<T>(BTreeMap<u64, (u64, T)>);

impl<T> Default for Segments<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Copy> Segments<T> {
    /// Gives `value` to those bytes of `start..end` that have none.
    pub(super) fn fill(&mut self, start: u64, end: u64, value: T) {
        for part in self.parts(start, end) {
            if part.value.is_none() {
                self.0.insert(part.start, (part.end, value));
            }
        }
    }

    /// Splits `start..end` into what has a value and what has none, in order.
    pub(super) fn parts(&self, start: u64, end: u64) -> Vec<Part<T>> {
        let mut parts = Vec::new();
        if start >= end {
            return parts;
        }
        let mut at = start;
        let before = self.0.range(..start).next_back().filter(|(_, (to, _))| *to > start);
        for (&from, &(to, value)) in before.into_iter().chain(self.0.range(start..end)) {
            let from = from.max(start);
            if from > at {
                parts.push(Part { start: at, end: from, value: None });
            }
            at = to.min(end);
            parts.push(Part { start: from, end: at, value: Some(value) });
        }
        if at < end {
            parts.push(Part { start: at, end, value: None });
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_what_was_inserted_and_are_merged(inserted in prop::collection::vec((0_u64..60, 0_u64..20), 0..12)) {
            let mut ranges = Ranges::default();
            let mut model = [false; 80];
            for (start, length) in inserted {
                ranges.insert(start, start + length);
                model[start as usize..(start + length) as usize].fill(true);
            }
            let mut found = [false; 80];
            let mut last = None;
            for (start, end) in ranges.iter() {
                prop_assert!(start < end && last.is_none_or(|last| last < start));
                found[start as usize..end as usize].fill(true);
                last = Some(end);
            }
            prop_assert_eq!(found, model);
        }

        #[test]
        fn the_first_value_of_a_byte_stays(
            filled in prop::collection::vec((0_u64..60, 0_u64..20), 0..12),
            asked in (0_u64..60, 0_u64..20),
        ) {
            let mut segments = Segments::default();
            let mut model = [None; 80];
            for (value, (start, length)) in filled.into_iter().enumerate() {
                segments.fill(start, start + length, value);
                for byte in &mut model[start as usize..(start + length) as usize] {
                    byte.get_or_insert(value);
                }
            }
            let (start, end) = (asked.0, asked.0 + asked.1);
            let mut at = start;
            for part in segments.parts(start, end) {
                prop_assert!(part.start == at && part.end > at);
                prop_assert!(model[at as usize..part.end as usize].iter().all(|value| *value == part.value));
                at = part.end;
            }
            prop_assert_eq!(at, end);
        }
    }
}
