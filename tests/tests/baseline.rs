//! QEMU's own migrations work over the lab's WAN and are measured. Needs root; says so and passes when there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::time::Duration;

use pageport_guest::protocol::{Reply, Request};
use pageport_lab::baseline::vm::{FreePageHints, PlainSpec};
use pageport_lab::baseline::{Baseline, Method};
use pageport_lab::lab::guest::client::{CountingSession, GuestClient};
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::network::Network;
use pageport_lab::netns;
use pageport_lab::wan::link::Shape;

const SHAPE: Shape = Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None };
const SOON: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_there_and_back_by_qemus_own_means() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let network = Network::create(folder.path(), SHAPE).unwrap();
    let disk = folder.path().join("disk.raw");
    images.copy_disk(&disk).unwrap();
    let spec = PlainSpec {
        name: "base".into(),
        images,
        disk,
        memory_bytes: SMALL.memory_bytes,
        address: GUEST_ADDRESS,
        mac_suffix: 10,
        accelerator: "tcg".into(),
        hints: FreePageHints::Off,
    };
    let mut baseline = Baseline::boot(&network, "a", spec, folder.path()).await.unwrap();
    let mut guest = GuestClient::connect(network.namespace("c"), GUEST_ADDRESS, SOON).await.unwrap();
    guest.call(&Request::Warm { bytes: SMALL.warm_bytes }, SOON).await.unwrap();
    guest.call(&Request::DirtyStart { bytes: 2 << 20, pages_per_second: 100, seed: 2 }, SOON).await.unwrap();
    let mut session = CountingSession::open(network.namespace("c"), GUEST_ADDRESS).await.unwrap();
    session.next(SOON).await.unwrap();

    let plain = baseline.migrate("b", Method::Precopy, SOON).await.unwrap();
    session.next(SOON).await.unwrap();
    let zstd = baseline.migrate("a", Method::MultifdZstd, SOON).await.unwrap();
    session.next(SOON).await.unwrap();
    eprintln!("plain {plain:?}\nzstd  {zstd:?}");

    assert!(plain.wan_bytes > SMALL.warm_bytes, "{plain:?}");
    assert!(zstd.wan_bytes < plain.wan_bytes * 3 / 4, "{plain:?} {zstd:?}");
    assert!(zstd.total_time_ms < plain.total_time_ms, "{plain:?} {zstd:?}");
    // The link's rate bounds it from below.
    assert!(plain.total_time_ms > plain.wan_bytes * 8 * 1000 / SHAPE.rate_bps, "{plain:?}");
    for figures in [plain, zstd] {
        assert!((25..figures.total_time_ms).contains(&figures.downtime_ms), "{figures:?}");
    }
    let dirty = guest.call(&Request::DirtyStop, SOON).await.unwrap();
    assert!(matches!(dirty, Reply::Dirty { corrupt_pages: 0, writes: 1.. }), "{dirty:?}");
}
