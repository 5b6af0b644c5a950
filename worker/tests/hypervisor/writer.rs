//! A guest that writes without a pause, to two disks in turn, at places and with contents that are known. So what its disks
//! held at any moment can be told from the newest write alone.

use std::path::{Path, PathBuf};

use pageport_proto::v1::DiskSpec;
use pageport_worker::hypervisor::{Console, FreezeDisk, Frozen, Launch, StartMode, Vm};
use pageport_worker::nbd::{NbdClient, States};
use pageport_worker::replica::cap::Cap;
use pageport_worker::replication::pull::{PullError, pull};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{DISK_BYTES, Fixture, MIB, QEMU, SOON, image, text, writes};
use crate::targets::Memory;

#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, //    cli; ax, ds, es, ss = 0
    0xbc, 0x00, 0x7c, 0xfb,                               //    mov sp, 0x7c00; sti
    0x66, 0xff, 0x06, 0x00, 0x7e,                         // 1: inc dword [0x7e00]
    0x66, 0xa1, 0x00, 0x7e,                               //    mov eax, [0x7e00]
    0x66, 0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e,             //    imul eax, eax, 0x9e3779b1
    0x66, 0xc1, 0xe8, 0x12, 0x66, 0x83, 0xc0, 0x40,       //    shr eax, 18; add eax, 64
    0x66, 0xa3, 0x5a, 0x7c,                               //    mov [packet + 8], eax
    0xb2, 0x80, 0xe8, 0x13, 0x00,                         //    mov dl, 0x80; call put
    0xb2, 0x81, 0xe8, 0x0e, 0x00,                         //    mov dl, 0x81; call put
    0xf6, 0x06, 0x00, 0x7e, 0x3f, 0x75, 0xd3,             //    test byte [0x7e00], 63; jnz 1b
    0xb0, b'.', 0xe8, 0x0e, 0x00, 0xeb, 0xcc,             //    mov al, '.'; call say; jmp 1b
    0xbe, 0x52, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13,       // put: mov si, packet; mov ax, 0x4300; int 0x13
    0x73, 0x06, 0xb0, b'E',                               //    jnc 2f; mov al, 'E'
    0xba, 0xf8, 0x03, 0xee, 0xc3,                         // say: mov dx, 0x3f8; out dx, al; 2: ret
    0x10, 0, 1, 0, 0x00, 0x7e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // packet: 1 sector from 0:7e00
];
const SECTOR: usize = 512;
/// The guest leaves alone what lies from here on.
pub const QUIET: u64 = 12 * MIB;
pub const DISKS: [&str; 2] = ["root", "a-disk-of-20-letters"];

/// Which sector the guest's write number `count` goes to, on each disk.
fn sector_of(count: u32) -> usize {
    64 + (count.wrapping_mul(0x9e37_79b1) >> 18) as usize
}

/// The disk before the guest's first write.
pub fn base() -> Vec<u8> {
    let mut base = image();
    base[..GUEST.len()].copy_from_slice(GUEST);
    base
}

/// The number of the newest write that `content` has; it must have all before that, and nothing else below [`QUIET`].
pub fn newest_write(content: &[u8]) -> u32 {
    let base = base();
    let sector = |bytes: &[u8], number: usize| bytes[number * SECTOR..(number + 1) * SECTOR].to_vec();
    let number = |bytes: &[u8], number: usize| {
        u32::from_le_bytes(bytes[number * SECTOR..number * SECTOR + 4].try_into().unwrap())
    };
    let sectors = QUIET as usize / SECTOR;
    let changed: Vec<usize> = (0..sectors).filter(|s| sector(content, *s) != sector(&base, *s)).collect();
    let newest = changed.iter().map(|s| number(content, *s)).max().unwrap_or(0);
    assert!(newest < 10_000_000, "a sector holds what the guest never wrote: {newest:#x}");
    let mut expected = vec![None; sectors];
    for count in 1..=newest {
        expected[sector_of(count)] = Some(count);
    }
    for (place, expected) in expected.into_iter().enumerate() {
        match expected {
            Some(count) => assert_eq!(number(content, place), count, "sector {place}, newest is {newest}"),
            None => assert!(sector(content, place) == sector(&base, place), "sector {place} was never written"),
        }
    }
    newest
}

/// A host with the guest, and a second monitor to reach the guest's disks through its devices.
pub struct Writer {
    pub fixture: Fixture,
    pub launch: Launch,
    side: PathBuf,
}

