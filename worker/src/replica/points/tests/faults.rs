//! A single step fails, and the worker lives on.

use std::io::ErrorKind;

use super::history::{AMPLE, Driver, Op};
use super::sim::{Loss, Trouble};

/// Lets each step of a history fail once, goes on in the same group where it lets us, and at last opens it again.
fn every_step_fails_once(seed: u64, kind: ErrorKind, loss: Loss) {
    for step in 1.. {
        let mut driver = Driver::new(seed, AMPLE);
        let adopt = Op::Adopt;
        driver.act(&adopt).unwrap();
        driver.sim.trouble(step, Trouble::Error(kind));
        let before = driver.sim.steps();
        let mut failed = false;
        for _ in 0..6 {
            let op = driver.draw();
            if driver.act(&op).is_err() {
                failed = true;
                break;
            }
            // Older points may have given way.
            driver.possible[0].kept = driver.possible[0].kept.min(1);
            driver.possible[0].held_may_go = true;
        }
        for model in &mut driver.possible {
            model.kept = model.kept.min(1);
            model.held_may_go = true;
        }
        let over = driver.sim.steps() - before < step;
        driver.sim.no_trouble();
        if failed {
            // A layer that is still open may be undone at once, unless the file or the record is unknown.
            if let Some(group) = driver.open_group() {
                let _ = group.undo_layer();
            }
            driver.close();
            driver.sim.power_on(loss);
            driver.open().unwrap();
        }
        driver.settle();
        if over {
            return;
        }
    }
}

#[test]
fn a_step_that_fails_once_costs_at_most_what_was_not_committed() {
    for seed in 0..4 {
        every_step_fails_once(seed, ErrorKind::Other, Loss::Everything);
        every_step_fails_once(seed + 10, ErrorKind::Other, Loss::Nothing);
    }
}

#[test]
fn a_full_file_system_costs_at_most_older_points_and_what_was_not_committed() {
    for seed in 20..24 {
        every_step_fails_once(seed, ErrorKind::StorageFull, Loss::Everything);
        every_step_fails_once(seed + 10, ErrorKind::StorageFull, Loss::Some);
    }
}

#[test]
fn a_failed_increment_can_be_tried_again_in_the_same_group() {
    for step in 1..40 {
        let mut driver = Driver::new(step, AMPLE);
        driver.act(&Op::Adopt).unwrap();
        let op = loop {
            let op = driver.draw();
            if matches!(op, Op::Increment { .. }) {
                break op;
            }
        };
        driver.sim.trouble(step, Trouble::Error(ErrorKind::Other));
        let mut tries = 0;
        while driver.possible.len() != 1 || driver.act(&op).is_err() {
            tries += 1;
            assert!(tries < 4);
            if driver.possible.len() != 1 {
                // Whether it was committed is found in the record only.
                driver.open().unwrap();
                driver.settle();
            } else if driver.model().points.len() > 1 {
                // Committed, and not yet in place.
                if driver.group().apply().is_err() {
                    // Whether it is noted that it is in place, too.
                    driver.open().unwrap();
                }
                break;
            }
        }
        driver.sim.no_trouble();
        driver.settle();
    }
}
