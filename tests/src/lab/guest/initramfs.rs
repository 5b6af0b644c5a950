//! The guest's root file system: busybox, modules, the lab's helper and an init script, as a `newc` archive.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{BuildError, Named};

/// What the kernel starts. Kept here so that its text is part of the cache key.
pub const INIT: &str = include_str!("init.sh");
/// What the power button starts.
const POWER_BUTTON: &str = include_str!("power-button.sh");

/// A file of this machine, and where the guest has it.
#[derive(Debug, Clone)]
pub struct Program {
    /// Here.
    pub file: PathBuf,
    /// There, without the first slash.
    pub name: String,
}

/// Builds the archive in memory; `programs` come on top of what every guest has.
pub fn build(
    busybox: &Path,
    helper: &Path,
    modules: &[impl AsRef<Path>],
    programs: &[Program],
) -> Result<Vec<u8>, BuildError> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "data", "modules", "etc", "etc/acpi", "etc/acpi/PWRF"] {
        archive.add(folder, Entry::Folder);
    }
    archive.add("dev/console", Entry::Console);
    archive.add("init", Entry::Program(INIT.as_bytes()));
    // The name that busybox's acpid looks for.
    archive.add("etc/acpi/PWRF/00000080", Entry::Program(POWER_BUTTON.as_bytes()));
    archive.add("bin/busybox", Entry::Program(&fs::read(busybox).named("read", busybox)?));
    archive.add("bin/pageport-guest", Entry::Program(&fs::read(helper).named("read", helper)?));
    for (n, module) in modules.iter().enumerate() {
        let path = module.as_ref();
        // The shell loads them in the order of their names.
        archive.add(&format!("modules/{n:02}.ko"), Entry::Program(&fs::read(path).named("read", path)?));
    }
    let mut folders = BTreeSet::new();
    for Program { file, name } in programs {
        let above: Vec<&str> = name.match_indices('/').map(|(at, _)| &name[..at]).collect();
        for folder in above.into_iter().filter(|folder| *folder != "bin") {
            if folders.insert(folder) {
                archive.add(folder, Entry::Folder);
            }
        }
        archive.add(name, Entry::Program(&fs::read(file).named("read", file)?));
    }
    Ok(archive.finish())
}

enum Entry<'a> {
    Folder,
    Program(&'a [u8]),
    Console,
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn add(&mut self, name: &str, entry: Entry<'_>) {
        let (mode, content, device): (u32, &[u8], (u32, u32)) = match entry {
            Entry::Folder => (0o040_755, &[], (0, 0)),
            Entry::Program(content) => (0o100_755, content, (0, 0)),
            Entry::Console => (0o020_600, &[], (5, 1)),
        };
        self.header(name, mode, content, device);
    }

    fn header(&mut self, name: &str, mode: u32, content: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let fields = [self.entries, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, major as usize, minor as usize];
        self.bytes.extend_from_slice(b"070701");
        for field in fields.into_iter().chain([name.len() + 1, 0]) {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_entry_is_laid_out_as_the_format_says() {
        let mut archive = Archive::default();
        archive.add("init", Entry::Program(b"abcde"));
        let bytes = archive.finish();
        let header = std::str::from_utf8(&bytes[..110]).unwrap();
        assert_eq!(&header[..22], "07070100000001000081ed");
        // Size, then after four device numbers the name's length with its end.
        assert_eq!((&header[54..62], &header[94..102]), ("00000005", "00000005"));
        assert_eq!(&bytes[110..116], b"init\0\0");
        assert_eq!(&bytes[116..124], b"abcde\0\0\0");
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }
}
