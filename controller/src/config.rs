//! Configuration: file to raw struct to validated struct. An error names the key and the fix.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pageport_common::config::{ConfigError, load};
use pageport_common::telemetry::TelemetryConfig;
use pageport_common::tls::TlsPaths;
use pageport_ownership::LeaseTerms;
use pageport_ownership::lease::LeaseTermsError;
use pageport_proto::SiteName;
use serde::Deserialize;

use crate::consensus::membership::{Member, is_address};
use crate::fence::FenceConfig;
use crate::fence::config::RawFence;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    id: u64,
    site: String,
    data_dir: PathBuf,
    listen: RawListen,
    #[serde(default)]
    join: bool,
    members: Vec<RawMember>,
    tls: TlsPaths,
    #[serde(default)]
    lease: RawLease,
    #[serde(default)]
    fence: RawFence,
    #[serde(default)]
    telemetry: TelemetryConfig,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLease {
    lease_ms: u64,
    drift_ppm: u32,
    fence_latency_ms: u64,
}

impl Default for RawLease {
    fn default() -> Self {
        Self { lease_ms: 10_000, drift_ppm: 10_000, fence_latency_ms: 2_000 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    api: String,
    web: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMember {
    id: u64,
    site: String,
    address: String,
}

/// What a controller without data does; one that has data goes on with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstStart {
    /// Begins a cluster with the other members.
    Found,
    /// Waits until the members, of which it is none yet, take it in.
    Join,
}

/// How much of the replicated log is kept; not configurable from the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// A snapshot is made after so many entries.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot, for members that are only a little late.
    pub keep_entries: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { snapshot_every: 4096, keep_entries: 1024 }
    }
}

/// What a controller needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// This controller's number.
    pub id: u64,
    /// Its site.
    pub site: SiteName,
    /// Where its log and state lie.
    pub data_dir: PathBuf,
    /// For daemons and pageportctl.
    pub listen_api: SocketAddr,
    /// For browsers.
    pub listen_web: SocketAddr,
    /// What it does when it has no data.
    pub first_start: FirstStart,
    /// The controllers of a cluster that is begun, this one included; or those of the cluster that it joins.
    pub members: Vec<Member>,
    /// How much of the replicated log is kept.
    pub log: LogLimits,
    /// How long workers may run VMs that fence themselves without hearing from the leader. The same at every controller.
    pub lease: LeaseTerms,
    /// Who can turn off which host. The same at every controller, since any of them may lead.
    pub fence: FenceConfig,
    /// Certificates.
    pub tls: TlsPaths,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::try_from(load::<Raw>(path)?)
    }
}

fn invalid<T>(key: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid { key, problem: problem.into() })
}

fn address(key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().or_else(|_| invalid(key, format!("\"{text}\" is not an address such as \"192.0.2.1:7400\"")))
}

fn site(key: &'static str, text: &str) -> Result<SiteName, ConfigError> {
    text.parse().or_else(|error| invalid(key, format!("{error}")))
}

/// A keeper that is stopped is noticed by the guard half a second after the end of the lease; then the kernel kills.
const MIN_FENCE_LATENCY_MS: u64 = 1_000;
/// Workers ask three times within a lease, and an answer may take an election.
const MIN_LEASE_MS: u64 = 3_000;

fn lease(raw: &RawLease) -> Result<LeaseTerms, ConfigError> {
    if raw.lease_ms < MIN_LEASE_MS {
        return invalid("lease.lease_ms", format!("{} is too short: use {MIN_LEASE_MS} or more", raw.lease_ms));
    }
    if raw.fence_latency_ms < MIN_FENCE_LATENCY_MS {
        let problem = format!("{} is too short: use {MIN_FENCE_LATENCY_MS} or more", raw.fence_latency_ms);
        return invalid("lease.fence_latency_ms", problem);
    }
    LeaseTerms::new(raw.lease_ms, raw.drift_ppm, raw.fence_latency_ms).or_else(|error| {
        let key = match error {
            LeaseTermsError::Lease { .. } => "lease.lease_ms",
            LeaseTermsError::Drift { .. } => "lease.drift_ppm",
            LeaseTermsError::FenceLatency { .. } => "lease.fence_latency_ms",
        };
        invalid(key, error.to_string())
    })
}

