//! Protection: a replica is kept up to date all the time, with recovery points, until it is ordered otherwise.
//!
//! ```text
//!                 Protect                first point                    Unprotect
//!  any, or none ──────────▶ Seeding ───────────────────▶ Seeded ──────────────────▶ Seeded, and left as it is
//!                              │                           ▲
//!                              └─ Unprotect: Failed        └── Outdated (after a takeover), with its first new point
//! ```
//! A protected replica that is `Seeded` can always be brought back to its newest recovery point, whatever writes into it: a move
//! to it does not make it `Mixed`. When the VM changes its place the protection turns round with it, from the place it left.
//!
//! Guarantees: each order and each turn has a number of its own, so that a report about an earlier one counts for nothing.
//! Does not know which points there are: that is what workers say ([`crate::link::observation`]).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use pageport_proto::ids::ParseIdError;
use pageport_proto::{PoolName, SiteName, VmId, WorkerName, v1};
use serde::{Deserialize, Serialize};

use super::apply::{not_migrating, vm_mut};
use super::command::{Answer, Outcome};
use super::disks;
use super::rejection::Rejection;
use super::state::{Replica, ReplicaPhase, State, Vm};

/// Target of a protection that names none, in milliseconds.
pub const DEFAULT_RPO_MS: u64 = 30_000;
/// Targets that can be ordered, in milliseconds.
pub const RPO_MS: RangeInclusive<u64> = 5_000..=24 * 3_600_000;
/// Recovery points that a protection keeps which says nothing of them.
pub const DEFAULT_KEEP_POINTS: u32 = 10;
/// Numbers of recovery points that can be kept.
pub const KEEP_POINTS: RangeInclusive<u32> = 1..=256;
/// The lowest cap of a link, in bits per second: below it nothing would ever arrive.
pub const MIN_CAP_BPS: u64 = 100_000;

/// Where the replicas of disks lie at a site, by name of the disk: paths of block devices there.
pub type Places = BTreeMap<String, String>;

/// Where a replica is to lie that is not there yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Block devices of disks.
    #[serde(default)]
    pub places: Places,
    /// The pool of the other disks and of the recovery points; [`None`]: where they lie, or the default one.
    #[serde(default)]
    pub pool: Option<PoolName>,
}

/// What an operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Target: the newest recovery point is never to be older.
    pub rpo_ms: u64,
    /// Recovery points that are kept, the newest included.
    pub keep_points: u32,
    /// Points are taken with the guest's file systems at rest, where its agent can do that.
    #[serde(default)]
    pub quiesce: bool,
}

/// What was asked for, and the number of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// What was asked for.
    pub terms: Terms,
    /// Number of the order, or of the turn that renewed it.
    pub seq: u64,
    /// Number of the newest order to scrub the replica; 0: none.
    #[serde(default)]
    pub scrub_seq: u64,
}

/// A recovery point that a VM was booted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Its number.
    pub number: u64,
    /// When it was taken, by the clock of the VM's host.
    pub taken_unix_ms: i64,
}

/// What cannot be promised, or cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// The target.
    #[error("a target of {rpo_ms} ms cannot be kept: give 5 s to 24 h")]
    Rpo {
        /// What was asked for.
        rpo_ms: u64,
    },
    /// The number of points.
    #[error("{keep_points} recovery points cannot be kept: give 1 to 256")]
    KeepPoints {
        /// What was asked for.
        keep_points: u32,
    },
    /// A place.
    #[error(
        "the replica of disk \"{disk}\" cannot lie at \"{path}\": give the absolute path of a block device of the site's host, without \"..\""
    )]
    Place {
        /// The disk.
        disk: String,
        /// What was asked for.
        path: String,
    },
    /// Two places.
    #[error("disk \"{disk}\" has two places: give one")]
    TwoPlaces {
        /// The disk.
        disk: String,
    },
    /// Not the name of a pool.
    #[error(transparent)]
    Pool(#[from] ParseIdError),
    /// The cap.
    #[error("a link cannot be capped at {cap_bps} bit/s: give at least 100 kbit/s, or 0 for no cap")]
    Cap {
        /// What was asked for.
        cap_bps: u64,
    },
}

impl TryFrom<v1::Protection> for Terms {
    type Error = TermsError;

