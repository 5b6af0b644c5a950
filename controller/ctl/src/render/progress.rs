//! One line that says how far a migration or a seed is. Pure: a message in, a line out.
//!
//! ```text
//! memory       [#######-----]  58 %  1.02 GiB of 1.96 GiB  ETA 3.40 s  35.2 MiB sent at 142 Mbit/s  zero 210 MiB, teleported 790 MiB, ...
//! ```
//! What matters most stands left, since a narrow terminal cuts the line at its right end.

use pageport_proto::v1::{
    Convergence, Migration, MigrationProgress, MigrationState, PageCounts, Replica, ReplicaState, ReplicationStatus,
    ScrubStatus,
};

use super::units;
use super::words;

/// Bytes of a guest page.
pub const PAGE_BYTES: u64 = 4096;
const BAR_CELLS: usize = 20;
const PHASE_CELLS: usize = 10;

/// What a migration is doing: the worker's phase while it runs, the state's word otherwise.
pub fn phase(migration: &Migration) -> &str {
    let running = MigrationState::try_from(migration.state) == Ok(MigrationState::Running);
    match &migration.progress {
        Some(progress) if running && !progress.phase.is_empty() => &progress.phase,
        _ => words::migration_state(migration.state),
    }
}

/// The line of a migration that is under way.
pub fn migration(migration: &Migration) -> String {
    let phase = phase(migration);
    let Some(progress) = &migration.progress else {
        return with_reason(phase, &migration.reason);
    };
    let mut parts = vec![head(phase, fraction(progress))];
    let running = progress.convergence.as_ref().filter(|_| !has_ended(migration));
    parts.extend(running.map(|convergence| convergence.sentence.clone()).filter(|sentence| !sentence.is_empty()));
    let whole = progress.memory_bytes + progress.remaining_bytes;
    let eta = progress.eta_ms.filter(|_| !has_ended(migration));
    let eta = eta.map(|eta| format!("ETA {}", units::duration(eta)));
    match progress.phase.as_str() {
        _ if has_ended(migration) => {}
        "disk-sync" => {
            parts.extend(of(progress.disk_done_bytes, progress.disk_total_bytes));
            parts.extend(eta);
            parts.extend(sent(progress.disk_wan_bytes, progress.rate_bps));
        }
        "memory" | "switchover" => {
            parts.extend(of(progress.memory_bytes, whole));
            parts.extend(eta);
            parts.extend(sent(progress.wan_bytes, progress.rate_bps));
            parts.extend((whole > 0).then(|| classes(progress.pages.as_ref())));
        }
        _ => parts.push(format!("{} so far", units::duration(progress.elapsed_ms))),
    }
    if !progress.waits_for.is_empty() && !has_ended(migration) {
        parts.push(format!("switchover waits for {}", progress.waits_for));
    }
    if !migration.reason.is_empty() {
        parts.push(migration.reason.clone());
    }
    parts.join("  ")
}

/// Why it waits, failed, or may not end.
pub fn reason(migration: &Migration) -> &str {
    let convergence = migration.progress.as_ref().and_then(|progress| progress.convergence.as_ref());
    match convergence {
        Some(convergence)
            if migration.reason.is_empty() && !has_ended(migration) && convergence.outlook() != Convergence::Yes =>
        {
            &convergence.sentence
        }
        _ => &migration.reason,
    }
}

/// The line of a seed that is under way.
pub fn seed(replica: &Replica) -> String {
    let state = words::replica_state(replica.state);
    if ReplicaState::try_from(replica.state) == Ok(ReplicaState::Failed) {
        return with_reason(state, &replica.problem);
    }
    let done = (replica.total_bytes > 0).then(|| replica.done_bytes as f64 / replica.total_bytes as f64);
    let mut parts = vec![head(state, done)];
    parts.extend(of(replica.done_bytes, replica.total_bytes));
    parts.extend(sent(replica.wan_bytes, replica.rate_bps));
    if !replica.problem.is_empty() {
        parts.push(replica.problem.clone());
    }
    parts.join("  ")
}

/// The line of a protected replica that waits for its first recovery point.
pub fn first_copy(replica: &Replica) -> String {
    let unknown = ReplicationStatus::default();
    let status = replica.replication.as_ref().unwrap_or(&unknown);
    let done = (status.total_bytes > 0).then(|| status.done_bytes as f64 / status.total_bytes as f64);
    let mut parts = vec![head(words::replication_phase(status.phase), done)];
    parts.extend(of(status.done_bytes, status.total_bytes));
    parts.extend(time_left(status).map(|left| format!("ETA {left}")));
    parts.extend(sent(replica.wan_bytes, status.rate_bps));
    if !replica.problem.is_empty() {
        parts.push(replica.problem.clone());
    }
    parts.join("  ")
}

