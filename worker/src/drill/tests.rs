//! Open points on the host's own files, read by a small NBD client.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_proto::v1::{PointExport, PointExportState};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;

use super::DrillError;
use super::export::Grounds;
use super::exports::{Exports, Standing};
use super::order::Order;
use crate::replica::groups::{Groups, Surrender};
use crate::replica::points::{ChangeDigest, LeaseEnd, Limits, Lineage, PointError, PointInfo};
use crate::replica::store::ReplicaStore;

const SIZE: u64 = 4 << 20;
const DISKS: [&str; 2] = ["data", "root"];
const SOON: Duration = Duration::from_secs(30);
const AMPLE: Limits = Limits { points_bytes: 1 << 30, held_bytes: 1 << 30, reserve_bytes: 0 };

type Contents = BTreeMap<&'static str, Vec<u8>>;

/// A worker's stores; [`Self::restart`] is a new worker over the same.
struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    replicas: Arc<ReplicaStore>,
    groups: Arc<Groups>,
    exports: Exports,
    limits: Limits,
    vm: VmId,
    lineage: Lineage,
}

impl Host {
    /// With a first point of zeros.
    fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let host = Self::over(folder, store, limits, VmId::generate(), Lineage::generate());
        for disk in DISKS {
            host.replicas.open_for_writing(host.vm, disk, SIZE, 0).unwrap();
        }
        let points = host.groups.open_existing(&host.replicas, host.vm).unwrap();
        points.group().adopt(host.lineage, info(1)).unwrap();
        host
    }

    fn over(folder: tempfile::TempDir, store: Arc<Store>, limits: Limits, vm: VmId, lineage: Lineage) -> Self {
        let replicas = Arc::new(ReplicaStore::new(store.clone(), folder.path()));
        let groups = Arc::new(Groups::new(store.clone(), folder.path(), limits));
        let sockets = folder.path().join("points");
        let grounds =
            Grounds { store: store.clone(), replicas: replicas.clone(), groups: groups.clone(), folder: sockets };
        let exports = Exports::new(grounds, Arc::new(Notify::new()));
        Self { folder, store, replicas, groups, exports, limits, vm, lineage }
    }

    fn restart(self) -> Self {
        let Self { folder, store, limits, vm, lineage, .. } = self;
        Self::over(folder, store, limits, vm, lineage)
    }

    /// A new point: every disk is filled with this byte.
    fn point(&self, number: u64, byte: u8) {
        let points = self.groups.open_existing(&self.replicas, self.vm).unwrap();
        let journal = points.group().begin(self.lineage, number).unwrap();
        let mut digest = ChangeDigest::default();
        for disk in DISKS {
            // Hardly compressible, so that what is held takes room.
            let raw: Vec<u8> = (0..1 << 20).map(|_| byte ^ rand::random::<u8>() & 0x80).collect();
            for at in (0..SIZE).step_by(raw.len()) {
                digest.data(disk, at, &raw);
                journal.write(disk, at, raw.len() as u32, &zstd::bulk::compress(&raw, 1).unwrap()).unwrap();
            }
        }
        points.group().commit(&journal, info(number), digest.finish(), 1).unwrap();
        points.group().apply().unwrap();
    }

    fn contents(&self) -> Contents {
        let content = |disk| {
            let mut content = vec![0; SIZE as usize];
            self.replicas.open_existing(self.vm, disk).unwrap().read(0, &mut content).unwrap();
            (disk, content)
        };
        DISKS.map(content).into()
    }

    fn order(&self, point: u64) -> Order {
        Order { vm: self.vm, name: "web".to_owned(), point, lasts: SOON * 100, listen: None }
    }

    fn socket(&self, point: u64) -> PathBuf {
        self.folder.path().join("points").join(format!("{}-{point}.sock", self.vm))
    }

    /// What is told of a point once that has ended.
    async fn ended(&self, point: u64) -> PointExport {
        let look = async {
            loop {
                let told = self.exports.reports().into_iter().find(|export| export.number == point).unwrap();
                if told.state() == PointExportState::Ended {
                    return told;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, look).await.expect("it goes on")
    }
}

fn info(number: u64) -> PointInfo {
    PointInfo { number, taken_unix_ms: 5000 + number as i64, changed_bytes: 0, quiesced: false, disks: 1 }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A client of one export.
struct Client {
    stream: Box<dyn Stream>,
    size: u64,
    flags: u16,
}

impl Client {
    /// [`None`]: there is no such export.
    async fn begin(mut stream: Box<dyn Stream>, export: &str) -> Option<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        let mut go = vec![0, 0, 0, 3];
        go.extend(b"IHAVEOPT\0\0\0\x07");
        go.extend((export.len() as u32 + 6).to_be_bytes());
        go.extend((export.len() as u32).to_be_bytes());
        go.extend(export.as_bytes());
        go.extend([0, 0]);
        stream.write_all(&go).await.unwrap();
        let (mut size, mut flags) = (0, 0);
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).await.unwrap();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            stream.read_exact(&mut data).await.unwrap();
            match (kind, data.len()) {
                (1, _) => return Some(Self { stream, size, flags }),
                (3, 12) => {
                    size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                    flags = u16::from_be_bytes(data[10..].try_into().unwrap());
                }
                (3, _) => {}
                _ => return None,
            }
        }
    }

    async fn at_socket(host: &Host, point: u64, disk: &str) -> Self {
        let stream = UnixStream::connect(host.socket(point)).await.unwrap();
        Self::begin(Box::new(stream), &format!("web/{disk}")).await.unwrap()
    }

    /// The answer's error, and so many bytes if there is none.
    async fn ask(&mut self, kind: u16, offset: u64, length: u32) -> std::io::Result<(u32, Vec<u8>)> {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(kind.to_be_bytes());
        request.extend(7u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        if kind == 1 {
            request.resize(request.len() + length as usize, 9);
        }
        self.stream.write_all(&request).await?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).await?;
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        let mut data = vec![0; if kind == 0 && error == 0 { length as usize } else { 0 }];
        self.stream.read_exact(&mut data).await?;
        Ok((error, data))
    }

    async fn read_all(&mut self) -> std::io::Result<Vec<u8>> {
        let (error, data) = self.ask(0, 0, self.size as u32).await?;
        assert_eq!(error, 0);
        Ok(data)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_point_is_read_at_its_socket_and_at_the_loopback_while_newer_points_come() {
    let host = Host::new(AMPLE);
    host.point(2, 2);
    let content = host.contents();
    let order = Order { listen: Some("127.0.0.1:0".parse().unwrap()), ..host.order(2) };
    let export = host.exports.open(order).await.unwrap();
    assert_eq!((export.state(), export.taken_unix_ms), (PointExportState::Open, 5002));
    assert_eq!(export.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), DISKS);
    let root = &export.disks[1];
    assert_eq!(root.size_bytes, SIZE);
    assert_eq!(root.urls[0], format!("nbd+unix:///web/root?socket={}", host.socket(2).display()));
    let address = root.urls[1].strip_prefix("nbd://").unwrap().strip_suffix("/web/root").unwrap();

    let tcp = || async { Box::new(TcpStream::connect(address).await.unwrap()) };
    let mut by_tcp = Client::begin(tcp().await, "web/data").await.unwrap();
    let mut by_socket = Client::at_socket(&host, 2, "root").await;
    assert_eq!((by_socket.size, by_socket.flags), (SIZE, 0b1_0000_0111), "read-only");
    for (number, byte) in [(3, 3), (4, 4), (5, 5)] {
        host.point(number, byte);
        assert!(by_tcp.read_all().await.unwrap() == content["data"]);
        assert!(by_socket.read_all().await.unwrap() == content["root"]);
    }
    for (kind, length) in [(1, 4096), (6, 4096)] {
        assert_eq!(by_socket.ask(kind, 0, length).await.unwrap().0, 1, "EPERM");
    }
    assert!(by_socket.read_all().await.unwrap() == content["root"]);
    assert!(Client::begin(tcp().await, "web/other").await.is_none());
    assert!(host.exports.reports()[0].held_bytes > 1 << 20);
    assert_eq!(host.groups.points(host.vm).len(), 1, "as many as are to be kept");

    host.exports.close(host.vm, 2).await.unwrap();
    assert!(by_socket.read_all().await.is_err() && by_tcp.read_all().await.is_err());
    let told = &host.exports.reports()[0];
    assert_eq!((told.state(), told.reason.as_str(), told.held_bytes), (PointExportState::Ended, "it was closed", 0));
    assert!(!host.socket(2).exists() && host.groups.held(host.vm).is_empty());
    assert!(matches!(host.exports.close(host.vm, 2).await, Err(DrillError::NotOpen { point: 2 })));
    assert!(matches!(
        host.exports.open(host.order(2)).await,
        Err(DrillError::Points(PointError::NoPoint { number: 2 }))
    ));
}

