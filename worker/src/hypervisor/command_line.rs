//! The command line of a VM's QEMU. Pure: (spec, paths, mode) in, arguments out.
//!
//! Source and destination must agree on everything that the guest or the migration stream can see, so both sides call
//! this with the same spec; only host paths, tap names, `-S` and `-incoming` differ.
//!
//! ```text
//!   virtio-blk-pci (blk-NAME, slot 4+i) ─▶ nodes of the disk: see `disk`
//! ```
//! - Guest memory is one backend whose id is the name of its RAM block. It is not preallocated where a migration will fill it: that would be
//!   waited for before anything moves, and most of memory is there long before the guest stops.
//! - The images are opened through the host's page cache: at the destination the worker has written the replica through
//!   the same cache, and QEMU flushes and lets go of its image before the other side may run.
//! - Disks that are added later have places of their own, so that they are at the same place at both ends of a move and after a boot. Where the machine
//!   type takes no device on its root bus while it runs, these are ports, and are there from the start.
//! - The balloon is there for its free-page hints; those need an iothread.
//! - Every VM has a port for a guest agent, so that one that is installed later is found.
//! - QEMU may not start programs or change its privileges (seccomp).

use std::collections::BTreeMap;
use std::path::Path;

use pageport_keeper::BootTime;
use pageport_proto::VmId;
use pageport_proto::ids::is_name;
use pageport_proto::v1::VmSpec;

use super::accel::Accelerator;
use super::disk::{self, Top};
use super::memory::GuestMemory;
use super::paths::VmPaths;
use crate::image::{Format, Image};

/// The machine type of a VM whose spec does not name one.
pub const DEFAULT_MACHINE: &str = "pc-q35-9.0";
/// Id of the memory backend, and thereby the name of the RAM block in the migration stream.
pub const RAM_ID: &str = "pc.ram";
/// Most disks of a VM: slots 4 to 15.
pub const MAX_DISKS: usize = 12;
/// Most network devices of a VM: slots 16 to 23.
pub const MAX_NICS: usize = 8;
/// Longest disk name.
pub const MAX_DISK_NAME_BYTES: usize = 20;
const BALLOON_SLOT: usize = 2;
/// The guest agent's port; its controller is there whether the guest has an agent or not.
const AGENT_SLOT: usize = 3;
const FIRST_DISK_SLOT: usize = 4;
const FIRST_NIC_SLOT: usize = 16;
/// The places for disks that are added later: functions of one slot where each is a port, or slots from this one on.
const ADDED_DISKS_SLOT: usize = 24;
/// Most disks that are added later.
pub const MAX_ADDED_DISKS: usize = 8;
/// Virtio's limit for serial numbers.
const SERIAL_BYTES: usize = 20;

/// How QEMU is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// Boots, and runs at once.
    Running,
    /// Boots, but waits for `cont` before the first instruction.
    Paused,
    /// Waits for a migration stream, and then for `cont`.
    Incoming,
}

/// A VM to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Which VM.
    pub vm: VmId,
    /// What it is.
    pub spec: VmSpec,
    /// Its disks on this host, by name; a disk that is not named here is a raw image where its spec says.
    pub images: BTreeMap<String, Image>,
    /// How to begin.
    pub mode: StartMode,
    /// When the keeper is to kill it, unless [`super::Vm::arm`] extends that; `None`: never.
    pub deadline: Option<BootTime>,
}

impl Launch {
    fn image(&self, name: &str, path: &str) -> Image {
        self.images.get(name).cloned().unwrap_or_else(|| Image::raw(path))
    }
}

/// A spec that cannot be made a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number is out of its range.
    #[error("{field} is {value}: {rule}")]
    Range {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        rule: &'static str,
    },
    /// A text is not of its form.
    #[error("{field} \"{value}\": {rule}")]
    Text {
        /// Which.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        rule: &'static str,
    },
}

fn option_text(value: &str) -> bool {
    value.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b))
}

/// Can this be the name of a Linux bridge, in an argument?
pub fn is_bridge_name(name: &str) -> bool {
    (1..=15).contains(&name.len()) && option_text(name) && !name.starts_with('-')
}

