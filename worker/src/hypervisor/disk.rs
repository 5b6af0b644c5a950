//! The nodes of QEMU's block graph that a disk is made of. Pure: (name, image) in, options out.
//!
//! ```text
//!   device ─▶ top-NAME (raw or throttle) ─▶ disk-NAME (raw or qcow2) ─▶ file-NAME ─▶ image
//!             mirrors                 ▲       bitmaps           └─▶ what backs the image, for reading
//!                                     └ here a frozen point puts its filter
//! ```
//! The upper node is there so that a mirror and a frozen point of one disk do not contend for the same node, and so that its
//! child can be changed under a running device. Formats are always named, those of backing files too: QEMU guesses none.
//!
//! Over an image with a backing file the upper node is a throttle filter that throttles nothing. QEMU looks through a filter to see what is allocated
//! in the whole chain; through a raw node it sees the first image alone, and a mirror then leaves out what only the backing file holds.
//!
//! A block device may be larger than the disk: the raw node is told the disk's size. While the node is there QEMU can only take that back, and show all of
//! the device: with another size the node's bitmaps would keep theirs.

use serde_json::{Value, json};

use super::block::NodeInfo;
use crate::image::{Format, Image};

/// The group of the filters: without limits.
pub const UNLIMITED: &str = "unlimited";
const THROTTLE: &str = "throttle";

/// Node that the device uses; mirrors attach to it.
pub fn top_node(disk: &str) -> String {
    format!("top-{disk}")
}

/// Node below it, with the disk's bitmaps.
pub fn disk_node(disk: &str) -> String {
    format!("disk-{disk}")
}

/// The device.
pub fn device(disk: &str) -> String {
    format!("blk-{disk}")
}

/// Node of the image's file.
fn file_node(disk: &str) -> String {
    format!("file-{disk}")
}

/// What the upper node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Top {
    /// A raw node.
    Raw,
    /// A throttle filter without limits.
    Transparent,
}

impl Top {
    /// What it is to be over an image.
    pub fn of(image: &Image) -> Self {
        if image.is_backed() { Self::Transparent } else { Self::Raw }
    }

    /// The options of the upper node, over the node `below` it: also for `blockdev-reopen`, which resets what it is not told.
    fn options(self, disk: &str, below: &str) -> Value {
        let mut options = json!({
            "driver": "raw", "node-name": top_node(disk), "file": below,
            "discard": "unmap", "cache": {"direct": false, "no-flush": false},
        });
        if self == Self::Transparent {
            options["driver"] = THROTTLE.into();
            options["throttle-group"] = UNLIMITED.into();
        }
        options
    }
}

/// The options of a disk's upper node, which is among these nodes, over another node.
pub fn repointed(nodes: &[NodeInfo], disk: &str, below: &str) -> Value {
    let top = top_node(disk);
    let transparent = nodes.iter().any(|node| node.node_name == top && node.drv == THROTTLE);
    if transparent { Top::Transparent.options(disk, below) } else { Top::Raw.options(disk, below) }
}

/// The options of a disk's node that shows all that the node below it has: also for `blockdev-reopen`.
pub fn unbounded(disk: &str, format: Format) -> Value {
    json!({
        "driver": format.name(), "node-name": disk_node(disk), "file": file_node(disk),
        "discard": "unmap", "detect-zeroes": "unmap", "cache": {"direct": false, "no-flush": false},
    })
}

/// The nodes of a disk, in the order in which they are added.
pub fn nodes(disk: &str, image: &Image) -> [Value; 3] {
    let driver = if image.device_bytes().is_some() { "host_device" } else { "file" };
    let file = json!({
        "driver": driver, "node-name": file_node(disk), "filename": image.path().to_string_lossy(),
        "discard": "unmap", "cache": {"direct": false, "no-flush": false},
    });
    let mut format = unbounded(disk, image.format());
    if let Some(backing) = image.backing_option() {
        format["backing"] = backing;
    }
    if let Some(size_bytes) = image.device_bytes() {
        format["size"] = size_bytes.into();
    }
    [file, format, Top::of(image).options(disk, &disk_node(disk))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_three_nodes_from_device_to_file() {
        let [file, format, top] = nodes("root", &Image::raw("/srv/a,b.raw"));
        assert_eq!((&file["filename"], &file["node-name"]), (&json!("/srv/a,b.raw"), &json!("file-root")));
        assert_eq!((&format["node-name"], &format["file"]), (&json!("disk-root"), &json!("file-root")));
        assert_eq!((&format["driver"], format.get("backing")), (&json!("raw"), None));
        assert_eq!((&top["node-name"], &top["file"]), (&json!("top-root"), &json!("disk-root")));
        assert_eq!((&file["driver"], format.get("size")), (&json!("file"), None));
    }

    #[test]
    fn on_a_block_device_a_disk_has_its_own_size() {
        let [file, format, top] = nodes("root", &Image::device("/dev/vg0/web", 4096));
        assert_eq!((&file["driver"], &format["driver"]), (&json!("host_device"), &json!("raw")));
        assert_eq!((&format["size"], top.get("size")), (&json!(4096), None));
    }
}
