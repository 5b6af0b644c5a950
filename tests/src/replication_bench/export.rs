//! A `qemu-nbd` at the replica's site: where the opponents copy to.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::BenchError;
use super::meter::REPLICA;
use crate::lab::network::Network;

const PORT: u16 = 10_809;
const NAME: &str = "replica";
const START_DEADLINE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// A file that can be written to over NBD. The server is killed when dropped; the file stays.
#[derive(Debug)]
pub struct Export {
    file: PathBuf,
    address: SocketAddr,
    server: Child,
}

impl Export {
    /// Makes an empty file of this size and serves it; the server's log and its note that it is ready lie in `folder`.
    ///
    /// # Errors
    /// When the server does not start.
    pub async fn start(network: &Network, file: &Path, bytes: u64, folder: &Path) -> Result<Self, BenchError> {
        let error = |source| BenchError::Export { file: file.to_owned(), source };
        File::create(file).and_then(|made| made.set_len(bytes)).map_err(error)?;
        let ready = folder.join("qemu-nbd.pid");
        std::fs::remove_file(&ready).ok();
        let log = File::options().create(true).append(true).open(folder.join("qemu-nbd.log")).map_err(error)?;
        let address: Ipv4Addr = Network::host_address(REPLICA);
        let mut command = network.place(REPLICA).command("qemu-nbd");
        command
            .args(["--persistent", "--shared=16", "--format=raw", "--cache=writeback", "--discard=unmap"])
            .args(["--export-name", NAME, "--bind", &address.to_string(), "--port", &PORT.to_string(), "--pid-file"])
            .arg(&ready)
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let server = command.spawn().map_err(error)?;
        let mut export = Self { file: file.to_owned(), address: SocketAddr::from((address, PORT)), server };
        let deadline = Instant::now() + START_DEADLINE;
        while !ready.exists() {
            let ended = export.server.try_wait().map_err(error)?;
            if ended.is_some() || Instant::now() > deadline {
                return Err(error(std::io::Error::other(format!("qemu-nbd does not listen ({ended:?})"))));
            }
            sleep(POLL).await;
        }
        Ok(export)
    }

    /// Where it is written.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// As QEMU's tools want it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nbd://{}/{NAME}", self.address)
    }

    /// As `blockdev-add` wants it.
    #[must_use]
    pub fn node(&self, name: &str) -> Value {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let server = json!({"type": "inet", "host": host, "port": port});
        json!({"driver": "nbd", "node-name": name, "export": NAME, "server": server, "discard": "unmap"})
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.server.kill().and_then(|()| self.server.wait()).ok();
    }
}