/// Checks everything that ends up in an argument, so that a spec cannot smuggle in options.
pub fn check_spec(spec: &VmSpec) -> Result<(), SpecError> {
    let range =
        |field, value: u64, ok: bool, rule| if ok { Ok(()) } else { Err(SpecError::Range { field, value, rule }) };
    let text = |field, value: &str, ok: bool, rule| {
        if ok { Ok(()) } else { Err(SpecError::Text { field, value: value.to_owned(), rule }) }
    };
    let file = |value: &str| Path::new(value).is_absolute() && !value.contains('\0');

    text("name", &spec.name, is_name(&spec.name), "use 1 to 40 of a-z, 0-9 and \"-\"")?;
    let mib = 1 << 20;
    let memory_fits = spec.memory_bytes >= 16 * mib && spec.memory_bytes.is_multiple_of(2 * mib);
    range("memory_bytes", spec.memory_bytes, memory_fits, "use at least 16 MiB and a multiple of 2 MiB")?;
    range("vcpus", spec.vcpus.into(), (1..=255).contains(&spec.vcpus), "use 1 to 255")?;
    text("machine", &spec.machine, option_text(&spec.machine), "use a QEMU machine type such as pc-q35-9.0")?;
    let cpu_form = option_text(&spec.cpu.replace([',', '='], ""));
    text("cpu", &spec.cpu, cpu_form, "use a QEMU CPU model")?;
    range("disks", spec.disks.len() as u64, spec.disks.len() <= MAX_DISKS, "at most 12")?;
    range("nics", spec.nics.len() as u64, spec.nics.len() <= MAX_NICS, "at most 8")?;
    for (index, disk) in spec.disks.iter().enumerate() {
        let fits = is_name(&disk.name) && disk.name.len() <= MAX_DISK_NAME_BYTES;
        text("disk name", &disk.name, fits, "use 1 to 20 of a-z, 0-9 and \"-\"")?;
        let unique = spec.disks[..index].iter().all(|other| other.name != disk.name);
        text("disk name", &disk.name, unique, "another disk has it")?;
        let format = disk.format.is_empty() || Format::parse(&disk.format).is_some();
        text("disk format", &disk.format, format, "use raw or qcow2")?;
        let made = disk.port > 0 && disk.path.is_empty();
        text("disk path", &disk.path, made || file(&disk.path), "use an absolute path")?;
        range("disk port", disk.port.into(), disk.port <= MAX_ADDED_DISKS as u32, "use 1 to 8, or 0 for none")?;
        let own = disk.port == 0 || spec.disks[..index].iter().all(|other| other.port != disk.port);
        range("disk port", disk.port.into(), own, "another disk has it")?;
    }
    for nic in &spec.nics {
        let mac = nic.mac.split(':').filter(|part| part.len() == 2 && u8::from_str_radix(part, 16).is_ok()).count();
        text("mac", &nic.mac, mac == 6 && nic.mac.len() == 17, "use six bytes such as 52:54:00:12:34:56")?;
        text("bridge", &nic.bridge, is_bridge_name(&nic.bridge), "use the name of a Linux bridge")?;
    }
    if let Some(boot) = &spec.direct_boot {
        text("kernel", &boot.kernel, file(&boot.kernel), "use an absolute path")?;
        text("initrd", &boot.initrd, boot.initrd.is_empty() || file(&boot.initrd), "use an absolute path")?;
    }
    Ok(())
}

/// The argument that gives QEMU its control socket; also what tells this VM's QEMU from other processes.
pub fn qmp_argument(paths: &VmPaths) -> String {
    format!("socket,id=qmp,path={},server=on,wait=off", escaped(&paths.qmp()))
}

/// Where the device of a disk that was added is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The bus.
    pub bus: String,
    /// The slot on it.
    pub addr: usize,
}

impl Place {
    /// The place with this number, from 1, in a VM of this machine type; [`None`]: there is none.
    pub fn of(machine: &str, port: u32) -> Option<Self> {
        let number = usize::try_from(port).ok().filter(|number| (1..=MAX_ADDED_DISKS).contains(number))?;
        match Bus::of(machine)? {
            Bus::Ports => Some(Self { bus: port_id(number), addr: 0 }),
            Bus::Slots => Some(Self { bus: "pci.0".to_owned(), addr: ADDED_DISKS_SLOT + number - 1 }),
        }
    }
}

