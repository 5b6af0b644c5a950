//! [`Spec`]: a VM's definition, validated once at the edge and then trusted.
//!
//! Guarantees: every length has a limit, names fit into device ids, memory is whole MiB, and empty fields have their
//! defaults. It does not look at any host: whether an image exists is the worker's business.

use std::collections::BTreeSet;

use pageport_ownership::Policy;
use pageport_proto::ids::is_name;
use pageport_proto::v1;
use serde::{Deserialize, Serialize};

/// The machine type of a definition that names none.
pub const DEFAULT_MACHINE: &str = "pc-q35-10.0";
const MIB: u64 = 1 << 20;
const MIN_MEMORY_BYTES: u64 = 16 * MIB;
const MAX_MEMORY_BYTES: u64 = 16 << 40;
const MAX_VCPUS: u32 = 64;
const MAX_DISKS: usize = 8;
const MAX_NICS: usize = 8;
const MAX_GROUPS: usize = 16;
const MAX_DISK_NAME_BYTES: usize = 20;
const MAX_PATH_BYTES: usize = 1024;
const MAX_CMDLINE_BYTES: usize = 2048;
const MAX_WORD_BYTES: usize = 128;
/// Linux' limit for names of network interfaces.
const MAX_BRIDGE_BYTES: usize = 15;

/// A validated definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Unique in the fleet.
    pub name: String,
    memory_bytes: u64,
    vcpus: u32,
    machine: String,
    cpu: String,
    disks: Vec<Disk>,
    nics: Vec<Nic>,
    boot: Option<Boot>,
    /// What happens when its worker is cut off.
    pub on_isolation: Policy,
    start: StartPolicy,
    /// Names of groups; VMs of one group are not moved to the same worker.
    #[serde(default)]
    anti_affinity: BTreeSet<String>,
}

/// What happens when the VM's host has rebooted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum StartPolicy {
    AsOrdered,
    Manual,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Disk {
    name: String,
    path: String,
    #[serde(default)]
    format: Format,
    /// What it was ordered to have at least, in bytes; 0: what its image has.
    #[serde(default)]
    size_bytes: u64,
    /// It was added later: the place of its device among those for such, from 1.
    #[serde(default)]
    port: Option<u8>,
    /// Its image is to be made, empty, where there is none.
    #[serde(default)]
    create: bool,
}

/// Of a disk's image at the VM's first site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Format {
    /// Definitions that are older than formats are of raw images.
    #[default]
    Raw,
    Qcow2,
    /// Not said. The worker takes it for raw, unless it looks like something else.
    Unsaid,
}

impl Format {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::Unsaid),
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Unsaid => "",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Nic {
    mac: String,
    bridge: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Boot {
    kernel: String,
    initrd: String,
    cmdline: String,
}

/// Why a definition is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("vm definition: {field}: {problem}")]
pub struct SpecError {
    /// The field.
    pub field: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

fn bad<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError { field: field.into(), problem: problem.into() })
}

impl TryFrom<v1::VmSpec> for Spec {
    type Error = SpecError;

    fn try_from(spec: v1::VmSpec) -> Result<Self, SpecError> {
        if !is_name(&spec.name) {
            return bad("name", format!("\"{}\" is not a name: use 1 to 40 of a-z, 0-9 and \"-\"", spec.name));
        }
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&spec.memory_bytes) || !spec.memory_bytes.is_multiple_of(MIB)
        {
            return bad(
                "memory",
                format!("{} bytes cannot be used: give a multiple of 1 MiB from 16 MiB to 16 TiB", spec.memory_bytes),
            );
        }
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return bad("vcpus", format!("{} cannot be used: give 1 to {MAX_VCPUS}", spec.vcpus));
        }
        word("machine", &spec.machine)?;
        word("cpu", &spec.cpu)?;
        let on_isolation = Policy::from(spec.on_isolation());
        let start = match spec.start() {
            v1::StartPolicy::Unspecified | v1::StartPolicy::AsOrdered => StartPolicy::AsOrdered,
            v1::StartPolicy::Manual => StartPolicy::Manual,
        };
        let disks = disks(spec.disks)?;
        let boot = spec.direct_boot.map(boot).transpose()?;
        if disks.is_empty() && boot.is_none() {
            return bad("disks", "give at least one disk, or a kernel to boot directly");
        }
        Ok(Self {
            on_isolation,
            start,
            machine: if spec.machine.is_empty() { DEFAULT_MACHINE.to_owned() } else { spec.machine },
            nics: nics(spec.nics)?,
            name: spec.name,
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            cpu: spec.cpu,
            disks,
            boot,
            anti_affinity: groups(spec.anti_affinity)?,
        })
    }
}

