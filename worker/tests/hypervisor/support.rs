//! A host with a small guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::v1::{DiskSpec, VmSpec};
use pageport_worker::hypervisor::{Accelerator, Console, Host, HugePages, Launch, StartMode, Vm, list_running};

pub const QEMU: &str = "qemu-system-x86_64";
pub const MIB: u64 = 1 << 20;
pub const DISK_BYTES: u64 = 16 * MIB;
pub const SOON: Duration = Duration::from_secs(30);

#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, //    cli; ax, ds, es, ss = 0
    0xbc, 0x00, 0x7c, 0xfb,                               //    mov sp, 0x7c00; sti
    0xff, 0x06, 0x00, 0x7e,                               // 1: inc word [0x7e00]
    0xbe, 0x28, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80,       //    mov si, packet; mov ax, 0x4300; mov dl, 0x80
    0xcd, 0x13,                                           //    int 0x13                  write a sector
    0xb0, b'.', 0x73, 0x02, 0xb0, b'E',                   //    mov al, '.'; jnc 2f; mov al, 'E'
    0xba, 0xf8, 0x03, 0xee,                               // 2: mov dx, 0x3f8; out dx, al serial port
    0xf4, 0xeb, 0xe5,                                     //    hlt; jmp 1b               until the next tick
    0x10, 0, 1, 0, 0x00, 0x7e, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, // packet: 1 sector from 0:7e00 to sector 64
];
/// Where the guest's count lies on its disk.
const COUNT_OFFSET: usize = 64 * 512;

/// A host with a disk image of 4 KiB blocks: every fourth zeroes, the others each with its own bytes, and the guest.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub host: Host,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime_dir = dir.path().join("run");
        let (accelerator, huge_pages) = (Accelerator::Tcg, HugePages::Never);
        let host = Host { qemu: QEMU.into(), keeper: keeper(), accelerator, huge_pages, runtime_dir };
        std::fs::write(dir.path().join("disk.raw"), image()).unwrap();
        Self { dir, host }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn launch(&self, mode: StartMode) -> Launch {
        let path = self.path("disk.raw").to_string_lossy().into_owned();
        let spec = VmSpec {
            name: "tiny".into(),
            memory_bytes: 64 * MIB,
            vcpus: 1,
            disks: vec![DiskSpec { name: "root".into(), path, format: "raw".into(), ..Default::default() }],
            ..VmSpec::default()
        };
        Launch { vm: VmId::generate(), spec, images: BTreeMap::new(), mode, deadline: None }
    }

    /// The same host, whose guests get these pages.
    pub fn host_with(&self, huge_pages: HugePages) -> Host {
        Host { huge_pages, ..self.host.clone() }
    }

    pub async fn start(&self, mode: StartMode) -> Vm {
        Vm::start(&self.host, &self.launch(mode)).await.expect("QEMU starts")
    }
}

/// A test that fails leaves no QEMU behind.
impl Drop for Fixture {
    fn drop(&mut self) {
        for vm in list_running(&self.host.runtime_dir).unwrap_or_default() {
            let pid = std::fs::read_to_string(self.host.runtime_dir.join(format!("vm/{vm}/pid"))).unwrap_or_default();
            let _ = std::process::Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

pub fn image() -> Vec<u8> {
    let mut image = vec![0; DISK_BYTES as usize];
    for (number, block) in image.chunks_mut(4096).enumerate() {
        if number % 4 != 0 {
            block.fill((number % 251 + 1) as u8);
        }
    }
    image[..GUEST.len()].copy_from_slice(GUEST);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image
}

pub fn count_on(disk: &Path) -> u16 {
    let disk = std::fs::read(disk).unwrap();
    u16::from_le_bytes([disk[COUNT_OFFSET], disk[COUNT_OFFSET + 1]])
}

/// Waits until the guest has written to its disk `count` more times; each must have worked.
pub async fn writes(console: &Console, count: usize) {
    let (mut output, _) = console.attach().await.unwrap();
    // The backlog is of the past.
    let mut seen = 0;
    let past = async { output.recv().await.is_some() };
    assert!(tokio::time::timeout(SOON, past).await.expect("the guest is silent"));
    while seen < count {
        let piece = tokio::time::timeout(SOON, output.recv()).await.expect("the guest is silent").unwrap();
        assert!(!piece.contains(&b'E'), "a guest's write failed");
        seen += piece.iter().filter(|byte| **byte == b'.').count();
    }
}

pub async fn tool(program: &str, arguments: &[&str]) -> (bool, String) {
    let run = tokio::process::Command::new(program).args(arguments).kill_on_drop(true).output();
    let output = tokio::time::timeout(SOON, run).await.expect("the tool hangs").unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The keeper that was built with these tests: they lie in the folder below.
fn keeper() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let keeper = own.ancestors().nth(2).unwrap().join("pageport-keeper");
    assert!(keeper.exists(), "{} is missing: build the workspace's programs first (make build)", keeper.display());
    keeper
}
