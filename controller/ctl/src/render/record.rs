//! What a finished migration was, as a page of text. Pure.

use pageport_proto::v1::{ConvergenceRecord, Migration, MigrationRecord, PageCounts, PhaseTiming};

use super::preflight;
use super::progress::PAGE_BYTES;
use super::quote;
use super::table::{Align, Table};
use super::units;
use super::words;

const LABEL_CELLS: usize = 18;

/// One line for what became of it, then its record when it has one.
pub fn summary(migration: &Migration) -> String {
    let Migration { vm_name, from_site, to_site, reason, id, .. } = migration;
    let state = words::migration_state(migration.state);
    let mut text = match &migration.record {
        Some(record) => format!(
            "{vm_name} moved from {from_site} to {to_site} in {}; it stood still for {}.\n",
            units::duration(record.total_time_ms),
            units::duration(record.downtime_ms),
        ),
        None => format!("{vm_name} from {from_site} to {to_site}: {state}.\n"),
    };
    if !reason.is_empty() {
        text.push_str(&format!("  {reason}\n"));
    }
    text.push_str(&format!("  migration {id}\n"));
    if let Some(record) = &migration.record {
        text.push('\n');
        text.push_str(&figures(record));
        text.push_str(&record.convergence.as_ref().map(measures).unwrap_or_default());
        text.push('\n');
        text.push_str(&pages(record.pages.as_ref()));
        text.push('\n');
        text.push_str(&timings("PHASE", &record.phases));
        if !record.downtime_parts.is_empty() {
            text.push('\n');
            text.push_str(&timings("DOWNTIME", &record.downtime_parts));
        }
        if let Some(quote) = &record.quote {
            text.push('\n');
            text.push_str(&quote::beside(quote, record));
        }
        if !record.warnings.is_empty() {
            text.push('\n');
            text.push_str(&preflight::warnings(&record.warnings));
        }
    }
    text
}

fn figures(record: &MigrationRecord) -> String {
    let ratio = if record.wan_bytes == 0 {
        String::new()
    } else {
        format!("  (1/{:.1} of the memory)", record.memory_bytes as f64 / record.wan_bytes as f64)
    };
    let digest = if record.stream_digest_match { "equal on both sides" } else { "DIFFERENT" };
    lines(&[
        ("total time", units::duration(record.total_time_ms)),
        ("memory time", units::duration(record.memory_time_ms)),
        ("downtime", units::duration(record.downtime_ms)),
        ("memory moved", units::bytes(record.memory_bytes)),
        ("memory on the wire", format!("{}{ratio}", units::bytes(record.wan_bytes))),
        ("disk on the wire", units::bytes(record.disk_wan_bytes)),
        ("stream digest", digest.to_owned()),
    ])
}

/// What was done for it to converge; nothing when nothing was.
fn measures(convergence: &ConvergenceRecord) -> String {
    if convergence.acted.is_empty() {
        return String::new();
    }
    let slowed = match convergence.greatest_throttle_percent {
        0 => "not at all".to_owned(),
        percent => format!("by {percent} % at most"),
    };
    lines(&[
        ("rounds of memory", units::count(convergence.rounds.into())),
        ("guest slowed down", slowed),
        ("permitted pause", units::duration(convergence.permitted_pause_ms)),
    ])
}

fn lines(lines: &[(&str, String)]) -> String {
    lines.iter().map(|(label, value)| format!("  {label:<LABEL_CELLS$}  {value}\n")).collect()
}

fn pages(pages: Option<&PageCounts>) -> String {
    let PageCounts { zero, teleported, literal, fallback } = pages.copied().unwrap_or_default();
    let all = zero + teleported + literal + fallback;
    let mut table =
        Table::new([("PAGES", Align::Left), ("COUNT", Align::Right), ("BYTES", Align::Right), ("SHARE", Align::Right)])
            .indented("  ");
    for (name, count) in [("zero", zero), ("teleported", teleported), ("literal", literal), ("fallback", fallback)] {
        let bytes = units::bytes(count * PAGE_BYTES);
        table.row([name.to_owned(), units::count(count), bytes, units::percent(count, all)]);
    }
    table.render("")
}

