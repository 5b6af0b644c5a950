//! The matrix as a table for the terminal: a row per fault, a column per point.

use std::collections::BTreeMap;

use super::plan::{Fault, Pair, Point, matrix};
use super::results::CaseResult;

/// What a cell says.
pub const LEGEND: &str = "\
ok: stayed at its source   OK: moved   ok!/OK!: its own QEMU was killed, it booted again there
FAIL: see results.jsonl    . : not run   - : nothing to strike";

/// Draws it.
#[must_use]
pub fn render(results: &BTreeMap<String, CaseResult>) -> String {
    let all = matrix();
    let mut text = format!("{:<24}", "");
    for point in Point::ALL {
        text += &format!("{:>11}", point.name());
    }
    for fault in Fault::ALL {
        text += &format!("\n{:<24}", fault.name());
        for point in Point::ALL {
            let pair = Pair { point, fault };
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
    format!("{word}{}", if result.crashed { "!" } else { "" })
}
