//! `vm.yaml`: the description of a VM, from text to a checked [`v1::VmSpec`].
//!
//! Unknown keys are refused by name, since a mistyped key would otherwise silently mean its default. The controllers
//! check again; what they know and we do not (is the name taken, does the site exist) is theirs alone.
//! `deploy/examples/vm.yaml` is the commented example.

use std::collections::HashSet;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pageport_proto::{ids, v1};
use serde::Deserialize;

use crate::size::Size;

/// Largest description that is read; a real one has about 1 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Disk names become part of QEMU's device ids.
const MAX_DISK_NAME_BYTES: usize = 20;
const MAX_VCPUS: u32 = 1024;
const PAGE_BYTES: u64 = 4096;
const MIN_MEMORY: Size = Size(16 << 20);

/// Why a description cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmFileError {
    /// The file cannot be read.
    #[error("read the VM description {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file is longer than any description.
    #[error("the VM description {} is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not YAML, an unknown key, or a value of the wrong kind.
    #[error("parse the VM description {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_yaml_ng::Error,
    },
    /// A value that cannot be.
    #[error("the VM description {} has a wrong {key}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmFile {
    name: String,
    memory: Size,
    vcpus: u32,
    #[serde(default)]
    machine: String,
    #[serde(default)]
    cpu: String,
    disks: Vec<DiskEntry>,
    #[serde(default)]
    nics: Vec<NicEntry>,
    direct_boot: Option<DirectBootEntry>,
    #[serde(default)]
    on_isolation: OnIsolation,
    #[serde(default)]
    start: Start,
    #[serde(default)]
    anti_affinity: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnIsolation {
    #[default]
    KeepRunning,
    SelfFence,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Start {
    #[default]
    AsOrdered,
    Manual,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskEntry {
    name: String,
    path: String,
    #[serde(default)]
    format: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NicEntry {
    mac: String,
    bridge: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DirectBootEntry {
    kernel: String,
    #[serde(default)]
    initrd: String,
    #[serde(default)]
    cmdline: String,
}

/// Reads a description from a file, or from standard input for "-".
///
/// # Errors
/// [`VmFileError`] names the file and the key.
pub fn load(path: &Path) -> Result<v1::VmSpec, VmFileError> {
    let failed = |source| VmFileError::Read { path: path.to_owned(), source };
    let reader: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(path).map_err(failed)?)
    };
    let mut text = String::new();
    let read = reader.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if read as u64 > MAX_FILE_BYTES {
        return Err(VmFileError::TooLarge { path: path.to_owned() });
    }
    parse(&text, path)
}

fn parse(text: &str, path: &Path) -> Result<v1::VmSpec, VmFileError> {
    let file: VmFile =
        serde_yaml_ng::from_str(text).map_err(|source| VmFileError::Parse { path: path.to_owned(), source })?;
    file.check().map_err(|Wrong { key, problem }| VmFileError::Invalid { path: path.to_owned(), key, problem })?;
    Ok(file.into_spec())
}

struct Wrong {
    key: String,
    problem: String,
}

fn require(holds: bool, key: impl Into<String>, problem: impl Into<String>) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(Wrong { key: key.into(), problem: problem.into() }) }
}

impl VmFile {
    fn check(&self) -> Result<(), Wrong> {
        let names = format!("use 1 to {} of a-z, 0-9 and \"-\"", ids::MAX_NAME_BYTES);
        require(ids::is_name(&self.name), "name", format!("\"{}\"; {names}", self.name))?;
        require(self.memory >= MIN_MEMORY, "memory", "less than 16MiB")?;
        require(self.memory.0.is_multiple_of(PAGE_BYTES), "memory", "not a multiple of 4KiB")?;
        require((1..=MAX_VCPUS).contains(&self.vcpus), "vcpus", format!("use 1 to {MAX_VCPUS}"))?;
        require(!self.disks.is_empty(), "disks", "a VM needs at least one")?;
        let mut seen = HashSet::new();
        for (at, disk) in self.disks.iter().enumerate() {
            let key = |field| format!("disks[{at}].{field}");
            let short = ids::is_name(&disk.name) && disk.name.len() <= MAX_DISK_NAME_BYTES;
            let problem = format!("\"{}\"; use 1 to {MAX_DISK_NAME_BYTES} of a-z, 0-9 and \"-\"", disk.name);
            require(short, key("name"), problem)?;
            require(seen.insert(&disk.name), key("name"), format!("\"{}\" is taken by another disk", disk.name))?;
            require(disk.path.starts_with('/'), key("path"), "use an absolute path on the worker")?;
            let known = ["", "raw", "qcow2"].contains(&disk.format.as_str());
            require(known, key("format"), format!("\"{}\"; use raw or qcow2", disk.format))?;
        }
        for (at, nic) in self.nics.iter().enumerate() {
            let key = |field| format!("nics[{at}].{field}");
            require(
                is_unicast_mac(&nic.mac),
                key("mac"),
                "use six hex bytes like 52:54:00:12:34:56, not a group address",
            )?;
            require(!nic.bridge.is_empty(), key("bridge"), "name a Linux bridge of the hosts")?;
        }
        if let Some(boot) = &self.direct_boot {
            require(boot.kernel.starts_with('/'), "direct_boot.kernel", "use an absolute path on the workers")?;
            let initrd = boot.initrd.is_empty() || boot.initrd.starts_with('/');
            require(initrd, "direct_boot.initrd", "use an absolute path on the workers")?;
        }
        Ok(())
    }

