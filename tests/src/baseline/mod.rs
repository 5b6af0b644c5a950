//! The opponents: QEMU's own live migration of an identical guest over the identical link.
//!
//! ```text
//!             plain pre-copy                       multifd with zstd
//! site a ───────────────────────────▶ site b ───────────────────────────▶ site a
//!   boot, warm, loads                                              checks
//! ```
//! Both QEMUs open one disk image of this machine: the disk counts as already synchronised, which favours the opponents.
//! The way back uses the mirrored direction of the link, which has the same shape.
//!
//! | figure | from | to |
//! |---|---|---|
//! | `total_time_ms` | the `migrate` command | `RESUME` at the destination |
//! | `downtime_ms` | `STOP` at the source | `RESUME` at the destination (one host, one clock) |
//! | `wan_bytes` | the WAN emulator's counter for the migration's TCP port, in the migration's direction | |

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::lab::guest::client::{GuestClient, GuestError};
use crate::lab::guest::line::SerialPort;
use crate::lab::network::{Mode, Network, NetworkError};
use crate::wan::flow::TCP;

pub mod qmp;
pub mod vm;

use vm::{PlainSpec, PlainVm, Start, VmError};

/// The port that baseline migrations use, or are counted as on the loopback; the WAN counts it apart.
pub const MIGRATION_PORT: u16 = 4444;
/// As the issue's figures have it.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// No limit but the link's; the default of 128 MiB/s would be one on fast links.
const MAX_BANDWIDTH: u64 = 10_000_000_000;
const MULTIFD_CHANNELS: u64 = 4;

/// Which of QEMU's ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Plain pre-copy over one connection.
    Precopy,
    /// Pre-copy over several connections, compressed with zstd.
    MultifdZstd,
}

/// What one migration was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// From the order to the guest's resume.
    pub total_time_ms: u64,
    /// From stop to resume.
    pub downtime_ms: u64,
    /// What the WAN carried.
    pub wan_bytes: u64,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// A QEMU went wrong.
    #[error("run baseline migration")]
    Vm(#[from] VmError),
    /// The WAN cannot be asked.
    #[error("count baseline migration's bytes")]
    Network(#[from] NetworkError),
    /// The WAN did not answer.
    #[error("read the wan's counters from {from} to {to}")]
    Counters {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The migration ended otherwise.
    #[error("migrate from {from} to {to}: qemu says {status}")]
    Ended {
        /// Source site.
        from: String,
        /// Destination site.
        to: String,
        /// QEMU's status and reason.
        status: String,
    },
}

/// A guest that moves between sites by QEMU's own means.
#[derive(Debug)]
pub struct Baseline<'a> {
    network: &'a Network,
    spec: PlainSpec,
    folder: PathBuf,
    site: String,
    vm: PlainVm,
}

impl<'a> Baseline<'a> {
    /// Boots the guest at a site.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub async fn boot(network: &'a Network, site: &str, spec: PlainSpec, folder: &Path) -> Result<Self, BaselineError> {
        let vm = PlainVm::start(network, site, &spec, Start::Boot, folder).await?;
        Ok(Self { network, spec, folder: folder.to_owned(), site: site.to_owned(), vm })
    }

    /// Moves the guest and tells what it took.
    ///
    /// # Errors
    /// When QEMU fails or has not finished within `deadline`; the guest then goes on where it was.
    pub async fn migrate(&mut self, to: &str, method: Method, deadline: Duration) -> Result<Figures, BaselineError> {
        let mut destination = PlainVm::start(self.network, to, &self.spec, Start::Incoming, &self.folder).await?;
        for vm in [&mut self.vm, &mut destination] {
            set_up(vm, method).await?;
        }
        let listen = json!({"uri": format!("tcp:{}", self.network.addresses().of(to).migration)});
        destination.execute("migrate-incoming", listen).await?;

        let carried_before = self.carried(to)?;
        let ordered_us = now_us();
        let uri = format!("tcp:{}", self.network.migration_target(&self.site, to));
        self.vm.execute("migrate", json!({"uri": uri})).await?;
        let stop = self.vm.context();
        let stopped = self.vm.qmp().wait_for("STOP", deadline, |event| {
            event.name == "STOP" || (event.name == "MIGRATION" && event.data["status"] == "failed")
        });
        let stopped = stopped.await.map_err(stop)?;
        if stopped.name != "STOP" {
            return Err(self.ended(to).await);
        }
        let context = destination.context();
        let resumed = destination.qmp().wait_for("RESUME", deadline, |event| event.name == "RESUME");
        let resumed = resumed.await.map_err(context)?;
        let figures = Figures {
            total_time_ms: resumed.at_us.saturating_sub(ordered_us) / 1000,
            downtime_ms: resumed.at_us.saturating_sub(stopped.at_us) / 1000,
            wan_bytes: self.carried(to)? - carried_before,
        };
        // The source has given up its disk and its memory is stale: it must not live on.
        self.vm = destination;
        to.clone_into(&mut self.site);
        Ok(figures)
    }

    /// Connects to the guest once it has booted, however it can be reached.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn reach(&self, deadline: Duration) -> Result<GuestClient, GuestError> {
        match self.network.mode() {
            Mode::Namespaces => {
                GuestClient::connect(self.network.namespace(&self.site), self.spec.address, deadline).await
            }
            Mode::Loopback => GuestClient::attach(SerialPort::Socket(self.vm.console().to_owned()), deadline).await,
        }
    }

    async fn ended(&mut self, to: &str) -> BaselineError {
        let status = match self.vm.execute("query-migrate", json!({})).await {
            Ok(info) => format!("{} {}", info["status"], info["error-desc"]),
            Err(error) => error.to_string(),
        };
        BaselineError::Ended { from: self.site.clone(), to: to.to_owned(), status }
    }

    fn carried(&self, to: &str) -> Result<u64, BaselineError> {
        let (from, to) = (self.site.clone(), to.to_owned());
        match self.network.wan()?.link(&from, &to) {
            Ok(counters) => Ok(counters.service_bytes(TCP, MIGRATION_PORT)),
            Err(source) => Err(BaselineError::Counters { from, to, source }),
        }
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

async fn set_up(vm: &mut PlainVm, method: Method) -> Result<(), VmError> {
    let capability = |name: &str, on: bool| json!({"capability": name, "state": on});
    let capabilities = json!({"capabilities": [
        capability("events", true),
        capability("multifd", method == Method::MultifdZstd),
    ]});
    vm.execute("migrate-set-capabilities", capabilities).await?;
    let mut parameters = json!({"max-bandwidth": MAX_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS});
    if method == Method::MultifdZstd {
        parameters["multifd-channels"] = json!(MULTIFD_CHANNELS);
        parameters["multifd-compression"] = json!("zstd");
        parameters["multifd-zstd-level"] = json!(1);
    }
    vm.execute("migrate-set-parameters", parameters).await.map(drop)
}
