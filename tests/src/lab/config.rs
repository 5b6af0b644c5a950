//! What a lab is to be.

use std::path::PathBuf;

use super::network::Mode;
use crate::wan::link::Shape;

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Every direction of every link.
    pub link: Shape,
    /// Where the daemons send spans.
    pub otlp_endpoint: Option<String>,
    /// What the daemons log.
    pub log: String,
    /// `auto`, `kvm` or `tcg`.
    pub accelerator: String,
    /// Whether guests get huge pages that are free.
    pub huge_pages: bool,
    /// How sites are told apart.
    pub mode: Mode,
    /// How long a worker may run VMs that fence themselves without hearing from the leader.
    pub lease_ms: u32,
    /// Whether moves can be held at exact points.
    pub failpoints: Failpoints,
    /// Size of the file system of its own that each worker's data folder is, so that it can be filled; [`None`]: it is none. Needs namespaces.
    pub worker_volume_bytes: Option<u64>,
    /// Size of the file system of its own that is the pool [`super::POOL`] of each worker; [`None`]: workers have no pool but the default one.
    pub worker_pool_bytes: Option<u64>,
    /// Block devices of this machine that workers may make replicas on.
    pub devices: Vec<PathBuf>,
    /// Who is at the sites.
    pub daemons: Daemons,
}

/// Which daemons a lab has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Daemons {
    /// A controller, a worker and its guard at each site.
    #[default]
    All,
    /// A controller at each site.
    Controllers,
}

/// Whether the workers' failpoints are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Failpoints {
    /// As in production.
    #[default]
    Off,
    /// Held by files in [`super::Lab::failpoints`].
    On,
}

impl Default for LabConfig {
    /// The link of the figures: 200 Mbit/s, 25 ms each way, no loss.
    fn default() -> Self {
        Self {
            link: Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None },
            otlp_endpoint: None,
            log: "info".into(),
            accelerator: "auto".into(),
            huge_pages: false,
            mode: Mode::default(),
            lease_ms: 10_000,
            failpoints: Failpoints::default(),
            worker_volume_bytes: None,
            worker_pool_bytes: None,
            devices: vec![],
            daemons: Daemons::default(),
        }
    }
}