fn timings(heading: &'static str, timings: &[PhaseTiming]) -> String {
    let mut table = Table::new([(heading, Align::Left), ("DURATION", Align::Right)]).indented("  ");
    for timing in timings {
        table.row([timing.name.clone(), units::duration(timing.duration_ms)]);
    }
    table.render("no phases")
}

#[cfg(test)]
pub(crate) mod tests {
    use pageport_proto::v1::{self, Check, Finding, MigrationState};

    use super::*;

    pub(crate) fn finished() -> Migration {
        let timing = |name: &str, duration_ms| PhaseTiming { name: name.into(), duration_ms };
        Migration {
            id: "m1".into(),
            vm_id: "v1".into(),
            vm_name: "web".into(),
            from_site: "a".into(),
            to_site: "b".into(),
            state: MigrationState::Completed.into(),
            epoch: 2,
            created_unix_ms: 1_700_000_000_000,
            ended_unix_ms: 1_700_000_006_210,
            record: Some(MigrationRecord {
                total_time_ms: 6_210,
                memory_time_ms: 4_896,
                downtime_ms: 312,
                wan_bytes: 73_610_035,
                disk_wan_bytes: 1_258_291,
                memory_bytes: 2_104_492_032,
                pages: Some(PageCounts { zero: 81_087, teleported: 405_574, literal: 37_757, fallback: 12 }),
                stream_digest_match: true,
                phases: vec![
                    timing("connect", 52),
                    timing("disk-sync", 1_260),
                    timing("memory", 4_584),
                    timing("switchover", 312),
                ],
                stream_digest: "ab12".into(),
                downtime_parts: vec![timing("last pages", 200)],
                quote: None,
                warnings: vec![],
                convergence: None,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_finished_migration_reads_like_this() {
        assert_eq!(
            summary(&finished()),
            "\
web moved from a to b in 6.21 s; it stood still for 312 ms.
  migration m1

  total time          6.21 s
  memory time         4.90 s
  downtime            312 ms
  memory moved        1.96 GiB
  memory on the wire  70.2 MiB  (1/28.6 of the memory)
  disk on the wire    1.20 MiB
  stream digest       equal on both sides

  PAGES         COUNT     BYTES   SHARE
  zero         81,087   317 MiB  15.5 %
  teleported  405,574  1.55 GiB  77.3 %
  literal      37,757   147 MiB   7.2 %
  fallback         12  48.0 KiB   0.0 %

  PHASE       DURATION
  connect        52 ms
  disk-sync     1.26 s
  memory        4.58 s
  switchover    312 ms

  DOWNTIME    DURATION
  last pages    200 ms
"
        );
    }

    #[test]
    fn a_failed_migration_says_why() {
        let failed = Migration {
            state: MigrationState::Failed.into(),
            reason: "no space at b".into(),
            record: None,
            ..finished()
        };
        assert_eq!(summary(&failed), "web from a to b: failed.\n  no space at b\n  migration m1\n");
    }

    #[test]
    fn what_a_preflight_warned_of_is_kept_with_the_move() {
        let mut migration = finished();
        let warning = Finding::warns(Check::Clocks, "3.0 s apart", "run NTP");
        migration.record.as_mut().unwrap().warnings = vec![warning];
        assert!(summary(&migration).ends_with("\n  WARNED OF\n  clocks     3.0 s apart; run NTP\n"));
    }

    #[test]
    fn what_was_done_for_it_to_converge_is_told() {
        let mut migration = finished();
        let convergence =
            ConvergenceRecord { rounds: 9, greatest_throttle_percent: 75, permitted_pause_ms: 300, acted: vec![] };
        migration.record.as_mut().unwrap().convergence = Some(convergence.clone());
        assert!(!summary(&migration).contains("rounds of memory"), "nothing had to be done");
        let acted = vec![v1::ConvergencePolicy::Throttle.into()];
        migration.record.as_mut().unwrap().convergence = Some(ConvergenceRecord { acted, ..convergence });
        let text = summary(&migration);
        assert!(text.contains(
            "  rounds of memory    9\n  guest slowed down   by 75 % at most\n  permitted pause     300 ms\n"
        ));
    }

    #[test]
    fn different_digests_cannot_be_overlooked() {
        let mut migration = finished();
        migration.record.as_mut().unwrap().stream_digest_match = false;
        assert!(summary(&migration).contains("stream digest       DIFFERENT\n"));
    }
}
