//! From what the two ends of a move are to findings. Pure.
//!
//! What the move itself would refuse (memory, room for the replica, the replica) comes here as the destination's own words: one place decides. What the
//! move could not know before it fails in a hypervisor is judged here.
//!
//! | check | blocks | warns |
//! |---|---|---|
//! | link | the destination does not answer | |
//! | link back | | the source does not answer from there |
//! | certificates | one has ended | one ends within [`SOON_S`] |
//! | clocks | | they differ by more than [`MAX_SKEW_MS`]: no decision hangs on them, times that people read do |
//! | QEMU | | the destination's is older |
//! | accelerator | one has KVM and the other has not; a QEMU that must not move guests | |
//! | machine | the destination has none of that name, or means another one by it | |
//! | CPU | the destination lacks the model, or features that the guest has | the guest could see features that it has not now |
//! | memory, disk space, replica, bridges, owner | the destination says why | |

use std::collections::BTreeSet;
use std::time::Duration;

use pageport_proto::v1::{Check, Finding, VmSpec};

use super::facts::{Cpu, Destination, Host, OwnCpu};
use crate::hypervisor::Accelerator;
use crate::hypervisor::accel::refuse_live_move;

/// A certificate that ends within this, in seconds, is to be renewed: a week.
pub const SOON_S: i64 = 7 * DAY_S;
/// Wall clocks may differ by so much, in milliseconds. Leases and the downtime are told by monotonic clocks; recovery points, windows and records by these.
pub const MAX_SKEW_MS: i64 = 1000;
const DAY_S: i64 = 24 * 3600;
/// Features that a finding names; the rest is counted.
const NAMED_FEATURES: usize = 5;

/// Both ends of a move, and when they were asked.
#[derive(Debug)]
pub struct Facts<'a> {
    /// What is to move.
    pub spec: &'a VmSpec,
    /// The workers' names.
    pub from: &'a str,
    /// As above.
    pub to: &'a str,
    /// The source.
    pub source: &'a Host,
    /// The destination.
    pub destination: &'a Destination,
    /// By the source's wall clock, when it asked, in milliseconds since 1970.
    pub asked_unix_ms: i64,
    /// By the same clock, when it had the answer.
    pub answered_unix_ms: i64,
    /// Of the link.
    pub round_trip: Duration,
}

/// One finding for each check, in the order of [`Check`].
pub fn judge(facts: &Facts<'_>) -> Vec<Finding> {
    let Facts { spec, from, to, source, destination, asked_unix_ms, .. } = *facts;
    let host = &destination.host;
    let ends = [(from, source.certificate_ends), (to, host.certificate_ends)];
    let refused = |check, reason: &Option<String>, ok: String| match reason {
        Some(reason) => Finding::refused(check, reason),
        None => Finding::ok(check, ok),
    };
    let disks = spec.disks.len();
    vec![
        refused(Check::Replica, &destination.no_replica, format!("{to} holds all {disks} disks of it")),
        Finding::ok(Check::Link, format!("{to} answers {from}, round trip {} ms", facts.round_trip.as_millis())),
        back(from, to, destination.unreachable.as_deref()),
        certificates(&ends, asked_unix_ms / 1000),
        clocks(facts),
        qemu(facts),
        accelerator(facts),
        machine(facts),
        cpu(facts),
        refused(Check::Memory, &destination.no_memory, format!("{to} has room for {} MiB", spec.memory_bytes >> 20)),
        refused(Check::DiskSpace, &destination.no_room, format!("{to} has room for what its replica lacks")),
        bridges(to, &destination.missing_bridges),
        owner(to, destination.owns),
    ]
}

fn back(from: &str, to: &str, unreachable: Option<&str>) -> Finding {
    match unreachable {
        None => Finding::ok(Check::LinkBack, format!("{from} answers {to}")),
        Some(reason) => Finding::warns(
            Check::LinkBack,
            format!("{to} does not reach {from}: {reason}"),
            format!(
                "after the move the VM could neither be protected at its old site nor move back: let UDP from {to} through to advertised.peer of {from}'s \
                 worker.toml, and see that it is the address at which {from} is reached"
            ),
        ),
    }
}

