//! Images of disks that were added to a VM: made empty, once.
//!
//! ```text
//!   nothing is there ─▶ location recorded ─▶ file made, sized, synced
//! ```
//! Guarantees: may be repeated after a crash at any step; no file that was there before becomes the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use pageport_proto::VmId;

use super::flattening::sync_folder_of;
use super::{DiskLocation, Origin, ReplicaError, ReplicaStore};
use crate::image::Format;

/// Of a file that is not yet under its name.
const BEGUN_SUFFIX: &str = ".pageport-new";

impl ReplicaStore {
    /// The image of a disk that was added, made where it is not there yet: at `given`, or in the VM's pool. The caller makes it larger if
    /// it is smaller than the disk.
    ///
    /// # Errors
    /// [`ReplicaError::DiskInTheWay`]; [`ReplicaError::Make`]; the worker's store failed.
    pub fn make_image(
        &self,
        vm: VmId,
        disk: &str,
        given: Option<&Path>,
        size_bytes: u64,
    ) -> Result<DiskLocation, ReplicaError> {
        let location = match self.locate(vm, disk)? {
            Some(location) => location,
            None => self.claim(vm, disk, given)?,
        };
        if given.is_none() {
            self.must_be_there(vm)?;
        }
        let path = &location.path;
        let failed = |source| ReplicaError::Make { disk: disk.to_owned(), path: path.clone(), source };
        match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(path, size_bytes).map_err(failed)?;
                tracing::info!(vm_id = %vm, disk, path = %path.display(), size_bytes, "disk made");
            }
            Err(error) => return Err(failed(error)),
            Ok(_) => {}
        }
        Ok(location)
    }

    fn claim(&self, vm: VmId, disk: &str, given: Option<&Path>) -> Result<DiskLocation, ReplicaError> {
        let (path, origin) = match given {
            Some(path) => (path.to_owned(), Origin::Given),
            None => (self.pools.of(vm)?.disks(vm).join(format!("{disk}.raw")), Origin::Made),
        };
        if path.symlink_metadata().is_ok() {
            return Err(ReplicaError::DiskInTheWay { disk: disk.to_owned(), path });
        }
        let location = DiskLocation { path, origin, format: Format::Raw, size_bytes: None };
        self.record(vm, disk, &location)?;
        Ok(location)
    }
}

/// With its size under its name at once: one that was cut short would have to be told from one that was not.
fn make(path: &Path, size_bytes: u64) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut begun = path.as_os_str().to_owned();
    begun.push(BEGUN_SUFFIX);
    let file: File = OpenOptions::new().write(true).create(true).truncate(true).open(&begun)?;
    file.set_len(size_bytes)?;
    file.sync_all()?;
    std::fs::rename(&begun, path)?;
    sync_folder_of(path)
}

#[cfg(test)]
mod tests {
    use super::super::tests::setup;
    use super::*;

    #[test]
    fn a_disk_is_made_once_and_goes_with_the_vm_unless_its_place_was_given() {
        let (folder, replicas) = setup();
        let (vm, given) = (VmId::generate(), folder.path().join("images/data.img"));
        let ours = replicas.make_image(vm, "log", None, 1 << 20).unwrap();
        let theirs = replicas.make_image(vm, "data", Some(&given), 2 << 20).unwrap();
        assert_eq!(ours.bytes().unwrap(), (1 << 20, 0));
        assert_eq!((theirs.path.as_path(), theirs.bytes().unwrap()), (given.as_path(), (2 << 20, 0)));
        std::fs::write(&given, b"what the guest wrote").unwrap();
        assert_eq!(replicas.make_image(vm, "data", Some(&given), 2 << 20).unwrap(), theirs);
        assert_eq!(std::fs::read(&given).unwrap(), b"what the guest wrote");
        replicas.remove(vm).unwrap();
        assert!(given.exists() && !ours.path.exists() && !ours.path.parent().unwrap().exists());
    }

    #[test]
    fn nothing_that_was_there_becomes_a_disk() {
        let (folder, replicas) = setup();
        let (vm, given) = (VmId::generate(), folder.path().join("data.img"));
        std::fs::write(&given, b"somebody's").unwrap();
        let refused = replicas.make_image(vm, "data", Some(&given), 4096).unwrap_err();
        assert!(refused.to_string().contains("move it away"), "{refused}");
        assert_eq!(std::fs::read(&given).unwrap(), b"somebody's");
        std::fs::remove_file(&given).unwrap();
        replicas.make_image(vm, "data", Some(&given), 4096).unwrap();
    }

    #[test]
    fn what_a_crash_left_out_is_made_up_for() {
        let (folder, replicas) = setup();
        let (vm, given) = (VmId::generate(), folder.path().join("data.img"));
        let claimed = replicas.claim(vm, "data", Some(&given)).unwrap();
        std::fs::write(folder.path().join("data.img.pageport-new"), b"begun").unwrap();
        assert_eq!(replicas.make_image(vm, "data", Some(&given), 4096).unwrap(), claimed);
        assert_eq!(claimed.bytes().unwrap(), (4096, 0));
    }
}
