//! The verdict on a case that was struck and healed.
//!
//! | question | asked of |
//! |---|---|
//! | has the move ended, and is what it says true? | the controllers, against where the guest is |
//! | does exactly one QEMU run the VM, at its owner? | the processes of all sites |
//! | did ever two copies execute, or one that is older? | the heartbeats: see [`super::witness`] |
//! | is it the guest that it was? | itself: boot id, uptime, digests of memory and files, its loads |
//! | is anything left? | processes, network devices, sockets and files of all sites: see [`super::leftovers`] |
//!
//! The VM may have crashed only if the QEMU that was killed (or whose keeper was) ran at its owner; then it must boot again there, from
//! its disk. A VM that fences itself may also have been ended with its lease, if a keeper says so or the controllers gave it to
//! another worker; then it must run again by itself, once, where the controllers say. What it had written is asked for at its own
//! disk only: one that was taken over boots from what its replica held.

use std::time::Duration;

use pageport_common::error::with_causes;
use serde_json::Value;

use super::arena::{Arena, VM, seen, wait_for};
use super::case::{Leases, Struck};
use super::error::FaultsError;
use super::leftovers;
use super::plan::Isolation;
use super::witness::contradictions;
use crate::demo::loads;
use crate::lab::settings::worker_name;

/// After healing the move must end by then.
const END_LIMIT: Duration = Duration::from_secs(90);
/// And the VM must be what it is to be.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// And nothing may be left.
const CLEAN_LIMIT: Duration = Duration::from_secs(30);
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(10);

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// How the move ended; empty if it did not.
    pub outcome: String,
    /// Why, in the controllers' words.
    pub reason: String,
    /// Who owns the VM now: a site.
    pub owner: String,
    /// It crashed, and was booted again.
    pub crashed: bool,
    /// It was ended with its lease, or taken over, and runs again.
    pub fenced: bool,
    /// Two copies executed.
    pub double_running: bool,
    /// It runs nowhere, or is not what it was.
    pub lost_vm: bool,
    /// What is left.
    pub orphans: Vec<String>,
    /// All that is wrong; empty when the case is passed.
    pub complaints: Vec<String>,
}

/// Looks at everything. What cannot be found out is a complaint.
pub async fn judge(arena: &mut Arena, struck: &Struck) -> Verdict {
    let mut verdict = Verdict::default();
    if let Err(error) = arena.lab.wait_until_ready().await {
        verdict.complaints.push(with_causes(&error));
    }
    if let Err(error) = end_of_move(arena, struck, &mut verdict).await {
        verdict.complaints.push(with_causes(&error));
    }
    if let Err(error) = guest(arena, struck, &mut verdict).await {
        verdict.lost_vm = true;
        verdict.complaints.push(with_causes(&error));
    }
    leftovers(arena, &mut verdict).await;
    match arena.sniffer.take() {
        Ok(sightings) => {
            let found = contradictions(&sightings, &struck.source);
            verdict.double_running = !found.is_empty();
            verdict.complaints.extend(found);
        }
        Err(error) => verdict.complaints.push(error.to_string()),
    }
    verdict
}

async fn end_of_move(arena: &Arena, struck: &Struck, verdict: &mut Verdict) -> Result<(), FaultsError> {
    let ended = wait_for("the move to end", END_LIMIT, async || {
        let migration =
            arena.lab.ctl_json(["migration", "get", &struck.migration]).await.map_err(|e| with_causes(&e))?;
        let state = migration["state"].as_str().unwrap_or_default();
        if ["completed", "failed", "cancelled"].contains(&state) { Ok(migration) } else { Err(brief(&migration)) }
    })
    .await?;
    verdict.outcome = text(&ended["state"]);
    verdict.reason = text(&ended["reason"]);
    if verdict.outcome != "completed" && verdict.reason.lines().count() != 1 {
        verdict
            .complaints
            .push(format!("the move {}, but no one line says why: {:?}", verdict.outcome, verdict.reason));
    }
    Ok(())
}