/// The line of a replica that is scrubbed.
pub fn scrub(replica: &Replica) -> String {
    let unknown = ScrubStatus::default();
    let status = replica.replication.as_ref();
    let scrub = status.and_then(|status| status.scrub.as_ref()).unwrap_or(&unknown);
    let done = (scrub.total_bytes > 0).then(|| scrub.done_bytes as f64 / scrub.total_bytes as f64);
    let mut parts = vec![head("scrub", done)];
    parts.extend(of(scrub.done_bytes, scrub.total_bytes));
    if scrub.different_blocks > 0 {
        let (different, repaired) = (units::count(scrub.different_blocks), units::count(scrub.repaired_blocks));
        parts.push(format!("{different} blocks differ, {repaired} of them repaired"));
    }
    let problems = [&scrub.problem, &replica.problem];
    parts.extend(problems.into_iter().find(|problem| !problem.is_empty()).cloned());
    parts.join("  ")
}

/// How long a first copy still takes: a range, since nobody knows how much of it differs.
pub fn time_left(status: &ReplicationStatus) -> Option<String> {
    match (status.eta_low_ms, status.eta_high_ms) {
        (0, 0) => None,
        (low, high) if low == high => Some(units::duration(low)),
        (low, high) => Some(format!("{} to {}", units::duration(low), units::duration(high))),
    }
}

/// The line as far as `cells` characters show it.
pub fn fit(line: &str, cells: usize) -> String {
    if line.chars().count() <= cells {
        return line.to_owned();
    }
    line.chars().take(cells.saturating_sub(1)).chain(std::iter::once('…')).collect()
}

fn with_reason(state: &str, reason: &str) -> String {
    if reason.is_empty() { state.to_owned() } else { format!("{state:<PHASE_CELLS$}  {reason}") }
}

fn fraction(progress: &MigrationProgress) -> Option<f64> {
    let (done, whole) = match progress.phase.as_str() {
        "disk-sync" => (progress.disk_done_bytes, progress.disk_total_bytes),
        "memory" | "switchover" => (progress.memory_bytes, progress.memory_bytes + progress.remaining_bytes),
        _ => return None,
    };
    (whole > 0).then(|| done as f64 / whole as f64)
}

fn head(phase: &str, fraction: Option<f64>) -> String {
    match fraction {
        None => format!("{phase:<PHASE_CELLS$}"),
        Some(fraction) => {
            let fraction = fraction.clamp(0.0, 1.0);
            let full = (fraction * BAR_CELLS as f64) as usize;
            let bar = format!("{}{}", "#".repeat(full), "-".repeat(BAR_CELLS - full));
            format!("{phase:<PHASE_CELLS$}  [{bar}] {:>3} %", (fraction * 100.0) as u32)
        }
    }
}

fn has_ended(migration: &Migration) -> bool {
    migration.ended_unix_ms != 0
}

/// Nothing while the whole is not known.
fn of(done: u64, whole: u64) -> Option<String> {
    (whole > 0).then(|| format!("{} of {}", units::bytes(done), units::bytes(whole)))
}

/// Nothing until something was sent, and no rate until there is one.
fn sent(wan_bytes: u64, rate_bps: u64) -> Option<String> {
    let sent = (wan_bytes > 0).then(|| format!("{} sent", units::bytes(wan_bytes)))?;
    Some(if rate_bps > 0 { format!("{sent} at {}", units::rate(rate_bps)) } else { sent })
}

