//! The power ends after every single step of a history.

use super::history::{AMPLE, Driver, Edit, Op};
use super::sim::{Loss, Trouble};

const OPERATIONS: usize = 7;

/// Draws and does a history without trouble; returns it and how many steps it takes.
fn rehearse(seed: u64) -> (Vec<Op>, u64) {
    let mut driver = Driver::new(seed, AMPLE);
    let began = driver.sim.steps();
    let mut ops = Vec::new();
    let mut steps = began;
    for _ in 0..OPERATIONS {
        let op = driver.draw();
        driver.act(&op).unwrap();
        steps = driver.sim.steps();
        driver.settle();
        ops.push(op);
    }
    (ops, steps - began)
}

/// Does the history, ends the power after `step` steps, and again `again` steps into the recovery.
fn interrupted(seed: u64, ops: &[Op], step: u64, again: Option<u64>, loss: Loss) {
    let mut driver = Driver::new(seed, AMPLE);
    driver.sim.trouble(step, Trouble::PowerOff);
    let _ = ops.iter().try_for_each(|op| driver.act(op));
    driver.close();
    driver.sim.power_on(loss);
    if let Some(again) = again {
        driver.sim.trouble(again, Trouble::PowerOff);
        let opened = driver.open().is_ok();
        assert!(opened || driver.sim.is_off(), "recovery failed on its own");
        driver.close();
        driver.sim.power_on(loss);
    }
    driver.open().unwrap();
    driver.settle();
    // Life goes on.
    for _ in 0..2 {
        let op = driver.draw();
        driver.act(&op).unwrap();
        driver.settle();
    }
}

fn every_step(seeds: std::ops::Range<u64>, losses: &[Loss]) {
    for seed in seeds {
        let (ops, steps) = rehearse(seed);
        for step in 1..=steps {
            for loss in losses {
                let again = (step % 2 == 0).then_some(1 + (step * 7 + seed) % 13);
                let run = || interrupted(seed, &ops, step, again, *loss);
                let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                assert!(passed.is_ok(), "seed {seed}, step {step} of {steps}, again {again:?}, {loss:?}");
            }
        }
    }
}

#[test]
fn whatever_step_the_power_ends_at_the_points_are_whole_and_what_was_committed_is_there() {
    every_step(0..12, &[Loss::Everything, Loss::Some]);
}

#[test]
fn whatever_step_the_process_ends_at_the_points_are_whole_and_what_was_committed_is_there() {
    every_step(100..108, &[Loss::Nothing]);
}

#[test]
fn long_histories_without_trouble_hold_every_point() {
    for seed in 1000..1040 {
        let mut driver = Driver::new(seed, AMPLE);
        for _ in 0..25 {
            let op = driver.draw();
            driver.act(&op).unwrap();
            driver.settle();
        }
    }
}

#[test]
fn what_an_undone_layer_left_behind_the_end_of_a_disk_is_no_part_of_what_it_grows_by() {
    let grow = |size| Edit::Grow { disk: "data".to_owned(), size };
    let write = |offset, byte| Edit::Write { disk: "data".to_owned(), offset, data: vec![byte; 5000] };
    let layer = Op::Layer {
        grown: vec![grow(60_000)],
        batches: vec![vec![write(38_000, 1)], vec![write(50_000, 2)]],
        keep: false,
    };
    // Less than the layer had made it, more, and in two steps.
    for sizes in [vec![52_000], vec![70_000], vec![45_000, 65_000]] {
        let edits: Vec<_> = sizes.into_iter().flat_map(|size| [grow(size), write(size - 6000, 3)]).collect();
        let ops = [Op::Adopt, layer.clone(), Op::Increment { edits, keep: 3 }];
        let mut rehearsal = Driver::new(7, AMPLE);
        for op in &ops {
            rehearsal.act(op).unwrap();
            rehearsal.settle();
        }
        for step in 1..=rehearsal.sim.steps() {
            for loss in [Loss::Everything, Loss::Some, Loss::Nothing] {
                for again in [None, Some(1 + step % 13)] {
                    interrupted(7, &ops, step, again, loss);
                }
            }
        }
    }
}