/// What a worker does until it is killed: nothing is closed in order.
fn until_killed<T>(worker: impl AsyncFnOnce() -> T) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(worker())
}

#[test]
fn a_restart_of_the_worker_opens_again_what_was_open_where_it_was() {
    let (host, content, before) = until_killed(async || {
        let host = Host::new(AMPLE);
        host.point(2, 2);
        let content = host.contents();
        let order = Order { listen: Some("127.0.0.1:0".parse().unwrap()), ..host.order(2) };
        let before = host.exports.open(order).await.unwrap();
        for (number, byte) in [(3, 3), (4, 4)] {
            host.point(number, byte);
        }
        (host, content, before)
    });
    let host = host.restart();
    until_killed(async || {
        let left = host.exports.left_open().unwrap();
        assert!(left.len() == 1 && !host.socket(2).exists());
        host.exports.reopen(left[0].clone(), Standing::Replica).await.unwrap();
        let after = &host.exports.reports()[0];
        assert_eq!(after.disks, before.disks, "{}", after.reason);
        assert_eq!((after.ends_unix_ms, after.opened_unix_ms), (before.ends_unix_ms, before.opened_unix_ms));
        host.point(5, 5);
        assert!(Client::at_socket(&host, 2, "root").await.read_all().await.unwrap() == content["root"]);
    });
}

