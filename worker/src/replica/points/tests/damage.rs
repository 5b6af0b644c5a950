//! Files that were whole and are not any more: every file kind, in every state of the record.

use super::super::group::Group;
use super::super::{Lineage, PointError};
use super::history::{AMPLE, Disks, Driver, Edit, Op, info, read_point, send, write};
use super::sim::{Loss, Sim, Trouble};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A group with points 1 to 4, and the content of each.
fn four_points() -> (Driver, Vec<Disks>) {
    let mut driver = Driver::new(9, AMPLE);
    let mut random = StdRng::seed_from_u64(9);
    driver.act(&Op::Adopt).unwrap();
    for at in 0..3 {
        let mut edits = vec![write(&mut random, "data", at * 700, 9000), write(&mut random, "root", at * 5000, 300)];
        edits.push(Edit::Zero { disk: "root".into(), offset: at * 5000 + 100, length: 3000 });
        driver.act(&Op::Increment { edits, keep: 4 }).unwrap();
    }
    driver.settle();
    let contents = driver.model().points.iter().map(|(_, disks)| disks.clone()).collect();
    (driver, contents)
}

/// Opens a world again after its process ended, with a file flipped at each of many bits; or cut, or gone.
fn each_damage(sim: &Sim, file: &str, mut judge: impl FnMut(&Sim, &Group, &str)) {
    let mut length = 0;
    sim.tamper(file, |bytes| length = bytes.len());
    let bits =
        (0..length.min(300) * 8).step_by(5).chain((0..length * 8).step_by(611)).chain(length * 8 - 600..length * 8);
    for bit in bits {
        let world = sim.copy();
        world.power_on(Loss::Nothing);
        world.tamper(file, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        judge(&world, &world.open(AMPLE).unwrap(), &format!("bit {bit} of {length} bytes"));
    }
    for cut in [0, 39, 40, length / 2, length - 1] {
        let world = sim.copy();
        world.power_on(Loss::Nothing);
        world.tamper(file, |bytes| bytes.truncate(cut));
        judge(&world, &world.open(AMPLE).unwrap(), &format!("cut to {cut} of {length} bytes"));
    }
    let world = sim.copy();
    world.power_on(Loss::Nothing);
    world.delete(file);
    judge(&world, &world.open(AMPLE).unwrap(), "gone");
}

/// Each point that the group says it has reads right, or says that it is lost. Returns how many read right.
fn right_or_lost(group: &Group, contents: &[Disks]) -> usize {
    let mut right = 0;
    for point in group.state().points.iter().rev() {
        let mut whole = true;
        for (name, content) in &contents[point.number as usize - 1] {
            match read_point(group, point.number, name) {
                Ok(found) => assert!(&found == content, "point {} of {name} reads wrong", point.number),
                Err(PointError::Lost { .. } | PointError::NoPoint { .. }) => whole = false,
                Err(error) => panic!("{error:?}"),
            }
        }
        right += usize::from(whole);
    }
    right
}

#[test]
fn a_damaged_undo_file_loses_the_points_behind_it_and_says_so() {
    let (driver, contents) = four_points();
    each_damage(&driver.sim, "3.undo", |sim, group, what| {
        assert_eq!(sim.disks(), contents[3], "{what}");
        assert_eq!(right_or_lost(group, &contents), 2, "{what}");
        let state = group.state();
        assert!(state.damaged.is_none() && state.lost.is_some(), "{what}: {state:?}");
        assert_eq!(state.points.iter().map(|point| point.number).collect::<Vec<_>>(), [3, 4], "{what}");
        // It is remembered, and the group goes on.
        sim.power_on(Loss::Nothing);
        let group = sim.open(AMPLE).unwrap();
        assert_eq!((group.state().points, group.state().lost), (state.points, state.lost), "{what}");
        let journal = group.begin(state.lineage.unwrap(), 5).unwrap();
        group.commit(&journal, info(5), send(&journal, &[]).unwrap(), 4).unwrap();
        group.apply().unwrap();
        assert_eq!(group.state().lost, None, "{what}");
    });
}

/// Commits point 5 and ends the power `steps` into putting it in place.
fn applying(driver: &Driver, steps: Option<u64>) -> Sim {
    let sim = driver.sim.copy();
    sim.power_on(Loss::Nothing);
    let group = sim.open(AMPLE).unwrap();
    let mut random = StdRng::seed_from_u64(10);
    let edits = [write(&mut random, "data", 500, 15_000), write(&mut random, "root", 100, 15_000)];
    let journal = group.begin(group.state().lineage.unwrap(), 5).unwrap();
    let digest = send(&journal, &edits).unwrap();
    group.commit(&journal, info(5), digest, 4).unwrap();
    if let Some(steps) = steps {
        sim.trouble(steps, Trouble::PowerOff);
        group.apply().unwrap_err();
        sim.power_on(Loss::Nothing);
    }
    sim
}

#[test]
fn a_damaged_journal_of_which_nothing_is_in_place_leaves_the_point_before() {
    let (driver, contents) = four_points();
    let sim = applying(&driver, None);
    each_damage(&sim, "5.journal", |sim, group, what| {
        let state = group.state();
        assert!(state.damaged.is_some() && state.points.len() == 4, "{what}: {state:?}");
        assert_eq!(sim.disks(), contents[3], "{what}");
        assert_eq!(right_or_lost(group, &contents), 4, "{what}");
        assert!(matches!(group.begin(state.lineage.unwrap(), 5), Err(PointError::Damaged { .. })), "{what}");
        assert!(matches!(group.open_layer(), Err(PointError::Damaged { .. })), "{what}");
        sim.power_on(Loss::Nothing);
        assert_eq!(sim.open(AMPLE).unwrap().state(), state, "{what}: it is remembered");
    });
    let group = sim.open(AMPLE).unwrap();
    assert_eq!(group.state().points.len(), 4, "without damage the oldest of five is pruned");
    assert_eq!(group.state().damaged, None);
}

/// The step of putting point 5 in place at which half of it is in place.
fn half_way(driver: &Driver) -> u64 {
    let before = driver.sim.disks();
    let half = |steps: &u64| {
        let disks = applying(driver, Some(*steps)).disks();
        disks["data"] != before["data"] && disks["root"] == before["root"]
    };
    (1..).find(half).unwrap()
}

#[test]
fn a_damaged_journal_that_is_half_in_place_is_taken_back() {
    let (driver, contents) = four_points();
    let sim = applying(&driver, Some(half_way(&driver)));
    each_damage(&sim, "5.journal", |sim, group, what| {
        let state = group.state();
        assert!(state.damaged.is_some() && state.points.len() == 4, "{what}: {state:?}");
        assert_eq!(sim.disks(), contents[3], "{what}");
        assert_eq!(right_or_lost(group, &contents), 4, "{what}");
        group.adopt(Lineage::generate(), info(1)).unwrap();
        assert_eq!(group.state().damaged, None, "{what}");
        assert!(sim.file_names().is_empty(), "{what}");
    });
}

#[test]
fn a_damaged_undo_of_a_point_that_is_half_in_place_costs_only_older_points() {
    let (driver, mut contents) = four_points();
    let sim = applying(&driver, Some(half_way(&driver)));
    let whole = sim.copy();
    whole.power_on(Loss::Nothing);
    whole.open(AMPLE).unwrap();
    contents.push(whole.disks());
    each_damage(&sim, "5.undo", |sim, group, what| {
        assert_eq!(sim.disks(), contents[4], "{what}");
        assert_eq!(right_or_lost(group, &contents), 1, "{what}");
        let state = group.state();
        assert!(state.damaged.is_none() && state.lost.is_some() && state.points.len() == 1, "{what}: {state:?}");
    });
}

#[test]
fn a_damaged_layer_is_found_as_far_as_it_was_marked() {
    let (driver, contents) = four_points();
    let group = driver.group();
    let layer = group.open_layer().unwrap();
    layer.write("data", 100, &[7; 9000]).unwrap();
    let marked = group.used_bytes();
    layer.write("root", 100, &[7; 9000]).unwrap();
    assert!(group.used_bytes() > marked);
    let mut found = 0;
    let mut undone = 0;
    each_damage(&driver.sim, "layer.undo", |sim, group, what| {
        // A file that is cut looks like one whose last batches never reached the disk.
        if what.starts_with("cut") {
            return;
        }
        let state = group.state();
        if state.damaged.is_some() {
            found += 1;
            assert!(state.points.is_empty(), "{what}: {state:?}");
        } else {
            undone += 1;
            assert_eq!(sim.disks(), contents[3], "{what}");
            assert_eq!(right_or_lost(group, &contents), 4, "{what}");
        }
    });
    // Only the last mark, which nothing follows, may be hurt unnoticed.
    assert!(undone <= 8 * 40 + 8 && found > undone, "{found} found, {undone} undone");
}

#[test]
fn disks_that_the_points_are_not_of_are_refused_and_nothing_is_deleted() {
    let (driver, contents) = four_points();
    driver.sim.power_on(Loss::Nothing);
    let files = driver.sim.file_names();
    driver.sim.set_disk("data", &contents[3]["data"][..4096]);
    let group = driver.sim.open(AMPLE).unwrap();
    assert!(group.state().damaged.is_some_and(|reason| reason.contains("cut to 4096")));
    group.apply().unwrap_err();
    assert_eq!(driver.sim.file_names(), files);
    driver.sim.set_disk("data", &contents[3]["data"]);
    let group = driver.sim.open(AMPLE).unwrap();
    assert_eq!(group.state().damaged, None);
    assert_eq!(right_or_lost(&group, &contents), 4);
}
