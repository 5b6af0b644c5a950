//! How a scrub goes on: what is noted when, and what is counted; and what becomes of bytes that were changed by hand.

use std::os::unix::fs::FileExt;

use bytes::Bytes;

use super::answer::compare;
use super::pass::Ours;
use super::piece::{Disks, Place, Written, digests};
use super::*;
use crate::replica::groups::Groups;
use crate::replica::points::{ChangeDigest, Limits, Lineage, PointInfo};
use crate::replica::store::{BLOCK_BYTES, ReplicaStore};
use crate::replica::view::{Confirmed, ReplicaState, ReplicaView};

struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    vm: VmId,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        Self { folder, store, vm: VmId::generate() }
    }

    fn scrub(&self) -> Scrub {
        assert!(self.folder.path().exists());
        Scrub::load(self.store.clone(), self.vm, "b")
    }
}

/// A pass came so far.
fn passed(scrub: &mut Scrub, to: Option<u64>, found: &[u64]) {
    let mut progress = scrub.record.running.clone().unwrap();
    progress.place = to.map(|offset| Place { disk: "root".to_owned(), offset });
    let difference = |blocks: &u64| Difference {
        disk: "root".to_owned(),
        offset: 0,
        data: Bytes::from(vec![0; (*blocks * 4096) as usize]),
    };
    let differences: Vec<_> = found.iter().map(difference).collect();
    progress.different_blocks += found.iter().sum::<u64>();
    match differences.is_empty() {
        true => scrub.advance(progress),
        false => scrub.ahead = Some((progress, differences)),
    }
}

fn offset(scrub: &Scrub) -> u64 {
    scrub.record.running.as_ref().unwrap().place.as_ref().unwrap().offset
}

