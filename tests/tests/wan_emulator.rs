//! The WAN between the sites does what it was told: TCP fills the line, packets take their time, losses are as set.
//! Needs root for namespaces; says so and passes when there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use pageport_lab::lab::network::Network;
use pageport_lab::netns;
use pageport_lab::wan::control::{Reply, Request};
use pageport_lab::wan::flow::{TCP, UDP};
use pageport_lab::wan::link::Shape;

const SHAPE: Shape = Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None };
const PORT: u16 = 4444;

fn network(shape: Shape) -> Option<(Network, tempfile::TempDir)> {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    Some((Network::create(folder.path(), shape).unwrap(), folder))
}

fn listen(network: &Network, site: &str) -> TcpListener {
    netns::within(network.namespace(site), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).unwrap().unwrap()
}

fn connect(network: &Network, from: &str, to: &str) -> TcpStream {
    let address = SocketAddr::from((Network::host_address(to), PORT));
    netns::within(network.namespace(from), move || TcpStream::connect_timeout(&address, Duration::from_secs(5)))
        .unwrap()
        .unwrap()
}

fn udp(network: &Network, site: &str) -> UdpSocket {
    let socket = netns::within(network.namespace(site), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)));
    let socket = socket.unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

#[test]
fn tcp_gets_through_no_faster_than_the_line_and_every_byte_is_counted() {
    const AMOUNT_BYTES: usize = 64 << 20;
    let Some((network, _folder)) = network(SHAPE) else { return };
    let listener = listen(&network, "b");
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
    });
    let began = Instant::now();
    let mut sender = connect(&network, "a", "b");
    sender.write_all(&vec![7; AMOUNT_BYTES]).unwrap();
    drop(sender);
    assert_eq!(receiver.join().unwrap(), AMOUNT_BYTES as u64);
    let rate = AMOUNT_BYTES as f64 * 8.0 / began.elapsed().as_secs_f64();
    let Reply::Counters { links, cpu_ms } = network.wan().unwrap().call(&Request::Counters).unwrap() else {
        unreachable!("counters were asked for");
    };
    eprintln!("{:.1} Mbit/s of {:.1}, emulator used {cpu_ms} ms of CPU", rate / 1e6, SHAPE.rate_bps as f64 / 1e6);
    assert!(rate < SHAPE.rate_bps as f64, "goodput {rate}");
    let forth = links.iter().find(|link| link.from == "a" && link.to == "b").unwrap();
    assert!(forth.service_bytes(TCP, PORT) > AMOUNT_BYTES as u64);
    assert_eq!(forth.service_bytes(TCP, PORT), forth.flows.iter().map(|f| f.amount.bytes).sum::<u64>());
    let elsewhere = links.iter().find(|link| link.from == "a" && link.to == "c").unwrap();
    assert_eq!(elsewhere.service_bytes(TCP, PORT), 0);
}

#[test]
fn a_round_trip_takes_both_delays() {
    let Some((network, _folder)) = network(SHAPE) else { return };
    let (near, far) = (udp(&network, "a"), udp(&network, "c"));
    near.connect((Network::host_address("c"), PORT)).unwrap();
    let echo = std::thread::spawn(move || {
        let mut buffer = [0; 64];
        for _ in 0..20 {
            let (size, peer) = far.recv_from(&mut buffer).unwrap();
            far.send_to(&buffer[..size], peer).unwrap();
        }
    });
    let mut round_trips = Vec::new();
    for n in 0..20u8 {
        let begin = Instant::now();
        near.send(&[n]).unwrap();
        near.recv(&mut [0; 64]).unwrap();
        round_trips.push(begin.elapsed());
    }
    echo.join().unwrap();
    // The quickest: a busy machine adds to the others as it likes.
    let quickest = *round_trips.iter().min().unwrap();
    assert!((Duration::from_millis(50)..Duration::from_millis(100)).contains(&quickest), "{round_trips:?}");
}

#[test]
fn losses_cuts_and_changes_are_as_set() {
    let Some((network, _folder)) = network(Shape { loss: 0.1, one_way_delay_ms: 2, ..SHAPE }) else { return };
    let (near, far) = (udp(&network, "a"), udp(&network, "b"));
    near.connect((Network::host_address("b"), PORT)).unwrap();
    let mut wan = network.wan().unwrap();
    let burst = |far: &UdpSocket| {
        let mut arrived = 0;
        for _ in 0..20 {
            for _ in 0..100 {
                near.send(&[0; 200]).unwrap();
            }
            far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            while far.recv(&mut [0; 256]).is_ok() {
                arrived += 1;
            }
        }
        arrived
    };
    let arrived = burst(&far);
    assert!((1740..1860).contains(&arrived), "{arrived} of 2000 arrived at 10 % loss");
    let counters = wan.link("a", "b").unwrap();
    assert_eq!(counters.lost.packets + arrived, 2000);
    assert_eq!(counters.service_bytes(UDP, PORT), 2000 * 228);

    let (from, to) = (String::from("a"), String::from("b"));
    wan.call(&Request::Cut { from: from.clone(), to: to.clone() }).unwrap();
    assert_eq!(burst(&far), 0);
    wan.call(&Request::Heal { from: from.clone(), to: to.clone() }).unwrap();
    wan.call(&Request::SetLink { from, to, shape: SHAPE }).unwrap();
    assert_eq!(burst(&far), 2000);
}

#[test]
fn the_segment_stretches_over_the_sites() {
    let Some((network, _folder)) = network(SHAPE) else { return };
    // A station of site c's segment is reached from site a by its address on the bridge.
    let far = netns::within(network.namespace("c"), || TcpListener::bind("10.88.255.3:7000")).unwrap().unwrap();
    let near = netns::within(network.namespace("a"), || {
        TcpStream::connect_timeout(&"10.88.255.3:7000".parse().unwrap(), Duration::from_secs(5))
    });
    near.unwrap().unwrap().write_all(b"hello").unwrap();
    let mut text = String::new();
    far.accept().unwrap().0.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    let counters = network.wan().unwrap().link("a", "c").unwrap();
    assert!(counters.segment.packets >= 4);
    assert_eq!(counters.flows, []);
}

#[test]
fn nothing_is_left_behind() {
    let Some((network, folder)) = network(SHAPE) else { return };
    let name = network.namespace("b").to_owned();
    let mut sleeper = netns::command(&name, "sleep").arg("600").spawn().unwrap();
    // `ip netns exec` has entered the namespace once the process is called sleep.
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(format!("/proc/{}/comm", sleeper.id())).unwrap().trim() != "sleep" {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    drop(network);
    assert!(!sleeper.wait().unwrap().success());
    assert!(!std::path::Path::new("/run/netns").join(name).exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
