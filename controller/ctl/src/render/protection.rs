//! How protected VMs stand, and links. Pure: messages in, text out.

use pageport_proto::v1::{
    ListLinksResponse, ListVmsResponse, Protection, Replica, ReplicationPhase, ReplicationStatus, ScrubStatus, Vm,
};

use super::pools::site;
use super::progress::time_left;
use super::schedule::{rate, slots};
use super::table::Align::{Left, Right};
use super::table::Table;
use super::units;
use super::words::replication_phase;
use crate::quantity::Span;

/// VMs that are protected somewhere.
pub fn protected(mut response: ListVmsResponse) -> ListVmsResponse {
    response.vms.retain(|vm| vm.replicas.iter().any(|replica| replica.protection.is_some()));
    response
}

/// `replication status`
pub fn statuses(response: &ListVmsResponse, now_unix_ms: i64) -> String {
    let mut table = Table::new([
        ("VM", Left),
        ("SITE", Left),
        ("PHASE", Left),
        ("POINT", Right),
        ("LAG", Right),
        ("BEHIND", Right),
        ("TARGET", Right),
        ("WORST", Left),
        ("RATE", Right),
        ("LEFT", Left),
        ("SCRUB", Left),
        ("PROBLEM", Left),
    ]);
    for vm in &response.vms {
        for replica in &vm.replicas {
            if let Some(protection) = replica.protection {
                table.row(status_cells(name(vm), replica, protection, now_unix_ms));
            }
        }
    }
    table.render("nothing is protected: `pageportctl protect VM --to SITE` keeps a replica up to date")
}

fn name(vm: &Vm) -> String {
    vm.spec.as_ref().map(|spec| spec.name.clone()).unwrap_or_default()
}

fn status_cells(vm: String, replica: &Replica, protection: Protection, now_unix_ms: i64) -> [String; 12] {
    let unknown = ReplicationStatus::default();
    let status = replica.replication.as_ref().unwrap_or(&unknown);
    let dash = || "-".to_owned();
    let newest = |figure: String| if status.newest.is_some() { figure } else { dash() };
    let worst = if status.window_ms == 0 {
        dash()
    } else {
        format!("{} in {}", units::duration(status.worst_rpo_ms), units::duration(status.window_ms))
    };
    [
        vm,
        site(replica),
        phase(status),
        status.newest.map_or_else(dash, |point| point.number.to_string()),
        newest(units::duration(status.lag_ms)),
        units::bytes(status.lag_bytes),
        Span(protection.rpo_ms).to_string(),
        worst,
        units::rate(status.rate_bps),
        time_left(status).unwrap_or_else(dash),
        scrub(status, now_unix_ms),
        problem(status),
    ]
}

/// The phase, with how far a copy is.
fn phase(status: &ReplicationStatus) -> String {
    let word = replication_phase(status.phase);
    let copying = matches!(status.phase(), ReplicationPhase::FullCopy | ReplicationPhase::Increment);
    if copying && status.total_bytes > 0 {
        return format!("{word} {}", units::percent(status.done_bytes, status.total_bytes));
    }
    word.to_owned()
}

/// How far a scrub is, or how the last one ended.
fn scrub(status: &ReplicationStatus, now_unix_ms: i64) -> String {
    let damaged = |blocks: u64, word: &str| format!("{} {word}", units::count(blocks));
    match (&status.scrub, &status.last_scrub) {
        (Some(running), _) => {
            let share = units::percent(running.done_bytes, running.total_bytes);
            match running.different_blocks {
                0 => share,
                blocks => format!("{share}, {}", damaged(blocks, "damaged")),
            }
        }
        (None, Some(last)) => {
            let ago = units::ago(last.ended_unix_ms, now_unix_ms);
            match last.different_blocks {
                0 => format!("clean, {ago}"),
                _ => format!("{}, {ago}", damaged(last.repaired_blocks, "repaired")),
            }
        }
        (None, None) => "-".to_owned(),
    }
}

/// `replication scrub`, without waiting for its end.
pub fn scrub_ordered(vm: &str, replica: &Replica) -> String {
    format!(
        "the replica of {vm} at {} is compared with the vm's disks\nhow far it is: pageportctl replication status {vm}",
        replica.site
    )
}

