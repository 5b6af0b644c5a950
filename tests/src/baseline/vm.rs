//! A QEMU without Pageport: the same machine, devices and guest as a worker starts, driven by hand over QMP.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use super::qmp::{Qmp, QmpError};
use crate::lab::guest::{Attachment, GuestImages, command_line};
use crate::lab::network::{GUEST_BRIDGE, Network, Place};
use crate::netns;

/// How long QEMU may take to answer for the first time; preallocating memory takes a moment.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// The machine type that workers use when a VM names none.
pub const MACHINE: &str = "pc-q35-9.0";

/// Why a plain VM cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A step before QEMU's own start failed.
    #[error("{step} for plain vm {name}")]
    Prepare {
        /// Which step.
        step: &'static str,
        /// Which VM.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU does not do as told.
    #[error("drive plain vm {name} (its log: {log})")]
    Qmp {
        /// Which VM.
        name: String,
        /// Where QEMU's own words are.
        log: PathBuf,
        /// What went wrong.
        #[source]
        source: QmpError,
    },
}

/// Whether the guest tells QEMU which pages are free, so that they are not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreePageHints {
    /// It does not: QEMU's default.
    #[default]
    Off,
    /// It does, through the balloon.
    On,
}

/// What a plain VM is.
#[derive(Clone, Debug)]
pub struct PlainSpec {
    /// Its name; also of its tap device, so at most 12 characters.
    pub name: String,
    /// What it boots.
    pub images: GuestImages,
    /// Its own disk.
    pub disk: PathBuf,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its address on the guests' segment.
    pub address: std::net::Ipv4Addr,
    /// Last byte of its hardware address.
    pub mac_suffix: u8,
    /// `tcg` or `kvm`.
    pub accelerator: String,
    /// Whether migrations skip what the guest says is free.
    pub hints: FreePageHints,
}

/// Whether a VM boots or waits for a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Boots.
    Boot,
    /// Waits for `migrate-incoming`, then runs as soon as all has arrived.
    Incoming,
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct PlainVm {
    name: String,
    log: PathBuf,
    console: PathBuf,
    child: Child,
    qmp: Qmp,
}

impl PlainVm {
    /// Starts QEMU in a site's namespace; sockets and logs lie in `folder`.
    ///
    /// # Errors
    /// When a device cannot be made or QEMU does not start.
    pub async fn start(
        network: &Network,
        site: &str,
        spec: &PlainSpec,
        start: Start,
        folder: &Path,
    ) -> Result<Self, VmError> {
        let prepare = |step| {
            let name = spec.name.clone();
            move |source| VmError::Prepare { step, name, source }
        };
        let place = network.place(site);
        let tap = match &place {
            Place::Namespace(namespace) => Some(make_tap(namespace, &spec.name).map_err(prepare("make tap device"))?),
            Place::Host => None,
        };
        let socket = folder.join(format!("{}-{site}.qmp", spec.name));
        std::fs::remove_file(&socket).ok();
        let log = folder.join(format!("{}-{site}.log", spec.name));
        let output = File::options().create(true).append(true).open(&log).map_err(prepare("make log"))?;
        let errors = output.try_clone().map_err(prepare("make log"))?;
        let console = folder.join(format!("{}-{site}.console", spec.name));
        let mut child = place
            .command("qemu-system-x86_64")
            .args(arguments(spec, start, tap.as_deref(), &socket, &console))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(prepare("start qemu"))?;
        match Qmp::connect(&socket, START_DEADLINE).await {
            Ok(qmp) => Ok(Self { name: spec.name.clone(), log, console, child, qmp }),
            Err(source) => {
                child.kill().and_then(|()| child.wait()).ok();
                Err(VmError::Qmp { name: spec.name.clone(), log, source })
            }
        }
    }

    /// Its serial port: a file of what it said, or without a network card a unix socket.
    #[must_use]
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// The connection to QEMU.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Adds this VM's name and log to what went wrong.
    pub(crate) fn context(&self) -> impl FnOnce(QmpError) -> VmError + use<> {
        let (name, log) = (self.name.clone(), self.log.clone());
        move |source| VmError::Qmp { name, log, source }
    }

    /// Runs a QMP command.
    ///
    /// # Errors
    /// When QEMU refuses, is late, or has ended.
    pub async fn execute(&mut self, command: &str, arguments: serde_json::Value) -> Result<serde_json::Value, VmError> {
        let context = self.context();
        self.qmp.execute(command, arguments).await.map_err(context)
    }
}

impl Drop for PlainVm {
    fn drop(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).ok();
    }
}

fn make_tap(namespace: &str, name: &str) -> io::Result<String> {
    let tap = format!("tap{name}");
    for command in [
        format!("-n {namespace} tuntap add dev {tap} mode tap"),
        format!("-n {namespace} link set {tap} master {GUEST_BRIDGE} up"),
    ] {
        // The device of an earlier VM of this name is as good.
        match netns::ip(command.split(' ')) {
            Err(error) if !error.to_string().contains("busy") => return Err(error),
            _ => {}
        }
    }
    Ok(tap)
}

fn arguments(spec: &PlainSpec, start: Start, tap: Option<&str>, socket: &Path, console: &Path) -> Vec<String> {
    let PlainSpec { images, memory_bytes, mac_suffix, accelerator, .. } = spec;
    let prealloc = if start == Start::Incoming { "on" } else { "off" };
    let mut args: Vec<String> =
        ["-no-user-config", "-nodefaults", "-display", "none", "-smp", "1"].map(Into::into).into();
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option("-name", format!("guest={}", spec.name));
    option("-machine", format!("{MACHINE},accel={accelerator},memory-backend=pc.ram"));
    option("-m", format!("{}k", memory_bytes / 1024));
    option("-object", format!("memory-backend-ram,id=pc.ram,size={memory_bytes},prealloc={prealloc}"));
    option("-qmp", format!("unix:{},server=on,wait=off", socket.display()));
    let serial = match tap {
        Some(_) => format!("file:{}", console.display()),
        None => format!("unix:{},server=on,wait=off", console.display()),
    };
    option("-serial", serial);
    option("-object", "iothread,id=balloon-io".into());
    let hints = if spec.hints == FreePageHints::On { "on" } else { "off" };
    option("-device", format!("virtio-balloon-pci,id=balloon,free-page-hint={hints},iothread=balloon-io,addr=0x2"));
    option("-blockdev", format!("driver=file,node-name=file-root,filename={},discard=unmap", spec.disk.display()));
    option("-blockdev", "driver=raw,node-name=disk-root,file=file-root,discard=unmap".into());
    option("-device", "virtio-blk-pci,id=blk-root,drive=disk-root,serial=root,addr=0x4".into());
    if let Some(tap) = tap {
        option("-netdev", format!("tap,id=net0,ifname={tap},script=no,downscript=no,vhost=off"));
        let mac = format!("52:54:00:70:70:{mac_suffix:02x}");
        option("-device", format!("virtio-net-pci,id=nic0,netdev=net0,mac={mac},romfile=,addr=0x10"));
    }
    option("-kernel", images.kernel.display().to_string());
    option("-initrd", images.initrd.display().to_string());
    option("-append", command_line(tap.map_or(Attachment::Serial, |_| Attachment::Segment(spec.address))));
    if start == Start::Incoming {
        option("-incoming", "defer".into());
    }
    args
}
