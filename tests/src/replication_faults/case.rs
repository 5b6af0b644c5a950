//! One case: a history, a fault at its moment, the replica as that leaves it, healing, and the replica once all is quiet again.
//!
//! ```text
//! a move, if need be
//! history ─▶ a point of it ─▶ moment ─▶ strike ─▶ copy as a crash leaves it ─▶ heal ─▶ a newer point ─▶ stop, sync ─▶ a point of that
//!                                                  └ recover, check, compare with what the host had heard         └ equal digests, check
//! ```

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pageport_common::error::with_causes;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::arena::{Arena, Newest};
use super::crash::{CrashedReplica, Recovered};
use super::fault::{apply, heal};
use super::image::{self, Findings};
use super::ledger::{Ledger, now_unix_ms};
use super::plan::{Case, Fault, Side};
use super::results::CaseResult;
use crate::faults::FaultsError;

/// A point of the load's beginning, and one of its end.
const POINT_LIMIT: Duration = Duration::from_secs(90);
/// How long replication may take to go on by itself.
const RESUME_LIMIT: Duration = Duration::from_secs(90);
/// How long the replica may take to be the disk, once a point of the quiet disk is known.
const EQUAL_LIMIT: Duration = Duration::from_secs(30);
/// The slowest write that a guest may meet.
const SLOWEST_WRITE_MS: u64 = 5000;
/// What may cross after QEMU was killed: digests of all blocks, and what differs.
const DIFFERENCES_BYTES: u64 = 32 << 20;

/// Runs a case; all that is wrong is in the result.
pub async fn run(arena: &mut Arena, case: Case) -> CaseResult {
    let mut result = CaseResult::default();
    if let Err(error) = attempt(arena, case, &mut result).await {
        result.complaints.push(with_causes(&error));
    }
    result
}

async fn attempt(arena: &mut Arena, case: Case, result: &mut CaseResult) -> Result<(), FaultsError> {
    arena.turn(case.direction).await?;
    let seed = history_seed(case);
    let boot_id = arena.guest().await?.uptime().await?.1;
    let ledger = arena.begin_history(seed).await?;
    let known = arena.point_taken_after(now_unix_ms(), POINT_LIMIT).await?;

    let (places, strike) = (arena.places(), case.strike());
    let moment = blocking(move || Ok(places.wait(strike))).await?;
    moment.map_err(|seen| FaultsError::InVain { what: "the moment".into(), seconds: 60, seen })?;
    let healing = apply(arena, case.fault)?;
    let crashed = copy_crashed(arena, case.fault).await;
    // While the destination is away, nothing can be acknowledged that is not in the copy.
    let known = if case.fault.holds_destination() { arena.newest().await? } else { known };
    let (checked, ()) = tokio::join!(check_crashed(crashed, seed), sleep(strike.lasts));
    let sent = arena.wan_bytes()?;
    heal(arena, healing).await?;

    let healed = (now_unix_ms(), Instant::now());
    judge_crashed(checked, known, &ledger, result);
    match arena.point_taken_after(healed.0, RESUME_LIMIT).await {
        Ok(_) => result.resumed_ms = u64::try_from(healed.1.elapsed().as_millis()).ok(),
        Err(error) => {
            result.stuck = true;
            return Err(error);
        }
    }
    let sent = arena.wan_bytes()?.saturating_sub(sent);
    result.resumed_wan_bytes = Some(sent);
    if case.fault == Fault::KillHypervisor && sent > DIFFERENCES_BYTES {
        result.complaints.push(format!("{sent} bytes crossed the link: more than what differed"));
    }
    let done = match case.fault {
        Fault::KillHypervisor => None,
        _ => {
            let same = arena.guest().await?.uptime().await?.1 == boot_id;
            if !same {
                result.complaints.push("the guest was booted anew".to_owned());
            }
            Some(arena.end_history().await?)
        }
    };
    let slowest_ms = done.map_or(0, |(_, slowest_ms)| slowest_ms).max(ledger.slowest_write_ms());
    judge_guest(arena, slowest_ms, &ledger, result).await?;
    let operations = match done {
        Some((done, _)) => done..=done,
        None => ledger.at_least(i64::MAX)..=u64::MAX,
    };
    judge_quiet(arena, seed, operations, result).await
}

/// Histories of different cases differ, so that none is taken for another.
fn history_seed(case: Case) -> u64 {
    let digest = blake3::hash(case.to_string().as_bytes());
    digest.as_bytes().first_chunk().map_or(case.seed, |bytes| u64::from_le_bytes(*bytes))
}

/// Copies the destination's files. A worker that runs is stopped for that long.
async fn copy_crashed(arena: &mut Arena, fault: Fault) -> io::Result<CrashedReplica> {
    let site = arena.site(Side::Destination);
    let runs = !fault.holds_destination();
    let (data, vm) = (arena.lab.worker_data(site), arena.vm_id().to_owned());
    let (replica, copies) = (arena.images(Side::Destination), arena.copies());
    if runs {
        arena.lab.worker(site).freeze().map_err(io::Error::other)?;
    }
    let copied = spawn_blocking(move || CrashedReplica::copy(&data, &vm, &replica, &copies)).await;
    if runs {
        arena.lab.worker(site).thaw().map_err(io::Error::other)?;
    }
    copied.map_err(io::Error::other)?
}

/// The newest point that was recovered, and what its images are worth.
struct Checked {
    phase: &'static str,
    number: u64,
    taken_unix_ms: i64,
    findings: Findings,
}

