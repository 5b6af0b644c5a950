//! Findings of a preflight, as both controllers and workers make them.

use crate::v1::{Check, Finding, Severity};

impl Finding {
    /// All is well.
    pub fn ok(check: Check, seen: impl Into<String>) -> Self {
        Self::new(check, Severity::Ok, seen.into(), String::new())
    }

    /// The move begins all the same.
    pub fn warns(check: Check, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, Severity::Warning, seen.into(), fix.into())
    }

    /// The move cannot be made.
    pub fn blocks(check: Check, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, Severity::Blocks, seen.into(), fix.into())
    }

    /// Refused with one of our errors, which read `problem: way out`.
    pub fn refused(check: Check, error: &str) -> Self {
        match error.split_once(": ") {
            Some((seen, fix)) => Self::blocks(check, seen, fix),
            None => Self::blocks(check, error, "see the rest of the findings, and the worker's log"),
        }
    }

    /// It is not known whether all is well.
    pub fn unchecked(check: Check, why: impl AsRef<str>, fix: impl Into<String>) -> Self {
        Self::new(check, Severity::Warning, format!("not checked: {}", why.as_ref()), fix.into())
    }

    fn new(check: Check, severity: Severity, seen: String, fix: String) -> Self {
        Self { check: check.into(), severity: severity.into(), seen, fix }
    }
}
