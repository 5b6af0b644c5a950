//! What must hold of views, and of their files after any crash.

mod crash;
mod host;
mod medium;

use pageport_teleport::BlockDigest;
use pageport_teleport::index::BlockLookup as _;

use super::*;
use crate::replica::store::BLOCK_BYTES;

const BLOCKS: u64 = 40;

fn view_of(blocks: u64) -> ReplicaView {
    let view = ReplicaView::default();
    view.start_over(0, "root", blocks * BLOCK_BYTES).unwrap();
    view
}

fn known(view: &ReplicaView, blocks: u64) -> Vec<Option<BlockDigest>> {
    (0..blocks).map(|block| view.index().get(BlockRef { disk: 0, block })).collect()
}

/// A step as a session takes it: what is to change is forgotten, and then perhaps confirmed.
fn change(view: &ReplicaView, (first_block, blocks, content): (u64, u64, u8), state: ReplicaState) {
    view.forget_blocks(0, first_block, blocks).unwrap();
    let digests = vec![BlockDigest([content; 16]); blocks as usize];
    match content {
        0 => {}
        1 => view.confirm(0, state, Confirmed::Zero { first_block, blocks }).unwrap(),
        _ => view.confirm(0, state, Confirmed::Digests { first_block, digests: &digests }).unwrap(),
    }
}

fn point(version: u64) -> ReplicaState {
    ReplicaState { instance: 9, version }
}

#[test]
fn a_block_in_flight_is_neither_held_nor_referred_to() {
    let view = view_of(16);
    assert!(view.holds_zeros(0, 0, 16));
    let digest = BlockDigest([7; 16]);
    let state = ReplicaState { instance: 1, version: 1 };
    view.confirm(0, state, Confirmed::Digests { first_block: 3, digests: &[digest] }).unwrap();
    assert!(view.holds(0, 3, &digest) && view.index().find(&digest).is_some());
    view.forget_blocks(0, 3, 1).unwrap();
    assert!(!view.holds(0, 3, &digest) && view.index().find(&digest).is_none());
    assert!(!view.holds_zeros(0, 0, 16));
    assert_eq!(view.state(0), state);
}

#[test]
fn what_an_attempt_has_changed_is_held_and_found_at_once() {
    let view = view_of(16);
    let attempt = view.begin_attempt();
    let digest = BlockDigest([7; 16]);
    view.forget_blocks(0, 3, 2).unwrap();
    assert!(!view.holds_zeros(0, 3, 1));
    view.confirm(0, point(1), Confirmed::Digests { first_block: 3, digests: &[digest] }).unwrap();
    assert!(view.holds(0, 3, &digest));
    assert_eq!(view.index().find(&digest), Some(BlockRef { disk: 0, block: 3 }));
    view.roll_back(attempt);
    assert!(view.holds_zeros(0, 0, 16));
}

#[test]
fn a_disk_of_another_name_or_size_has_no_known_state() {
    let view = view_of(16);
    view.keep(None, point(3), 1);
    assert_eq!(view.state_of(0, "root", 16 * BLOCK_BYTES), point(3));
    for (name, blocks) in [("data", 16), ("root", 17)] {
        assert_eq!(view.state_of(0, name, blocks * BLOCK_BYTES), ReplicaState::default());
    }
}

