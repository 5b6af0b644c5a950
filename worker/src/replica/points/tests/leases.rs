//! Points that are held open while newer ones come.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::{Lease, LeaseEnd, Limits, MAX_LEASES, PointError, PointReader};
use super::history::{AMPLE, Driver, Edit, FOR_EVER, Op, edits, in_place, write};
use super::sim::{Loss, Trouble};

fn adopted(limits: Limits) -> Driver {
    let mut driver = Driver::new(21, limits);
    driver.act(&Op::Adopt).unwrap();
    driver
}

/// Takes a point that changes so many hardly compressible bytes.
fn point(driver: &mut Driver, seed: u64, bytes: usize, keep: usize) {
    let edits = vec![write(&mut StdRng::seed_from_u64(seed), "root", 0, bytes)];
    driver.act(&Op::Increment { edits, keep }).unwrap();
}

/// Leases the newest point; the model expects it from now on.
fn lease_newest(driver: &mut Driver) -> Lease {
    let number = driver.model().points.last().unwrap().0.number;
    driver.possible[0].held.insert(number);
    driver.group().lease(number, FOR_EVER).unwrap()
}

fn read(reader: &PointReader) -> Result<Vec<u8>, PointError> {
    let mut content = vec![0; reader.size_bytes() as usize];
    reader.read(0, &mut content).map(|()| content)
}

fn end_of(lease: &mut Lease) -> LeaseEnd {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let limit = std::time::Duration::from_secs(30);
        tokio::time::timeout(limit, lease.ended()).await.expect("the lease goes on")
    })
}

#[test]
fn a_held_point_is_read_while_newer_ones_are_put_in_place_pruned_and_undone() {
    let mut driver = adopted(AMPLE);
    let mut random = StdRng::seed_from_u64(22);
    let content = driver.model().newest().clone();
    let lease = lease_newest(&mut driver);
    let readers: Vec<_> = content.iter().map(|(disk, content)| (lease.reader(disk).unwrap(), content)).collect();
    for round in 0..24 {
        let newest = driver.model().newest().clone();
        if round % 4 == 3 {
            let batches = (0..2).map(|_| edits(&mut random, &newest, false)).collect();
            driver.act(&Op::Layer { grown: vec![], batches, keep: false }).unwrap();
        } else {
            driver.act(&Op::Increment { edits: edits(&mut random, &newest, true), keep: 1 }).unwrap();
        }
        for (reader, content) in &readers {
            assert!(&read(reader).unwrap() == *content);
        }
        driver.settle();
    }
    assert_eq!(driver.group().state().points.len(), 1, "what is held costs no more listed points than are to be kept");
    let held = driver.group().state().held[0];
    assert_eq!((held.point.number, held.bytes), (1, driver.group().used_bytes()));

    let layer = driver.group().open_layer().unwrap();
    let batch = edits(&mut random, driver.model().newest(), false);
    layer.change(&batch.iter().map(in_place).collect::<Vec<_>>()).unwrap();
    for (reader, content) in &readers {
        assert!(&read(reader).unwrap() == *content, "below an open layer");
    }
    layer.undo().unwrap();

    lease.release().unwrap();
    driver.possible[0].held.clear();
    assert!(matches!(read(&readers[0].0), Err(PointError::Gone { number: 1 })));
    assert_eq!(driver.group().used_bytes(), 0);
    driver.settle();
}

#[test]
fn a_lease_is_found_again_after_a_crash_and_one_whose_time_is_over_is_not() {
    let mut driver = adopted(AMPLE);
    let content = driver.model().newest()["root"].clone();
    drop(lease_newest(&mut driver));
    let overdue = driver.group().lease(1, 1000).unwrap();
    assert_eq!(driver.group().state().held.len(), 1, "asked again for the same point it is one lease");
    overdue.renew(FOR_EVER).unwrap();
    for seed in 0..4 {
        point(&mut driver, seed, 9000, 2);
        driver.sim.power_on(Loss::Everything);
        driver.open().unwrap();
        let lease = driver.group().lease(1, FOR_EVER).unwrap();
        assert!(read(&lease.reader("root").unwrap()).unwrap() == content);
        driver.settle();
    }
    driver.group().lease(1, 1000).unwrap();
    driver.open().unwrap();
    driver.possible[0].held.clear();
    assert!(matches!(driver.group().lease(1, FOR_EVER), Err(PointError::NoPoint { number: 1 })));
    driver.settle();
}

#[test]
fn a_lease_that_holds_back_too_much_ends_and_newer_points_go_on() {
    let mut driver = adopted(Limits { held_bytes: 30_000, ..AMPLE });
    let mut lease = lease_newest(&mut driver);
    let reader = lease.reader("root").unwrap();
    // Each overwrites what the one before has written: an undo is as large as its change.
    for seed in 0..3 {
        point(&mut driver, seed, 20_000, 1);
        driver.settle();
    }
    let held_back = driver.group().state().held[0].bytes;
    assert!(held_back > 15_000 && held_back <= 30_000, "{held_back}");
    read(&reader).unwrap();
    for seed in 3..9 {
        point(&mut driver, seed, 20_000, 1);
        driver.possible[0].held_may_go = true;
        driver.settle();
    }
    let LeaseEnd::Quota { held_bytes, limit_bytes: 30_000 } = end_of(&mut lease) else { panic!() };
    assert!(held_bytes > 30_000);
    assert!(matches!(read(&reader), Err(PointError::Gone { .. })));
    assert_eq!((driver.group().state().held, driver.group().used_bytes()), (vec![], 0));
    assert_eq!(driver.group().state().lost, None, "no recovery point was lost to it");
}