impl Writer {
    pub fn new(mode: StartMode) -> Self {
        let mut fixture = Fixture::new();
        let side = fixture.path("side.sock");
        let script = format!(
            "#!/bin/sh\nexec {QEMU} \"$@\" -chardev socket,id=side,path={},server=on,wait=off -mon chardev=side,mode=control\n",
            side.display()
        );
        let qemu = fixture.path("qemu");
        std::fs::write(&qemu, script).unwrap();
        std::fs::set_permissions(&qemu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        fixture.host.qemu = text(&qemu).to_owned();
        let mut launch = fixture.launch(mode);
        launch.spec.disks = DISKS
            .iter()
            .map(|name| {
                let path = fixture.path(&format!("{name}.raw"));
                std::fs::write(&path, base()).unwrap();
                DiskSpec {
                    name: (*name).into(),
                    path: text(&path).to_owned(),
                    format: "raw".into(),
                    ..Default::default()
                }
            })
            .collect();
        Self { fixture, launch, side }
    }

    pub async fn start(&self) -> Vm {
        Vm::start(&self.fixture.host, &self.launch).await.expect("QEMU starts")
    }

    /// The disks, with their scratch files to be.
    pub fn freeze_disks(&self) -> Vec<FreezeDisk> {
        let disk = |name: &&str| FreezeDisk {
            name: (*name).to_owned(),
            scratch: self.fixture.path(&format!("{name}.scratch")),
        };
        DISKS.iter().map(disk).collect()
    }

    pub fn on_disk(&self, disk: &str) -> Vec<u8> {
        std::fs::read(self.fixture.path(&format!("{disk}.raw"))).unwrap()
    }

    pub async fn side(&self) -> Side {
        Side::connect(&self.side).await
    }
}

/// Waits until the guest has written a few hundred times more; each write must have worked.
pub async fn guest_goes_on(vm: &Vm) {
    writes(&Console::open(&vm.paths().console()).await.unwrap(), 4).await;
}

pub fn names() -> Vec<String> {
    DISKS.map(str::to_owned).to_vec()
}

/// A copy of each frozen disk to its target, under way.
pub async fn copies(frozen: &Frozen, targets: &[Arc<Memory>]) -> Vec<AbortOnDropHandle<Result<(), PullError>>> {
    let socket = frozen.export().await.unwrap();
    let mut copies = Vec::new();
    for (disk, target) in DISKS.iter().zip(targets) {
        copies.push(AbortOnDropHandle::new(tokio::spawn(copy(&socket, frozen, disk, target).await)));
    }
    copies
}

/// A copy of one disk of a point that is offered on `socket`.
pub async fn copy(
    socket: &Path,
    frozen: &Frozen,
    disk: &str,
    target: &Arc<Memory>,
) -> impl Future<Output = Result<(), PullError>> + use<> {
    let states = frozen.since().map_or(States::Zeroes, |bitmap| States::Dirty { bitmap: bitmap.to_owned() });
    let client = NbdClient::connect(socket, disk, states).await.unwrap();
    pull(client, Arc::clone(target), Arc::new(Cap::none()), Arc::default())
}

pub fn targets() -> Vec<Arc<Memory>> {
    DISKS.iter().map(|_| Memory::with(vec![0xdd; DISK_BYTES as usize])).collect()
}

/// A second monitor.
pub struct Side {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Side {
    async fn connect(path: &Path) -> Self {
        let (read, write) = UnixStream::connect(path).await.unwrap().into_split();
        let mut side = Self { lines: BufReader::new(read).lines(), write };
        side.execute("qmp_capabilities", json!({})).await;
        side
    }

    pub async fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.write.write_all(line.as_bytes()).await.unwrap();
        let answer = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("QEMU has ended");
                let line: Value = serde_json::from_str(&line).unwrap();
                assert!(line.get("error").is_none(), "{command}: {line}");
                if let Some(answer) = line.get("return") {
                    return answer.clone();
                }
            }
        };
        tokio::time::timeout(SOON, answer).await.expect("QEMU answers the second monitor")
    }

    /// Does to a disk, through the guest's device, what `qemu-io` would.
    pub async fn io(&mut self, disk: &str, command: &str) {
        let line = format!("qemu-io -d /machine/peripheral/blk-{disk}/virtio-backend \"{command}\"");
        let said = self.execute("human-monitor-command", json!({"command-line": line})).await;
        let said = said.as_str().unwrap().to_lowercase();
        assert!(!said.contains("failed") && !said.contains("error") && !said.contains("not "), "{command}: {said}");
    }
}