async fn check_crashed(crashed: io::Result<CrashedReplica>, seed: u64) -> io::Result<Checked> {
    let crashed = crashed?;
    let checked = spawn_blocking(move || {
        let Recovered { phase, newest, images } = crashed.recover()?;
        let findings = examine(&images, seed)?;
        Ok(Checked { phase, number: newest.number, taken_unix_ms: newest.taken_unix_ms, findings })
    });
    checked.await.map_err(io::Error::other)?
}

/// The replica as the fault left it: sound, of one moment, and of no other than its point's.
fn judge_crashed(checked: io::Result<Checked>, known: Newest, ledger: &Ledger, result: &mut CaseResult) {
    let Checked { phase, number, taken_unix_ms, findings } = match checked {
        Ok(checked) => checked,
        Err(error) => {
            result.content_mismatches += 1;
            result.complaints.push(format!("the replica that the fault left could not be recovered: {error}"));
            return;
        }
    };
    result.phase_at_fault = phase.to_owned();
    result.point_at_fault = Some(number);
    result.operations_at_fault = findings.moment.clone().ok();
    let place = format!("the replica that the fault left, at point {number}");
    judge_soundness(&findings, &place, result);
    let mut wrong = vec![];
    if number < known.number {
        wrong.push(format!("{place}: point {} was acknowledged before", known.number));
    }
    match &findings.moment {
        Err(reason) => wrong.push(format!("{place}: {reason}")),
        Ok(found) => {
            let least = ledger.at_least(taken_unix_ms);
            if *found < least {
                wrong.push(format!(
                    "{place}: {least} operations were on the disk before it was taken, {found} are there"
                ));
            }
            if let Some(most) = ledger.at_most(taken_unix_ms).filter(|most| found > most) {
                wrong.push(format!("{place}: only {most} operations had begun when it was taken, {found} are there"));
            }
        }
    }
    result.content_mismatches += usize::from(!wrong.is_empty());
    result.complaints.append(&mut wrong);
}

/// Notes that a file system is not sound.
fn judge_soundness(findings: &Findings, place: &str, result: &mut CaseResult) {
    if let Some(said) = &findings.unsound {
        result.fsck_failures += 1;
        result.complaints.push(format!("{place}: {said}"));
    }
}

/// The guest noticed nothing.
async fn judge_guest(
    arena: &Arena,
    slowest_write_ms: u64,
    ledger: &Ledger,
    result: &mut CaseResult,
) -> Result<(), FaultsError> {
    result.slowest_write_ms = slowest_write_ms;
    let mut trouble = arena.kernel_trouble().await?;
    trouble.extend(ledger.failure());
    if slowest_write_ms > SLOWEST_WRITE_MS {
        trouble.push(format!("a write took {slowest_write_ms} ms"));
    }
    result.guest_io_errors = trouble.len();
    result.complaints.extend(trouble.into_iter().map(|line| format!("the guest: {line}")));
    Ok(())
}

/// The replica of disks that nobody writes to: equal to them, sound, and the whole history.
async fn judge_quiet(
    arena: &Arena,
    seed: u64,
    operations: std::ops::RangeInclusive<u64>,
    result: &mut CaseResult,
) -> Result<(), FaultsError> {
    arena.sync().await?;
    let newest = arena.point_taken_after(now_unix_ms(), POINT_LIMIT).await?;
    let place = format!("the replica of the quiet disks, at point {}", newest.number);
    let deadline = Instant::now() + EQUAL_LIMIT;
    let different = loop {
        arena.applied().await?;
        let different = different(arena).await?;
        if different.is_empty() || Instant::now() > deadline {
            break different;
        }
        // A file system that is at rest may still bring its books up to date, once: that is part of the next point.
        arena.point_taken_after(now_unix_ms(), POINT_LIMIT).await?;
    };
    let (replica, copy) = (arena.images(Side::Destination), arena.copies().join("quiet.raw"));
    let mut images: Vec<_> = replica.into_iter().map(|(_, image)| image).collect();
    let findings = blocking(move || {
        image::copy(&images[0], &copy)?;
        images[0].clone_from(&copy);
        let findings = examine(&images, seed);
        std::fs::remove_file(&copy)?;
        findings
    })
    .await?;
    judge_soundness(&findings, &place, result);
    let mut wrong = vec![];
    wrong.extend(different.iter().map(|disk| format!("{place}: disk {disk} differs from the vm's")));
    match &findings.moment {
        Ok(found) if operations.contains(found) => {}
        Ok(found) => wrong.push(format!("{place}: {found} operations are there, and should be {operations:?}")),
        Err(reason) => wrong.push(format!("{place}: {reason}")),
    }
    result.content_mismatches += usize::from(!wrong.is_empty());
    result.complaints.append(&mut wrong);
    Ok(())
}

/// Names of the disks that are not as their replicas.
async fn different(arena: &Arena) -> Result<Vec<&'static str>, FaultsError> {
    let (disks, replicas) = (arena.images(Side::Source), arena.images(Side::Destination));
    blocking(move || {
        let mut different = Vec::new();
        for ((name, disk), (_, replica)) in disks.iter().zip(&replicas) {
            if image::digest(disk)? != image::digest(replica)? {
                different.push(*name);
            }
        }
        Ok(different)
    })
    .await
}

/// The first image is the one with the file system.
fn examine(images: &[PathBuf], seed: u64) -> io::Result<Findings> {
    let (root, disks) = images.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    image::examine(root, disks, seed)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, FaultsError> {
    let done = spawn_blocking(work).await.map_err(io::Error::other).flatten();
    done.map_err(FaultsError::Image)
}