    fn into_spec(self) -> v1::VmSpec {
        let disks = self.disks.into_iter().map(|d| v1::DiskSpec {
            name: d.name,
            path: d.path,
            format: d.format,
            ..Default::default()
        });
        let nics = self.nics.into_iter().map(|n| v1::NicSpec { mac: n.mac.to_ascii_lowercase(), bridge: n.bridge });
        let boot = |b: DirectBootEntry| v1::DirectBoot { kernel: b.kernel, initrd: b.initrd, cmdline: b.cmdline };
        v1::VmSpec {
            name: self.name,
            memory_bytes: self.memory.0,
            vcpus: self.vcpus,
            machine: self.machine,
            cpu: self.cpu,
            disks: disks.collect(),
            nics: nics.collect(),
            direct_boot: self.direct_boot.map(boot),
            on_isolation: match self.on_isolation {
                OnIsolation::KeepRunning => v1::IsolationPolicy::KeepRunning.into(),
                OnIsolation::SelfFence => v1::IsolationPolicy::SelfFence.into(),
            },
            start: match self.start {
                Start::AsOrdered => v1::StartPolicy::AsOrdered.into(),
                Start::Manual => v1::StartPolicy::Manual.into(),
            },
            anti_affinity: self.anti_affinity,
        }
    }
}

fn is_unicast_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let byte = |part: &&str| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Option<Vec<u8>> = parts.iter().map(byte).collect();
    bytes.is_some_and(|bytes| bytes.len() == 6 && bytes[0] & 1 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::one_line;

    const MINIMAL: &str = "name: web\nmemory: 2GiB\nvcpus: 2\ndisks:\n  - {name: root, path: /srv/web.img}\n";

    fn error(text: &str) -> String {
        one_line(&parse(text, Path::new("vm.yaml")).unwrap_err())
    }

    #[test]
    fn the_shortest_description_gets_the_defaults() {
        let spec = parse(MINIMAL, Path::new("vm.yaml")).unwrap();
        assert_eq!((spec.memory_bytes, spec.vcpus, spec.machine.as_str()), (2 << 30, 2, ""));
        assert_eq!(spec.disks[0].format, "");
        assert!(spec.nics.is_empty() && spec.direct_boot.is_none());
        assert_eq!(spec.on_isolation(), v1::IsolationPolicy::KeepRunning);
        assert_eq!(spec.start(), v1::StartPolicy::AsOrdered);
    }

    #[test]
    fn the_shipped_example_is_valid() {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/vm.yaml");
        let spec = load(&example).unwrap();
        assert_eq!(spec.name, "web");
        assert_eq!(spec.memory_bytes, 2 << 30);
        assert_eq!(spec.nics[0].mac, "52:54:00:12:34:56");
        assert!(spec.direct_boot.unwrap().cmdline.contains("console=ttyS0"));
    }

    #[test]
    fn an_unknown_key_is_named_wherever_it_stands() {
        for (text, key) in [
            (format!("{MINIMAL}memroy: 1GiB\n"), "unknown field `memroy`"),
            (MINIMAL.replace("path:", "file:"), "unknown field `file`"),
            (format!("{MINIMAL}nics: [{{mac: 52:54:00:12:34:56, brigde: br0}}]\n"), "unknown field `brigde`"),
            (format!("{MINIMAL}direct_boot: {{kernel: /k, append: x}}\n"), "unknown field `append`"),
        ] {
            let message = error(&text);
            assert!(message.contains(key) && message.starts_with("parse the VM description vm.yaml"), "{message}");
        }
    }

    #[test]
    fn wrong_values_name_their_key_and_the_fix() {
        for (from, to, expected) in [
            ("name: web", "name: Web_1", "wrong name: \"Web_1\"; use 1 to 40 of"),
            ("2GiB", "2GB", "unknown unit \"GB\": use KiB"),
            ("2GiB", "1MiB", "wrong memory: less than 16MiB"),
            ("2GiB", "33554433", "wrong memory: not a multiple"),
            ("vcpus: 2", "vcpus: 0", "wrong vcpus"),
            ("vcpus: 2", "vcpus: -1", "vcpus: invalid"),
            ("/srv/web.img", "web.img", "wrong disks[0].path: use an absolute path"),
            ("name: root", "name: a-very-long-disk-name-x", "wrong disks[0].name"),
            ("web.img}", "web.img, format: vmdk}", "wrong disks[0].format: \"vmdk\"; use raw or qcow2"),
            ("disks:\n  - {name: root, path: /srv/web.img}", "disks: []", "wrong disks: a VM needs"),
            ("vcpus: 2\n", "", "missing field `vcpus`"),
        ] {
            let message = error(&MINIMAL.replace(from, to));
            assert!(message.contains(expected), "{to}: {message}");
        }
        let twice = format!("{MINIMAL}  - {{name: root, path: /srv/2.img}}\n");
        assert!(error(&twice).contains("disks[1].name: \"root\" is taken"), "{}", error(&twice));
    }

    #[test]
    fn only_unicast_hardware_addresses_pass() {
        for (mac, fits) in [
            ("52:54:00:12:34:56", true),
            ("52:54:00:AB:CD:EF", true),
            ("53:54:00:12:34:56", false),
            ("52:54:00:12:34", false),
            ("52-54-00-12-34-56", false),
            ("52:54:00:12:34:5", false),
            ("5g:54:00:12:34:56", false),
        ] {
            assert_eq!(is_unicast_mac(mac), fits, "{mac}");
        }
    }
}
