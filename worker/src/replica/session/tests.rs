//! A session and its destination, over real QUIC.

use std::sync::atomic::Ordering::Relaxed;

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_teleport::PAGE_SIZE;

use super::*;
use crate::replica::serve::{InPlace, serve_disk};
use crate::replica::store::{BLOCK_BYTES, ReplicaDisk, ReplicaStore};
use crate::test_support::ConnectedPair;

const BLOCKS: u64 = 1024;

/// A replica, its destination, and a connection to it.
struct Pair {
    replica: Arc<ReplicaDisk>,
    workers: ConnectedPair,
    view: Arc<ReplicaView>,
    _folder: tempfile::TempDir,
}

impl Pair {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let replicas = ReplicaStore::new(store, folder.path());
        let replica = replicas.open_for_writing(VmId::generate(), "root", BLOCKS * BLOCK_BYTES, 0).unwrap();
        let workers = ConnectedPair::new().await;
        let destination = workers.destination.clone();
        let target = Arc::new(InPlace(replica.clone()));
        tokio::spawn(async move {
            while let Ok((send, recv)) = destination.accept_bi().await {
                let (mut writer, mut reader) = (MessageWriter::new(send), MessageReader::new(recv));
                let hello: StreamHello = reader.receive().await.unwrap();
                let Some(stream_hello::Kind::Disk(hello)) = hello.kind else { panic!("not a disk's stream") };
                // How it ends is the source's to see.
                let _ = serve_disk(&hello, target.clone(), &mut reader, &mut writer).await;
            }
        });
        Self { replica, workers, view: Arc::default(), _folder: folder }
    }

    async fn session(&self) -> DiskSession {
        let hello = DiskHello { disk: "root".into(), size_bytes: BLOCKS * BLOCK_BYTES, ..DiskHello::default() };
        let (view, cap) = (self.view.clone(), Arc::new(Cap::none()));
        DiskSession::open(&self.workers.source, 0, hello, String::new(), view, CopiesFrom::Now, cap).await.unwrap()
    }

    fn read(&self, block: u64, blocks: usize) -> Vec<u8> {
        let mut data = vec![0; blocks * PAGE_SIZE];
        self.replica.read(block * BLOCK_BYTES, &mut data).unwrap();
        data
    }
}

/// Blocks that do not compress.
fn noise(blocks: usize) -> Bytes {
    (0..blocks * PAGE_SIZE / 8).flat_map(|_| rand::random::<u64>().to_le_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_lies_elsewhere_on_the_disk_crosses_the_link_as_digests() {
    let pair = Pair::new().await;
    let session = pair.session().await;
    let data = noise(256);
    session.write(0, data.clone()).await.unwrap();
    session.flush().await.unwrap();
    let before = pair.workers.source.sent_bytes();
    session.write(512 * BLOCK_BYTES, data.clone()).await.unwrap();
    session.flush().await.unwrap();
    let sent = pair.workers.source.sent_bytes() - before;
    assert!(sent < data.len() as u64 / 50, "{sent} bytes for {} that were there", data.len());
    assert!(pair.read(512, 256) == *data);
    assert_eq!(session.changed_bytes(), 2 * data.len() as u64);
    assert_eq!(session.unflushed.load(Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_does_not_hold_what_is_known_of_it_is_compared_anew() {
    let pair = Pair::new().await;
    let session = pair.session().await;
    let data = noise(2);
    session.write(0, data.clone()).await.unwrap();
    session.flush().await.unwrap();
    // Behind everybody's back.
    pair.replica.write(BLOCK_BYTES, &[!data[PAGE_SIZE]]).unwrap();
    let attempt = pair.view.begin_attempt();
    session.write(8 * BLOCK_BYTES, data.clone()).await.unwrap();
    session.flush().await.unwrap_err();
    assert!(session.failure().unwrap().contains("does not hold"), "{:?}", session.failure());
    session.end().await;
    drop(session);
    pair.view.roll_back(attempt);
    assert_eq!(pair.view.state(0), ReplicaState::default(), "nothing is believed any more");

    let session = pair.session().await;
    session.write(0, data.clone()).await.unwrap();
    session.write(8 * BLOCK_BYTES, data.clone()).await.unwrap();
    session.flush().await.unwrap();
    assert!(pair.read(0, 2) == *data && pair.read(8, 2) == *data);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_writes_than_may_be_in_flight_arrive_in_their_order() {
    let pair = Pair::new().await;
    let session = pair.session().await;
    let mut disk = vec![0; (BLOCKS * BLOCK_BYTES) as usize];
    let mut written = 0;
    while written < 2 * IN_FLIGHT_BYTES {
        let (first, blocks) = (rand::random::<u64>() % BLOCKS, 1 + rand::random::<u64>() % 64);
        let blocks = blocks.min(BLOCKS - first);
        let data: Bytes = [rand::random::<u8>(); PAGE_SIZE].repeat(blocks as usize).into();
        disk[(first * BLOCK_BYTES) as usize..][..data.len()].copy_from_slice(&data);
        written += data.len() as u64;
        session.write(first * BLOCK_BYTES, data).await.unwrap();
        assert!(session.in_flight_bytes() <= IN_FLIGHT_BYTES);
    }
    session.flush().await.unwrap();
    assert_eq!(session.in_flight_bytes(), 0);
    assert!(pair.read(0, BLOCKS as usize) == disk);
}
