//! The guest's kernel and modules: Debian's cloud kernel, downloaded and unpacked, never installed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{BuildError, Named, run};

const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// What the guest needs beyond what is built in; their dependencies come by themselves.
pub const MODULES: [&str; 6] = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "button", "evdev"];

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bootable image.
    pub image: PathBuf,
    /// Paths of the modules in the order in which they must be loaded.
    pub modules: Vec<PathBuf>,
}

/// Downloads and unpacks the kernel into `folder`, unless it is there.
pub fn fetch(folder: &Path) -> Result<Kernel, BuildError> {
    let unpacked = folder.join("kernel");
    if !unpacked.exists() {
        let depends = run(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
        let package = depends
            .lines()
            .find_map(|line| {
                line.trim().strip_prefix("Depends: linux-image-").map(|rest| format!("linux-image-{rest}"))
            })
            .ok_or(BuildError::NoKernelPackage { meta: META_PACKAGE })?;
        unpack(&package, folder, &unpacked)?;
    }
    let image = find(&unpacked.join("boot"), &|name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| BuildError::NotInPackage { what: "vmlinuz".into() })?;
    Ok(Kernel { image, modules: modules(folder, &MODULES)? })
}

/// Modules of the unpacked kernel, after what they depend on.
pub fn modules(folder: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>, BuildError> {
    in_load_order(&folder.join("kernel/lib/modules"), wanted)
}

/// Downloads a package and unpacks it to `unpacked`, by way of a folder within `folder`.
pub fn unpack(package: &str, folder: &Path, unpacked: &Path) -> Result<(), BuildError> {
    // apt sometimes loses a shared temporary folder.
    let scratch = tempfile::tempdir_in(folder).named("make a folder in", folder)?;
    run(Command::new("apt-get")
        .args(["download", "-q", "-o", "APT::Sandbox::User=root", package])
        .env("TMPDIR", scratch.path())
        .current_dir(scratch.path()))?;
    let archive = find(scratch.path(), &|name| name.ends_with(".deb"))
        .ok_or_else(|| BuildError::NotInPackage { what: package.to_owned() })?;
    let contents = scratch.path().join("contents");
    run(Command::new("dpkg").arg("-x").arg(archive).arg(&contents))?;
    fs::rename(&contents, unpacked).named("move into place", unpacked)
}

/// The first file below `folder` whose name fits.
pub fn find(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries.iter().find_map(|path| {
        if path.is_dir() {
            return find(path, fits);
        }
        fits(path.file_name()?.to_str()?).then(|| path.clone())
    })
}

fn module_files(folder: &Path, into: &mut HashMap<String, PathBuf>) {
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            module_files(&path, into);
        } else if let Some(stem) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".ko")) {
            into.insert(stem.replace('-', "_"), path);
        }
    }
}

/// The modules and what they depend on, dependencies first.
fn in_load_order(folder: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>, BuildError> {
    fn visit(name: &str, files: &HashMap<String, PathBuf>, order: &mut Vec<PathBuf>) -> Result<(), BuildError> {
        let path = files.get(name).ok_or_else(|| BuildError::NotInPackage { what: format!("{name}.ko") })?;
        if order.contains(path) {
            return Ok(());
        }
        let content = fs::read(path).named("read", path)?;
        for dependency in dependencies(&content) {
            visit(&dependency, files, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
    let mut files = HashMap::new();
    module_files(folder, &mut files);
    let mut order = Vec::new();
    for name in wanted {
        visit(name, &files, &mut order)?;
    }
    Ok(order)
}

/// What a module's `.modinfo` section says that it depends on.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value: Vec<u8> = module[at + KEY.len()..].iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let folder = tempfile::tempdir().unwrap();
        for (name, depends) in [("x-net", "x-core,x_ring"), ("x_ring", "x_core"), ("x-core", "")] {
            fs::write(folder.path().join(format!("{name}.ko")), format!("ELF\0depends={depends}\0name=x\0")).unwrap();
        }
        let order = in_load_order(folder.path(), &["x_net", "x_ring"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["x-core", "x_ring", "x-net"]);
        assert!(matches!(in_load_order(folder.path(), &["y"]), Err(BuildError::NotInPackage { .. })));
    }
}
