//! Findings of a preflight: those that hinder first to be seen. Pure.

use pageport_proto::v1::{Finding, PreflightMigrationResponse, Severity};

use super::table::{Align, Table};
use super::words;

/// The verdict, then all findings, each with its fix below.
pub fn page(response: &PreflightMigrationResponse) -> String {
    let mut table = Table::new([("CHECK", Align::Left), ("", Align::Left), ("SEEN", Align::Left)]).indented("  ");
    for Finding { check, severity, seen, fix } in &response.findings {
        table.row([words::check(*check).to_owned(), words::severity(*severity).to_owned(), seen.clone()]);
        if !fix.is_empty() {
            table.row([String::new(), String::new(), format!("fix: {fix}")]);
        }
    }
    format!("{}\n\n{}", verdict(&response.findings), table.render("nothing was looked at"))
}

fn verdict(findings: &[Finding]) -> String {
    let warnings = findings.iter().filter(|finding| finding.severity() == Severity::Warning).count();
    match (blocking(findings), warnings) {
        (0, 0) => "Nothing hinders the move.".to_owned(),
        (0, 1) => "Nothing hinders the move; there is a warning.".to_owned(),
        (0, _) => format!("Nothing hinders the move; there are {warnings} warnings."),
        (1, _) => "The move cannot be made: a finding blocks it.".to_owned(),
        (blocking, _) => format!("The move cannot be made: {blocking} findings block it."),
    }
}

/// How many keep the move from being made.
pub fn blocking(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.severity() == Severity::Blocks).count()
}

/// What a move was made in spite of.
pub fn warnings(findings: &[Finding]) -> String {
    let mut table = Table::new([("WARNED OF", Align::Left), ("", Align::Left)]).indented("  ");
    for finding in findings {
        table.row([words::check(finding.check).to_owned(), format!("{}; {}", finding.seen, finding.fix)]);
    }
    table.render("")
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::Check;

    use super::*;

    #[test]
    fn what_hinders_is_said_first_and_each_fix_stands_below_its_finding() {
        let findings = vec![
            Finding::ok(Check::Vm, "it runs"),
            Finding::warns(Check::Clocks, "3.0 s apart", "run NTP"),
            Finding::blocks(Check::LinkBack, "no answer", "let UDP through"),
        ];
        let mut response = PreflightMigrationResponse { findings };
        assert_eq!(
            page(&response),
            "\
The move cannot be made: a finding blocks it.

  CHECK               SEEN
  vm         ok       it runs
  clocks     warning  3.0 s apart
                      fix: run NTP
  link back  BLOCKS   no answer
                      fix: let UDP through
"
        );
        assert_eq!(blocking(&response.findings), 1);
        response.findings.pop();
        assert!(page(&response).starts_with("Nothing hinders the move; there is a warning.\n"));
        response.findings.pop();
        assert!(page(&response).starts_with("Nothing hinders the move.\n"));
    }
}