/// How a machine type takes devices while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bus {
    /// Only behind ports that were there when it was started.
    Ports,
    /// In any free slot.
    Slots,
}

impl Bus {
    /// [`None`]: not at all, as far as is known.
    fn of(machine: &str) -> Option<Self> {
        let is = |name: &str| machine == name || machine.starts_with(&format!("pc-{name}-"));
        match machine {
            "" => Some(Self::Ports),
            _ if is("q35") => Some(Self::Ports),
            _ if is("i440fx") || machine == "pc" => Some(Self::Slots),
            _ => None,
        }
    }
}

/// The ports of a VM of this machine type, as devices: all of them in one slot.
fn ports(machine: &str) -> Vec<String> {
    if Bus::of(machine) != Some(Bus::Ports) {
        return vec![];
    }
    let port = |number: usize| {
        let several = if number == 1 { ",multifunction=on" } else { "" };
        let (id, function) = (port_id(number), number - 1);
        format!(
            "pcie-root-port,id={id},bus=pcie.0,chassis={number},slot={number},addr={ADDED_DISKS_SLOT:#x}.{function}{several}"
        )
    };
    (1..=MAX_ADDED_DISKS).map(port).collect()
}

fn port_id(number: usize) -> String {
    format!("port-{number}")
}

/// What the guest knows a disk by.
pub fn serial(disk: &str) -> String {
    disk.chars().take(SERIAL_BYTES).collect()
}