#[test]
fn what_cannot_be_opened_again_has_ended_and_holds_nothing() {
    let host = until_killed(async || {
        let host = Host::new(AMPLE);
        host.exports.open(host.order(1)).await.unwrap();
        host.point(2, 2);
        host.exports.open(host.order(2)).await.unwrap();
        host
    });
    let mut records = super::record::Record::all(&host.store).unwrap();
    records[1].until_unix_ms = 1;
    let host = host.restart();
    until_killed(async || {
        host.exports.reopen(records[0].clone(), Standing::Owned).await.unwrap();
        host.exports.reopen(records[1].clone(), Standing::Replica).await.unwrap();
        assert_eq!(host.ended(1).await.reason, LeaseEnd::Runs.to_string());
        assert_eq!(host.ended(2).await.reason, "its time was over while the worker was away");
        assert!(host.exports.left_open().unwrap().is_empty());
        assert_eq!(host.groups.held(host.vm).len(), 2);
        host.exports.release_orphans(host.vm).await;
        assert!(host.groups.held(host.vm).is_empty());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_ends_with_its_time_and_a_new_order_moves_that() {
    let host = Host::new(AMPLE);
    let brief = Order { lasts: Duration::from_millis(50), ..host.order(1) };
    host.exports.open(brief.clone()).await.unwrap();
    assert_eq!(host.ended(1).await.reason, "its time was over");
    assert!(host.groups.held(host.vm).is_empty());

    let long = host.exports.open(host.order(1)).await.unwrap();
    let longer = host.exports.open(Order { lasts: SOON * 200, ..host.order(1) }).await.unwrap();
    assert!(longer.ends_unix_ms > long.ends_unix_ms && longer.opened_unix_ms == long.opened_unix_ms);
    let moved = Order { listen: Some("127.0.0.1:0".parse().unwrap()), ..host.order(1) };
    assert!(matches!(host.exports.open(moved).await, Err(DrillError::Listens { point: 1, .. })));
    host.exports.open(brief).await.unwrap();
    assert_eq!(host.ended(1).await.reason, "its time was over");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_the_replica_cuts_readers_off_and_says_why() {
    type Way = (fn(&Host), LeaseEnd);
    let ways: [Way; 3] = [
        (|host| host.groups.surrender(&host.replicas, host.vm, Surrender::NewestPoint).unwrap(), LeaseEnd::Runs),
        (|host| host.groups.forget(host.vm, &LeaseEnd::Removed).unwrap(), LeaseEnd::Removed),
        (|host| host.groups.forget(host.vm, &LeaseEnd::Seeded).unwrap(), LeaseEnd::Seeded),
    ];
    for (take, why) in ways {
        let host = Host::new(AMPLE);
        host.exports.open(host.order(1)).await.unwrap();
        let mut client = Client::at_socket(&host, 1, "root").await;
        client.read_all().await.unwrap();
        tokio::task::block_in_place(|| take(&host));
        assert_eq!(host.ended(1).await.reason, why.to_string());
        assert!(client.read_all().await.is_err());
        assert!(!host.socket(1).exists() && host.exports.left_open().unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_holds_back_too_much_ends_and_the_points_go_on() {
    let host = Host::new(Limits { held_bytes: 3 << 20, ..AMPLE });
    host.point(2, 2);
    host.exports.open(host.order(2)).await.unwrap();
    for number in 3..8 {
        host.point(number, number as u8);
    }
    let told = host.ended(2).await;
    assert!(told.reason.contains("drill.held_bytes in worker.toml"), "{}", told.reason);
    assert_eq!(host.groups.points(host.vm).last().map(|point| point.number), Some(7));
    assert!(host.groups.held(host.vm).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_holds_nothing() {
    let host = Host::new(AMPLE);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let order = Order { listen: taken.local_addr().ok(), ..host.order(1) };
    assert!(matches!(host.exports.open(order).await, Err(DrillError::Export(_))));
    assert!(host.groups.held(host.vm).is_empty() && !host.socket(1).exists());
    let unknown = Order { vm: VmId::generate(), ..host.order(1) };
    assert!(matches!(host.exports.open(unknown).await, Err(DrillError::Points(PointError::NoPoint { .. }))));
    assert!(host.exports.reports().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_added_ends_what_is_open_and_an_older_point_is_opened_without_it() {
    let host = Host::new(AMPLE);
    host.point(2, 2);
    host.exports.open(host.order(2)).await.unwrap();
    host.replicas.open_as_it_is(host.vm, "added", 0).unwrap();
    host.groups.open_existing(&host.replicas, host.vm).unwrap();
    assert!(host.ended(2).await.reason.contains("other disks"));
    let export = host.exports.open(host.order(2)).await.unwrap();
    assert_eq!(export.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), DISKS);
}