    /// What is zero gets its default.
    fn try_from(asked: v1::Protection) -> Result<Self, TermsError> {
        let v1::Protection { rpo_ms, keep_points, quiesce } = asked;
        let rpo_ms = if rpo_ms == 0 { DEFAULT_RPO_MS } else { rpo_ms };
        let keep_points = if keep_points == 0 { DEFAULT_KEEP_POINTS } else { keep_points };
        if !RPO_MS.contains(&rpo_ms) {
            return Err(TermsError::Rpo { rpo_ms });
        }
        if !KEEP_POINTS.contains(&keep_points) {
            return Err(TermsError::KeepPoints { keep_points });
        }
        Ok(Self { rpo_ms, keep_points, quiesce })
    }
}

impl From<Terms> for v1::Protection {
    fn from(terms: Terms) -> Self {
        let Terms { rpo_ms, keep_points, quiesce } = terms;
        Self { rpo_ms, keep_points, quiesce }
    }
}

/// Longest path of a place, in bytes: what systems take.
const MAX_PLACE_BYTES: usize = 4096;

/// Places as an operator may order them.
///
/// # Errors
/// [`TermsError::Place`], [`TermsError::TwoPlaces`].
pub fn valid_places(asked: Vec<v1::DiskPlace>) -> Result<Places, TermsError> {
    let mut places = Places::new();
    for v1::DiskPlace { disk, path } in asked {
        let plain = path.starts_with('/') && path.split('/').all(|part| part != "..") && !path.contains('\0');
        if !plain || path.len() > MAX_PLACE_BYTES {
            return Err(TermsError::Place { disk, path });
        }
        if places.insert(disk.clone(), path).is_some() {
            return Err(TermsError::TwoPlaces { disk });
        }
    }
    Ok(places)
}

/// As they are told.
pub fn told_places(places: Option<&Places>) -> Vec<v1::DiskPlace> {
    let told = |(disk, path): (&String, &String)| v1::DiskPlace { disk: disk.clone(), path: path.clone() };
    places.into_iter().flatten().map(told).collect()
}

/// A pool as an operator may order it; empty: none.
///
/// # Errors
/// [`TermsError::Pool`].
pub fn valid_pool(asked: &str) -> Result<Option<PoolName>, TermsError> {
    if asked.is_empty() { Ok(None) } else { Ok(Some(asked.parse()?)) }
}

/// A cap as an operator may order it; 0: none.
///
/// # Errors
/// [`TermsError::Cap`].
pub fn valid_cap(cap_bps: u64) -> Result<u64, TermsError> {
    if cap_bps == 0 || cap_bps >= MIN_CAP_BPS { Ok(cap_bps) } else { Err(TermsError::Cap { cap_bps }) }
}

/// Caps of links, by source and destination. Nested, since keys of serialised maps are strings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Links(BTreeMap<SiteName, BTreeMap<SiteName, u64>>);

impl Links {
    /// What replication and seeds may send from one site to another, in bits per second; 0: as much as they can.
    pub fn cap_bps(&self, from: &SiteName, to: &SiteName) -> u64 {
        self.0.get(from).and_then(|caps| caps.get(to)).copied().unwrap_or_default()
    }

    fn set(&mut self, from: SiteName, to: SiteName, cap_bps: u64) {
        self.0.entry(from).or_default().insert(to, cap_bps);
    }
}

/// Orders that a replica is kept up to date, and where it is to lie where there is none yet.
pub(super) fn protect(
    state: &mut State,
    id: VmId,
    site: SiteName,
    worker: WorkerName,
    terms: Terms,
    at: Placement,
) -> Outcome {
    if state.site_of(&worker) != Some(&site) {
        return Err(Rejection::WorkerUnknown { worker });
    }
    let owner_site = state.vms.get(&id).and_then(|vm| state.site_of_vm(vm)).cloned();
    let seq = state.protect_seq + 1;
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    let name = vm.spec.name.clone();
    if owner_site.as_ref() == Some(&site) {
        return Err(Rejection::AlreadyThere { name, site });
    }
    if vm.removals.contains_key(&site) {
        return Err(Rejection::ReplicaLeaving { name, site });
    }
    let Placement { places, pool } = at;
    let held = vm.replicas.get(&site).is_some_and(Replica::is_there);
    for (disk, path) in &places {
        disks::must_have(vm, disk)?;
        let known = vm.places.get(&site).and_then(|places| places.get(disk));
        if held && known != Some(path) {
            return Err(Rejection::ReplicaPlaced { name, site, disk: disk.clone() });
        }
    }
    let known = vm.pools.get(&site).cloned().unwrap_or_default();
    if held && pool.as_ref().is_some_and(|pool| *pool != known) {
        return Err(Rejection::ReplicaPooled { name, site, pool: known });
    }
    if !places.is_empty() {
        vm.places.entry(site.clone()).or_default().extend(places);
    }
    if let Some(pool) = pool {
        vm.pools.insert(site.clone(), pool);
    }
    let fresh = Replica::new(worker, 0, ReplicaPhase::Seeding, None);
    // Files of an earlier copy lie at the worker that made it: replication goes on there.
    let replica = vm.replicas.entry(site.clone()).or_insert(fresh);
    if replica.protection.is_none() {
        // The first copy may write into what lies there.
        replica.phase = ReplicaPhase::Seeding;
    }
    let scrub_seq = replica.protection.map_or(0, |protection| protection.scrub_seq);
    replica.protection = Some(Protection { terms, seq, scrub_seq });
    state.protect_seq = seq;
    Ok(Answer::Replica(id, site))
}

