//! After the end of the worker or of the power at any step, a file says a state only with what the replica held at that state.

use std::collections::HashMap;

use super::medium::SimShelf;
use super::*;

/// More than one part, and not a whole number of them.
const BLOCKS: u64 = 2500;

fn view_on(shelf: &SimShelf) -> ReplicaView {
    ReplicaView { account: Account::load(Box::new(shelf.clone())).into() }
}

/// What the replica held at each state, by the source's own account, which knows nothing of files.
#[derive(Default)]
struct History {
    held: HashMap<(u64, u64), Vec<Option<BlockDigest>>>,
}

impl History {
    /// Everything that the view says must be what a model without files knew at that state.
    fn check(&self, view: &ReplicaView, when: &str) {
        let state = view.state(0);
        if state == ReplicaState::default() {
            return assert!(known(view, BLOCKS).iter().all(Option::is_none), "{when}: a state is missing");
        }
        let held = self.held.get(&(state.instance, state.version));
        let held = held.unwrap_or_else(|| panic!("{when}: a state that never was: {state:?}"));
        assert!(known(view, BLOCKS) == *held, "{when}: at {state:?} the replica held something else");
    }
}

/// A life of a view: a first copy in place, increments that are kept and dropped, a session that starts over. `model` lives the same.
fn live(view: &ReplicaView, model: &ReplicaView, history: &mut History) {
    let both = [view, model];
    for view in both {
        view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
        let in_place = |version| ReplicaState { instance: 77, version };
        view.confirm(0, in_place(0), Confirmed::Nothing).unwrap();
        change(view, (5, 3, 8), in_place(1));
        change(view, (1000, 700, 9), in_place(2));
    }
    keep(both, None, 1, history);
    let rounds: [&[(u64, u64, u8)]; 3] =
        [&[(6, 1, 20), (2499, 1, 21), (1500, 2, 1)], &[(1024, 1024, 1), (0, 6, 22)], &[(0, 2500, 1), (1100, 4, 23)]];
    for (number, round) in (2..).zip(rounds) {
        let dropped = both.map(ReplicaView::begin_attempt);
        both.iter().for_each(|view| change(view, (6, 900, 30), point(number - 1)));
        both.iter().zip(dropped).for_each(|(view, id)| view.roll_back(id));
        let kept = both.map(ReplicaView::begin_attempt);
        for view in both {
            round.iter().for_each(|step| change(view, *step, point(number - 1)));
        }
        keep(both, Some(kept), number, history);
    }
    for view in both {
        view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
        change(view, (40, 4, 40), ReplicaState::default());
        view.confirm(0, point(9), Confirmed::Nothing).unwrap();
    }
    history.held.insert((9, 9), known(model, BLOCKS));
    let last = both.map(ReplicaView::begin_attempt);
    both.iter().for_each(|view| change(view, (41, 1, 41), point(9)));
    keep(both, Some(last), 10, history);
}

fn keep(both: [&ReplicaView; 2], attempts: Option<[AttemptId; 2]>, number: u64, history: &mut History) {
    let [view, model] = both;
    model.keep(attempts.map(|ids| ids[1]), point(number), 1);
    history.held.insert((9, number), known(model, BLOCKS));
    view.keep(attempts.map(|ids| ids[0]), point(number), 1);
}

#[test]
fn a_worker_that_begins_anew_knows_what_the_last_one_knew() {
    let (shelf, mut history) = (SimShelf::default(), History::default());
    let (view, model) = (view_on(&shelf), ReplicaView::default());
    live(&view, &model, &mut history);
    let again = view_on(&shelf.after_kill());
    assert_eq!(again.state_of(0, "root", BLOCKS * BLOCK_BYTES), point(10));
    history.check(&again, "after a life");
    assert_eq!(again.index().find(&BlockDigest([41; 16])), Some(BlockRef { disk: 0, block: 41 }));
}

#[test]
fn a_worker_killed_within_an_increment_knows_what_it_knew_before() {
    let shelf = SimShelf::default();
    let view = view_on(&shelf);
    view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
    change(&view, (5, 3, 8), point(0));
    view.keep(None, point(1), 1);
    let held = known(&view, BLOCKS);
    view.begin_attempt();
    change(&view, (0, 2500, 1), point(1));
    change(&view, (5, 3, 9), point(1));
    view.distrust(0);
    for lost in [false, true] {
        let again = view_on(&shelf.after_power_loss(|| !lost));
        assert_eq!(again.state(0), point(1));
        assert!(known(&again, BLOCKS) == held);
    }
}

#[test]
fn digests_from_the_peer_are_not_asked_for_again_though_the_increment_after_them_fails() {
    let shelf = SimShelf::default();
    let view = view_on(&shelf);
    view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
    change(&view, (5, 3, 8), ReplicaState::default());
    view.confirm(0, point(4), Confirmed::Nothing).unwrap();
    view.begin_attempt();
    assert_eq!(view_on(&shelf.after_power_loss(|| false)).state(0), point(4));
}

#[test]
fn power_may_end_at_any_step_and_lose_any_of_what_was_not_synced() {
    let whole = SimShelf::default();
    live(&view_on(&whole), &ReplicaView::default(), &mut History::default());
    assert!(whole.steps() > 30, "{} steps", whole.steps());
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut toss = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.is_multiple_of(2)
    };
    let mut known_after = 0;
    for end in 0..=whole.steps() {
        let (shelf, mut history) = (SimShelf::default(), History::default());
        shelf.limit(end);
        // The view goes on without its files, as it does when they fail; nothing of that may come back.
        live(&view_on(&shelf), &ReplicaView::default(), &mut history);
        for case in 0..6 {
            let after = match case {
                0 => shelf.after_kill(),
                1 => shelf.after_power_loss(|| false),
                _ => shelf.after_power_loss(&mut toss),
            };
            let view = view_on(&after);
            history.check(&view, &format!("power ended after step {end}, case {case}"));
            known_after += u64::from(view.state(0) != ReplicaState::default());
        }
    }
    assert!(known_after > whole.steps(), "most crashes cost nothing: {known_after} of {}", whole.steps() * 6);
}