/// `replication scrub`, at its end.
pub fn scrubbed(vm: &str, replica: &Replica) -> String {
    let none = ScrubStatus::default();
    let last = replica.replication.as_ref().and_then(|status| status.last_scrub.as_ref()).unwrap_or(&none);
    let took = u64::try_from(last.ended_unix_ms.saturating_sub(last.started_unix_ms)).unwrap_or_default();
    let compared = format!("{} compared in {}", units::bytes(last.compared_bytes), units::duration(took));
    let found = match last.different_blocks {
        0 => "nothing differed".to_owned(),
        blocks => format!(
            "{} blocks of 4 KiB differed, {} repaired",
            units::count(blocks),
            units::count(last.repaired_blocks)
        ),
    };
    format!("the replica of {vm} at {}: {compared}, {found}", replica.site)
}

fn problem(status: &ReplicationStatus) -> String {
    let late = match (status.rpo_missed, status.problem.as_str()) {
        (true, "") => "TARGET MISSED".to_owned(),
        (true, problem) => format!("TARGET MISSED: {problem}"),
        (false, problem) => problem.to_owned(),
    };
    let not_quiesced = match status.quiesce_problem.as_str() {
        "" => String::new(),
        problem => format!("quiescing: {problem}"),
    };
    [late, not_quiesced].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
}

/// One line after `protect`.
pub fn protect_line(vm: &str, replica: &Replica) -> String {
    let terms = replica.protection.unwrap_or_default();
    let keep = units::count(terms.keep_points.into());
    let rpo = Span(terms.rpo_ms);
    let quiesced = if terms.quiesce { ", quiesced where the guest's agent answers" } else { "" };
    let places: String =
        replica.places.iter().map(|place| format!(", disk {} on {}", place.disk, place.path)).collect();
    format!(
        "{vm} is protected at {}: a recovery point at least every {rpo}, {keep} are kept{quiesced}{places}",
        site(replica)
    )
}

