//! A VM that moves from one QEMU to another.

use std::time::Duration;

use pageport_worker::hypervisor::migrate::{AutoConverge, SourceSettings};
use pageport_worker::hypervisor::{Console, Host, HugePages, MigrationStatus, RunState, StartMode, Vm};
use pageport_worker::image::Image;

use crate::support::{Fixture, MIB, SOON, count_on, writes};

/// Starts a migration between two VMs over the destination's own socket, up to the pause.
async fn migrate_to_the_pause(fixture: &Fixture) -> (Vm, Vm) {
    migrate_between(fixture, &fixture.host, &fixture.host).await
}

async fn migrate_between(fixture: &Fixture, from: &Host, to: &Host) -> (Vm, Vm) {
    let source = Vm::start(from, &fixture.launch(StartMode::Running)).await.unwrap();
    writes(&Console::open(&source.paths().console()).await.unwrap(), 3).await;
    let mut arriving = fixture.launch(StartMode::Incoming);
    let replica = fixture.path("replica.raw");
    std::fs::copy(fixture.path("disk.raw"), &replica).unwrap();
    arriving.images.insert("root".into(), Image::raw(replica));
    let destination = Vm::start(to, &arriving).await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Inmigrate);
    let socket = destination.paths().incoming();
    destination.listen_incoming(&socket).await.unwrap();
    let settings = SourceSettings {
        downtime_limit: Duration::from_millis(300),
        switchover_bandwidth: 25_000_000,
        auto_converge: AutoConverge::On,
    };
    source.migrate_to(&socket, settings).await.unwrap();
    source.set_switchover_bandwidth(50_000_000).await.unwrap();
    source.set_throttle(50).await.unwrap();
    source.set_downtime_limit(Duration::from_millis(500)).await.unwrap();
    source.wait_migration(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    (source, destination)
}

#[tokio::test]
async fn a_vm_moves_to_another_qemu_and_runs_there() {
    let fixture = Fixture::new();
    let (source, destination) = migrate_to_the_pause(&fixture).await;
    assert!(source.marks().borrow().stopped.is_some(), "the guest is paused before the switchover");
    let info = source.migration_info().await.unwrap();
    let ram = info.ram.unwrap();
    assert!(ram.total >= 64 * MIB && ram.transferred > 0 && ram.page_size == 4096, "{ram:?}");

    source.continue_switchover().await.unwrap();
    source.wait_migration(MigrationStatus::Completed, SOON).await.unwrap();
    destination.wait_migration(MigrationStatus::Completed, SOON).await.unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Postmigrate);
    assert_eq!(destination.run_state().await.unwrap(), RunState::Paused);
    source.kill().await.unwrap();
    destination.add_bitmap(&["root".into()], "since-arrival").await.unwrap();
    destination.cont().await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Running);
    let mut marks = destination.marks();
    let resumed = tokio::time::timeout(SOON, marks.wait_for(|marks| marks.resumed.is_some())).await.unwrap().unwrap();
    let stopped = source.marks().borrow().stopped.unwrap();
    assert!(stopped.qemu < resumed.resumed.unwrap().qemu);
    drop(resumed);
    // It goes on counting from where it was, on its new disk.
    let left_at = count_on(&fixture.path("disk.raw"));
    writes(&Console::open(&destination.paths().console()).await.unwrap(), 2).await;
    let arrived_at = count_on(&fixture.path("replica.raw"));
    assert!(left_at >= 3 && arrived_at > left_at, "left at {left_at}, now at {arrived_at}");
    assert_eq!(count_on(&fixture.path("disk.raw")), left_at);
    let bitmaps = destination.bitmaps().await.unwrap();
    assert!(bitmaps.len() == 1 && bitmaps[0].usable() && bitmaps[0].dirty_bytes == 4096, "{bitmaps:?}");
    destination.kill().await.unwrap();
}

#[tokio::test]
async fn a_cancelled_move_leaves_the_guest_running_and_can_be_tried_again() {
    let fixture = Fixture::new();
    let (source, destination) = migrate_to_the_pause(&fixture).await;
    source.cancel_migration().await.unwrap();
    source.wait_migration(MigrationStatus::Cancelled, SOON).await.unwrap();
    let denied = source.migration_info().await.unwrap().cpu_throttle_percentage;
    assert_eq!(denied, None, "the guest has all of its CPUs");
    let mut marks = source.marks();
    let runs = |resumed: &pageport_worker::hypervisor::Marks| {
        resumed.resumed.zip(resumed.stopped).is_some_and(|(resumed, stopped)| resumed.qemu > stopped.qemu)
    };
    tokio::time::timeout(SOON, marks.wait_for(runs)).await.expect("the guest stays paused").unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
    destination.kill().await.unwrap();

    // A destination that is not there: an error, and the guest runs on.
    let settings = SourceSettings {
        downtime_limit: Duration::from_millis(300),
        switchover_bandwidth: 25_000_000,
        auto_converge: AutoConverge::On,
    };
    let nowhere = fixture.path("nowhere.sock");
    let failed = match source.migrate_to(&nowhere, settings).await {
        Ok(()) => source.wait_migration(MigrationStatus::PreSwitchover, SOON).await,
        refused => refused,
    };
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
    source.kill().await.unwrap();
}

/// Huge pages that this test has added to the kernel's.
struct SetAside {
    pages: u64,
}

impl SetAside {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn pool() -> u64 {
        std::fs::read_to_string(Self::POOL).map_or(0, |text| text.trim().parse().unwrap())
    }

    fn new(pages: u64) -> Option<Self> {
        let before = Self::pool();
        std::fs::write(Self::POOL, (before + pages).to_string()).ok()?;
        let set_aside = Self { pages: Self::pool().saturating_sub(before) };
        (set_aside.pages == pages).then_some(set_aside)
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::POOL, Self::pool().saturating_sub(self.pages).to_string());
    }
}

fn huge_page_kib(vm: &Vm) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
    let lines = text.lines().filter(|line| line.contains("_Hugetlb:"));
    lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
}

#[tokio::test]
async fn a_guest_moves_from_huge_pages_to_ordinary_ones_and_the_other_way() {
    // Of 2 MiB, for one guest of 64 MiB.
    let Some(_set_aside) = SetAside::new(32) else {
        eprintln!("skipped: the kernel sets no huge pages aside for this process");
        return;
    };
    for (from, to) in [(HugePages::Always, HugePages::Never), (HugePages::Never, HugePages::IfFree)] {
        let fixture = Fixture::new();
        let (from, to) = (fixture.host_with(from), fixture.host_with(to));
        let (source, destination) = migrate_between(&fixture, &from, &to).await;
        let huge = [huge_page_kib(&source) > 0, huge_page_kib(&destination) > 0];
        assert_eq!(huge, [from.huge_pages, to.huge_pages].map(|pages| pages != HugePages::Never));
        source.continue_switchover().await.unwrap();
        destination.wait_migration(MigrationStatus::Completed, SOON).await.unwrap();
        source.kill().await.unwrap();
        destination.cont().await.unwrap();
        writes(&Console::open(&destination.paths().console()).await.unwrap(), 2).await;
        destination.kill().await.unwrap();
    }
}