fn check_members(own: u64, members: &BTreeSet<u64>, first_start: FirstStart) -> Result<(), ConfigError> {
    match first_start {
        FirstStart::Join if own == 0 => invalid("id", "0 is no number: number the members from 1"),
        FirstStart::Join if members.is_empty() => invalid("members", "empty: list the controllers that there are"),
        FirstStart::Join if members.contains(&own) => invalid(
            "id",
            format!("{own} is among the [[members]]: with join = true list only those that there are already"),
        ),
        FirstStart::Join => Ok(()),
        FirstStart::Found if !members.contains(&own) => {
            let problem = "is not among the [[members]]: list every controller there, or set join = true";
            invalid("id", format!("{own} {problem}"))
        }
        FirstStart::Found if members.len().is_multiple_of(2) => {
            let count = members.len();
            invalid("members", format!("{count} controllers tolerate no more failures than one fewer: use 1, 3 or 5"))
        }
        FirstStart::Found => Ok(()),
    }
}

impl TryFrom<Raw> for Config {
    type Error = ConfigError;

    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        let mut ids = BTreeSet::new();
        let mut members = vec![];
        for member in raw.members {
            if member.id == 0 || !ids.insert(member.id) {
                return invalid("members.id", format!("{} is 0 or used twice: number the members from 1", member.id));
            }
            if !is_address(&member.address) {
                let problem = format!("\"{}\" is not an address such as \"192.0.2.1:7400\"", member.address);
                return invalid("members.address", problem);
            }
            members.push(Member::new(member.id, site("members.site", &member.site)?, member.address));
        }
        let first_start = if raw.join { FirstStart::Join } else { FirstStart::Found };
        check_members(raw.id, &ids, first_start)?;
        if !raw.data_dir.is_absolute() {
            return invalid("data_dir", format!("{} is not an absolute path", raw.data_dir.display()));
        }
        Ok(Self {
            id: raw.id,
            site: site("site", &raw.site)?,
            data_dir: raw.data_dir,
            listen_api: address("listen.api", &raw.listen.api)?,
            listen_web: address("listen.web", &raw.listen.web)?,
            first_start,
            members,
            log: LogLimits::default(),
            lease: lease(&raw.lease)?,
            fence: FenceConfig::try_from(raw.fence)?,
            tls: raw.tls,
            telemetry: raw.telemetry,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../deploy/config/controller.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("controller.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn the_example_that_is_shipped_is_valid() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!((config.id, config.members.len(), config.first_start), (1, 3, FirstStart::Found));
    }

    #[test]
    fn who_joins_names_the_others_and_not_itself() {
        let joining = EXAMPLE.replacen("id = 1\n", "id = 4\njoin = true\n", 1);
        assert_eq!(parse(&joining).unwrap().first_start, FirstStart::Join);
        match parse(&EXAMPLE.replacen("id = 1\n", "id = 1\njoin = true\n", 1)) {
            Err(ConfigError::Invalid { key, problem }) => {
                assert_eq!(key, "id");
                assert!(problem.contains("list only those that there are already"), "{problem}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_bad_value_is_named_by_its_key() {
        let cases = [
            ("id = 1\n", "id = 9\n", "id"),
            ("site = \"a\"\n", "site = \"A\"\n", "site"),
            ("data_dir = \"/", "data_dir = \"", "data_dir"),
            ("api = \"192.0.2.1:7400\"", "api = \"here\"", "listen.api"),
            ("id = 3\n", "id = 2\n", "members.id"),
            ("lease_ms = 10000", "lease_ms = 2999", "lease.lease_ms"),
            ("drift_ppm = 10000", "drift_ppm = 1000001", "lease.drift_ppm"),
            ("fence_latency_ms = 2000", "fence_latency_ms = 999", "lease.fence_latency_ms"),
            ("address = \"192.0.2.3:7400\"", "address = \"192.0.2.3\"", "members.address"),
        ];
        for (good, bad, expected) in cases {
            assert!(EXAMPLE.contains(good), "the example no longer has {good:?}");
            match parse(&EXAMPLE.replacen(good, bad, 1)) {
                Err(ConfigError::Invalid { key, .. }) => assert_eq!(key, expected),
                other => panic!("{bad:?} gave {other:?}"),
            }
        }
    }
}
