//! The nodes of QEMU's block graph that a disk is made of. Pure: (name, image) in, options out.
//!
//! ```text
//!   device ─▶ top-NAME (raw) ─▶ disk-NAME (raw or qcow2) ─▶ file-NAME ─▶ image
//!             mirrors       ▲       bitmaps           └─▶ what backs the image, for reading
//!                           └ here a frozen point puts its filter
//! ```
//! The upper node is there so that a mirror and a frozen point of one disk do not contend for the same node, and so that its
//! child can be changed under a running device. Formats are always named, those of backing files too: QEMU guesses none.

use serde_json::{Value, json};

use crate::image::Image;

/// Node that the device uses; mirrors attach to it.
pub fn top_node(disk: &str) -> String {
    format!("top-{disk}")
}

/// Node below it, with the disk's bitmaps.
pub fn disk_node(disk: &str) -> String {
    format!("disk-{disk}")
}

/// Node of the image's file.
fn file_node(disk: &str) -> String {
    format!("file-{disk}")
}

/// The options of the upper node, over the node `below` it: also for `blockdev-reopen`, which resets what it is not told.
pub fn top_layer(disk: &str, below: &str) -> Value {
    json!({
        "driver": "raw", "node-name": top_node(disk), "file": below,
        "discard": "unmap", "cache": {"direct": false, "no-flush": false},
    })
}

/// The nodes of a disk, in the order in which they are added.
pub fn nodes(disk: &str, image: &Image) -> [Value; 3] {
    let file = json!({
        "driver": "file", "node-name": file_node(disk), "filename": image.path().to_string_lossy(),
        "discard": "unmap", "cache": {"direct": false, "no-flush": false},
    });
    let mut format = json!({
        "driver": image.format().name(), "node-name": disk_node(disk), "file": file_node(disk),
        "discard": "unmap", "detect-zeroes": "unmap", "cache": {"direct": false, "no-flush": false},
    });
    if let Some(backing) = image.backing_option() {
        format["backing"] = backing;
    }
    [file, format, top_layer(disk, &disk_node(disk))]
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
    }
}
