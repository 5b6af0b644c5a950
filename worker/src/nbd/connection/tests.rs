//! Order, concurrency and bounds of a connection, against a target whose every step the test decides.

use super::*;
use tokio::io::DuplexStream;
use tokio::sync::watch;

const SIZE: u64 = 64 << 20;
const SOON: Duration = Duration::from_secs(5);

/// A target that holds each write until the gate opens, and counts.
struct Gated {
    gate: watch::Receiver<bool>,
    log: mpsc::UnboundedSender<&'static str>,
}

impl BlockTarget for Gated {
    fn size(&self) -> u64 {
        SIZE
    }
    async fn read(&self, _offset: u64, length: u32) -> io::Result<Bytes> {
        Ok(vec![9; length as usize].into())
    }
    async fn write(&self, _offset: u64, _data: Bytes) -> io::Result<()> {
        self.log.send("write").unwrap();
        self.gate.clone().wait_for(|open| *open).await.unwrap();
        self.log.send("written").unwrap();
        Ok(())
    }
    async fn zero(&self, _offset: u64, _length: u32) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    async fn flush(&self) -> io::Result<()> {
        self.log.send("flush").unwrap();
        Ok(())
    }
}

struct Fixture {
    client: DuplexStream,
    gate: watch::Sender<bool>,
    log: mpsc::UnboundedReceiver<&'static str>,
    served: tokio::task::JoinHandle<Result<(), ConnectionError>>,
}

fn fixture() -> Fixture {
    fixture_with(SOON)
}

fn fixture_with(request_deadline: Duration) -> Fixture {
    let (gate, open) = watch::channel(false);
    let (log_in, log) = mpsc::unbounded_channel();
    let (client, server) = tokio::io::duplex(256 * 1024);
    let served =
        tokio::spawn(serve(server, Arc::new(Gated { gate: open, log: log_in }), TaskTracker::new(), request_deadline));
    Fixture { client, gate, log, served }
}

impl Fixture {
    async fn send(&mut self, flags: u16, code: u16, cookie: u64, length: u32) {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(code.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        if code == 1 {
            bytes.extend(vec![1; length as usize]);
        }
        self.client.write_all(&bytes).await.unwrap();
    }

    async fn reply(&mut self, data: usize) -> (u64, u32) {
        let mut bytes = vec![0; 16 + data];
        tokio::time::timeout(SOON, self.client.read_exact(&mut bytes)).await.expect("no reply").unwrap();
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (u64::from_be_bytes(bytes[8..16].try_into().unwrap()), error)
    }

    async fn logged(&mut self) -> &'static str {
        tokio::time::timeout(SOON, self.log.recv()).await.expect("nothing happened").unwrap()
    }
}

#[tokio::test]
async fn a_read_overtakes_a_write_that_waits() {
    let mut fixture = fixture();
    fixture.send(0, 1, 1, 4096).await;
    fixture.send(0, 0, 2, 4096).await;
    assert_eq!(fixture.reply(4096).await, (2, 0));
    fixture.gate.send_replace(true);
    assert_eq!(fixture.reply(0).await, (1, 0));
}

#[tokio::test]
async fn a_flush_waits_for_what_came_before_and_holds_what_comes_after() {
    let mut fixture = fixture();
    fixture.send(0, 1, 1, 4096).await;
    fixture.send(0, 3, 2, 0).await;
    fixture.send(0, 1, 3, 4096).await;
    assert_eq!(fixture.logged().await, "write");
    fixture.gate.send_replace(true);
    assert_eq!([fixture.logged().await, fixture.logged().await], ["written", "flush"]);
    assert_eq!([fixture.logged().await, fixture.logged().await], ["write", "written"]);
    assert_eq!([fixture.reply(0).await, fixture.reply(0).await, fixture.reply(0).await], [(1, 0), (2, 0), (3, 0)]);
}

#[tokio::test]
async fn a_fua_write_is_answered_after_a_flush() {
    let mut fixture = fixture();
    fixture.gate.send_replace(true);
    fixture.send(1, 1, 1, 4096).await;
    assert_eq!(fixture.reply(0).await, (1, 0));
    assert_eq!([fixture.logged().await, fixture.logged().await, fixture.logged().await], ["write", "written", "flush"]);
}

#[tokio::test]
async fn no_more_requests_run_than_the_bound() {
    let mut fixture = fixture();
    for cookie in 0..u64::from(MAX_IN_FLIGHT) + 1 {
        fixture.send(0, 1, cookie, 4096).await;
    }
    for _ in 0..MAX_IN_FLIGHT {
        assert_eq!(fixture.logged().await, "write");
    }
    // The one beyond the bound begins only after another has ended.
    fixture.gate.send_replace(true);
    assert_eq!(fixture.logged().await, "written");
}

#[tokio::test]
async fn a_targets_error_is_that_requests_error_only() {
    let mut fixture = fixture();
    fixture.send(0, 6, 1, 4096).await;
    assert_eq!(fixture.reply(0).await, (1, WireError::Space as u32));
    fixture.send(0, 0, 2, 4096).await;
    assert_eq!(fixture.reply(4096).await, (2, 0));
}

#[tokio::test]
async fn a_target_that_hangs_is_an_error_after_its_deadline() {
    let mut fixture = fixture_with(Duration::from_millis(20));
    fixture.send(0, 1, 1, 4096).await;
    assert_eq!(fixture.reply(0).await, (1, WireError::Io as u32));
    fixture.send(0, 0, 2, 4096).await;
    assert_eq!(fixture.reply(4096).await, (2, 0));
}

#[tokio::test]
async fn goodbye_lets_what_is_in_flight_finish() {
    let mut fixture = fixture();
    fixture.send(0, 1, 1, 4096).await;
    fixture.send(0, 2, 2, 0).await;
    assert_eq!(fixture.logged().await, "write");
    fixture.gate.send_replace(true);
    assert_eq!(fixture.reply(0).await, (1, 0));
    fixture.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn hostile_bytes_end_the_connection_with_an_error() {
    let mut fixture = fixture();
    fixture.client.write_all(&[0xff; 28]).await.unwrap();
    let ended = tokio::time::timeout(SOON, fixture.served).await.expect("still serving").unwrap();
    assert!(matches!(ended, Err(ConnectionError::Protocol(_))), "{ended:?}");
}
