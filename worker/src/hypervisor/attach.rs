//! Disks that are added to a guest that runs.
//!
//! ```text
//!   nodes ─▶ bitmaps of the other disks' names ─▶ device: the guest sees it
//! ```
//! Guarantees: may be repeated, and goes on where it was broken off. The disk is at the place where a later start, or the destination of a move, puts it. A bitmap
//! that says what was written to all disks since a moment says so of the new disk, too: since then it was empty, and what the guest writes is noted from
//! its first write on. So an increment goes on from it. A disk that was open already is not taken for empty: it keeps the bitmaps that it has. (A guest can
//! switch the power of a port off, which unplugs the disk; it stays open, and is copied as before.)

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::command_line::{Place, serial};
use super::disk::{device, disk_node, nodes, top_node};
use super::error::HypervisorError;
use super::qmp::{Ignored, qmp_command};
use super::vm::Vm;
use crate::image::Image;

/// Where devices that have names are.
const PERIPHERAL: &str = "/machine/peripheral";

qmp_command!(/// What an object has.
    QomList = "qom-list" -> Vec<Property> { path: String });
qmp_command!(/// Plugs a device in.
    DeviceAdd = "device_add" -> Ignored { driver: &'static str, id: String, drive: String, serial: String, bus: String, addr: String });

/// What an object has.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Property {
    name: String,
}

/// A disk to attach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AddedDisk {
    /// Its name.
    pub name: String,
    /// The number of its place, from 1.
    pub port: u32,
    /// The VM's machine type, as defined.
    pub machine: String,
}

impl Vm {
    /// Disks that are plugged in, by name.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub async fn plugged_disks(&self) -> Result<BTreeSet<String>, HypervisorError> {
        let prefix = device("");
        let devices = self.devices().await?;
        Ok(devices.iter().filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned)).collect())
    }

    /// Disks that are open, by name: those that the guest has, or had.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub async fn open_disks(&self) -> Result<BTreeSet<String>, HypervisorError> {
        let prefix = top_node("");
        let nodes = self.nodes().await?;
        Ok(nodes.iter().filter_map(|node| node.node_name.strip_prefix(&prefix).map(str::to_owned)).collect())
    }

    /// Plugs one more disk in, which must be empty if it is not open; `false`: it is plugged in.
    ///
    /// # Errors
    /// There is no place for it, its image cannot be opened, a job holds up the graph, or QEMU does not answer.
    pub async fn attach_disk(&self, disk: &AddedDisk, image: &Image) -> Result<bool, HypervisorError> {
        let AddedDisk { name, port, machine } = disk;
        let devices = self.devices().await?;
        if devices.contains(&device(name)) {
            return Ok(false);
        }
        let missing = || HypervisorError::NoPlace { vm: self.id(), disk: name.clone(), machine: machine.clone() };
        let Place { bus, addr } = Place::of(machine, *port).ok_or_else(missing)?;
        // The root bus is no device that has a name.
        if bus.starts_with("port-") && !devices.contains(&bus) {
            return Err(missing());
        }
        let there: BTreeSet<String> = self.nodes().await?.into_iter().map(|node| node.node_name).collect();
        for node in nodes(name, image) {
            if !node["node-name"].as_str().is_some_and(|name| there.contains(name)) {
                self.add_node(node).await?;
            }
        }
        if !there.contains(&disk_node(name)) {
            let bitmaps: BTreeSet<String> = self.bitmaps().await?.into_iter().map(|bitmap| bitmap.name).collect();
            for bitmap in &bitmaps {
                self.add_bitmap(std::slice::from_ref(name), bitmap).await?;
            }
        }
        let (id, drive, serial, addr) = (device(name), top_node(name), serial(name), format!("{addr:#x}"));
        self.execute(&DeviceAdd { driver: "virtio-blk-pci", id, drive, serial, bus, addr }).await?;
        tracing::info!(vm_id = %self.id(), disk = name, port, node = disk_node(name), "disk attached");
        Ok(true)
    }

    async fn devices(&self) -> Result<BTreeSet<String>, HypervisorError> {
        let listed = self.execute(&QomList { path: PERIPHERAL.to_owned() }).await?;
        Ok(listed.into_iter().map(|property| property.name).collect())
    }
}