impl Spec {
    /// As these controllers' predecessors gave it to a worker, with what orders have changed in it since it was defined.
    ///
    /// # Errors
    /// It is none that they can have given.
    pub fn kept(mut spec: v1::VmSpec) -> Result<Self, SpecError> {
        let (added, defined): (Vec<_>, Vec<_>) =
            std::mem::take(&mut spec.disks).into_iter().partition(|disk| disk.port != 0);
        let mut kept = Self::try_from(v1::VmSpec { disks: defined.clone(), ..spec })?;
        for disk in &defined {
            kept.order_bytes(&disk.name, disk.size_bytes);
        }
        for v1::DiskSpec { name, path, size_bytes, port, create, .. } in added {
            kept.add_disk(name, path, size_bytes)?;
            if let Some(disk) = kept.disks.last_mut() {
                (disk.port, disk.create) = (u8::try_from(port).ok(), create);
            }
        }
        Ok(kept)
    }

    /// What it has of its host's memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Names of groups; VMs of one group are not moved to the same worker.
    pub fn anti_affinity(&self) -> &BTreeSet<String> {
        &self.anti_affinity
    }

    /// Its network cards: the bridge and the MAC address of each.
    pub fn nics(&self) -> impl Iterator<Item = (&str, &str)> {
        self.nics.iter().map(|nic| (nic.bridge.as_str(), nic.mac.as_str()))
    }

    /// Names of the disks, in the order of their numbers.
    pub fn disk_names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name.as_str())
    }

    /// What a disk was ordered to have at least, in bytes; 0: nothing was. [`None`]: there is no such disk.
    pub fn ordered_bytes(&self, disk: &str) -> Option<u64> {
        self.disks.iter().find(|known| known.name == disk).map(|known| known.size_bytes)
    }

    /// One more disk, which is to be made. An empty path: wherever its worker makes disks.
    ///
    /// # Errors
    /// Its name or path cannot be, or no place is free.
    pub(super) fn add_disk(&mut self, name: String, path: String, size_bytes: u64) -> Result<(), SpecError> {
        if self.disks.len() >= MAX_DISKS {
            return bad("disks", format!("a vm has at most {MAX_DISKS}: no place for another disk is free"));
        }
        if !is_name(&name) || name.len() > MAX_DISK_NAME_BYTES {
            return bad("disk", format!("\"{name}\": use 1 to {MAX_DISK_NAME_BYTES} of a-z, 0-9 and \"-\""));
        }
        if self.disks.iter().any(|other| other.name == name) {
            return bad("disk", format!("\"{name}\" is the name of another disk"));
        }
        if !path.is_empty() {
            self::path("path".to_owned(), &path)?;
            if self.disks.iter().any(|other| other.path == path) {
                return bad("path", format!("\"{path}\" is the image of another disk"));
            }
        }
        let free = (1..=MAX_DISKS as u8).find(|port| self.disks.iter().all(|disk| disk.port != Some(*port)));
        self.disks.push(Disk { name, path, format: Format::Raw, size_bytes, port: free, create: true });
        Ok(())
    }

    /// Disks whose images are still to be made.
    pub fn disks_to_make(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().filter(|disk| disk.create).map(|disk| disk.name.as_str())
    }

    /// The image of a disk has been made.
    pub(super) fn disk_made(&mut self, disk: &str) {
        if let Some(known) = self.disks.iter_mut().find(|known| known.name == disk) {
            known.create = false;
        }
    }

    /// The image of a disk is to be made where the VM is now: what there was of it is elsewhere.
    pub(super) fn make_disk_anew(&mut self, disk: &str) {
        if let Some(known) = self.disks.iter_mut().find(|known| known.name == disk) {
            known.create = true;
            known.path.clear();
        }
    }

    /// A disk is to have so many bytes.
    pub(super) fn order_bytes(&mut self, disk: &str, size_bytes: u64) {
        if let Some(known) = self.disks.iter_mut().find(|known| known.name == disk) {
            known.size_bytes = size_bytes;
        }
    }
}

fn groups(names: Vec<String>) -> Result<BTreeSet<String>, SpecError> {
    if names.len() > MAX_GROUPS {
        return bad("anti_affinity", format!("{} groups are too many: at most {MAX_GROUPS}", names.len()));
    }
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        return bad("anti_affinity", format!("\"{name}\" is not a group's name: use 1 to 40 of a-z, 0-9 and \"-\""));
    }
    Ok(names.into_iter().collect())
}

/// A word of QEMU's command line: nothing that could end the option it stands in.
fn word(field: &str, text: &str) -> Result<(), SpecError> {
    let fits = text.len() <= MAX_WORD_BYTES;
    if fits && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b)) {
        return Ok(());
    }
    bad(
        field,
        format!("\"{text}\" cannot be used: at most {MAX_WORD_BYTES} letters, digits, \"-\", \"_\", \".\", \"+\""),
    )
}