/// Of those whose end is known.
pub(super) fn certificates(ends: &[(&str, Option<i64>)], now_unix_s: i64) -> Finding {
    let known = ends.iter().filter_map(|(worker, ends)| Some(((*ends)?, *worker)));
    let Some((first, worker)) = known.min() else {
        let fix = "look at them: openssl x509 -enddate -noout -in the file of tls.cert in worker.toml";
        return Finding::unchecked(Check::Certificates, "when they end is not known", fix);
    };
    let left_s = first.saturating_sub(now_unix_s);
    let days = left_s.max(0) / DAY_S;
    let fix = format!(
        "issue {worker} a new certificate (tls.cert and tls.key in its worker.toml) and restart pageport-worker; its guests run on"
    );
    match left_s {
        ..=0 => Finding::blocks(Check::Certificates, format!("the certificate of {worker} has ended"), fix),
        1..=SOON_S => Finding::warns(
            Check::Certificates,
            format!("the certificate of {worker} ends within {} days", days + 1),
            fix,
        ),
        _ => Finding::ok(Check::Certificates, format!("the first to end, that of {worker}, is good for {days} days")),
    }
}

/// It was asked after the one moment of the source's clock, and had answered before the other: what lies between is no difference.
fn clocks(facts: &Facts<'_>) -> Finding {
    let Facts { from, to, destination, asked_unix_ms, answered_unix_ms, .. } = *facts;
    let ahead_ms = destination.now_unix_ms.saturating_sub(answered_unix_ms);
    let behind_ms = asked_unix_ms.saturating_sub(destination.now_unix_ms);
    let (apart_ms, direction) = if ahead_ms > behind_ms { (ahead_ms, "ahead of") } else { (behind_ms, "behind") };
    if apart_ms <= MAX_SKEW_MS {
        let within_ms = answered_unix_ms.saturating_sub(asked_unix_ms).saturating_add(apart_ms.max(0));
        return Finding::ok(Check::Clocks, format!("the wall clocks of {from} and {to} agree within {within_ms} ms"));
    }
    Finding::warns(
        Check::Clocks,
        format!("the wall clock of {to} is {:.1} s {direction} that of {from}", apart_ms as f64 / 1000.0),
        "run chrony or another NTP client on both hosts: the times of recovery points, windows and records are by these clocks",
    )
}

fn qemu(facts: &Facts<'_>) -> Finding {
    let (here, there) = (facts.source.qemu, facts.destination.host.qemu);
    let Facts { from, to, .. } = *facts;
    // Versions that differ in the last number have the same format.
    if (there.major, there.minor) < (here.major, here.minor) {
        return Finding::warns(
            Check::Qemu,
            format!(
                "QEMU is {here} on {from} and older on {to}, {there}: QEMU sees to it that guests move to a newer one"
            ),
            format!(
                "install QEMU {here} or newer on {to}, or be ready for the move to fail, which leaves the guest on {from}"
            ),
        );
    }
    Finding::ok(Check::Qemu, format!("{here} on {from}, {there} on {to}"))
}

fn accelerator(facts: &Facts<'_>) -> Finding {
    let Facts { from, to, source, destination, .. } = *facts;
    let there = &destination.host;
    for host in [source, there] {
        if let Some(reason) = refuse_live_move(host.qemu, host.accelerator) {
            return Finding::refused(Check::Accelerator, &reason);
        }
    }
    if source.accelerator == there.accelerator {
        return Finding::ok(Check::Accelerator, format!("{} at both ends", source.accelerator));
    }
    Finding::blocks(
        Check::Accelerator,
        format!(
            "guests run with {} on {from} and with {} on {to}: their state differs",
            source.accelerator, there.accelerator
        ),
        "make /dev/kvm work on both hosts (nested virtualisation switched on, the worker's user in group kvm), or set hypervisor.accelerator alike in both worker.toml and start the VM anew",
    )
}

fn machine(facts: &Facts<'_>) -> Finding {
    let Facts { spec, from, to, source, destination, .. } = *facts;
    let (wanted, there) = (&spec.machine, &destination.host);
    if let Some(unknown) = unknown(Check::Machine, facts) {
        return unknown;
    }
    match (&source.machine, &there.machine) {
        (_, None) => Finding::blocks(
            Check::Machine,
            format!("QEMU {} on {to} has no machine type {wanted}", there.qemu),
            format!("install a QEMU on {to} that has it (qemu-system-x86_64 -machine help lists them)"),
        ),
        (_, Some(named)) if named == wanted => Finding::ok(Check::Machine, format!("{to} has {wanted}")),
        (Some(here), Some(named)) if here == named => {
            Finding::ok(Check::Machine, format!("{wanted} is {named} at both ends"))
        }
        (here, Some(named)) => Finding::blocks(
            Check::Machine,
            format!("{wanted} is {named} on {to} and {} on {from}", here.as_deref().unwrap_or("unknown")),
            "define the VM with a versioned machine type that both have and start it anew, or install the same QEMU on both",
        ),
    }
}