#[test]
fn a_disk_that_has_grown_keeps_what_is_known_of_it_and_what_is_new_is_zeros() {
    // In the middle of a part, and across several.
    for (before, after) in [(16, 40), (1000, 5000), (1024, 1025), (3000, 3001)] {
        let view = view_of(before);
        change(&view, (2, 3, 8), point(0));
        change(&view, (before - 1, 1, 9), point(0));
        view.keep(None, point(3), 1);
        view.grow(0, "root", after * BLOCK_BYTES).unwrap();
        assert_eq!(view.state_of(0, "root", after * BLOCK_BYTES), point(3));
        assert!(view.holds(0, 4, &BlockDigest([8; 16])) && view.holds(0, before - 1, &BlockDigest([9; 16])));
        assert_eq!(view.index().find(&BlockDigest([9; 16])), Some(BlockRef { disk: 0, block: before - 1 }));
        assert!(view.holds_zeros(0, before, after - before) && view.holds_zeros(0, 5, before - 6));
        // Of another disk, or back, it is not.
        view.grow(0, "data", 2 * after * BLOCK_BYTES).unwrap();
        view.grow(0, "root", before * BLOCK_BYTES).unwrap();
        assert_eq!(view.state_of(0, "root", after * BLOCK_BYTES), point(3));
        let attempt = view.begin_attempt();
        change(&view, (after - 1, 1, 7), point(3));
        view.keep(Some(attempt), point(4), 1);
        assert!(view.holds(0, after - 1, &BlockDigest([7; 16])));
    }
}

#[test]
fn an_attempt_that_nobody_ended_leaves_no_trace_in_the_next() {
    let view = view_of(16);
    view.keep(None, point(1), 1);
    let first = view.begin_attempt();
    change(&view, (0, 4, 5), point(1));
    let second = view.begin_attempt();
    assert!(view.holds_zeros(0, 0, 16));
    view.roll_back(first);
    change(&view, (8, 1, 6), point(1));
    view.keep(Some(second), point(2), 1);
    assert!(view.holds_zeros(0, 0, 8) && view.holds(0, 8, &BlockDigest([6; 16])));
    assert_eq!(view.state(0), point(2));
}

#[test]
fn an_attempt_during_which_a_session_started_over_is_not_kept() {
    let view = view_of(16);
    view.keep(None, point(1), 1);
    let attempt = view.begin_attempt();
    view.start_over(0, "root", 16 * BLOCK_BYTES).unwrap();
    view.keep(Some(attempt), point(2), 1);
    assert_eq!(view.state(0), ReplicaState::default());
}

#[test]
fn disks_that_the_vm_has_no_more_are_forgotten() {
    let view = view_of(16);
    view.start_over(1, "data", 8 * BLOCK_BYTES).unwrap();
    view.keep(None, point(1), 2);
    assert_eq!(view.state_of(1, "data", 8 * BLOCK_BYTES), point(1));
    let attempt = view.begin_attempt();
    view.keep(Some(attempt), point(2), 1);
    assert_eq!((view.state(0), view.state(1)), (point(2), ReplicaState::default()));
    assert!(!view.holds_zeros(1, 0, 1));
}

proptest::proptest! {
    #[test]
    fn an_attempt_that_is_dropped_leaves_no_trace(
        before in proptest::collection::vec((0u64..32, 1u64..6, 0u8..4), 0..20),
        attempt in proptest::collection::vec((0u64..32, 1u64..6, 0u8..4), 0..20),
    ) {
        let view = view_of(BLOCKS);
        for (version, step) in (1..).zip(before) {
            change(&view, step, point(version));
        }
        let (held, state) = (known(&view, BLOCKS), view.state(0));
        let id = view.begin_attempt();
        for (version, step) in (100..).zip(attempt) {
            change(&view, step, point(version));
        }
        view.roll_back(id);
        proptest::prop_assert_eq!(known(&view, BLOCKS), held);
        proptest::prop_assert_eq!(view.state(0), state);
    }

    #[test]
    fn an_attempt_that_is_kept_leaves_what_it_would_have_left_in_place(
        steps in proptest::collection::vec((0u64..32, 1u64..6, 0u8..4), 0..20),
    ) {
        let (view, model) = (view_of(BLOCKS), view_of(BLOCKS));
        let id = view.begin_attempt();
        for step in steps {
            change(&view, step, point(0));
            change(&model, step, point(0));
        }
        view.keep(Some(id), point(1), 1);
        proptest::prop_assert_eq!(known(&view, BLOCKS), known(&model, BLOCKS));
        proptest::prop_assert_eq!(view.state(0), point(1));
    }
}
