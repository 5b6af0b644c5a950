//! The memory that arrives is the memory that left: a real Linux guest that writes all the time is moved through the real
//! pipeline (encode, QUIC, decode, restore from a replica), and the physical memory of both hypervisors is compared while both
//! stand still. A digest over the stream could not notice that QEMU itself lost a dirty page; this does.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pageport_common::store::Store;
use pageport_common::tls::{self, TlsPaths};
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL, command_line};
use pageport_lab::lab::tls::Authority;
use pageport_proto::VmId;
use pageport_proto::v1::{DirectBoot, DiskSpec, StreamHello, VmSpec, to_source};
use pageport_teleport::{BlockDigest, PAGE_SIZE};
use pageport_worker::hypervisor::migrate::{AutoConverge, SourceSettings};
use pageport_worker::hypervisor::{
    Accelerator, Console, Host, HugePages, Launch, MigrationStatus, RunState, StartMode, Vm, VmPaths, list_running,
};
use pageport_worker::memory::arrived::Arrived;
use pageport_worker::migration::incoming::{self, Incoming};
use pageport_worker::migration::outgoing::{self, Outgoing};
use pageport_worker::replica::cap::Cap;
use pageport_worker::replica::store::{ReplicaDisk, ReplicaStore};
use pageport_worker::replica::view::{Confirmed, ReplicaState, ReplicaView};
use pageport_worker::transport::{MessageReader, PeerConnection, PeerEndpoint};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(90);
const DISK: &str = "root";

/// Ends every hypervisor that the test started, also when it fails.
struct Hosts(tempfile::TempDir);

impl Drop for Hosts {
    fn drop(&mut self) {
        for side in ["a", "b"] {
            for vm in list_running(&self.0.path().join(side)).unwrap_or_default() {
                let pid =
                    std::fs::read_to_string(VmPaths::new(&self.0.path().join(side), vm).pid()).unwrap_or_default();
                if let Ok(pid) = pid.trim().parse() {
                    // It may have ended by itself.
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                }
            }
        }
    }
}

