use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const BLOCKS: u64 = 2500;

fn at(disk: u16, block: u64) -> BlockRef {
    BlockRef { disk, block }
}

fn digest(seed: u8) -> BlockDigest {
    BlockDigest([seed + 1; 16])
}

fn index() -> BlockIndex {
    let mut index = BlockIndex::new();
    index.add_disk(0, BLOCKS).unwrap();
    index.add_disk(7, 100).unwrap();
    index
}

#[test]
fn content_in_two_places_is_never_found_where_it_no_longer_is() {
    let mut index = index();
    index.set(at(0, 5), digest(1)).unwrap();
    index.set(at(7, 9), digest(1)).unwrap();
    assert_eq!(index.find(&digest(1)), Some(at(0, 5)));
    index.set(at(0, 5), digest(2)).unwrap();
    assert_eq!(index.find(&digest(1)), None);
    assert!(index.holds(at(7, 9), &digest(1)));
    index.set(at(7, 9), digest(1)).unwrap();
    index.set(at(7, 10), digest(1)).unwrap();
    assert_eq!(index.find(&digest(1)), Some(at(7, 10)));
}

#[test]
fn zeros_are_known_by_place_only_and_cost_nothing_by_the_part() {
    let mut index = BlockIndex::new();
    index.add_disk(0, 1 << 20).unwrap();
    let empty = index.memory_bytes();
    index.zero(at(0, 0), 1 << 20).unwrap();
    assert_eq!(index.memory_bytes(), empty);
    assert_eq!(index.get(at(0, 12_345)), Some(BlockDigest::ZERO));
    assert_eq!(index.find(&BlockDigest::ZERO), None);
    index.set(at(0, 12_345), digest(0)).unwrap();
    assert_eq!(index.get(at(0, 12_344)), Some(BlockDigest::ZERO));
    index.clear(at(0, 12_300), 100).unwrap();
    assert_eq!((index.get(at(0, 12_345)), index.find(&digest(0))), (None, None));
    assert_eq!(index.get(at(0, 12_400)), Some(BlockDigest::ZERO));
}

#[test]
fn places_that_do_not_exist_are_refused() {
    let mut index = index();
    let beyond = |disk, block, blocks| Err(IndexError::BeyondEnd { disk, block, blocks });
    assert_eq!(index.set(at(3, 0), digest(1)), Err(IndexError::NoDisk { disk: 3 }));
    assert_eq!(index.set(at(7, 100), digest(1)), beyond(7, 100, 100));
    assert_eq!(index.zero(at(7, 99), 2), beyond(7, 100, 100));
    assert_eq!(index.clear(at(0, u64::MAX), 2), beyond(0, u64::MAX, BLOCKS));
    assert_eq!(index.add_disk(1, u64::MAX), Err(IndexError::TooLarge { disk: 1, blocks: u64::MAX }));
    assert_eq!((index.get(at(7, 100)), index.get(at(9, 0)), index.get(at(0, u64::MAX))), (None, None, None));
}

#[test]
fn a_disk_added_again_is_forgotten_and_its_memory_used_again() {
    let mut index = index();
    (0..BLOCKS).for_each(|block| index.set(at(0, block), digest((block % 200) as u8)).unwrap());
    let full = index.memory_bytes();
    for _ in 0..3 {
        index.add_disk(0, BLOCKS).unwrap();
        assert!(index.is_empty());
        (0..BLOCKS).for_each(|block| index.set(at(0, block), digest((block % 200) as u8)).unwrap());
        assert_eq!(index.memory_bytes(), full);
    }
}

#[test]
fn a_block_costs_less_than_24_bytes_when_all_differ() {
    let mut index = BlockIndex::new();
    const MANY: u64 = 1 << 17;
    index.add_disk(0, MANY).unwrap();
    for block in 0..MANY {
        let hash = blake3::hash(&block.to_le_bytes());
        index.set(at(0, block), BlockDigest(*hash.as_bytes().first_chunk().unwrap())).unwrap();
    }
    assert_eq!(index.len(), MANY as usize);
    assert!(index.memory_bytes() < MANY as usize * 24, "{} bytes", index.memory_bytes());
}

#[test]
fn a_disk_added_later_leaves_the_others_to_be_found() {
    let mut index = index();
    (0..200).for_each(|seed| index.set(at(0, u64::from(seed)), digest(seed)).unwrap());
    index.add_disk(1, 100_000).unwrap();
    assert!((0..200).all(|seed| index.find(&digest(seed)) == Some(at(0, u64::from(seed)))));
}

#[derive(Clone, Debug)]
enum Change {
    Set(u64, u8),
    Clear(u64, u64),
    Zero(u64, u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (0..BLOCKS, 0..40_u8).prop_map(|(block, seed)| Change::Set(block, seed)),
        1 => (0..BLOCKS, 0..BLOCKS).prop_map(|(from, count)| Change::Clear(from, count.min(BLOCKS - from))),
        1 => (0..BLOCKS, 0..BLOCKS).prop_map(|(from, count)| Change::Zero(from, count.min(BLOCKS - from))),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_plain_map_after_any_changes(changes in vec(change(), 0..200)) {
        let mut index = index();
        let mut model: HashMap<u64, BlockDigest> = HashMap::new();
        for change in changes {
            match change {
                Change::Set(block, seed) => {
                    index.set(at(0, block), digest(seed)).unwrap();
                    model.insert(block, digest(seed));
                }
                Change::Clear(from, count) => {
                    index.clear(at(0, from), count).unwrap();
                    model.retain(|block, _| !(from..from + count).contains(block));
                }
                Change::Zero(from, count) => {
                    index.zero(at(0, from), count).unwrap();
                    model.extend((from..from + count).map(|block| (block, BlockDigest::ZERO)));
                }
            }
        }
        for block in 0..BLOCKS {
            prop_assert_eq!(index.get(at(0, block)), model.get(&block).copied());
        }
        for seed in 0..40 {
            if let Some(found) = index.find(&digest(seed)) {
                prop_assert_eq!(model.get(&found.block).copied(), Some(digest(seed)));
            }
        }
    }
}
