//! The relay between ports of the loopback does what it was told: rate, delay and counters, for UDP and TCP. Needs no rights.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageport_lab::wan::config::WanConfig;
use pageport_lab::wan::control::{Control, Request};
use pageport_lab::wan::flow::{TCP, UDP};
use pageport_lab::wan::link::Shape;
use pageport_lab::wan::relay::{Relay, RelayConfig, RelaySite};

const SHAPE: Shape = Shape { rate_bps: 8_000_000, one_way_delay_ms: 20, loss: 0.0, queue_bytes: Some(200_000) };
const COUNTED_AS: (u16, u16) = (7501, 4444);
const SOON: Duration = Duration::from_secs(10);

/// Two sites, their ends, and a relay that runs between them.
struct World {
    peers: [UdpSocket; 2],
    faces: [SocketAddr; 2],
    listener: TcpListener,
    door: SocketAddr,
    control: Control,
    relay: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl World {
    fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let peers = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        peers.iter().for_each(|peer| peer.set_read_timeout(Some(SOON)).unwrap());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let sites = ["a", "b"].iter().zip(&peers).map(|(name, peer)| RelaySite {
            name: (*name).to_owned(),
            peer: peer.local_addr().unwrap(),
            stream: listener.local_addr().unwrap(),
        });
        let relay = Relay::open(RelayConfig {
            sites: sites.collect(),
            links: WanConfig::mesh(["a", "b"], shape, control.clone()).links,
            seed: 1,
            counted_as: COUNTED_AS,
            control: control.clone(),
        });
        let relay = relay.unwrap();
        let faces = ["a", "b"].map(|site| relay.face(site).unwrap());
        let door = relay.door("a", "b").unwrap();
        let relay = Some(std::thread::spawn(move || relay.run().unwrap()));
        Self { peers, faces, listener, door, control: Control::connect(&control).unwrap(), relay, _folder: folder }
    }

    fn dial(&self) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(self.door).unwrap();
        let (far, _) = self.listener.accept().unwrap();
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(SOON)).unwrap();
        }
        (near, far)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.control.call(&Request::Stop).unwrap();
        if let Some(Err(panic)) = self.relay.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn datagrams_take_their_time_and_come_from_the_senders_face() {
    let mut world = World::new(SHAPE);
    let [a, b] = &world.peers;
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    stranger.send_to(b"x", world.faces[1]).unwrap();
    // With its headers each has 1000 bytes: one millisecond.
    let begin = Instant::now();
    for n in 0..100u8 {
        a.send_to(&[n; 972], world.faces[1]).unwrap();
    }
    let mut buffer = [0; 2000];
    let mut arrived = Vec::new();
    for n in 0..100u8 {
        assert_eq!(b.recv_from(&mut buffer).unwrap(), (972, world.faces[0]));
        assert_eq!(buffer[0], n);
        arrived.push(begin.elapsed());
    }
    assert!(arrived[0] >= Duration::from_millis(21), "{arrived:?}");
    assert!(arrived[99] >= Duration::from_millis(120), "{arrived:?}");
    // The answer goes back the same way.
    b.send_to(b"yes", world.faces[0]).unwrap();
    assert_eq!(a.recv_from(&mut buffer).unwrap(), (3, world.faces[1]));
    let there = world.control.link("a", "b").unwrap();
    assert_eq!(there.service_bytes(UDP, COUNTED_AS.0), 100_000);
    assert_eq!(world.control.link("b", "a").unwrap().service_bytes(UDP, COUNTED_AS.0), 31);
    world.control.call(&Request::Cut { from: "a".into(), to: "b".into() }).unwrap();
    world.peers[0].send_to(b"lost", world.faces[1]).unwrap();
    let deadline = Instant::now() + SOON;
    while world.control.link("a", "b").unwrap().cut.packets == 0 {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn a_connection_arrives_whole_at_the_lines_rate_and_ends_on_both_sides() {
    const BYTES: usize = 4 << 20;
    let mut world = World::new(Shape { rate_bps: 80_000_000, queue_bytes: None, ..SHAPE });
    let (mut near, mut far) = world.dial();
    let sent: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
    let begin = Instant::now();
    let receiver = std::thread::spawn(move || {
        let mut received = Vec::new();
        far.read_to_end(&mut received).unwrap();
        let took = begin.elapsed();
        far.write_all(b"got it").unwrap();
        (received, took)
    });
    near.write_all(&sent).unwrap();
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).unwrap();
    let (received, took) = receiver.join().unwrap();
    assert!(received == sent);
    assert_eq!(answer, b"got it");
    let bytes = world.control.link("a", "b").unwrap().service_bytes(TCP, COUNTED_AS.1);
    let payload = BYTES as u64;
    assert!((payload * 103 / 100..payload * 107 / 100).contains(&bytes), "{bytes}");
    let least = Duration::from_millis(20) + Duration::from_secs_f64(bytes as f64 * 8.0 / 80e6);
    assert!(took >= least * 99 / 100, "{took:?} of {least:?}");
    assert!(took < least * 2, "{took:?} of {least:?}");
}

#[test]
fn lost_pieces_of_a_connection_are_sent_again_and_a_cut_breaks_it() {
    let mut world = World::new(Shape { rate_bps: 400_000_000, loss: 0.2, queue_bytes: None, ..SHAPE });
    let (mut near, mut far) = world.dial();
    let sent = vec![7; 1 << 20];
    let sender = std::thread::spawn(move || {
        near.write_all(&sent).unwrap();
        near
    });
    let mut received = vec![0; 1 << 20];
    far.read_exact(&mut received).unwrap();
    assert!(received.iter().all(|byte| *byte == 7));
    let mut near = sender.join().unwrap();
    let counters = world.control.link("a", "b").unwrap();
    assert!(counters.lost.packets > 0 && counters.total.bytes > received.len() as u64, "{counters:?}");

    world
        .control
        .call(&Request::SetLink {
            from: "a".into(),
            to: "b".into(),
            shape: Shape { loss: 0.0, one_way_delay_ms: 5000, ..SHAPE },
        })
        .unwrap();
    let before = counters.total.packets;
    near.write_all(b"under way").unwrap();
    let deadline = Instant::now() + SOON;
    while world.control.link("a", "b").unwrap().total.packets == before {
        assert!(Instant::now() < deadline);
    }
    world.control.call(&Request::Cut { from: "a".into(), to: "b".into() }).unwrap();
    assert!(matches!(far.read(&mut received), Ok(0) | Err(_)));
}