fn classes(pages: Option<&PageCounts>) -> String {
    let PageCounts { zero, teleported, literal, fallback } = pages.copied().unwrap_or_default();
    let mut classes = vec![("zero", zero), ("teleported", teleported), ("literal", literal)];
    if fallback > 0 {
        classes.push(("fallback", fallback));
    }
    let class = |(name, pages): &(&str, u64)| format!("{name} {}", units::bytes(pages * PAGE_BYTES));
    classes.iter().map(class).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::ConvergenceStatus;

    use super::*;

    fn running(progress: MigrationProgress) -> Migration {
        Migration { state: MigrationState::Running.into(), progress: Some(progress), ..Default::default() }
    }

    fn memory() -> MigrationProgress {
        MigrationProgress {
            phase: "memory".into(),
            pages: Some(PageCounts { zero: 53_760, teleported: 202_240, literal: 5_120, fallback: 0 }),
            memory_bytes: 1_095_216_660,
            remaining_bytes: 1_009_317_314,
            wan_bytes: 36_909_875,
            rate_bps: 142_000_000,
            eta_ms: Some(3_400),
            ..Default::default()
        }
    }

    #[test]
    fn the_memory_phase_shows_classes_rate_and_time_left() {
        assert_eq!(
            migration(&running(memory())),
            "memory      [##########----------]  52 %  1.02 GiB of 1.96 GiB  ETA 3.40 s  \
             35.2 MiB sent at 142 Mbit/s  zero 210 MiB, teleported 790 MiB, literal 20.0 MiB"
        );
    }

    #[test]
    fn a_migration_that_will_not_converge_says_so_first() {
        let sentence = "will not converge: the guest dirties 37.5 MB/s".to_owned();
        let convergence = Some(ConvergenceStatus { sentence, ..Default::default() });
        let mut progress = MigrationProgress { convergence, ..memory() };
        progress.pages = Some(PageCounts { fallback: 1, ..progress.pages.unwrap() });
        progress.eta_ms = None;
        assert_eq!(
            migration(&running(progress)),
            "memory      [##########----------]  52 %  \
             will not converge: the guest dirties 37.5 MB/s  1.02 GiB of 1.96 GiB  \
             35.2 MiB sent at 142 Mbit/s  zero 210 MiB, teleported 790 MiB, literal 20.0 MiB, fallback 4.00 KiB"
        );
    }

    #[test]
    fn what_the_switchover_waits_for_is_said_until_the_migration_has_ended() {
        let waits_for = "the disks: 2.0 MB of the guest's writes to copy".to_owned();
        let mut migrating = running(MigrationProgress { waits_for, ..memory() });
        assert!(
            migration(&migrating).ends_with("switchover waits for the disks: 2.0 MB of the guest's writes to copy")
        );
        migrating.ended_unix_ms = 1;
        assert!(!migration(&migrating).contains("waits for"));
    }

    #[test]
    fn other_phases() {
        let disk = MigrationProgress {
            phase: "disk-sync".into(),
            disk_done_bytes: 1 << 30,
            disk_total_bytes: 4 << 30,
            disk_wan_bytes: 3 << 20,
            rate_bps: 200_000_000,
            ..Default::default()
        };
        assert_eq!(
            migration(&running(disk)),
            "disk-sync   [#####---------------]  25 %  1.00 GiB of 4.00 GiB  3.00 MiB sent at 200 Mbit/s"
        );
        let connect = MigrationProgress { phase: "connect".into(), elapsed_ms: 52, ..Default::default() };
        assert_eq!(migration(&running(connect)), "connect     52 ms so far");
        let requested = Migration { state: MigrationState::Requested.into(), ..Default::default() };
        assert_eq!(migration(&requested), "queued");
        let waits = Migration { reason: "another VM is first".into(), ..requested };
        assert_eq!(migration(&waits), "queued      another VM is first");
    }

    #[test]
    fn what_is_not_known_yet_is_not_shown_as_nothing() {
        let begun = |phase: &str| MigrationProgress { phase: phase.into(), ..Default::default() };
        assert_eq!(migration(&running(begun("disk-sync"))).trim_end(), "disk-sync");
        assert_eq!(migration(&running(begun("memory"))).trim_end(), "memory");
        let greeted = MigrationProgress { wan_bytes: 8 << 10, ..begun("memory") };
        assert_eq!(migration(&running(greeted)), "memory      8.00 KiB sent");
        let ordered = Replica { state: ReplicaState::Seeding.into(), ..Default::default() };
        assert_eq!(seed(&ordered).trim_end(), "seeding");
    }

    #[test]
    fn what_has_ended_goes_on_no_longer() {
        let ended =
            MigrationProgress { phase: "hand-over".into(), elapsed_ms: 8130, eta_ms: Some(1), ..Default::default() };
        let state = MigrationState::Completed.into();
        let ended = Migration { state, progress: Some(ended), ended_unix_ms: 5, ..Default::default() };
        assert_eq!(migration(&ended).trim_end(), "completed");
    }

    #[test]
    fn a_state_beyond_running_hides_the_phase() {
        let cancelling = Migration { state: MigrationState::Cancelling.into(), ..running(memory()) };
        assert_eq!(phase(&cancelling), "cancelling");
        assert_eq!(phase(&running(memory())), "memory");
    }

    #[test]
    fn seeds() {
        let seeding = Replica {
            state: ReplicaState::Seeding.into(),
            done_bytes: 3 << 30,
            total_bytes: 4 << 30,
            wan_bytes: 1 << 30,
            rate_bps: 200_000_000,
            ..Default::default()
        };
        assert_eq!(
            seed(&seeding),
            "seeding     [###############-----]  75 %  3.00 GiB of 4.00 GiB  1.00 GiB sent at 200 Mbit/s"
        );
        let failed = Replica { state: ReplicaState::Failed.into(), problem: "no space".into(), ..Default::default() };
        assert_eq!(seed(&failed), "failed      no space");
    }

    #[test]
    fn figures_that_cannot_be_do_not_break_the_bar() {
        let odd = Replica { state: ReplicaState::Seeding.into(), done_bytes: 9, total_bytes: 3, ..Default::default() };
        assert!(seed(&odd).contains("[####################] 100 %"), "{}", seed(&odd));
    }

    #[test]
    fn a_line_is_cut_to_the_terminal() {
        assert_eq!(fit("abcdef", 6), "abcdef");
        assert_eq!(fit("abcdef", 4), "abc…");
        assert_eq!(fit("äöüäöü", 4), "äöü…");
    }
}
