//! Frozen disks offered to the worker by QEMU's own NBD server, on a unix socket.
//!
//! QEMU reads its local files and answers; nothing of it waits for the worker but the connection itself. A range that the worker trims is no
//! longer saved from being overwritten.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Frozen, graph};
use crate::hypervisor::block::refused_with;
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::qmp::{Ignored, qmp_command};
use crate::hypervisor::vm::Vm;

qmp_command!(/// Begins to listen. A QEMU has one server.
NbdServerStart = "nbd-server-start" -> Ignored { addr: Value });
qmp_command!(/// Ends all connections and exports.
NbdServerStop = "nbd-server-stop" -> Ignored {});
qmp_command!(/// Offers a node.
BlockExportAdd = "block-export-add" -> Ignored {
    #[serde(rename = "type")]
    kind: &'static str,
    id: String,
    node_name: String,
    name: String,
    writable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<String>,
});

impl Frozen {
    /// Offers all disks, each under its name and with its bitmap, if there is one, until the point is released; gives the socket.
    ///
    /// # Errors
    /// QEMU refuses: the point was released, or it is offered already.
    pub async fn export(&self) -> Result<PathBuf, HypervisorError> {
        if self.turn.is_none() {
            return Err(HypervisorError::NotFrozen { vm: self.vm.id() });
        }
        let socket = self.vm.paths().points();
        self.vm.start_nbd_server(&socket).await?;
        for disk in &self.disks {
            let export = BlockExportAdd {
                kind: "nbd",
                id: format!("export-{}", disk.name),
                node_name: graph::point_node(&disk.name),
                name: disk.name.clone(),
                // To trim. Nothing can be written to a point.
                writable: true,
                bitmaps: self.since.iter().cloned().collect(),
            };
            self.vm.execute(&export).await?;
        }
        Ok(socket)
    }
}

impl Vm {
    async fn start_nbd_server(&self, socket: &Path) -> Result<(), HypervisorError> {
        let addr = json!({"type": "unix", "data": {"path": socket.to_string_lossy()}});
        self.execute(&NbdServerStart { addr }).await.map(drop)
    }

    /// Takes back whatever is offered. That nothing is, is no error. QEMU waits, and does nothing else, until whoever reads has taken what was
    /// answered, or has left.
    pub(super) async fn stop_nbd_server(&self) -> Result<(), HypervisorError> {
        match self.execute(&NbdServerStop {}).await {
            Ok(Ignored {}) => Ok(()),
            Err(error) if refused_with(&error, "not running") => Ok(()),
            Err(error) => Err(error),
        }
    }
}