/// Orders that a replica is left as it is.
pub(super) fn unprotect(state: &mut State, id: VmId, site: SiteName) -> Outcome {
    let vm = vm_mut(state, id)?;
    not_migrating(vm)?;
    let protected = vm.replicas.get_mut(&site).filter(|replica| replica.protection.is_some());
    let Some(replica) = protected else {
        return Err(Rejection::NotProtected { name: vm.spec.name.clone(), site });
    };
    replica.protection = None;
    match replica.phase {
        ReplicaPhase::Seeding => {
            let reason =
                "the protection was ended before the first recovery point: seed or protect it again".to_owned();
            replica.phase = ReplicaPhase::Failed { reason };
        }
        ReplicaPhase::Seeded | ReplicaPhase::Mixed | ReplicaPhase::Outdated | ReplicaPhase::Failed { .. } => {}
    }
    Ok(Answer::Done)
}

/// Orders that a replica's files are compared with the disks. The owner's worker does it, between points.
pub(super) fn scrub(state: &mut State, id: VmId, site: SiteName) -> Outcome {
    let seq = state.protect_seq + 1;
    let vm = vm_mut(state, id)?;
    let name = vm.spec.name.clone();
    let protected = vm.replicas.get(&site).filter(|replica| replica.protection.is_some());
    let Some(replica) = protected else { return Err(Rejection::NotProtected { name, site }) };
    has_point(vm, &site, replica)?;
    if let Some(protection) = vm.replicas.get_mut(&site).and_then(|replica| replica.protection.as_mut()) {
        protection.scrub_seq = seq;
    }
    state.protect_seq = seq;
    Ok(Answer::Replica(id, site))
}

/// The replica has its first recovery point under this order.
pub(super) fn reached_a_point(state: &mut State, id: VmId, site: &SiteName, protect_seq: u64) {
    let replica = state.vms.get_mut(&id).and_then(|vm| vm.replicas.get_mut(site));
    if let Some(replica) = replica.filter(|replica| replica.is_protected_by(protect_seq)) {
        replica.phase = ReplicaPhase::Seeded;
    }
}

/// Caps a link.
pub(super) fn set_link_cap(state: &mut State, from: SiteName, to: SiteName, cap_bps: u64) -> Outcome {
    if from == to {
        return Err(Rejection::NoLink { site: from });
    }
    state.links.set(from, to, cap_bps);
    Ok(Answer::Done)
}

/// The VM now lives on what was `arrived`: what protected it there protects what it left.
pub(super) fn turn_round(protect_seq: &mut u64, arrived: Option<&Replica>) -> Option<Protection> {
    let Protection { terms, .. } = arrived?.protection?;
    *protect_seq += 1;
    Some(Protection { terms, seq: *protect_seq, scrub_seq: 0 })
}

/// Is the replica, if it is protected, one to boot from or move to?
pub(super) fn has_point(vm: &Vm, site: &SiteName, replica: &Replica) -> Result<(), Rejection> {
    match replica.phase {
        _ if replica.protection.is_none() => Ok(()),
        ReplicaPhase::Seeded => Ok(()),
        ReplicaPhase::Seeding | ReplicaPhase::Mixed | ReplicaPhase::Outdated | ReplicaPhase::Failed { .. } => {
            Err(Rejection::NoPointYet { name: vm.spec.name.clone(), site: site.clone() })
        }
    }
}
