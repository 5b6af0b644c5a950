//! Limits, links and drains as text. Pure.

use pageport_proto::v1::{DrainStatus, Limits, Link, Migration, MigrationState, Spot, spot::Place};

use super::table::Align::{Left, Right};
use super::table::Table;
use super::units;
use super::words::{self, or_dash};

/// `scheduler get`
pub fn limits(limits: &Limits) -> String {
    let Limits { migrations_per_worker, migrations_per_link, memory_percent } = limits;
    format!(
        "migrations per worker  {migrations_per_worker}\nmigrations per link    {migrations_per_link}\nmemory for vms         {memory_percent} % of a host's\n"
    )
}

/// A budget or a cap.
pub fn rate(bps: u64) -> String {
    if bps == 0 { "none".to_owned() } else { units::rate(bps) }
}

/// Migrations over a link at a time.
pub fn slots(link: &Link) -> String {
    if link.migrations == 0 { "default".to_owned() } else { link.migrations.to_string() }
}

/// One line after `link set`.
pub fn link_line(link: &Link) -> String {
    let Link { from_site, to_site, cap_bps, budget_bps, .. } = link;
    let (cap, budget, slots) = (rate(*cap_bps), rate(*budget_bps), slots(link));
    format!(
        "from {from_site} to {to_site}: budget of all {budget}, cap of replication {cap}, migrations at a time {slots}"
    )
}

/// What is emptied, in words.
pub fn spot(spot: &Spot) -> String {
    match &spot.place {
        Some(Place::Site(site)) => format!("site {site}"),
        Some(Place::Worker(worker)) => format!("worker {worker}"),
        None => "?".to_owned(),
    }
}

/// The command that ends a drain.
pub fn undrain_command(spot: &Spot) -> String {
    match &spot.place {
        Some(Place::Site(site)) => format!("site undrain {site}"),
        Some(Place::Worker(worker)) => format!("worker undrain {worker}"),
        None => "site undrain SITE".to_owned(),
    }
}

/// One line on how far a drain is.
pub fn drain_line(status: &DrainStatus) -> String {
    let (waiting, running) = split(status);
    let left = waiting.len() + status.planned.len();
    let all = status.moved + (left + running.len() + status.stays.len()) as u64;
    let mut line = format!(
        "{} of {all} moved, {} under way, {left} to come, {} cannot leave",
        status.moved,
        running.len(),
        status.stays.len()
    );
    if let Some(first) = running.first() {
        line.push_str(&format!("  {} to {}", first.vm_name, first.to_site));
    } else if let Some(first) = waiting.first() {
        line.push_str(&format!("  {}: {}", first.vm_name, first.reason));
    }
    line
}

fn split(status: &DrainStatus) -> (Vec<&Migration>, Vec<&Migration>) {
    let is_queued = |migration: &&Migration| migration.state == i32::from(MigrationState::Requested);
    status.migrations.iter().partition(is_queued)
}

/// `site drain`: what moves where, what waits and why, and what stays.
pub fn drain(status: &DrainStatus) -> String {
    let spot = status.spot.as_ref().map(spot).unwrap_or_default();
    let order = if status.ordered_unix_ms == 0 { "not drained; this is what would be done" } else { "being drained" };
    let mut text = format!("{spot}: {order}\n{}\n", drain_line(status));
    if !status.migrations.is_empty() {
        let mut table =
            Table::new([("VM", Left), ("TO", Left), ("STATE", Left), ("MIGRATION", Left), ("REASON", Left)]);
        for migration in &status.migrations {
            let state = words::migration_state(migration.state).to_owned();
            let Migration { vm_name, to_site, id, reason, .. } = migration;
            table.row([vm_name.clone(), to_site.clone(), state, id.clone(), reason.clone()]);
        }
        text.push_str(&format!("\n{}", table.render("")));
    }
    if !status.planned.is_empty() {
        let mut table = Table::new([("VM", Left), ("MEMORY", Right), ("TO", Left), ("WORKER", Left)]);
        for planned in &status.planned {
            let memory = units::bytes(planned.memory_bytes);
            table.row([planned.vm_name.clone(), memory, planned.to_site.clone(), planned.to_worker.clone()]);
        }
        text.push_str(&format!("\n{}", table.render("")));
    }
    if !status.stays.is_empty() {
        let mut table = Table::new([("CANNOT LEAVE", Left), ("BECAUSE", Left)]);
        for stay in &status.stays {
            table.row([stay.vm_name.clone(), or_dash(&stay.reason).to_owned()]);
        }
        text.push_str(&format!("\n{}", table.render("")));
    }
    text
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::{DrainMove, DrainStay};

    use super::*;

    fn status() -> DrainStatus {
        let migration = |name: &str, state: MigrationState, reason: &str| Migration {
            id: format!("m-{name}"),
            vm_name: name.into(),
            to_site: "b".into(),
            state: state.into(),
            reason: reason.into(),
            ..Migration::default()
        };
        DrainStatus {
            spot: Some(Spot { place: Some(Place::Site("a".into())) }),
            ordered_unix_ms: 1,
            moved: 3,
            migrations: vec![
                migration("db", MigrationState::Running, ""),
                migration("web", MigrationState::Requested, "waits behind vm \"db\" for worker \"worker-b\""),
            ],
            planned: vec![DrainMove {
                vm_name: "mail".into(),
                to_site: "c".into(),
                to_worker: "wc".into(),
                memory_bytes: 1 << 30,
                ..DrainMove::default()
            }],
            stays: vec![DrainStay { vm_name: "old".into(), reason: "it does not run".into(), ..DrainStay::default() }],
            ..DrainStatus::default()
        }
    }

    #[test]
    fn a_drain_has_one_progress_and_names_what_waits_and_what_stays() {
        assert_eq!(drain_line(&status()), "3 of 7 moved, 1 under way, 2 to come, 1 cannot leave  db to b");
        assert_eq!(
            drain(&status()),
            "\
site a: being drained
3 of 7 moved, 1 under way, 2 to come, 1 cannot leave  db to b

VM   TO  STATE    MIGRATION  REASON
db   b   running  m-db
web  b   queued   m-web      waits behind vm \"db\" for worker \"worker-b\"

VM      MEMORY  TO  WORKER
mail  1.00 GiB  c   wc

CANNOT LEAVE  BECAUSE
old           it does not run
"
        );
    }

    #[test]
    fn a_plan_that_was_not_ordered_says_so() {
        assert!(drain(&DrainStatus { ordered_unix_ms: 0, ..status() }).starts_with("site a: not drained; this is"));
    }
}
