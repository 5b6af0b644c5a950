//! Limits of space: older points give way, the newest never does.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::{Limits, PointError};
use super::history::{AMPLE, Driver, Op, info, send, write};
use super::sim::Loss;

fn limited(points_bytes: u64) -> Driver {
    let mut driver = Driver::new(5, Limits { points_bytes, ..AMPLE });
    driver.act(&Op::Adopt).unwrap();
    driver
}

fn increment(seed: u64, bytes: usize) -> Op {
    Op::Increment { edits: vec![write(&mut StdRng::seed_from_u64(seed), "root", 0, bytes)], keep: 100 }
}

#[test]
fn the_limit_is_kept_by_giving_up_the_oldest_points() {
    let mut driver = limited(60_000);
    let mut most = 0;
    for seed in 0..20 {
        driver.act(&increment(seed, 10_000)).unwrap();
        assert!(driver.group().used_bytes() <= 60_000);
        most = most.max(driver.group().state().points.len());
        driver.possible[0].kept = 2;
        driver.settle();
    }
    assert!(most > 3 && driver.group().state().points.len() <= most);
    assert!(driver.group().state().lost.is_some());
    driver.open().unwrap();
    driver.settle();
}

#[test]
fn an_increment_that_cannot_fit_is_refused_with_the_numbers_and_the_newest_point_stays() {
    let mut driver = limited(20_000);
    driver.act(&increment(1, 5000)).unwrap();
    let big = increment(2, 60_000);
    let refused = driver.act(&big).unwrap_err();
    let PointError::NoSpace { needed_bytes, used_bytes, limit_bytes: 20_000, free_bytes, .. } = refused else {
        panic!("{refused:?}");
    };
    assert!(needed_bytes > 20_000 && used_bytes < 20_000 && free_bytes > 20_000);
    driver.possible[0].kept = 1;
    driver.settle();
    driver.act(&increment(3, 5000)).unwrap();
    driver.possible[0].kept = 1;
    driver.settle();
}

#[test]
fn a_point_whose_undo_does_not_fit_is_put_in_place_without_it() {
    // What replaces hardly compressible bytes by zeros has a small journal and a large undo.
    let mut driver = limited(25_000);
    driver.act(&increment(1, 30_000)).unwrap();
    driver.possible[0].kept = 1;
    driver.settle();
    let zero = super::history::Edit::Zero { disk: "root".into(), offset: 0, length: 60_000 };
    driver.act(&increment(2, 20_000)).unwrap();
    driver.act(&Op::Increment { edits: vec![zero], keep: 100 }).unwrap();
    driver.possible[0].kept = 1;
    driver.settle();
    driver.sim.power_on(Loss::Everything);
    driver.open().unwrap();
    driver.settle();
}

#[test]
fn what_must_stay_free_on_the_file_system_stays_free() {
    let mut driver = Driver::new(6, Limits { reserve_bytes: 50_000, ..AMPLE });
    driver.act(&Op::Adopt).unwrap();
    driver.sim.set_capacity(100_000);
    for seed in 0..12 {
        driver.act(&increment(seed, 10_000)).unwrap();
        assert!(driver.group().used_bytes() <= 50_000);
        driver.possible[0].kept = 1;
        driver.settle();
    }
    driver.sim.set_capacity(40_000);
    assert!(matches!(driver.act(&increment(20, 10_000)), Err(PointError::NoSpace { .. })));
    driver.possible[0].kept = 1;
    driver.settle();
}

#[test]
fn a_disk_that_is_full_keeps_the_point_committed_until_there_is_room() {
    let mut driver = limited(1 << 20);
    driver.act(&increment(1, 10_000)).unwrap();
    driver.settle();
    driver.sim.set_disks_full(true);
    assert!(matches!(driver.act(&increment(2, 10_000)), Err(PointError::NoSpace { .. })));
    assert!(driver.group().state().applying);
    assert_eq!(driver.group().state().points.last().map(|point| point.number), Some(3));
    // Neither a restart nor the next increment forgets it.
    driver.sim.power_on(Loss::Everything);
    driver.open().unwrap();
    assert!(driver.group().state().applying);
    let lineage = driver.model().lineage.unwrap();
    assert!(matches!(driver.group().begin(lineage, 4), Err(PointError::NoSpace { .. })));
    driver.sim.set_disks_full(false);
    let journal = driver.group().begin(lineage, 4).unwrap();
    driver.possible[0].kept = 1;
    let after = driver.model().with_point(lineage, 4, driver.model().newest().clone(), 3);
    driver.group().commit(&journal, info(4), send(&journal, &[]).unwrap(), 3).unwrap();
    driver.possible = vec![after];
    driver.settle();
}

#[test]
fn a_layer_gives_up_older_points_and_then_refuses_a_batch_whole() {
    let mut driver = limited(30_800);
    driver.act(&increment(1, 61_000)).unwrap();
    driver.act(&increment(2, 20_000)).unwrap();
    driver.act(&increment(3, 20_000)).unwrap();
    driver.possible[0].kept = 1;
    let newest = driver.model().newest().clone();
    let layer = driver.group().open_layer().unwrap();
    layer.write("root", 0, &[1; 30_000]).unwrap();
    let before = driver.sim.disks();
    let refused = layer.write("root", 30_000, &[2; 31_000]);
    assert!(matches!(refused, Err(PointError::NoSpace { .. })), "{} bytes are used", driver.group().used_bytes());
    assert_eq!(driver.sim.disks(), before);
    assert_eq!(driver.group().state().points.len(), 1);
    layer.write("root", 0, &[3; 30_000]).unwrap();
    layer.write("root", 40_000, &[4; 4000]).unwrap();
    layer.undo().unwrap();
    assert_eq!(driver.sim.disks(), newest);
    driver.settle();
}