fn told(scrub: &Scrub) -> ReplicationStatus {
    let mut status = ReplicationStatus::default();
    scrub.tell(&mut status);
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_ends_goes_on_behind_what_is_compared_and_repaired_and_finds_the_rest_again() {
    let host = Host::new();
    let mut scrub = host.scrub();
    assert!(scrub.next_pass().is_none());
    scrub.order(7);
    assert!(scrub.next_pass().is_some());
    passed(&mut scrub, Some(100), &[]);
    passed(&mut scrub, Some(200), &[3, 1]);
    assert!(scrub.next_pass().is_none(), "what was found is repaired first");
    assert_eq!((scrub.differences().len(), told(&scrub).scrub.unwrap().different_blocks), (2, 4));

    let mut again = host.scrub();
    again.order(7);
    assert_eq!(offset(&again), 100);
    assert!(again.differences().is_empty() && again.next_pass().is_some());

    scrub.repaired();
    assert!(scrub.differences().is_empty());
    let mut again = host.scrub();
    again.order(7);
    assert_eq!(offset(&again), 200);
    passed(&mut again, None, &[2]);
    assert!(told(&again).last_scrub.is_none(), "not before it is repaired");
    again.repaired();
    let last = told(&again).last_scrub.unwrap();
    assert_eq!((last.seq, last.different_blocks, last.repaired_blocks), (7, 6, 6));
    assert!(last.ended_unix_ms >= last.started_unix_ms && told(&again).scrub.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_newer_order_begins_anew_and_the_last_result_stays_until_there_is_another() {
    let host = Host::new();
    let mut scrub = host.scrub();
    scrub.order(7);
    passed(&mut scrub, None, &[]);
    let mut again = host.scrub();
    again.order(7);
    assert!(again.next_pass().is_none(), "it is complete");
    again.order(9);
    passed(&mut again, Some(100), &[5]);
    again.order(10);
    assert_eq!(told(&again).last_scrub.unwrap().seq, 7);
    again.repaired();
    let running = told(&again).scrub.unwrap();
    assert_eq!((running.seq, running.repaired_blocks, offset(&again)), (10, 5, 0));
    forget(&host.store, host.vm, "b");
    assert_eq!(host.scrub().record, Record::default());
}

/// Blocks with a content of their own, the sixth of them zeros; the last is cut.
fn disk() -> Vec<u8> {
    let mut content = vec![0; 20 * BLOCK_BYTES as usize + 700];
    for (number, block) in content.chunks_mut(BLOCK_BYTES as usize).enumerate().filter(|(number, _)| *number != 5) {
        block.fill(number as u8 + 1);
    }
    content
}

/// What the source makes of its disk, of which it knows these blocks to be written since the newest point.
fn ours(content: &[u8], written: &[u64]) -> Ours {
    let disks = Disks(vec![("root".to_owned(), content.len() as u64)]);
    let piece = disks.piece_at(&Place::default()).unwrap();
    let mut noted = Written::default();
    written.iter().for_each(|block| noted.note(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES));
    let content = Bytes::copy_from_slice(content);
    Ours { piece, digests: digests(&content), content, written: noted }
}

#[test]
fn bytes_that_were_changed_by_hand_are_found_and_repaired_and_nothing_else_is() {
    let host = Host::new();
    let replicas = ReplicaStore::new(host.store.clone(), host.folder.path());
    let limits = Limits { points_bytes: 1 << 30, held_bytes: 1 << 30, reserve_bytes: 0 };
    let groups = Groups::new(host.store.clone(), host.folder.path(), limits);
    let mut source = disk();
    let replica = replicas.open_for_writing(host.vm, "root", source.len() as u64, 0).unwrap();
    replica.write(0, &source).unwrap();
    let points = groups.open_existing(&replicas, host.vm).unwrap();
    let (lineage, info) = (Lineage::generate(), |number| PointInfo {
        number,
        taken_unix_ms: 0,
        changed_bytes: 0,
        quiesced: false,
        disks: 0,
    });
    points.group().adopt(lineage, info(1)).unwrap();
    let (view, state) = (ReplicaView::default(), ReplicaState { instance: lineage.get(), version: 1 });
    view.start_over(0, "root", source.len() as u64).unwrap();
    view.confirm(0, state, Confirmed::Digests { first_block: 0, digests: &digests(&source) }).unwrap();
    let disks = vec![("root".to_owned(), replica.clone())];
    let judged = |ours: &Ours| ours.judge(&view, &compare(&disks, &ours.question()).unwrap()).unwrap();
    assert_eq!(judged(&ours(&source, &[])), []);

    // Behind everybody's back; one of the blocks is one that the guest has written since.
    let path = host.folder.path().join("replicas").join(host.vm.to_string()).join("root.raw");
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    for block in [3, 5, 12, 20] {
        file.write_all_at(&[0xee, 0xee], block * BLOCK_BYTES + 100).unwrap();
    }
    source[8 * BLOCK_BYTES as usize..9 * BLOCK_BYTES as usize].fill(0x88);
    source[12 * BLOCK_BYTES as usize..13 * BLOCK_BYTES as usize].fill(0xcc);
    let before = ours(&source, &[8, 12]);
    let found = judged(&before);
    let places: Vec<_> = found.iter().map(|it| (it.offset / BLOCK_BYTES, it.data.len() as u64)).collect();
    assert_eq!(places, [(3, BLOCK_BYTES), (5, BLOCK_BYTES), (20, 700)]);
    for block in [3, 5, 20] {
        assert!(!view.holds(0, block, &before.digests[block as usize]), "the index knows of block {block}");
    }
    assert!(view.holds(0, 4, &before.digests[4]) && view.state(0) == state);

    // The next point brings it, and then what the guest has changed.
    let journal = points.group().begin(lineage, 2).unwrap();
    let mut digest = ChangeDigest::default();
    let guest = [8, 12].map(|block| (block * BLOCK_BYTES, &source[(block * BLOCK_BYTES) as usize..][..4096]));
    let repairs = found.iter().map(|it| (it.offset, &it.data[..]));
    for (offset, data) in repairs.chain(guest) {
        digest.data("root", offset, data);
        journal.write("root", offset, data.len() as u32, &zstd::bulk::compress(data, 1).unwrap()).unwrap();
    }
    points.group().commit(&journal, info(2), digest.finish(), 3).unwrap();
    points.group().apply().unwrap();
    assert!(compare(&disks, &ours(&source, &[]).question()).unwrap().same);
    let mut content = vec![0; source.len()];
    replica.read(0, &mut content).unwrap();
    assert!(content == source);
}