#[test]
fn where_room_is_short_leases_go_before_recovery_points_that_are_to_be_kept() {
    let mut driver = adopted(Limits { points_bytes: 60_000, ..AMPLE });
    let mut lease = lease_newest(&mut driver);
    driver.possible[0].held_may_go = true;
    for seed in 0..12 {
        point(&mut driver, seed, 20_000, 2);
        assert!(driver.group().used_bytes() <= 60_000);
        driver.settle();
        let state = driver.group().state();
        assert_eq!((state.points.len(), state.lost), (2, None));
    }
    assert_eq!(end_of(&mut lease), LeaseEnd::Space);
    assert_eq!(driver.group().state().held, vec![]);
}

#[test]
fn a_lease_on_a_point_that_is_given_up_ends_with_it() {
    let mut driver = adopted(Limits { points_bytes: 60_000, ..AMPLE });
    point(&mut driver, 1, 9000, 100);
    let mut lease = lease_newest(&mut driver);
    driver.possible[0].held_may_go = true;
    for seed in 2..12 {
        point(&mut driver, seed, 20_000, 100);
        driver.possible[0].kept = 2;
        driver.settle();
    }
    assert_eq!(end_of(&mut lease), LeaseEnd::Space);
    assert!(driver.group().state().lost.is_some());
}

#[test]
fn whoever_takes_the_points_away_says_so_to_those_who_hold_one() {
    type Way = (fn(&mut Driver), LeaseEnd);
    let ways: [Way; 3] = [
        (|driver| driver.act(&Op::Adopt).unwrap(), LeaseEnd::Replaced),
        (|driver| driver.act(&Op::Forget).unwrap(), LeaseEnd::Replaced),
        (|driver| driver.group().close(&LeaseEnd::Runs), LeaseEnd::Runs),
    ];
    for (take, why) in ways {
        let mut driver = adopted(AMPLE);
        let mut lease = lease_newest(&mut driver);
        let reader = lease.reader("data").unwrap();
        take(&mut driver);
        assert_eq!(end_of(&mut lease), why);
        assert!(matches!(read(&reader), Err(PointError::Gone { .. })));
        assert!(lease.reader("data").is_err());
    }
}

#[test]
fn damage_of_what_a_lease_needs_ends_it_and_nothing_newer() {
    let mut driver = adopted(AMPLE);
    let mut lease = lease_newest(&mut driver);
    for seed in 0..3 {
        point(&mut driver, seed, 20_000, 1);
    }
    driver.sim.tamper("2.undo", |content| content.truncate(100));
    let reader = lease.reader("root");
    assert!(matches!(reader, Err(PointError::Lost { .. })), "{reader:?}");
    assert!(matches!(end_of(&mut lease), LeaseEnd::Lost { .. }));
    driver.possible[0].held.clear();
    driver.open().unwrap();
    driver.settle();
}

#[test]
fn only_so_many_points_are_held_and_only_such_as_there_are() {
    let mut driver = adopted(AMPLE);
    for seed in 0..MAX_LEASES as u64 {
        drop(lease_newest(&mut driver));
        point(&mut driver, seed, 100, 1);
    }
    let newest = driver.model().points.last().unwrap().0.number;
    assert!(matches!(driver.group().lease(newest, FOR_EVER), Err(PointError::Leases)));
    driver.group().lease(1, FOR_EVER).unwrap();
    assert!(matches!(driver.group().lease(newest + 1, FOR_EVER), Err(PointError::NoPoint { .. })));
    driver.settle();
    let edit = Edit::Zero { disk: "root".into(), offset: 0, length: 60_000 };
    driver.act(&Op::Increment { edits: vec![edit], keep: 1 }).unwrap();
    driver.settle();
}

#[test]
fn a_step_that_fails_while_a_lease_is_taken_or_released_leaves_it_whole_or_not_at_all() {
    for (op, before) in [(Op::Lease(1), false), (Op::Release(1), true)] {
        for step in 1.. {
            let mut driver = adopted(AMPLE);
            for seed in 0..2 {
                point(&mut driver, seed, 9000, 3);
            }
            if before {
                driver.act(&Op::Lease(1)).unwrap();
                point(&mut driver, 3, 9000, 1);
            }
            let began = driver.sim.steps();
            driver.sim.trouble(step, Trouble::PowerOff);
            let done = driver.act(&op);
            let over = driver.sim.steps() - began < step;
            driver.sim.power_on(Loss::Some);
            driver.open().unwrap();
            driver.settle();
            if over {
                done.unwrap();
                break;
            }
        }
    }
}
