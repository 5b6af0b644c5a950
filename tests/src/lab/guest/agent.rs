//! Debian's QEMU guest agent for a guest: downloaded and unpacked, never installed. Its libraries are this machine's, as busybox is.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{BuildError, run};
use super::initramfs::Program;
use super::kernel::{find, unpack};

const PACKAGE: &str = "qemu-guest-agent";
/// What its port needs.
pub const MODULES: [&str; 1] = ["virtio_console"];

/// Downloads and unpacks the agent into `folder`, unless it is there; hands back what the guest needs to run it.
pub fn fetch(folder: &Path) -> Result<Vec<Program>, BuildError> {
    let unpacked = folder.join("agent");
    if !unpacked.exists() {
        unpack(PACKAGE, folder, &unpacked)?;
    }
    let file = find(&unpacked.join("usr/sbin"), &|name| name == "qemu-ga")
        .ok_or_else(|| BuildError::NotInPackage { what: "qemu-ga".into() })?;
    let mut programs = libraries(&run(Command::new("ldd").arg(&file))?)?;
    programs.push(Program { file, name: "bin/qemu-ga".into() });
    Ok(programs)
}

/// The files that `ldd` names. The kernel's own has no file.
fn libraries(said: &str) -> Result<Vec<Program>, BuildError> {
    let mut found = Vec::new();
    for line in said.lines().map(str::trim) {
        let (library, place) = line.split_once(" => ").unwrap_or((line, line));
        if place.starts_with("not found") {
            return Err(BuildError::NoLibrary { library: library.to_owned() });
        }
        let path = place.split_once(" (").map_or(place, |(path, _)| path);
        if let Some(name) = path.strip_prefix('/') {
            found.push(Program { file: PathBuf::from(path), name: name.to_owned() });
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn libraries_lie_in_the_guest_where_they_lie_here() {
        let said = "\tlinux-vdso.so.1 (0x0)\n\tlibx.so.6 => /lib/a/libx.so.6 (0x1)\n\t/lib64/ld.so.2 (0x2)\n";
        let names: Vec<String> = libraries(said).unwrap().into_iter().map(|library| library.name).collect();
        assert_eq!(names, ["lib/a/libx.so.6", "lib64/ld.so.2"]);
        assert!(matches!(libraries("\tliby.so => not found\n"), Err(BuildError::NoLibrary { .. })));
    }
}