fn cpu(facts: &Facts<'_>) -> Finding {
    let Facts { spec, to, source, destination, .. } = *facts;
    let there = &destination.host;
    if spec.cpu.is_empty() {
        return Finding::ok(Check::Cpu, "the machine type's own model");
    }
    if let Some(unknown) = unknown(Check::Cpu, facts) {
        return unknown;
    }
    match (&source.cpu, &there.cpu) {
        (_, None) => Finding::blocks(
            Check::Cpu,
            format!("QEMU {} on {to} has no CPU model {}", there.qemu, spec.cpu),
            "define the VM with a CPU model that both have (qemu-system-x86_64 -cpu help lists them) and start it anew",
        ),
        (_, Some(model)) if !model.migration_safe => whatever_the_host_has(facts),
        (here, Some(model)) => {
            let none = Cpu { migration_safe: true, unavailable: BTreeSet::new() };
            let here = here.as_ref().unwrap_or(&none);
            let lacking = model.unavailable.difference(&here.unavailable).collect::<Vec<_>>();
            let added = here.unavailable.difference(&model.unavailable).collect::<Vec<_>>();
            features(facts, &lacking, &added, &format!("{} is the same at both ends", spec.cpu))
        }
    }
}

/// `host` and `max`.
fn whatever_the_host_has(facts: &Facts<'_>) -> Finding {
    let Facts { spec, source, destination, .. } = *facts;
    let there = &destination.host;
    let same = format!("{} means the same at both ends", spec.cpu);
    match (&source.own_cpu, &there.own_cpu) {
        (Some(OwnCpu { name: here, flags }), Some(other)) => {
            let lacking = flags.difference(&other.flags).collect::<Vec<_>>();
            let added = other.flags.difference(flags).collect::<Vec<_>>();
            features(facts, &lacking, &added, &format!("{same}: {here}"))
        }
        _ if source.accelerator == Accelerator::Tcg && source.qemu == there.qemu => Finding::ok(Check::Cpu, same),
        _ => Finding::warns(
            Check::Cpu,
            format!("what {} means at the two ends cannot be compared", spec.cpu),
            "define the VM with a named CPU model and start it anew",
        ),
    }
}

fn features(facts: &Facts<'_>, lacking: &[&String], added: &[&String], same: &str) -> Finding {
    let Facts { spec, from, to, .. } = *facts;
    let fix = format!(
        "define the VM with a CPU model that {from} and {to} both have in full, such as an older one, and start it anew"
    );
    if !lacking.is_empty() {
        return Finding::blocks(
            Check::Cpu,
            format!("{} on {to} lacks features that the guest may use: {}", spec.cpu, list(lacking)),
            fix,
        );
    }
    if !added.is_empty() {
        return Finding::warns(
            Check::Cpu,
            format!(
                "{} on {to} has features that it has not on {from}, and the guest could not move back: {}",
                spec.cpu,
                list(added)
            ),
            fix,
        );
    }
    Finding::ok(Check::Cpu, same)
}

fn list(names: &[&String]) -> String {
    let named: Vec<&str> = names.iter().take(NAMED_FEATURES).map(|name| name.as_str()).collect();
    let rest = names.len() - named.len();
    if rest == 0 { named.join(", ") } else { format!("{} and {rest} more", named.join(", ")) }
}

/// Machine types and CPU models of one end are not known.
fn unknown(check: Check, facts: &Facts<'_>) -> Option<Finding> {
    let ends = [(facts.from, facts.source), (facts.to, &facts.destination.host)];
    ends.into_iter().find_map(|(worker, host)| {
        let why = host.offer_failure.as_ref()?;
        Some(Finding::unchecked(
            check,
            format!("{worker} says: {why}"),
            format!("look at the log of pageport-worker on {worker}"),
        ))
    })
}

fn bridges(to: &str, missing: &[String]) -> Finding {
    let Some(first) = missing.first() else {
        return Finding::ok(Check::Bridges, format!("{to} has all that it needs"));
    };
    Finding::blocks(
        Check::Bridges,
        format!("{to} has no bridge {}", missing.join(", ")),
        format!(
            "make it there (ip link add {first} type bridge; ip link set {first} up) and join it to the guests' network"
        ),
    )
}

fn owner(to: &str, owns: bool) -> Finding {
    if owns {
        return Finding::blocks(
            Check::Owner,
            format!("{to} takes the VM for its own"),
            "wait a moment and look again (pageportctl vm get); if that stays, see docs/ownership.md",
        );
    }
    Finding::ok(Check::Owner, format!("{to} does not run it"))
}

#[cfg(test)]
mod tests;