#[test]
fn power_may_end_while_a_file_grows_with_its_disk() {
    let larger = 2 * BLOCKS;
    let begin = |shelf: &SimShelf| {
        let view = view_on(shelf);
        view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
        change(&view, (5, 3, 8), point(0));
        change(&view, (2499, 1, 9), point(0));
        view.keep(None, point(1), 1);
        view
    };
    let whole = SimShelf::default();
    let view = begin(&whole);
    let before = whole.steps();
    view.grow(0, "root", larger * BLOCK_BYTES).unwrap();
    let held = known(&view, larger);
    assert!(whole.steps() > before + 3, "{} steps", whole.steps());
    let again = view_on(&whole.after_kill());
    assert_eq!(again.state_of(0, "root", larger * BLOCK_BYTES), point(1));
    assert!(known(&again, larger) == held);
    for end in before..=whole.steps() {
        for lost in [false, true] {
            let shelf = SimShelf::default();
            let view = begin(&shelf);
            shelf.limit(end);
            view.grow(0, "root", larger * BLOCK_BYTES).unwrap();
            let after = view_on(&shelf.after_power_loss(|| !lost));
            match after.state(0) {
                state if state == ReplicaState::default() => {}
                state => {
                    assert_eq!(state, point(1));
                    let blocks = if after.state_of(0, "root", larger * BLOCK_BYTES) == state { larger } else { BLOCKS };
                    assert!(known(&after, blocks)[..] == held[..blocks as usize], "power ended after step {end}");
                }
            }
        }
    }
}

#[test]
fn a_full_disk_costs_what_is_known_and_nothing_else() {
    let (shelf, model) = (SimShelf::default(), ReplicaView::default());
    let view = view_on(&shelf);
    for view in [&view, &model] {
        view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
        change(view, (5, 3, 8), point(0));
        view.keep(None, point(1), 1);
    }
    let attempt = view.begin_attempt();
    change(&view, (5, 3, 9), point(1));
    shelf.fill_up();
    view.keep(Some(attempt), point(2), 1);
    assert_eq!(view.state(0), ReplicaState::default(), "the next session asks the peer");
    assert!(!view.holds(0, 6, &BlockDigest([9; 16])), "nothing is taken for held");
    assert_eq!(shelf.bytes(0), None);
    view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap();
    change(&view, (5, 3, 8), ReplicaState::default());
    view.keep(None, point(2), 1);
    assert_eq!(view.state(0), point(2), "in memory it goes on");
    assert!(view.holds(0, 6, &BlockDigest([8; 16])));
}

#[test]
fn a_file_that_is_damaged_cut_or_foreign_is_dropped() {
    let shelf = SimShelf::default();
    live(&view_on(&shelf), &ReplicaView::default(), &mut History::default());
    let whole = shelf.bytes(0).unwrap();
    assert_eq!(view_on(&shelf.after_kill()).state(0), point(10));
    let dropped = |what: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        let shelf = shelf.after_kill();
        shelf.damage(0, damage);
        let view = view_on(&shelf);
        assert_eq!(view.state(0), ReplicaState::default(), "{what}");
        assert!(known(&view, BLOCKS).iter().all(Option::is_none), "{what}");
        assert_eq!(shelf.bytes(0), None, "{what}");
    };
    for length in [0, 511, 4096, whole.len() - 1] {
        dropped("cut", &|bytes| bytes.truncate(length));
    }
    dropped("longer", &|bytes| bytes.push(0));
    dropped("foreign", &|bytes| bytes[..4].copy_from_slice(b"ELF!"));
    for at in [20, 64, 500] {
        dropped("header", &|bytes| bytes[at] ^= 1);
    }
    dropped("kind of a part", &|bytes| bytes[4096] ^= 1);
    dropped("no kind of a part", &|bytes| bytes[4097] = 7);
    let digests = whole.iter().rposition(|byte| *byte == 41).unwrap();
    dropped("a digest", &|bytes| bytes[digests] = 40);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 64, ..Default::default() })]

    #[test]
    fn any_history_and_any_crash_leave_the_truth_or_nothing(
        rounds in proptest::collection::vec(
            (proptest::collection::vec((0u64..2400, 1u64..100, 0u8..6), 0..6), proptest::bool::ANY), 1..6),
        end in 0u64..120,
        losses in proptest::collection::vec(proptest::bool::ANY, 64),
    ) {
        let (shelf, mut history) = (SimShelf::default(), History::default());
        let (view, model) = (view_on(&shelf), ReplicaView::default());
        let both = [&view, &model];
        shelf.limit(end);
        both.iter().for_each(|view| view.start_over(0, "root", BLOCKS * BLOCK_BYTES).unwrap());
        keep(both, None, 1, &mut history);
        for (number, (round, kept)) in (2..).zip(rounds) {
            let ids = both.map(ReplicaView::begin_attempt);
            for view in both {
                round.iter().for_each(|step| change(view, *step, point(number - 1)));
            }
            if kept {
                keep(both, Some(ids), number, &mut history);
            } else {
                both.iter().zip(ids).for_each(|(view, id)| view.roll_back(id));
            }
        }
        let mut losses = losses.into_iter().cycle();
        let after = view_on(&shelf.after_power_loss(|| losses.next().unwrap()));
        history.check(&after, "after the crash");
    }
}
