//! Which blocks the changes of a session touch that are not acknowledged yet.
//!
//! What an acknowledged change has brought is known only where no later one is under way: that one may be carried out already.

use std::collections::VecDeque;
use std::ops::Range;

/// Names a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(u64);

/// In the order in which they are planned, which is that in which they are sent. One that was planned and never sent stays.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    next: u64,
    changes: VecDeque<(u64, Range<u64>)>,
}

impl InFlight {
    /// One more, of these blocks.
    pub(super) fn begin(&mut self, blocks: Range<u64>) -> Number {
        self.next += 1;
        self.changes.push_back((self.next, blocks));
        Number(self.next)
    }

    /// A change is acknowledged: the parts of it that no later one touches.
    pub(super) fn end(&mut self, Number(number): Number) -> Vec<Range<u64>> {
        let Some(at) = self.changes.iter().position(|(one, _)| *one == number) else { return vec![] };
        let mut parts: Vec<_> = self.changes.remove(at).map(|(_, blocks)| blocks).into_iter().collect();
        for (_, later) in self.changes.range(at..) {
            if parts.iter().any(|part| part.start < later.end && later.start < part.end) {
                parts = parts.into_iter().flat_map(|part| without(&part, later)).collect();
            }
        }
        parts.retain(|part| !part.is_empty());
        parts
    }
}

fn without(part: &Range<u64>, taken: &Range<u64>) -> [Range<u64>; 2] {
    [part.start..part.end.min(taken.start.max(part.start)), part.start.max(taken.end.min(part.end))..part.end]
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_a_later_change_touches_is_not_known() {
        let mut in_flight = InFlight::default();
        let numbers = [0..10, 3..5, 4..7, 20..22].map(|blocks| in_flight.begin(blocks));
        assert_eq!(in_flight.end(numbers[0]), [0..3, 7..10]);
        assert_eq!(in_flight.end(numbers[1]), [3..4]);
        let all = in_flight.begin(0..100);
        assert_eq!(in_flight.end(numbers[2]), []);
        assert_eq!(in_flight.end(all), [0..100], "one before it says nothing of it");
        assert_eq!(in_flight.end(all), []);
        assert_eq!(in_flight.end(numbers[3]), [20..22]);
    }
}