impl Hosts {
    fn host(&self, side: &str) -> Host {
        let runtime_dir = self.0.path().join(side);
        let keeper = pageport_lab::paths::program("pageport-keeper");
        let (accelerator, huge_pages) = (Accelerator::Tcg, HugePages::Never);
        Host { qemu: "qemu-system-x86_64".into(), keeper, accelerator, huge_pages, runtime_dir }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_both_hypervisors_is_equal_when_a_busy_guest_has_moved() {
    let images = GuestImages::build(SMALL).unwrap();
    let hosts = Hosts(tempfile::tempdir().unwrap());
    let folder = hosts.0.path().to_owned();
    let vm = VmId::generate();
    let disk = folder.join("disk.raw");
    images.copy_disk(&disk).unwrap();

    // The replica is the disk as it was before the boot: what the guest writes since will not verify, and falls back.
    let store = Arc::new(Store::open(&folder.join("store")).unwrap());
    let replicas = ReplicaStore::new(store, &folder);
    let replica_path = folder.join("replica.raw");
    images.copy_disk(&replica_path).unwrap();
    replicas.locate_or_adopt(vm, DISK, &replica_path, None).unwrap();
    let replica = replicas.open_existing(vm, DISK).unwrap();
    let view = Arc::new(view_of(&replica));
    // A few blocks rot after they were indexed, so that references to them must fall back.
    for block in (0..replica.size_bytes() / PAGE_SIZE as u64).step_by(20_011) {
        replica.write(block * PAGE_SIZE as u64, &[0x5a; PAGE_SIZE]).unwrap();
    }

    let spec = spec(&images, &disk);
    let launch = |mode| Launch { vm, spec: spec.clone(), images: BTreeMap::new(), mode, deadline: None };
    let source = Vm::start(&hosts.host("a"), &launch(StartMode::Running)).await.unwrap();
    make_busy(&source).await;
    let destination = Vm::start(&hosts.host("b"), &launch(StartMode::Incoming)).await.unwrap();
    destination.listen_incoming(&destination.paths().incoming()).await.unwrap();

    let (sending, receiving, _endpoints) = connected(&folder).await;
    let accepting = tokio::spawn(accept(receiving, destination.paths().incoming(), replica));
    let outgoing_socket = begin(&source).await;
    let held = outgoing::Held { disks: view, kept: None };
    let mut outgoing =
        Outgoing::start(sending, "test", "", outgoing_socket, held, None, Arc::new(Cap::none())).await.unwrap();
    let (mut incoming, mut answers) = accepting.await.unwrap();
    let acknowledging = outgoing.answers();
    tokio::spawn(async move {
        while let Some(answer) = answers.recv().await {
            match answer {
                to_source::Kind::BatchAck(ack) => acknowledging.acknowledged(ack.sequence),
                to_source::Kind::FallbackRequest(request) => acknowledging.fall_back(request.sequence).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    });

    source.wait_migration(MigrationStatus::PreSwitchover, PATIENCE).await.unwrap();
    source.continue_switchover().await.unwrap();
    let sent = outgoing.sent_all().await.unwrap();
    let written = incoming.written_all().await.unwrap();
    drop(incoming);
    assert_eq!(sent.digest, written.digest.value());
    source.wait_migration(MigrationStatus::Completed, PATIENCE).await.unwrap();
    destination.wait_migration(MigrationStatus::Completed, PATIENCE).await.unwrap();
    let pages = outgoing.sent().pages;
    assert!(pages.teleported > 1000 && pages.literal > 1000 && pages.fallback > 0, "{pages:?}");

    let (left, arrived) = (folder.join("left"), folder.join("arrived"));
    source.save_memory(SMALL.memory_bytes, &left).await.unwrap();
    destination.save_memory(SMALL.memory_bytes, &arrived).await.unwrap();
    assert_equal(&left, &arrived);
    source.kill().await.unwrap();
    assert_ne!(destination.run_state().await.unwrap(), RunState::Running);
    destination.cont().await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Running);
    destination.kill().await.unwrap();
}

fn spec(images: &GuestImages, disk: &Path) -> VmSpec {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    VmSpec {
        name: "busy".into(),
        memory_bytes: SMALL.memory_bytes,
        vcpus: 1,
        machine: "pc-q35-10.0".into(),
        disks: vec![DiskSpec { name: DISK.into(), path: text(disk), format: "raw".into(), ..Default::default() }],
        direct_boot: Some(DirectBoot {
            kernel: text(&images.kernel),
            initrd: text(&images.initrd),
            cmdline: command_line(GUEST_ADDRESS),
        }),
        ..VmSpec::default()
    }
}

fn view_of(replica: &ReplicaDisk) -> ReplicaView {
    let view = ReplicaView::default();
    view.start_over(0, "root", replica.size_bytes()).unwrap();
    let mut page = [0; PAGE_SIZE];
    let mut at = 0;
    while let Some((start, end)) = replica.next_data(at).unwrap() {
        for offset in (start - start % PAGE_SIZE as u64..end).step_by(PAGE_SIZE) {
            replica.read(offset, &mut page).unwrap();
            let (first_block, digests) = (offset / PAGE_SIZE as u64, &[BlockDigest::of(&page)]);
            view.confirm(0, ReplicaState::default(), Confirmed::Digests { first_block, digests }).unwrap();
        }
        at = end;
    }
    view
}

/// Reads all files, and from then on dirties memory and the disk without end.
async fn make_busy(guest: &Vm) {
    let console = Console::open(&guest.paths().console()).await.unwrap();
    let (mut output, input) = console.attach().await.unwrap();
    let mut seen = String::new();
    let mut wait_for = async |text: &str| {
        let shown = async {
            while !seen.contains(text) {
                seen += &String::from_utf8_lossy(&output.recv().await.expect("the console is open"));
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, shown).await;
        in_time.unwrap_or_else(|_| panic!("waited in vain for {text:?} in {seen:?}"));
        seen.clear();
    };
    wait_for("guest is up").await;
    let type_in = async |line: &'static str| input.send(Bytes::from_static(line.as_bytes())).await.unwrap();
    type_in("find /data -type f -exec cat {} + >/dev/null; echo wa''rm\n").await;
    wait_for("warm").await;
    type_in("while :; do dd if=/dev/urandom of=/tmp/busy bs=4k count=64 2>/dev/null; done & \n").await;
    type_in("while :; do date >>/data/busy; sync; done & echo bu''sy\n").await;
    wait_for("busy").await;
}

async fn connected(folder: &Path) -> (PeerConnection, PeerConnection, [PeerEndpoint; 2]) {
    let authority = Authority::create(&folder.join("tls")).unwrap();
    let endpoint = |name: &str| {
        let issued = authority.issue(name, &tls::worker_name(name)).unwrap();
        let paths = TlsPaths { ca: issued.ca, cert: issued.cert, key: issued.key };
        let address = free_address();
        (PeerEndpoint::bind(address, &tls::Identity::load(&paths).unwrap()).unwrap(), address)
    };
    let ((source, _), (destination, address)) = (endpoint("worker-a"), endpoint("worker-b"));
    let accepting = destination.clone();
    let accepted = tokio::spawn(async move { accepting.accept().await.unwrap() });
    let sending = source.connect("worker-b", &address.to_string()).await.unwrap();
    (sending, accepted.await.unwrap(), [source, destination])
}

fn free_address() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn begin(source: &Vm) -> UnixStream {
    let path = source.paths().outgoing();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let settings = SourceSettings {
        downtime_limit: Duration::from_millis(300),
        switchover_bandwidth: 100_000_000,
        auto_converge: AutoConverge::Off,
    };
    let (ordered, accepted) = tokio::join!(source.migrate_to(&path, settings), listener.accept());
    ordered.unwrap();
    let socket = accepted.unwrap().0.into_std().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket
}

async fn accept(
    connection: PeerConnection,
    socket: std::path::PathBuf,
    replica: Arc<ReplicaDisk>,
) -> (Incoming, mpsc::UnboundedReceiver<to_source::Kind>) {
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut reader = MessageReader::new(connection.accept_uni().await.unwrap());
        let _: StreamHello = reader.receive().await.unwrap();
        streams.push(reader.into_stream());
    }
    let (fallback, memory) = (streams.pop().unwrap(), streams.pop().unwrap());
    let (answers, answered) = mpsc::unbounded_channel();
    let socket = UnixStream::connect(socket).unwrap();
    let held = incoming::Held { disks: vec![replica], kept: None };
    (Incoming::start(memory, fallback, socket, held, Arrived::default(), answers).unwrap(), answered)
}

fn assert_equal(left: &Path, arrived: &Path) {
    let (left, arrived) = (std::fs::read(left).unwrap(), std::fs::read(arrived).unwrap());
    assert_eq!(left.len(), arrived.len());
    let pages = left.chunks(PAGE_SIZE).zip(arrived.chunks(PAGE_SIZE)).enumerate();
    let different: Vec<_> = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert!(different.is_empty(), "{} pages differ, among them {:?}", different.len(), different.first());
}
