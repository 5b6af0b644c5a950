//! What no honest peer sends, and what no careful caller does.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::{Change, ChangeDigest, Lineage, MAX_DISK_BYTES, PointError};
use super::history::{AMPLE, Driver, Op, edits, info, read_point, send};
use crate::replica::serve::MAX_WRITE_BYTES;

fn adopted() -> Driver {
    let mut driver = Driver::new(1, AMPLE);
    driver.act(&Op::Adopt).unwrap();
    driver
}

fn packed(data: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(data, 1).unwrap()
}

/// Sends one bad change; it must be refused, close the journal and leave nothing behind.
fn refused(send: impl FnOnce(&super::super::JournalWriter) -> Result<(), PointError>) -> PointError {
    let mut driver = adopted();
    let lineage = driver.model().lineage.unwrap();
    let journal = driver.group().begin(lineage, 2).unwrap();
    journal.zero("data", 0, 4096).unwrap();
    let error = send(&journal).unwrap_err();
    let closed = driver.group().commit(&journal, info(2), ChangeDigest::default().finish(), 3);
    assert!(matches!(closed, Err(PointError::JournalClosed)), "{closed:?}");
    driver.settle();
    assert_eq!(driver.group().used_bytes(), 0);
    error
}

#[test]
fn a_change_that_lies_outside_the_disk_is_refused() {
    let small = packed(&[1; 2]);
    for offset in [39_999, 40_000, u64::MAX, u64::MAX - 1] {
        let write = refused(|journal| journal.write("data", offset, 2, &small));
        assert!(matches!(write, PointError::Hostile { .. }), "{write:?}");
        let zero = refused(|journal| journal.zero("data", offset, 2));
        assert!(matches!(zero, PointError::Hostile { .. }), "{zero:?}");
    }
    assert!(matches!(refused(|journal| journal.zero("data", 0, u64::MAX)), PointError::Hostile { .. }));
    assert!(matches!(refused(|journal| journal.zero("data", 5, 0)), PointError::Hostile { .. }));
    assert!(matches!(refused(|journal| journal.zero("other", 0, 1)), PointError::NoDisk { .. }));
    assert!(matches!(refused(|journal| journal.write("", 0, 2, &small)), PointError::NoDisk { .. }));
}

#[test]
fn a_write_that_does_not_decompress_to_its_length_is_refused() {
    let bomb = packed(&vec![0; 64 << 20]);
    assert!(bomb.len() < 16 << 10);
    let padded = [packed(&[1; 8]), vec![0x50, 0x2a, 0x4d, 0x18, 0, 4, 0, 0], vec![0; 1024]].concat();
    let cases = [
        (MAX_WRITE_BYTES as u32, bomb.clone()),
        (MAX_WRITE_BYTES as u32 + 1, packed(&vec![0; MAX_WRITE_BYTES + 1])),
        (u32::MAX, bomb),
        (4096, packed(&[0; 4095])),
        (4095, packed(&[0; 4096])),
        (8, b"no frame".to_vec()),
        (8, Vec::new()),
        (8, padded),
        (0, packed(&[])),
    ];
    for (length, zstd) in cases {
        let error = refused(|journal| journal.write("root", 0, length, &zstd));
        assert!(matches!(error, PointError::Hostile { .. }), "{length}: {error:?}");
    }
}

#[test]
fn a_disk_never_shrinks_nor_grows_past_what_a_file_system_holds() {
    for size in [0, 39_999, MAX_DISK_BYTES + 1, u64::MAX] {
        let error = refused(|journal| journal.resize("data", size));
        assert!(matches!(error, PointError::Hostile { .. }), "{size}: {error:?}");
    }
}