/// `link list`
pub fn links(response: &ListLinksResponse) -> String {
    let mut table =
        Table::new([("FROM", Left), ("TO", Left), ("BUDGET", Right), ("CAP", Right), ("MIGRATIONS", Right)]);
    for link in &response.links {
        let (budget, cap) = (rate(link.budget_bps), rate(link.cap_bps));
        table.row([link.from_site.clone(), link.to_site.clone(), budget, cap, slots(link)]);
    }
    table.render("no links: they join the sites of workers that have connected")
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::{Link, RecoveryPoint, VmSpec};

    use super::*;
    use crate::render::progress;

    const NOW: i64 = 1_000_000;

    fn web(status: ReplicationStatus) -> ListVmsResponse {
        let replica = Replica {
            site: "b".into(),
            protection: Some(Protection { rpo_ms: 30_000, keep_points: 10, quiesce: false }),
            replication: Some(status),
            ..Default::default()
        };
        let seeded = Replica { site: "c".into(), ..Default::default() };
        let spec = VmSpec { name: "web".into(), ..Default::default() };
        let vm = Vm { spec: Some(spec), replicas: vec![replica, seeded], ..Default::default() };
        ListVmsResponse { vms: vec![vm, Vm::default()], found: vec![] }
    }

    fn idle() -> ReplicationStatus {
        ReplicationStatus {
            phase: ReplicationPhase::Idle.into(),
            newest: Some(RecoveryPoint { number: 41, ..Default::default() }),
            lag_ms: 12_300,
            lag_bytes: 3 << 20,
            worst_rpo_ms: 34_000,
            window_ms: 86_400_000,
            ..Default::default()
        }
    }

    #[test]
    fn a_status_has_a_row_for_each_protected_site() {
        assert_eq!(
            statuses(&web(idle()), NOW),
            "VM   SITE  PHASE  POINT     LAG    BEHIND  TARGET  WORST                    RATE  LEFT  SCRUB  PROBLEM\n\
             web  b     idle      41  12.3 s  3.00 MiB     30s  34.0 s in 24 h 0 min  0 bit/s  -     -\n"
        );
        assert_eq!(protected(web(idle())).vms.len(), 1);
        assert!(statuses(&ListVmsResponse::default(), NOW).contains("pageportctl protect VM --to SITE"));
    }

    #[test]
    fn a_scrub_says_how_far_it_is_and_the_last_one_what_it_found() {
        let scrub = |different_blocks, repaired_blocks| ScrubStatus {
            seq: 7,
            started_unix_ms: NOW - 100_000,
            ended_unix_ms: NOW - 40_000,
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            compared_bytes: 1 << 30,
            different_blocks,
            repaired_blocks,
            ..ScrubStatus::default()
        };
        let cell = |running, last| scrub_cell(&ReplicationStatus { scrub: running, last_scrub: last, ..idle() });
        assert_eq!(cell(None, None), "-");
        assert_eq!(cell(None, Some(scrub(0, 0))), "clean, 40.0 s ago");
        assert_eq!(cell(None, Some(scrub(1200, 1200))), "1,200 repaired, 40.0 s ago");
        assert_eq!(cell(Some(scrub(0, 0)), Some(scrub(3, 3))), "25.0 %");
        assert_eq!(cell(Some(scrub(2, 1)), None), "25.0 %, 2 damaged");
        let replica =
            |last| web(ReplicationStatus { last_scrub: Some(last), ..idle() }).vms.remove(0).replicas.remove(0);
        assert_eq!(
            scrubbed("web", &replica(scrub(0, 0))),
            "the replica of web at b: 1.00 GiB compared in 1 min 0 s, nothing differed"
        );
        assert!(scrubbed("web", &replica(scrub(3, 3))).ends_with("3 blocks of 4 KiB differed, 3 repaired"));
        assert!(statuses(&web(ReplicationStatus { last_scrub: Some(scrub(0, 0)), ..idle() }), NOW).contains("clean"));
    }

    fn scrub_cell(status: &ReplicationStatus) -> String {
        super::scrub(status, NOW)
    }

    #[test]
    fn a_missed_target_cannot_be_overlooked() {
        let late = ReplicationStatus { lag_ms: 95_000, rpo_missed: true, ..idle() };
        assert!(statuses(&web(late.clone()), NOW).contains("1 min 35 s"));
        assert!(statuses(&web(late.clone()), NOW).trim_end().ends_with("TARGET MISSED"));
        let why = ReplicationStatus { problem: "scratch is full".into(), ..late };
        assert!(statuses(&web(why), NOW).trim_end().ends_with("TARGET MISSED: scratch is full"));
    }

    #[test]
    fn points_that_are_not_quiesced_as_ordered_have_a_reason() {
        let status = ReplicationStatus { quiesce_problem: "no guest agent answers".into(), ..idle() };
        assert!(
            statuses(&web(status.clone()), NOW).trim_end().ends_with("-     -      quiescing: no guest agent answers")
        );
        let both = ReplicationStatus { rpo_missed: true, ..status };
        assert!(statuses(&web(both), NOW).trim_end().ends_with("TARGET MISSED; quiescing: no guest agent answers"));
    }

    #[test]
    fn a_first_copy_says_how_far_it_is_and_how_long_it_takes() {
        let copying = ReplicationStatus {
            phase: ReplicationPhase::FullCopy.into(),
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            rate_bps: 100_000_000,
            eta_low_ms: 240_000,
            eta_high_ms: 300_000,
            ..Default::default()
        };
        let table = statuses(&web(copying.clone()), NOW);
        assert!(table.contains("full copy 25.0 %"), "{table}");
        assert!(table.contains("4 min 0 s to 5 min 0 s"), "{table}");
        let replica = Replica { wan_bytes: 70 << 20, ..web(copying).vms.remove(0).replicas.remove(0) };
        assert_eq!(
            progress::first_copy(&replica),
            "full copy   [#####---------------]  25 %  1.00 GiB of 4.00 GiB  ETA 4 min 0 s to 5 min 0 s  \
             70.0 MiB sent at 100 Mbit/s"
        );
    }

    #[test]
    fn orders_are_confirmed_in_one_line() {
        let vms = web(idle());
        assert_eq!(
            protect_line("web", &vms.vms[0].replicas[0]),
            "web is protected at b: a recovery point at least every 30s, 10 are kept"
        );
        let terms = Protection { rpo_ms: 30_000, keep_points: 10, quiesce: true };
        let quiesced = Replica { protection: Some(terms), ..vms.vms[0].replicas[0].clone() };
        assert!(protect_line("web", &quiesced).ends_with("10 are kept, quiesced where the guest's agent answers"));
        let link = |cap_bps| Link { from_site: "a".into(), to_site: "b".into(), cap_bps, ..Link::default() };
        assert_eq!(
            links(&ListLinksResponse { links: vec![link(100_000_000)] }),
            "FROM  TO  BUDGET         CAP  MIGRATIONS\na     b     none  100 Mbit/s     default\n"
        );
    }
}
