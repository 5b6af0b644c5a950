//! Where cases happen: a lab with one guest that runs at a or b, and whose disk has a replica at the other.
//!
//! It is used again and again: the two sites are alike, so a case begins wherever the one before has left the guest. That is
//! faster than restoring a saved guest for each case (a case sets up in about 2 s), and only what ended in a crash boots anew.

use std::path::PathBuf;
use std::time::Duration;

use pageport_common::error::with_causes;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::error::FaultsError;
use super::plan::Isolation;
use super::sniffer::Sniffer;
use crate::lab::guest::client::GuestClient;
use crate::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use crate::lab::{Failpoints, Lab, LabConfig, VmFile};
use crate::wan::control::Request;
use crate::wan::link::Shape;

/// The VM.
pub const VM: &str = "web";
/// Between two heartbeats, and so the shortest double run that is seen for sure.
pub const HEARTBEAT: Duration = Duration::from_millis(20);
/// A fault lasts for longer than this, and for what the controllers add to it.
const LEASE_MS: u32 = 4_000;
const SEED_RATE_BPS: u64 = 1_000_000_000;
const SEED_DEADLINE: Duration = Duration::from_secs(120);
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks; each is a `pageportctl`.
const POLL: Duration = Duration::from_millis(250);

/// The lab, its guest and who watches it.
#[derive(Debug)]
pub struct Arena {
    /// The lab.
    pub lab: Lab,
    /// Who sees heartbeats.
    pub sniffer: Sniffer,
    /// What its guest does when it is cut off.
    pub isolation: Isolation,
}

impl Arena {
    /// Starts a lab and boots a guest of this policy at a.
    ///
    /// # Errors
    /// When a part of it does not start.
    pub async fn open(images: &GuestImages, isolation: Isolation) -> Result<Self, FaultsError> {
        // Software emulation everywhere: the same on every machine, and a restarted worker need not try anything.
        let accelerator = "tcg".to_owned();
        let config = LabConfig { failpoints: Failpoints::On, accelerator, lease_ms: LEASE_MS, ..LabConfig::default() };
        let lab = Lab::start(config).await?;
        let words = format!("pageport.heartbeat=10.88.255.255,{}", HEARTBEAT.as_millis());
        let file = VmFile::telling(&lab, VM, images, SMALL, &words)?;
        file.add(&format!("on_isolation: {}", isolation.name()))?;
        let sniffer = Sniffer::start(lab.network());
        let arena = Self { lab, sniffer, isolation };
        arena.lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await?;
        arena.lab.ctl(["vm", "start", VM]).await?;
        arena.guest("a").await?;
        Ok(arena)
    }

    /// A connection to the guest from a site's segment, once it answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn guest(&self, from: &str) -> Result<GuestClient, FaultsError> {
        Ok(GuestClient::connect(self.lab.network().namespace(from), GUEST_ADDRESS, BOOT_DEADLINE).await?)
    }

    /// The VM as the controllers show it.
    ///
    /// # Errors
    /// When they do not answer.
    pub async fn vm(&self) -> Result<Value, FaultsError> {
        Ok(self.lab.ctl_json(["vm", "get", VM]).await?)
    }

    /// Makes sure that the disk has a complete replica at `site`, over a fast link.
    ///
    /// # Errors
    /// When it cannot be seeded.
    pub async fn seed(&self, site: &str) -> Result<(), FaultsError> {
        let vm = self.vm().await?;
        let replicas = vm["replicas"].as_array().into_iter().flatten();
        if replicas.into_iter().any(|replica| replica["site"] == site && replica["state"] == "seeded") {
            return Ok(());
        }
        self.set_rate(SEED_RATE_BPS)?;
        let arguments = ["replica", "seed", VM, "--to", site, "--watch"];
        let output = self.lab.ctl_within(arguments, SEED_DEADLINE).await?;
        self.set_rate(LabConfig::default().link.rate_bps)?;
        if output.status.success() {
            return Ok(());
        }
        Err(FaultsError::Answer { what: "a complete replica", answer: output.stderr })
    }

    fn set_rate(&self, rate_bps: u64) -> Result<(), FaultsError> {
        let shape = Shape { rate_bps, queue_bytes: None, ..LabConfig::default().link };
        for (from, to) in [("a", "b"), ("b", "a")] {
            steer(&self.lab, from, to, |from, to| Request::SetLink { from, to, shape })?;
        }
        Ok(())
    }

    /// The site of the controller that leads.
    ///
    /// # Errors
    /// When none does.
    pub async fn leader(&self) -> Result<String, FaultsError> {
        let answer = self.lab.ctl_json(["cluster", "status"]).await?;
        let leader = answer["members"].as_array().into_iter().flatten().find(|member| member["leader"] == true);
        let site = leader.and_then(|leader| leader["site"].as_str()).map(str::to_owned);
        site.ok_or_else(|| FaultsError::Answer { what: "a leader", answer: answer.to_string() })
    }

    /// Where this lab's logs are.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.lab.logs()
    }
}

/// Looks again and again until there is an answer, or time is up.
///
/// # Errors
/// [`FaultsError::InVain`] with what was seen last.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> Result<T, FaultsError> {
    let end = Instant::now() + limit;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() >= end => {
                return Err(FaultsError::InVain { what: what.to_owned(), seconds: limit.as_secs(), seen });
            }
            Err(_) => sleep(POLL).await,
        }
    }
}

/// Asks something of a lab's WAN for one direction.
///
/// # Errors
/// When it refuses.
pub fn steer(
    lab: &Lab,
    from: &str,
    to: &str,
    request: impl FnOnce(String, String) -> Request,
) -> Result<(), FaultsError> {
    let mut wan = lab.network().wan()?;
    wan.call(&request(from.to_owned(), to.to_owned())).map(drop).map_err(|source| FaultsError::Link {
        from: from.to_owned(),
        to: to.to_owned(),
        source,
    })
}

/// An error as what was seen last.
pub fn seen(error: &FaultsError) -> String {
    with_causes(error)
}