#[test]
fn a_wrong_digest_or_number_commits_nothing() {
    let mut driver = adopted();
    let lineage = driver.model().lineage.unwrap();
    let changes = edits(&mut StdRng::seed_from_u64(3), driver.model().newest(), true);
    let journal = driver.group().begin(lineage, 2).unwrap();
    let mut digest = send(&journal, &changes).unwrap();
    digest[31] ^= 1;
    let refused = driver.group().commit(&journal, info(2), digest, 3);
    assert!(matches!(refused, Err(PointError::Digest { number: 2 })), "{refused:?}");
    driver.settle();
    let journal = driver.group().begin(lineage, 2).unwrap();
    let digest = send(&journal, &changes).unwrap();
    let refused = driver.group().commit(&journal, info(3), digest, 3);
    assert!(matches!(refused, Err(PointError::Hostile { .. })), "{refused:?}");
    driver.settle();
    for (lineage, number) in [(lineage, 0), (lineage, 1), (lineage, 3), (Lineage::generate(), 2)] {
        let refused = driver.group().begin(lineage, number);
        assert!(matches!(refused, Err(PointError::NotNext { .. })), "{refused:?}");
    }
}

#[test]
fn a_later_journal_takes_the_place_of_an_earlier() {
    let mut driver = adopted();
    let lineage = driver.model().lineage.unwrap();
    let first = driver.group().begin(lineage, 2).unwrap();
    let second = driver.group().begin(lineage, 2).unwrap();
    assert!(matches!(first.zero("data", 0, 1), Err(PointError::JournalClosed)));
    drop(first);
    let digest = send(&second, &[]).unwrap();
    driver.group().commit(&second, info(2), digest, 3).unwrap();
    let after = driver.model().with_point(lineage, 2, driver.model().newest().clone(), 3);
    driver.possible = vec![after];
    driver.settle();
}

#[test]
fn a_layer_excludes_journals_and_a_stale_one_changes_nothing() {
    let mut driver = adopted();
    let lineage = driver.model().lineage.unwrap();
    let layer = driver.group().open_layer().unwrap();
    assert!(driver.group().state().layer);
    assert!(matches!(driver.group().begin(lineage, 2), Err(PointError::LayerOpen)));
    assert!(matches!(driver.group().open_layer(), Err(PointError::LayerOpen)));
    assert!(matches!(driver.group().adopt(lineage, info(1)), Err(PointError::LayerOpen)));
    let outside = Change::Write { disk: "data", offset: 39_999, data: &[1; 2] };
    let inside = Change::Write { disk: "data", offset: 0, data: &[1; 2] };
    assert!(matches!(layer.change(&[inside, outside]), Err(PointError::Hostile { .. })));
    assert_eq!(&driver.sim.disk("data"), &driver.model().newest()["data"], "none of a batch with a bad change");
    layer.change(&[inside]).unwrap();
    driver.group().undo_layer().unwrap();
    assert!(matches!(layer.change(&[inside]), Err(PointError::LayerClosed)));
    assert!(matches!(layer.keep(), Err(PointError::LayerClosed)));
    driver.settle();
}

#[test]
fn reads_past_the_end_and_of_unknown_points_are_refused() {
    let driver = adopted();
    let reader = driver.group().reader(1, "data").unwrap();
    assert!(matches!(reader.read(39_999, &mut [0; 2]), Err(PointError::Hostile { .. })));
    assert!(matches!(reader.read(u64::MAX, &mut [0; 2]), Err(PointError::Hostile { .. })));
    reader.read(40_000, &mut []).unwrap();
    assert!(matches!(read_point(driver.group(), 2, "data"), Err(PointError::NoPoint { number: 2 })));
    assert!(matches!(read_point(driver.group(), 1, "none"), Err(PointError::NoDisk { .. })));
    driver.group().forget().unwrap();
    assert!(matches!(reader.read(0, &mut [0; 2]), Err(PointError::Gone { number: 1 })));
    assert!(matches!(driver.group().open_layer(), Err(PointError::Empty)));
}

#[test]
fn a_lineage_is_sixteen_hexadecimal_digits() {
    let lineage = Lineage::generate();
    assert_eq!(lineage.to_string().parse(), Ok(lineage));
    assert_eq!(Lineage::from_u64(255).unwrap().to_string(), "00000000000000ff");
    for bad in ["", "0", "0000000000000000", "+000000000000001", "000000000000000g", "00000000000000001"] {
        assert!(bad.parse::<Lineage>().is_err(), "{bad:?}");
    }
}
