//! The matrix as a table for the terminal: a row per fault and policy, a column per point.

use std::collections::BTreeMap;

use super::plan::{Fault, Isolation, Pair, Point, matrix};
use super::results::CaseResult;

/// What a cell says.
pub const LEGEND: &str = "\
ok: stayed at its source   OK: moved   !: its own QEMU was killed, it booted again there
~: it was ended with its lease, and runs again where the controllers say
FAIL: see results.jsonl    . : not run   - : nothing to strike";

/// Draws it.
#[must_use]
pub fn render(results: &BTreeMap<String, CaseResult>) -> String {
    let all = matrix();
    let mut text = format!("{:<35}", "");
    for point in Point::ALL {
        text += &format!("{:>11}", point.name());
    }
    let rows = Isolation::ALL.into_iter().flat_map(|isolation| Fault::ALL.map(|fault| (fault, isolation)));
    for (fault, isolation) in rows.filter(|row| all.iter().any(|pair| (pair.fault, pair.isolation) == *row)) {
        let policy = if isolation == Isolation::SelfFence { "/self-fence" } else { "" };
        text += &format!("\n{:<35}", format!("{}{policy}", fault.name()));
        for point in Point::ALL {
            let pair = Pair { point, fault, isolation };
            let cell = match results.get(&pair.to_string()) {
                _ if !all.contains(&pair) => "-".to_owned(),
                None => ".".to_owned(),
                Some(result) => cell(result),
            };
            text += &format!("{cell:>11}");
        }
    }
    text
}

/// One result in a word.
#[must_use]
pub fn cell(result: &CaseResult) -> String {
    if !result.passed {
        return "FAIL".to_owned();
    }
    let word = if result.outcome == "completed" { "OK" } else { "ok" };
    format!("{word}{}{}", if result.crashed { "!" } else { "" }, if result.fenced { "~" } else { "" })
}
