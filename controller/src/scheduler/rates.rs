//! How the budget of a link is shared by the moves on it: evenly, and nobody gets more than was asked for.
//!
//! ```text
//!   budget ──┬── replication: at least its reserve, and what moves leave
//!            └── moves: each an equal part; what one does not want goes to the others
//! ```

use std::collections::BTreeMap;

use pageport_proto::MigrationId;

use super::fleet::Line;

/// A move that would get less than this, in bits per second, waits instead, unless it is alone.
pub const FLOOR_BPS: u64 = 10_000_000;
/// What a paused move goes on with, in bits per second.
pub const PAUSED_BPS: u64 = 100_000;
/// Of a budget, what replication keeps where there is any, in per cent.
pub const RESERVE_PERCENT: u64 = 20;

impl Line {
    /// What moves may send together, in bits per second; 0: no bound.
    pub fn for_moves_bps(&self) -> u64 {
        if self.budget_bps == 0 { 0 } else { self.budget_bps.saturating_sub(self.reserved_bps).max(1) }
    }

    /// Would one more leave each enough?
    pub fn has_bandwidth(&self, running: u32) -> bool {
        running == 0 || self.budget_bps == 0 || self.for_moves_bps() / (u64::from(running) + 1) >= FLOOR_BPS
    }
}

/// What each move gets, in bits per second (0: no bound), given what was asked for each (0: as much as there is).
pub fn shares(line: &Line, asked: &BTreeMap<MigrationId, u64>) -> BTreeMap<MigrationId, u64> {
    let mut left_bps = line.for_moves_bps();
    if left_bps == 0 {
        return asked.clone();
    }
    // Whoever asks for least comes first: what it leaves is shared by the others.
    let mut order: Vec<_> = asked.iter().map(|(id, bps)| (if *bps == 0 { u64::MAX } else { *bps }, *id)).collect();
    order.sort_unstable();
    let mut waiting = order.len() as u64;
    let mut shares = BTreeMap::new();
    for (bps, id) in order {
        // Never 0, which would be no bound.
        let share = bps.min(left_bps / waiting).max(1);
        left_bps = left_bps.saturating_sub(share);
        waiting -= 1;
        shares.insert(id, share);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(line: Line, asked: &[u64]) -> Vec<u64> {
        let asked: BTreeMap<_, _> = asked.iter().map(|bps| (MigrationId::generate(), *bps)).collect();
        let shares = shares(&line, &asked);
        let mut out: Vec<_> = shares.into_values().collect();
        out.sort_unstable();
        out
    }

    #[test]
    fn a_budget_is_shared_evenly_and_what_one_leaves_goes_to_the_others() {
        let line = |budget_bps, reserved_bps| Line { budget_bps, reserved_bps, migrations: 0 };
        assert_eq!(share(line(0, 0), &[0, 7]), [0, 7], "no budget: as was asked");
        assert_eq!(share(line(100, 0), &[0]), [100]);
        assert_eq!(share(line(100, 20), &[0, 0]), [40, 40]);
        assert_eq!(share(line(100, 0), &[10, 0, 0]), [10, 45, 45]);
        assert_eq!(share(line(100, 0), &[90, 80]), [50, 50]);
        assert_eq!(share(line(100, 0), &[]), [0; 0]);
    }

    #[test]
    fn one_more_is_let_on_while_each_keeps_enough_and_one_alone_always() {
        let line = Line { budget_bps: 3 * FLOOR_BPS, reserved_bps: FLOOR_BPS, migrations: 0 };
        assert!(line.has_bandwidth(0) && line.has_bandwidth(1) && !line.has_bandwidth(2));
        let narrow = Line { budget_bps: 1_000_000, ..Line::default() };
        assert!(narrow.has_bandwidth(0) && !narrow.has_bandwidth(1));
        assert!(Line::default().has_bandwidth(1000));
    }
}
