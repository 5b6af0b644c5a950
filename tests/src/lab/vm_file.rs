//! The description of a lab's VM, as `pageportctl vm define -f` takes it, with a disk of its own.

use std::fs;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_worker::image::Format;

use super::guest::{Attachment, GUEST_ADDRESS, GuestImages, Variant, command_line};
use super::network::{GUEST_BRIDGE, Mode};
use super::{Lab, LabError};

/// A VM that is ready to be defined.
#[derive(Clone, Debug)]
pub struct VmFile {
    path: PathBuf,
    disk: PathBuf,
}

impl VmFile {
    /// Copies the disk and writes the description of a VM with the usual address.
    ///
    /// # Errors
    /// When there is no room.
    pub fn new(lab: &Lab, name: &str, images: &GuestImages, variant: Variant) -> Result<Self, LabError> {
        Self::with_address(lab, name, images, variant, GUEST_ADDRESS)
    }

    /// As [`VmFile::new`], and the guest is told these words at boot as well.
    ///
    /// # Errors
    /// When there is no room.
    pub fn telling(
        lab: &Lab,
        name: &str,
        images: &GuestImages,
        variant: Variant,
        words: &str,
    ) -> Result<Self, LabError> {
        Self::write(lab, name, images, variant, GUEST_ADDRESS, words)
    }

    /// As [`VmFile::new`], with the copied disk as the backing file of a qcow2 image, which is the VM's.
    ///
    /// # Errors
    /// When there is no room, or no `qemu-img`.
    pub fn qcow2(lab: &Lab, name: &str, images: &GuestImages, variant: Variant) -> Result<Self, LabError> {
        let mut file = Self::new(lab, name, images, variant)?;
        let (base, disk) = (file.disk.clone(), file.disk.with_extension("qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&base, &disk]);
        run(create).map_err(failed("make", &disk))?;
        let text = fs::read_to_string(&file.path).map_err(failed("read", &file.path))?;
        let said = format!("path: {}\n    format: qcow2\n", disk.display());
        let text = text.replace(&format!("path: {}\n", base.display()), &said);
        fs::write(&file.path, text).map_err(failed("write", &file.path))?;
        file.disk = disk;
        Ok(file)
    }

    /// As [`VmFile::new`] with an address of the guests' segment, 10.88.0.0/16. Without a segment it has no network card.
    ///
    /// # Errors
    /// When there is no room.
    pub fn with_address(
        lab: &Lab,
        name: &str,
        images: &GuestImages,
        variant: Variant,
        address: Ipv4Addr,
    ) -> Result<Self, LabError> {
        Self::write(lab, name, images, variant, address, "")
    }

    fn write(
        lab: &Lab,
        name: &str,
        images: &GuestImages,
        variant: Variant,
        address: Ipv4Addr,
        words: &str,
    ) -> Result<Self, LabError> {
        let disk = lab.folder().join("disks").join(format!("{name}.raw"));
        images.copy_disk(&disk).map_err(|error| LabError::Io {
            operation: "copy the template to",
            path: disk.clone(),
            source: std::io::Error::other(error),
        })?;
        let path = lab.folder().join("config").join(format!("{name}.yaml"));
        let attachment = match lab.network().mode() {
            Mode::Namespaces => Attachment::Segment(address),
            Mode::Loopback => Attachment::Serial,
        };
        let cmdline = format!("{} {words}", command_line(attachment));
        let text = description(name, &disk, images, variant, attachment, cmdline.trim_end());
        fs::write(&path, text).map_err(|source| LabError::Io { operation: "write", path: path.clone(), source })?;
        Ok(Self { path, disk })
    }

    /// Gives the VM one more disk, empty; returns its image.
    ///
    /// # Errors
    /// When there is no room, or no `qemu-img`.
    pub fn add_disk(&self, name: &str, format: Format, disk_bytes: u64) -> Result<PathBuf, LabError> {
        let vm = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let image = self.disk.with_file_name(format!("{vm}-{name}.{}", format.name()));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", format.name()]).arg(&image).arg(disk_bytes.to_string());
        run(create).map_err(failed("make", &image))?;
        let text = fs::read_to_string(&self.path).map_err(failed("read", &self.path))?;
        let disk = format!("  - name: {name}\n    path: {}\n    format: {}\n", image.display(), format.name());
        // In the guest it comes behind those that are there.
        let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
        let disks = lines.iter().position(|line| *line == "disks:\n").map_or(lines.len(), |at| at + 1);
        let behind = lines[disks..].iter().take_while(|line| line.starts_with(' ')).count();
        lines.insert(disks + behind, &disk);
        fs::write(&self.path, lines.concat()).map_err(failed("write", &self.path))?;
        Ok(image)
    }

    /// Adds a line to the description.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&self, line: &str) -> Result<(), LabError> {
        let error = |source| LabError::Io { operation: "append to", path: self.path.clone(), source };
        let mut file = fs::File::options().append(true).open(&self.path).map_err(error)?;
        writeln!(file, "{line}").map_err(error)
    }

    /// The description.
    ///
    /// # Panics
    /// Never for paths below a repository whose path is text.
    #[must_use]
    pub fn path(&self) -> &str {
        self.path.to_str().unwrap_or_else(|| panic!("{} is not text", self.path.display()))
    }

    /// The disk at the VM's first site.
    #[must_use]
    pub fn disk(&self) -> &Path {
        &self.disk
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LabError {
    let path = path.to_owned();
    move |source| LabError::Io { operation, path, source }
}

fn run(mut command: Command) -> io::Result<()> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
}

fn description(
    name: &str,
    disk: &Path,
    images: &GuestImages,
    variant: Variant,
    attachment: Attachment,
    cmdline: &str,
) -> String {
    let nics = match attachment {
        Attachment::Segment(address) => {
            let [.., c, d] = address.octets();
            format!("nics:\n  - mac: 52:54:00:70:{c:02x}:{d:02x}\n    bridge: {GUEST_BRIDGE}\n")
        }
        Attachment::Serial => String::new(),
    };
    format!(
        "name: {name}\nmemory: {}MiB\nvcpus: 1\ndisks:\n  - name: root\n    path: {}\n{nics}direct_boot:\n  kernel: {}\n  initrd: {}\n  cmdline: {cmdline}\n",
        variant.memory_bytes >> 20,
        disk.display(),
        images.kernel.display(),
        images.initrd.display(),
    )
}
