//! Readers while the group goes on.

use std::sync::atomic::{AtomicBool, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::history::{AMPLE, Driver, Op, edits, in_place};

fn adopted() -> Driver {
    let mut driver = Driver::new(11, AMPLE);
    driver.act(&Op::Adopt).unwrap();
    driver
}

#[test]
fn a_reader_sees_its_point_while_later_ones_are_put_in_place_and_pruned_and_layers_come_and_go() {
    let mut driver = adopted();
    let mut random = StdRng::seed_from_u64(12);
    for _ in 0..2 {
        let edits = edits(&mut random, driver.model().newest(), true);
        driver.act(&Op::Increment { edits, keep: 3 }).unwrap();
    }
    let points = driver.model().points.clone();
    let readers = points.iter().flat_map(|(info, disks)| {
        disks.iter().map(|(name, content)| (driver.group().reader(info.number, name).unwrap(), content))
    });
    let readers: Vec<_> = readers.collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (reader, content) in &readers {
            let done = &done;
            scope.spawn(move || {
                let mut last = false;
                while !last {
                    // One more time after the end.
                    last = done.load(Ordering::Acquire);
                    let mut found = vec![0; reader.size_bytes() as usize];
                    for (piece, start) in found.chunks_mut(9000).zip((0..).step_by(9000)) {
                        reader.read(start, piece).unwrap();
                    }
                    assert!(&found == *content);
                }
            });
        }
        for round in 0..40 {
            let newest = driver.model().newest().clone();
            if round % 3 == 0 {
                let batches = (0..3).map(|_| edits(&mut random, &newest, false)).collect();
                driver.act(&Op::Layer { grown: vec![], batches, keep: false }).unwrap();
            } else {
                let edits = edits(&mut random, &newest, true);
                driver.act(&Op::Increment { edits, keep: 1 + round % 3 }).unwrap();
            }
        }
        done.store(true, Ordering::Release);
    });
    drop(readers);
    driver.settle();
}

#[test]
fn a_reader_sees_its_point_below_an_open_layer() {
    let mut driver = adopted();
    let mut random = StdRng::seed_from_u64(13);
    for _ in 0..3 {
        let edits = edits(&mut random, driver.model().newest(), false);
        driver.act(&Op::Increment { edits, keep: 9 }).unwrap();
    }
    let layer = driver.group().open_layer().unwrap();
    for _ in 0..6 {
        let batch = edits(&mut random, driver.model().newest(), false);
        layer.change(&batch.iter().map(in_place).collect::<Vec<_>>()).unwrap();
        for (info, disks) in &driver.model().points {
            for (name, content) in disks {
                assert!(&super::history::read_point(driver.group(), info.number, name).unwrap() == content);
            }
        }
    }
    assert_ne!(&driver.sim.disks(), driver.model().newest());
    layer.undo().unwrap();
    driver.settle();
}

#[test]
fn what_a_layer_has_saved_it_does_not_save_again() {
    let driver = adopted();
    let layer = driver.group().open_layer().unwrap();
    layer.write("root", 5000, &[1; 3000]).unwrap();
    let used = driver.group().used_bytes();
    let steps = driver.sim.steps();
    layer.write("root", 4096, &[2; 8000]).unwrap();
    layer.zero("root", 6000, 1).unwrap();
    assert_eq!(driver.sim.steps() - steps, 5, "the second block is saved, synced, written and marked, then one zero");
    assert!(driver.group().used_bytes() - used < 100, "of a hole only one record, and a mark");
    layer.undo().unwrap();
}
