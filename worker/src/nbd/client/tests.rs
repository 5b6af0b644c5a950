//! Against a server whose every byte the test decides; a real QEMU's is in `tests/hypervisor/freeze.rs`.

use tokio::net::UnixListener;

use super::*;

const SIZE: u64 = 16 << 20;
const ANSWER_MAGIC: &[u8] = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = ANSWER_MAGIC.to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn chunk(cookie: u64, last: bool, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(u16::from(last).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn data(cookie: u64, last: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(cookie, last, 1, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(cookie: u64, last: bool, offset: u64, length: u32) -> Vec<u8> {
    chunk(cookie, last, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

fn failure(cookie: u64, error: u32, message: &str) -> Vec<u8> {
    let length = (message.len() as u16).to_be_bytes();
    chunk(cookie, true, 1 << 15 | 1, &[&error.to_be_bytes()[..], &length, message.as_bytes()].concat())
}

/// A server that negotiates, and then says what it is told to.
struct Fixture {
    _dir: tempfile::TempDir,
    client: Arc<NbdClient>,
    server: UnixStream,
}

impl Fixture {
    async fn new(states: States) -> Self {
        let context = [b"\x00\x00\x00\x01".as_slice(), b"a-context"].concat();
        let export = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 0x25]].concat();
        let answers = [
            answer(8, 1, b""),
            answer(10, 4, &context),
            answer(10, 1, b""),
            // A kind of information that nobody asked for.
            answer(7, 3, b"\x00\x03abcdefghijkl"),
            answer(7, 3, &export),
            answer(7, 1, b""),
        ];
        let (dir, client, server) = negotiate_with(&answers.concat(), states).await;
        Self { _dir: dir, client: Arc::new(client.unwrap()), server }
    }

    /// The next request: its type, cookie, offset and length.
    async fn request(&mut self) -> (u16, u64, u64, u32) {
        let mut bytes = [0; REQUEST_HEADER_BYTES];
        self.server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes[..4], 0x2560_9513_u32.to_be_bytes());
        let number =
            |range: std::ops::Range<usize>| bytes[range].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        (number(6..8) as u16, number(8..16), number(16..24), number(24..28) as u32)
    }

    async fn says(&mut self, bytes: Vec<u8>) {
        self.server.write_all(&bytes).await.unwrap();
    }
}

async fn negotiate_with(
    answers: &[u8],
    states: States,
) -> (tempfile::TempDir, Result<NbdClient, ClientError>, UnixStream) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").await.unwrap();
        stream.write_all(answers).await.unwrap();
        stream
    };
    let (client, mut server) = tokio::join!(NbdClient::connect(&path, "disk", states), serve);
    if client.is_ok() {
        // Flags, and three options: STRUCTURED_REPLY, SET_META_CONTEXT, GO.
        let mut flags = [0; 4];
        server.read_exact(&mut flags).await.unwrap();
        assert_eq!(flags, 3u32.to_be_bytes());
        for expected in [8, 10, 7] {
            let mut header = [0; 16];
            server.read_exact(&mut header).await.unwrap();
            assert!(header.starts_with(b"IHAVEOPT\0\0\0") && header[11] == expected, "{header:?}");
            server.read_exact(&mut vec![0; header[15].into()]).await.unwrap();
        }
    }
    (dir, client, server)
}

type Read = tokio::task::JoinHandle<Result<Content, ClientError>>;

impl Fixture {
    fn read(&self, offset: u64, length: u32) -> Read {
        let client = self.client.clone();
        tokio::spawn(async move { client.read(offset, length).await })
    }
}

#[tokio::test]
async fn reads_are_put_together_from_parts_that_come_in_any_order() {
    let mut fixture = Fixture::new(States::Zeroes).await;
    assert_eq!(fixture.client.size_bytes(), SIZE);
    let first = fixture.read(4096, 8192);
    assert_eq!(fixture.request().await, (0, 0, 4096, 8192));
    let second = fixture.read(0, 4096);
    assert_eq!(fixture.request().await, (0, 1, 0, 4096));
    fixture.says(hole(1, true, 0, 4096)).await;
    assert_eq!(second.await.unwrap().unwrap(), Content::Zero);
    fixture.says(data(0, false, 4096 + 6144, &[7; 2048])).await;
    fixture.says(hole(0, false, 4096 + 2048, 4096)).await;
    fixture.says(data(0, false, 4096, &[5; 2048])).await;
    fixture.says(chunk(0, true, 0, b"")).await;
    let expected = [[5; 2048].as_slice(), &[0; 4096], &[7; 2048]].concat();
    assert_eq!(first.await.unwrap().unwrap(), Content::Data(expected.into()));
}

#[tokio::test]
async fn a_call_that_is_dropped_or_fails_disturbs_no_other() {
    let mut fixture = Fixture::new(States::Zeroes).await;
    let dropped = fixture.read(0, 4096);
    fixture.request().await;
    dropped.abort();
    let refused = fixture.read(8192, 4096);
    fixture.request().await;
    let trims = fixture.client.clone();
    let trim = tokio::spawn(async move { trims.trim(0, 65536).await });
    assert_eq!(fixture.request().await, (4, 2, 0, 65536));
    fixture.says(data(0, true, 0, &[1; 4096])).await;
    fixture.says(failure(1, EINVAL, "no such luck")).await;
    let error = refused.await.unwrap().unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "the NBD server cannot read 4096 bytes at 8192: no such luck");
    // A simple reply.
    fixture.says(b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x02".to_vec()).await;
    let error = trim.await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Failed { error: 5, .. }) && !error.is_refusal(), "{error}");
    let last = fixture.read(0, 4096);
    fixture.request().await;
    fixture.says(data(3, true, 0, &[9; 4096])).await;
    assert_eq!(last.await.unwrap().unwrap(), Content::Data(vec![9; 4096].into()));
}