fn path(field: String, text: &str) -> Result<(), SpecError> {
    if !text.starts_with('/') {
        return bad(field, format!("\"{text}\" is not an absolute path"));
    }
    if text.len() > MAX_PATH_BYTES || text.contains(char::is_control) {
        return bad(field, format!("at most {MAX_PATH_BYTES} bytes and no control characters"));
    }
    Ok(())
}

fn disks(disks: Vec<v1::DiskSpec>) -> Result<Vec<Disk>, SpecError> {
    if disks.len() > MAX_DISKS {
        return bad("disks", format!("{} are too many: at most {MAX_DISKS}", disks.len()));
    }
    let mut taken: Vec<Disk> = Vec::with_capacity(disks.len());
    for (index, disk) in disks.into_iter().enumerate() {
        let field = |name: &str| format!("disks[{index}].{name}");
        if !is_name(&disk.name) || disk.name.len() > MAX_DISK_NAME_BYTES {
            let problem = format!("\"{}\": use 1 to {MAX_DISK_NAME_BYTES} of a-z, 0-9 and \"-\"", disk.name);
            return bad(field("name"), problem);
        }
        if taken.iter().any(|other| other.name == disk.name) {
            return bad(field("name"), format!("\"{}\" is used twice", disk.name));
        }
        let Some(format) = Format::parse(&disk.format) else {
            let problem = format!("\"{}\" is not supported: use \"raw\" or \"qcow2\"", disk.format);
            return bad(field("format"), problem);
        };
        path(field("path"), &disk.path)?;
        if taken.iter().any(|other| other.path == disk.path) {
            return bad(field("path"), format!("\"{}\" is used twice", disk.path));
        }
        taken.push(Disk { name: disk.name, path: disk.path, format, size_bytes: 0, port: None, create: false });
    }
    Ok(taken)
}

fn is_unicast_mac(text: &str) -> bool {
    let octets: Vec<Option<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect();
    let unicast = matches!(octets.first(), Some(Some(first)) if first & 1 == 0);
    octets.len() == 6 && unicast && octets.iter().all(Option::is_some)
}

fn nics(nics: Vec<v1::NicSpec>) -> Result<Vec<Nic>, SpecError> {
    if nics.len() > MAX_NICS {
        return bad("nics", format!("{} are too many: at most {MAX_NICS}", nics.len()));
    }
    let mut taken: Vec<Nic> = Vec::with_capacity(nics.len());
    for (index, nic) in nics.into_iter().enumerate() {
        let mac = nic.mac.to_ascii_lowercase();
        if !is_unicast_mac(&mac) {
            let problem = format!("\"{}\" is not a unicast MAC address such as 52:54:00:12:34:56", nic.mac);
            return bad(format!("nics[{index}].mac"), problem);
        }
        if taken.iter().any(|other| other.mac == mac) {
            return bad(format!("nics[{index}].mac"), format!("\"{mac}\" is used twice"));
        }
        let bridge = &nic.bridge;
        let fits = (1..=MAX_BRIDGE_BYTES).contains(&bridge.len());
        if !fits || !bridge.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            let problem = format!("\"{bridge}\" is not the name of a bridge of at most {MAX_BRIDGE_BYTES} characters");
            return bad(format!("nics[{index}].bridge"), problem);
        }
        taken.push(Nic { mac, bridge: nic.bridge });
    }
    Ok(taken)
}

fn boot(boot: v1::DirectBoot) -> Result<Boot, SpecError> {
    path("direct_boot.kernel".to_owned(), &boot.kernel)?;
    if !boot.initrd.is_empty() {
        path("direct_boot.initrd".to_owned(), &boot.initrd)?;
    }
    if boot.cmdline.len() > MAX_CMDLINE_BYTES || boot.cmdline.contains(char::is_control) {
        return bad("direct_boot.cmdline", format!("at most {MAX_CMDLINE_BYTES} bytes and no control characters"));
    }
    Ok(Boot { kernel: boot.kernel, initrd: boot.initrd, cmdline: boot.cmdline })
}