// QEMU's option syntax doubles commas within values.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The arguments of QEMU; `taps` are the names of the tap devices, one per NIC.
pub fn arguments(
    launch: &Launch,
    paths: &VmPaths,
    accelerator: Accelerator,
    memory: GuestMemory,
    taps: &[String],
) -> Result<Vec<String>, SpecError> {
    let spec = &launch.spec;
    check_spec(spec)?;
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);

    option("-name", format!("guest={}", spec.name));
    option("-uuid", launch.vm.to_string());
    option("-display", "none".into());
    option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    let machine = if spec.machine.is_empty() { DEFAULT_MACHINE } else { &spec.machine };
    option("-machine", format!("{machine},accel={accelerator},memory-backend={RAM_ID}"));
    if !spec.cpu.is_empty() {
        option("-cpu", spec.cpu.clone());
    }
    option("-smp", spec.vcpus.to_string());
    option("-m", format!("{}k", spec.memory_bytes / 1024));
    let backend = match memory {
        GuestMemory::Ordinary => "memory-backend-ram",
        GuestMemory::Huge => "memory-backend-memfd,hugetlb=on",
    };
    option("-object", format!("{backend},id={RAM_ID},size={}", spec.memory_bytes));

    option("-chardev", qmp_argument(paths));
    option("-mon", "chardev=qmp,mode=control".into());
    option("-chardev", format!("socket,id=console,path={},server=on,wait=off", escaped(&paths.console())));
    option("-serial", "chardev:console".into());

    option("-object", "iothread,id=balloon-io".into());
    let balloon = format!("virtio-balloon-pci,id=balloon,free-page-hint=on,iothread=balloon-io,addr={BALLOON_SLOT:#x}");
    option("-device", balloon);
    option("-chardev", format!("socket,id=agent,path={},server=on,wait=off", escaped(&paths.agent())));
    option("-device", format!("virtio-serial-pci,id=ports,max_ports=2,addr={AGENT_SLOT:#x}"));
    option("-device", "virtserialport,id=agent-port,bus=ports.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0".into());
    if spec.disks.iter().any(|disk| Top::of(&launch.image(&disk.name, &disk.path)) == Top::Transparent) {
        option("-object", format!("throttle-group,id={}", disk::UNLIMITED));
    }
    for port in ports(machine) {
        option("-device", port);
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let name = &disk.name;
        for node in disk::nodes(name, &launch.image(name, &disk.path)) {
            option("-blockdev", node.to_string());
        }
        let (bus, addr) = match Place::of(machine, disk.port) {
            Some(Place { bus, addr }) => (format!(",bus={bus}"), addr),
            None => (String::new(), FIRST_DISK_SLOT + index),
        };
        let first = disk.port == 0 && spec.direct_boot.is_none();
        let boot = if first { format!(",bootindex={}", index + 1) } else { String::new() };
        let (drive, serial) = (disk::top_node(name), serial(name));
        let device =
            format!("virtio-blk-pci,id={},drive={drive},serial={serial}{bus},addr={addr:#x}{boot}", disk::device(name));
        option("-device", device);
    }
    for (index, (nic, tap)) in spec.nics.iter().zip(taps).enumerate() {
        option("-netdev", format!("tap,id=net{index},ifname={tap},script=no,downscript=no,vhost=off"));
        let slot = FIRST_NIC_SLOT + index;
        // No option ROM: nothing boots from the network, and its size would be part of the migration stream.
        option(
            "-device",
            format!("virtio-net-pci,id=nic{index},netdev=net{index},mac={},romfile=,addr={slot:#x}", nic.mac),
        );
    }
    if let Some(boot) = &spec.direct_boot {
        option("-kernel", boot.kernel.clone());
        if !boot.initrd.is_empty() {
            option("-initrd", boot.initrd.clone());
        }
        option("-append", boot.cmdline.clone());
    }
    option("-pidfile", paths.pid().to_string_lossy().into_owned());
    args.extend(["-no-user-config", "-nodefaults"].map(str::to_owned));
    match launch.mode {
        StartMode::Running => {}
        StartMode::Paused => args.push("-S".into()),
        StartMode::Incoming => args.extend(["-S", "-incoming", "defer"].map(str::to_owned)),
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageport_proto::v1::{DirectBoot, DiskSpec, NicSpec};

    fn launch(mode: StartMode) -> Launch {
        let spec = VmSpec {
            name: "web-1".into(),
            memory_bytes: 64 << 20,
            vcpus: 2,
            disks: vec![
                DiskSpec {
                    name: "root".into(),
                    path: "/srv/a,b.raw".into(),
                    format: "raw".into(),
                    ..Default::default()
                },
                DiskSpec {
                    name: "data".into(),
                    path: "/srv/data.raw".into(),
                    format: String::new(),
                    ..Default::default()
                },
            ],
            nics: vec![NicSpec { mac: "52:54:00:12:34:56".into(), bridge: "br0".into() }],
            ..VmSpec::default()
        };
        let vm = "018f4a3e-7c1b-7000-8000-000000000001".parse().unwrap();
        Launch { vm, spec, images: BTreeMap::new(), mode, deadline: None }
    }

    fn argv(launch: &Launch) -> Vec<String> {
        let paths = VmPaths::new(Path::new("/run/pageport"), launch.vm);
        arguments(launch, &paths, Accelerator::Tcg, GuestMemory::Ordinary, &["pp0".into()]).unwrap()
    }

    fn values<'a>(argv: &'a [String], name: &str) -> Vec<&'a str> {
        argv.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn devices_have_stable_ids_and_addresses() {
        let argv = argv(&launch(StartMode::Running));
        assert_eq!(
            values(&argv, "-device"),
            [
                "virtio-balloon-pci,id=balloon,free-page-hint=on,iothread=balloon-io,addr=0x2",
                "virtio-serial-pci,id=ports,max_ports=2,addr=0x3",
                "virtserialport,id=agent-port,bus=ports.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0",
                "pcie-root-port,id=port-1,bus=pcie.0,chassis=1,slot=1,addr=0x18.0,multifunction=on",
                "pcie-root-port,id=port-2,bus=pcie.0,chassis=2,slot=2,addr=0x18.1",
                "pcie-root-port,id=port-3,bus=pcie.0,chassis=3,slot=3,addr=0x18.2",
                "pcie-root-port,id=port-4,bus=pcie.0,chassis=4,slot=4,addr=0x18.3",
                "pcie-root-port,id=port-5,bus=pcie.0,chassis=5,slot=5,addr=0x18.4",
                "pcie-root-port,id=port-6,bus=pcie.0,chassis=6,slot=6,addr=0x18.5",
                "pcie-root-port,id=port-7,bus=pcie.0,chassis=7,slot=7,addr=0x18.6",
                "pcie-root-port,id=port-8,bus=pcie.0,chassis=8,slot=8,addr=0x18.7",
                "virtio-blk-pci,id=blk-root,drive=top-root,serial=root,addr=0x4,bootindex=1",
                "virtio-blk-pci,id=blk-data,drive=top-data,serial=data,addr=0x5,bootindex=2",
                "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,romfile=,addr=0x10",
            ]
        );
    }

    #[test]
    fn a_disk_that_was_added_is_where_it_was_plugged_in() {
        let mut launch = launch(StartMode::Running);
        let added = DiskSpec { name: "added".into(), port: 3, size_bytes: 4096, ..DiskSpec::default() };
        launch.spec.disks.push(added);
        launch.images.insert("added".into(), Image::raw("/srv/added.raw"));
        let device = |launch: &Launch| {
            let argv = argv(launch);
            values(&argv, "-device").into_iter().find(|device| device.contains("added")).unwrap().to_owned()
        };
        assert_eq!(device(&launch), "virtio-blk-pci,id=blk-added,drive=top-added,serial=added,bus=port-3,addr=0x0");
        launch.spec.machine = "pc-i440fx-10.0".into();
        assert_eq!(device(&launch), "virtio-blk-pci,id=blk-added,drive=top-added,serial=added,bus=pci.0,addr=0x1a");
        assert!(values(&argv(&launch), "-device").iter().all(|device| !device.contains("root-port")));
        for (machine, port) in [("pc-q35-10.0", 9), ("pc-q35-10.0", 0), ("microvm", 1)] {
            assert_eq!(Place::of(machine, port), None, "{machine} {port}");
        }
    }

    #[test]
    fn both_sides_of_a_move_differ_only_in_paths_and_start() {
        let source = argv(&launch(StartMode::Running));
        let mut moved = launch(StartMode::Incoming);
        moved.images.insert("root".into(), Image::raw("/replicas/root"));
        let destination = argv(&moved);
        let differing: Vec<&str> =
            source.iter().zip(&destination).filter(|(a, b)| a != b).map(|(a, _)| a.as_str()).collect();
        assert!(differing.len() == 1 && differing[0].contains("/srv/a,b.raw"), "{differing:?}");
        assert_eq!(destination[source.len()..], ["-S", "-incoming", "defer"]);
    }

    #[test]
    fn a_directly_booted_vm_has_no_boot_order() {
        let mut launch = launch(StartMode::Running);
        let cmdline = "console=ttyS0 root=/dev/vda".to_owned();
        launch.spec.direct_boot = Some(DirectBoot { kernel: "/boot/k".into(), initrd: String::new(), cmdline });
        let argv = argv(&launch);
        assert_eq!(values(&argv, "-append"), ["console=ttyS0 root=/dev/vda"]);
        assert!(values(&argv, "-initrd").is_empty());
        assert!(argv.iter().all(|arg| !arg.contains("bootindex")));
    }

    #[test]
    fn a_spec_cannot_smuggle_in_options() {
        let refused = |change: fn(&mut VmSpec)| {
            let mut spec = launch(StartMode::Running).spec;
            change(&mut spec);
            check_spec(&spec).unwrap_err().to_string()
        };
        assert!(refused(|s| s.name = "a,process=x".into()).contains("name"));
        assert!(refused(|s| s.machine = "q35,accel=kvm".into()).contains("machine"));
        assert!(refused(|s| s.cpu = "max -device x".into()).contains("cpu"));
        assert!(refused(|s| s.memory_bytes = 1).contains("memory_bytes"));
        assert!(refused(|s| s.vcpus = 0).contains("vcpus"));
        assert!(refused(|s| s.disks[1].name = "root".into()).contains("another disk"));
        assert!(refused(|s| s.disks[0].format = "vmdk".into()).contains("raw or qcow2"));
        assert!(refused(|s| s.disks[0].path = "nbd://x".into()).contains("absolute"));
        assert!(refused(|s| s.disks[0].path.clear()).contains("absolute"));
        assert!(refused(|s| s.disks[0].port = 9).contains("disk port"));
        assert!(refused(|s| s.disks.iter_mut().for_each(|disk| disk.port = 1)).contains("another disk"));
        assert!(refused(|s| s.nics[0].mac = "52:54:00:12:34:5g".into()).contains("mac"));
        assert!(refused(|s| s.nics[0].bridge = "br0,x=y".into()).contains("bridge"));
    }
}
