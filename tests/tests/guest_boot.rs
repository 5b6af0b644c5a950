//! The lab's guest boots quickly and does what it is told. Needs root; says so and passes when there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::time::{Duration, Instant};

use pageport_guest::protocol::{Reply, Request};
use pageport_lab::baseline::vm::{FreePageHints, PlainSpec, PlainVm, Start};
use pageport_lab::lab::guest::client::{CountingSession, GuestClient};
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::network::Network;
use pageport_lab::netns;
use pageport_lab::wan::link::Shape;

const SHAPE: Shape = Shape { rate_bps: 1_000_000_000, one_way_delay_ms: 1, loss: 0.0, queue_bytes: None };
const SOON: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_boots_fills_its_cache_and_checks_its_loads() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let begin = Instant::now();
    let images = GuestImages::build(SMALL).unwrap();
    eprintln!("images are there after {:?}", begin.elapsed());
    let folder = tempfile::tempdir().unwrap();
    let network = Network::create(folder.path(), SHAPE).unwrap();
    let disk = folder.path().join("disk.raw");
    images.copy_disk(&disk).unwrap();
    let spec = PlainSpec {
        name: "boot".into(),
        images,
        disk,
        memory_bytes: SMALL.memory_bytes,
        address: GUEST_ADDRESS,
        mac_suffix: 10,
        accelerator: "tcg".into(),
        hints: FreePageHints::Off,
    };
    let begin = Instant::now();
    let _vm = PlainVm::start(&network, "a", &spec, Start::Boot, folder.path()).await.unwrap();
    // From another site: the segment is stretched.
    let mut guest = GuestClient::connect(network.namespace("b"), GUEST_ADDRESS, SOON).await.unwrap();
    eprintln!("up after {:?}", begin.elapsed());

    let Reply::Read { bytes, milliseconds, .. } =
        guest.call(&Request::Warm { bytes: SMALL.warm_bytes }, SOON).await.unwrap()
    else {
        unreachable!("a read was asked for");
    };
    assert_eq!(bytes, SMALL.warm_bytes);
    let memory = guest.meminfo().await.unwrap();
    eprintln!("warmed in {milliseconds} ms, {} MiB cached", memory["Cached"] >> 20);
    assert!(memory["Cached"] > SMALL.warm_bytes * 9 / 10, "{memory:?}");

    guest.call(&Request::StaticStart { bytes: 1 << 20, seed: 1 }, SOON).await.unwrap();
    guest.call(&Request::DirtyStart { bytes: 4 << 20, pages_per_second: 200, seed: 2 }, SOON).await.unwrap();
    guest.call(&Request::WriteStart { records_per_second: 20, seed: 3 }, SOON).await.unwrap();
    let begin = Instant::now();
    let files = guest.checksum(&Request::ChecksumFiles { every: 1 }, SOON).await.unwrap();
    eprintln!("files digested in {:?}", begin.elapsed());
    let static_region = guest.checksum(&Request::ChecksumMemory, SOON).await.unwrap();
    assert_eq!(guest.checksum(&Request::ChecksumFiles { every: 1 }, SOON).await.unwrap(), files);
    assert_eq!(guest.checksum(&Request::ChecksumMemory, SOON).await.unwrap(), static_region);

    let mut session = CountingSession::open(network.namespace("c"), GUEST_ADDRESS).await.unwrap();
    for expected in 0..5 {
        assert_eq!(session.next(SOON).await.unwrap(), expected);
    }
    let Reply::Dirty { writes, corrupt_pages: 0 } = guest.call(&Request::DirtyStop, SOON).await.unwrap() else {
        panic!("the dirtying load is corrupt");
    };
    let Reply::Written { synced, lost: 0 } = guest.call(&Request::WriteStop, SOON).await.unwrap() else {
        panic!("the writing load is corrupt");
    };
    assert!(writes > 0 && synced > 0, "{writes} {synced}");
}