impl From<&Spec> for v1::VmSpec {
    fn from(spec: &Spec) -> Self {
        let disk = |disk: &Disk| v1::DiskSpec {
            name: disk.name.clone(),
            path: disk.path.clone(),
            format: disk.format.name().to_owned(),
            size_bytes: disk.size_bytes,
            port: disk.port.map_or(0, u32::from),
            create: disk.create,
        };
        let nic = |nic: &Nic| v1::NicSpec { mac: nic.mac.clone(), bridge: nic.bridge.clone() };
        let boot = |boot: &Boot| v1::DirectBoot {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            cmdline: boot.cmdline.clone(),
        };
        Self {
            name: spec.name.clone(),
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            machine: spec.machine.clone(),
            cpu: spec.cpu.clone(),
            disks: spec.disks.iter().map(disk).collect(),
            nics: spec.nics.iter().map(nic).collect(),
            direct_boot: spec.boot.as_ref().map(boot),
            on_isolation: match spec.on_isolation {
                Policy::KeepRunning => v1::IsolationPolicy::KeepRunning.into(),
                Policy::SelfFence => v1::IsolationPolicy::SelfFence.into(),
            },
            start: match spec.start {
                StartPolicy::AsOrdered => v1::StartPolicy::AsOrdered.into(),
                StartPolicy::Manual => v1::StartPolicy::Manual.into(),
            },
            anti_affinity: spec.anti_affinity.iter().cloned().collect(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A definition that is taken.
    pub(crate) fn sample(name: &str) -> v1::VmSpec {
        v1::VmSpec {
            name: name.to_owned(),
            memory_bytes: 512 * MIB,
            vcpus: 2,
            disks: vec![v1::DiskSpec {
                name: "root".into(),
                path: "/images/web.raw".into(),
                format: String::new(),
                ..Default::default()
            }],
            nics: vec![v1::NicSpec { mac: "52:54:00:12:34:56".into(), bridge: "br0".into() }],
            ..v1::VmSpec::default()
        }
    }

    #[test]
    fn defaults_fill_what_was_left_empty() {
        let spec = v1::VmSpec::from(&Spec::try_from(sample("web")).unwrap());
        assert_eq!(spec.machine, DEFAULT_MACHINE);
        assert_eq!(Spec::try_from(spec.clone()).map(|again| v1::VmSpec::from(&again)), Ok(spec));
    }

    #[test]
    fn what_a_worker_was_given_is_read_back_with_its_orders() {
        let mut spec = Spec::try_from(sample("web")).unwrap();
        spec.order_bytes("root", 64 * MIB);
        spec.add_disk("data".into(), String::new(), 32 * MIB).unwrap();
        spec.add_disk("logs".into(), "/images/logs.raw".into(), 16 * MIB).unwrap();
        spec.disk_made("logs");
        let given = v1::VmSpec::from(&spec);
        assert_eq!(Spec::kept(given.clone()), Ok(spec));
        let mut bad = given;
        bad.disks[1].name = "root".into();
        assert!(Spec::kept(bad).is_err());
    }

    #[test]
    fn formats_are_kept_as_they_were_said_and_old_definitions_are_of_raw_images() {
        for format in ["", "raw", "qcow2"] {
            let mut asked = sample("web");
            asked.disks[0].format = format.to_owned();
            assert_eq!(v1::VmSpec::from(&Spec::try_from(asked).unwrap()).disks[0].format, format);
        }
        let old: Disk = serde_json::from_str(r#"{"name": "root", "path": "/images/web.raw"}"#).unwrap();
        assert_eq!(old.format, Format::Raw);
    }

    #[test]
    fn each_bad_field_is_named() {
        type Break = fn(&mut v1::VmSpec);
        let cases: [(&str, Break); 16] = [
            ("name", |s| s.name = "Web".into()),
            ("memory", |s| s.memory_bytes = 15 * MIB),
            ("memory", |s| s.memory_bytes += 1),
            ("vcpus", |s| s.vcpus = 0),
            ("vcpus", |s| s.vcpus = 65),
            ("machine", |s| s.machine = "q35,accel=kvm".into()),
            ("disks", |s| s.disks.clear()),
            ("disks[1].name", |s| s.disks.push(s.disks[0].clone())),
            ("disks[0].name", |s| s.disks[0].name = "x".repeat(21)),
            ("disks[0].format", |s| s.disks[0].format = "vmdk".into()),
            ("disks[0].path", |s| s.disks[0].path = "web.raw".into()),
            ("nics[0].mac", |s| s.nics[0].mac = "53:54:00:12:34:56".into()),
            ("nics[0].mac", |s| s.nics[0].mac = "52:54:0:12:34:56".into()),
            ("anti_affinity", |s| s.anti_affinity = vec!["Data Base".into()]),
            ("anti_affinity", |s| s.anti_affinity = (0..17).map(|number| format!("group{number}")).collect()),
            ("nics[0].bridge", |s| s.nics[0].bridge = "a bridge".into()),
        ];
        for (field, damage) in cases {
            let mut spec = sample("web");
            damage(&mut spec);
            assert_eq!(Spec::try_from(spec).unwrap_err().field, field);
        }
    }
}
