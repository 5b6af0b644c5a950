//! What every way of replicating a running guest's disk goes through, and what is measured of each stage.
//!
//! ```text
//! boot, sync ─▶ FIRST COPY ─▶ compare ─▶ the guest changes files ─▶ INCREMENT ─▶ compare ─▶ the guest writes: UNDER LOAD ─▶ compare
//! ```
//! Bytes of an increment are counted from before the change, since a mirror sends at once; its time and its processor time from
//! when the guest's change is on its disk, which favours the mirror.

use std::time::{Duration, Instant};

use pageport_guest::protocol::{Reply, Request};

use super::meter::{Cost, Reading};
use super::{BenchError, Tell};
use crate::lab::guest::client::{GuestClient, GuestError};
use crate::lab::network::Network;

/// Blocks of 4 KiB, each somewhere in the tree.
pub const REWRITTEN_BYTES: u64 = 64 << 20;
/// New versions of files of the tree.
pub const NEW_BYTES: u64 = 64 << 20;
/// How long the guest writes.
pub const LOAD: Duration = Duration::from_secs(20);
/// Synced writes of 4 KiB that it tries to make.
pub const RECORDS_PER_SECOND: u64 = 100;
const SEED: u64 = 2013;
/// Under software emulation.
const PATIENCE: Duration = Duration::from_secs(180);

/// A way to keep a replica of a running guest's disk.
pub trait Replication {
    /// Makes the replica; returns when it is complete.
    fn first_copy(&mut self) -> impl Future<Output = Result<(), BenchError>> + Send;
    /// Returns when the replica holds all that the guest had written when this was called.
    fn catch_up(&mut self) -> impl Future<Output = Result<(), BenchError>> + Send;
    /// Replicates for so long.
    fn keep_up(&mut self, time: Duration) -> impl Future<Output = Result<(), BenchError>> + Send;
    /// Whether the replica is the disk, once it has caught up with a guest that writes nothing.
    fn is_equal(&mut self) -> impl Future<Output = Result<bool, BenchError>> + Send;
}

/// A stage: what it cost, and whether the replica was right after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage {
    /// From its beginning to the complete replica.
    pub cost: Cost,
    /// Only then do its figures count.
    pub equal: bool,
}

/// The stage in which the guest writes all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Everything from the first write until the replica holds the last.
    pub stage: Stage,
    /// Synced writes that the guest got through.
    pub records: u64,
    /// From the guest's last write until the replica held it.
    pub behind: Duration,
}

/// All stages of one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stages {
    /// The whole disk.
    pub first_copy: Stage,
    /// What has changed.
    pub increment: Stage,
    /// While it changes.
    pub load: Load,
}

/// Brings a guest's disk to rest, so that all begin alike.
///
/// # Errors
/// When the guest does not answer.
pub async fn settle(guest: &mut GuestClient) -> Result<(), GuestError> {
    guest.call(&Request::Sync, PATIENCE).await.map(drop)
}

/// Has the guest change so many bytes of its disk.
///
/// # Errors
/// When the guest does not answer.
pub async fn change(guest: &mut GuestClient) -> Result<(), GuestError> {
    guest.call(&Request::RewriteBlocks { bytes: REWRITTEN_BYTES, seed: SEED }, PATIENCE).await?;
    guest.call(&Request::WriteFiles { bytes: NEW_BYTES, seed: SEED }, PATIENCE).await?;
    settle(guest).await
}

/// Goes through all stages.
///
/// # Errors
/// When a copy fails or the guest does not answer.
pub async fn run(
    way: &mut impl Replication,
    network: &Network,
    guest: &mut GuestClient,
    tell: Tell<'_>,
) -> Result<Stages, BenchError> {
    settle(guest).await?;
    let begin = Reading::take(network)?;
    way.first_copy().await?;
    let cost = begin.until_now(network)?;
    let first_copy = Stage { cost, equal: way.is_equal().await? };
    tell(&format!("  first copy: {}", said(&first_copy)));

    let begin = Reading::take(network)?;
    change(guest).await?;
    let changed = Reading::take(network)?;
    way.catch_up().await?;
    let end = Reading::take(network)?;
    let Cost { to_replica, to_source, .. } = begin.until(&end);
    let cost = Cost { to_replica, to_source, ..changed.until(&end) };
    let increment = Stage { cost, equal: way.is_equal().await? };
    tell(&format!("  increment: {}", said(&increment)));

    let begin = Reading::take(network)?;
    guest.call(&Request::WriteStart { records_per_second: RECORDS_PER_SECOND, seed: SEED }, PATIENCE).await?;
    way.keep_up(LOAD).await?;
    let records = match guest.call(&Request::WriteStop, PATIENCE).await? {
        Reply::Written { synced, lost: 0 } => synced,
        reply => return Err(BenchError::Records { reply: format!("{reply:?}") }),
    };
    settle(guest).await?;
    let stopped = Instant::now();
    way.catch_up().await?;
    let behind = stopped.elapsed();
    let cost = begin.until_now(network)?;
    let stage = Stage { cost, equal: way.is_equal().await? };
    tell(&format!("  under load: {}, {records} records", said(&stage)));
    Ok(Stages { first_copy, increment, load: Load { stage, records, behind } })
}

/// A stage in a few words.
#[must_use]
pub fn said(Stage { cost, equal }: &Stage) -> String {
    let words = if *equal { "" } else { ", but the replica DIFFERS" };
    format!(
        "{:.1} s, {:.1} MB, {:.1} s of processor time{words}",
        cost.time.as_secs_f64(),
        (cost.to_replica + cost.to_source) as f64 / 1e6,
        cost.cpu.as_secs_f64(),
    )
}