#[tokio::test]
async fn block_states_are_told_in_extents_within_the_disk() {
    let states = |pairs: &[(u32, u32)]| {
        let pairs = pairs.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()].concat());
        chunk(0, true, 5, &[0, 0, 0, 1].into_iter().chain(pairs).collect::<Vec<u8>>())
    };
    for (wanted, expected) in [
        (States::Zeroes, [State::Data, State::Zero, State::Zero]),
        (States::Dirty { bitmap: "cur".to_owned() }, [State::Data, State::Clean, State::Data]),
    ] {
        let mut fixture = Fixture::new(wanted).await;
        let client = fixture.client.clone();
        let extents = tokio::spawn(async move { client.extents(SIZE - 12288).await });
        assert_eq!(fixture.request().await, (7, 0, SIZE - 12288, 12288));
        fixture.says(states(&[(4096, 1), (4096, 2), (1 << 30, 3)])).await;
        let extents = extents.await.unwrap().unwrap();
        let offsets = [SIZE - 12288, SIZE - 8192, SIZE - 4096];
        let expected = offsets.into_iter().zip(expected).map(|(offset, state)| Extent { offset, length: 4096, state });
        assert_eq!(extents, expected.collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn bytes_that_are_no_answer_end_the_connection_and_every_call() {
    let too_long = [&0x668e_33ef_u32.to_be_bytes()[..], &[0, 1, 0, 1], &[0; 8], &[0xff; 4]].concat();
    for nonsense in [
        b"what is this, then?".to_vec(),
        too_long,
        data(77, true, 0, &[1; 4096]),
        data(0, true, 1 << 40, &[1; 4096]),
        data(0, true, 0, &[1; 8192]),
        data(0, true, 0, &[1; 2048]),
        hole(0, true, 0, 8192),
        chunk(0, true, 5, b"states?"),
        chunk(0, true, 99, b"what?"),
        chunk(0, true, 1 << 15 | 1, b"short"),
    ] {
        let mut fixture = Fixture::new(States::Zeroes).await;
        let reads = [fixture.read(0, 4096), fixture.read(4096, 4096)];
        fixture.request().await;
        fixture.request().await;
        fixture.says(nonsense.clone()).await;
        for read in reads {
            let error = read.await.unwrap().unwrap_err();
            assert!(matches!(error, ClientError::Ended { .. }), "{nonsense:?}: {error}");
        }
        let later = fixture.client.read(0, 4096).await;
        assert!(matches!(later, Err(ClientError::Ended { .. })), "{later:?}");
    }
}

#[tokio::test]
async fn a_server_that_leaves_ends_every_call() {
    let mut fixture = Fixture::new(States::Zeroes).await;
    let read = fixture.read(0, 4096);
    fixture.request().await;
    drop(fixture.server);
    assert!(matches!(read.await.unwrap(), Err(ClientError::Ended { .. })));
    assert!(matches!(fixture.client.trim(0, 4096).await, Err(ClientError::Ended { .. })));
}

#[tokio::test]
async fn what_is_not_offered_is_said() {
    let refused = [answer(8, 1, b""), answer(10, 1 << 31 | 6, b"no export \"disk\"")].concat();
    let (_dir, client, _) = negotiate_with(&refused, States::Zeroes).await;
    let said = client.unwrap_err().to_string();
    assert_eq!(said, "the NBD server does not offer its block states: no export \"disk\"");
    let no_context = [answer(8, 1, b""), answer(10, 1, b"")].concat();
    let (_dir, client, _) = negotiate_with(&no_context, States::Dirty { bitmap: "cur".to_owned() }).await;
    let said = client.unwrap_err().to_string();
    assert_eq!(said, "the NBD server does not offer its block states: it does not know qemu:dirty-bitmap:cur");
    let nobody = NbdClient::connect(Path::new("/nowhere/nbd.sock"), "disk", States::Zeroes).await;
    assert!(matches!(nobody, Err(ClientError::Connect { .. })), "{nobody:?}");
    let (_dir, client, _) = negotiate_with(b"\0\0\0\0this is not it ...", States::Zeroes).await;
    assert!(matches!(client, Err(ClientError::Protocol(_))), "{client:?}");
}

proptest::proptest! {
    #[test]
    fn whatever_a_chunk_holds_is_read_or_refused(kind: u16, data: Vec<u8>) {
        if let Ok(Chunk::Data { bytes, .. }) = parse_chunk(kind, data.clone().into()) {
            proptest::prop_assert!(!bytes.is_empty() && bytes.len() < data.len());
        }
    }
}