/// Where the VM is, whether that is true, and whether it is the guest that it was.
async fn guest(arena: &Arena, struck: &Struck, verdict: &mut Verdict) -> Result<(), FaultsError> {
    let vm = wait_for("the vm to run or to have crashed", SETTLE_LIMIT, async || {
        let vm = arena.vm().await.map_err(|error| seen(&error))?;
        let state = vm["state"].as_str().unwrap_or_default();
        if ["running", "crashed"].contains(&state) { Ok(vm) } else { Err(brief(&vm)) }
    })
    .await?;
    verdict.owner = text(&vm["owner_site"]);
    verdict.crashed = vm["state"] == "crashed";
    let leases = Leases::of(arena, &vm);
    let taken_over = leases.takeover_epoch > struck.before_leases.takeover_epoch;
    let truth = match &*verdict.outcome {
        "completed" => &struck.destination,
        _ => &struck.source,
    };
    if taken_over {
        let heir =
            vm["takeovers"].as_array().and_then(|takeovers| takeovers.last()).map(|last| text(&last["to_worker"]));
        if heir.as_deref() != Some(worker_name(&verdict.owner).as_str()) {
            verdict.complaints.push(format!("the vm was taken over by {heir:?}, but its owner is {}", verdict.owner));
        }
    } else if verdict.owner != *truth && !verdict.outcome.is_empty() {
        verdict.complaints.push(format!("the move {}, but the vm's owner is {}", verdict.outcome, verdict.owner));
    }
    let owners_was_killed = struck.killed_hypervisor() == Some(&verdict.owner);
    match (verdict.crashed, owners_was_killed) {
        (true, false) => {
            verdict.lost_vm = true;
            verdict.complaints.push(format!("the vm crashed, though nobody killed it: {}", vm["problem"]));
        }
        (false, true) if still_the_same(arena, struck, &verdict.owner).await => {
            // Its QEMU was killed before it became the owner's: then the VM must not be there.
            verdict.complaints.push("the guest goes on in a qemu that was killed".to_owned());
        }
        _ => {}
    }
    let owner = verdict.owner.clone();
    if verdict.crashed {
        if vm["problem"].as_str().is_none_or(str::is_empty) {
            verdict.complaints.push("the vm crashed, but nothing says why".to_owned());
        }
        return boot_again(arena, struck, &owner, verdict).await;
    }
    let may_be_fenced = struck.pair.isolation == Isolation::SelfFence;
    if may_be_fenced && !still_the_same(arena, struck, &owner).await {
        verdict.fenced = true;
        let why = Why { lease_ran_out: leases.expired > struck.before_leases.expired, taken_over };
        return boots_by_itself(arena, struck, &owner, why, verdict).await;
    }
    verdict.fenced = taken_over;
    if taken_over && !may_be_fenced {
        verdict.complaints.push("the vm was taken over, though it keeps running".to_owned());
    }
    let mut guest = arena.guest(&owner).await?;
    let checks = loads::compare(&mut guest, &struck.before, None).await?;
    for (what, equal) in [
        ("files are not what they were, or synced records are lost", checks.files_checksum_equal),
        ("memory is not what it was", checks.memory_checksum_equal),
        ("guest was booted anew, or its clock went back", checks.uptime_continued),
    ] {
        if !equal {
            verdict.lost_vm = true;
            verdict.complaints.push(format!("the {what}"));
        }
    }
    beats_at(arena, &owner).await
}

async fn still_the_same(arena: &Arena, struck: &Struck, owner: &str) -> bool {
    let Ok(mut guest) = arena.guest(owner).await else { return false };
    guest.uptime().await.is_ok_and(|(_, boot_id, _)| boot_id == struck.before.boot_id())
}

async fn boot_again(arena: &Arena, struck: &Struck, owner: &str, verdict: &mut Verdict) -> Result<(), FaultsError> {
    arena.lab.ctl(["vm", "start", VM]).await?;
    let mut guest = arena.guest(owner).await?;
    if guest.uptime().await?.1 == struck.before.boot_id() {
        verdict.complaints.push("the vm crashed, but the same guest goes on".to_owned());
    }
    if !loads::files_equal(&mut guest, &struck.before).await? {
        verdict.lost_vm = true;
        verdict.complaints.push("after its boot the files are not what they were".to_owned());
    }
    wait_for("the vm to run again", SETTLE_LIMIT, async || {
        let vm = arena.vm().await.map_err(|error| seen(&error))?;
        if vm["state"] == "running" && vm["owner_site"] == owner { Ok(()) } else { Err(brief(&vm)) }
    })
    .await?;
    beats_at(arena, owner).await
}

/// Why a VM that fences itself is not the guest that it was.
struct Why {
    lease_ran_out: bool,
    taken_over: bool,
}

async fn boots_by_itself(
    arena: &Arena,
    struck: &Struck,
    owner: &str,
    why: Why,
    verdict: &mut Verdict,
) -> Result<(), FaultsError> {
    if !why.taken_over && !why.lease_ran_out {
        verdict.lost_vm = true;
        verdict.complaints.push("the guest was booted anew, though no lease of it ran out".to_owned());
    }
    let mut guest = arena.guest(owner).await?;
    // A replica holds what was synchronised.
    if !why.taken_over && !loads::files_equal(&mut guest, &struck.before).await? {
        verdict.lost_vm = true;
        verdict.complaints.push("after its lease ran out the files are not what they were".to_owned());
    }
    beats_at(arena, owner).await
}

/// A new heartbeat must come, and from there.
async fn beats_at(arena: &Arena, owner: &str) -> Result<(), FaultsError> {
    let begin = std::time::Instant::now();
    wait_for("a heartbeat at the vm's owner", HEARTBEAT_LIMIT, async || match arena.sniffer.last() {
        Ok(Some(last)) if last.at > begin && last.site == owner => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
}

async fn leftovers(arena: &Arena, verdict: &mut Verdict) {
    let owner = verdict.owner.clone();
    let clean = wait_for("nothing to be left", CLEAN_LIMIT, async || {
        let found = leftovers::find(&arena.lab, VM, &owner);
        if found.is_empty() { Ok(()) } else { Err(found.join("; ")) }
    })
    .await;
    if clean.is_err() {
        verdict.orphans = leftovers::find(&arena.lab, VM, &owner);
        let complaints = verdict.orphans.iter().map(|orphan| format!("left behind: {orphan}"));
        verdict.complaints.extend(complaints);
    }
    match arena.lab.ctl_json(["vm", "list"]).await {
        Ok(answer) if answer["vms"].as_array().is_some_and(|vms| vms.len() == 1) => {}
        Ok(answer) => verdict.complaints.push(format!("there is not exactly one vm: {answer}")),
        Err(error) => verdict.complaints.push(with_causes(&error)),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What matters of a VM or a move, in one line.
fn brief(answer: &Value) -> String {
    let keys = ["state", "reason", "owner_site", "problem", "migration_id"];
    let shown = keys.iter().filter_map(|key| Some(format!("{key} {}", answer.get(*key)?)));
    shown.collect::<Vec<_>>().join(", ")
}
