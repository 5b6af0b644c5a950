//! `pageport-lab faults-replication`: the faults of standing replication on the command line.

use std::path::PathBuf;

use anyhow::Context;
use pageport_lab::faults::Passed;
use pageport_lab::replication_faults::{self, CaseResult, News, ReplicationFaultsConfig, Sum};
use pageport_lab::{netns, paths};
use tokio::signal::unix::{SignalKind, signal};

use crate::print_line;

/// Strike standing replication with every fault at seeded moments, on real processes.
///
/// A guest that writes is protected from one site to another. In each case a fault strikes at a moment drawn from a seed; the replica that it leaves is
/// recovered and checked at once; then all is healed, replication must go on by itself, and in the end the replica must equal the disk. The last cases strike after
/// the VM was moved there, with its old site holding the replica. Results are appended to
/// target/faults/replication.jsonl; what is passed at this commit is not run again. Exit code 1 when a case is not passed.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageport-lab faults-replication                              78 cases, or what is left of them
  pageport-lab faults-replication --only cut-both --only /2    all of one fault, and all with one seed
  pageport-lab faults-replication --only kill-qemu/3 --again   one case at its moment, even if it is passed
  pageport-lab faults-replication --only turned                those with the VM moved, the direction turned round
  pageport-lab faults-replication --seed 100 --cases 3         39 other moments
  pageport-lab faults-replication --list                       all cases with their moments, and what is known of them

A failed case keeps its daemons' logs: see \"logs\" of its line. A seed draws the same moment each time; what the processes do at it may differ.")]
pub struct ReplicationFaultsCommand {
    /// A case as --list names it, or FAULT, or /SEED; may be given again.
    #[arg(long, value_name = "FAULT/SEED")]
    only: Vec<String>,
    /// Say what there is and what is known of it, and run nothing.
    #[arg(long)]
    list: bool,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds of each fault, from the first; a third of them also in the turned-round direction.
    #[arg(long, value_name = "SEEDS", default_value_t = replication_faults::SEEDS)]
    cases: u64,
    /// Also what is passed already.
    #[arg(long)]
    again: bool,
    /// One JSON object per case on standard output, the sum as the last line.
    #[arg(long)]
    json: bool,
    /// Where results are kept.
    #[arg(long, value_name = "FOLDER", default_value_os_t = paths::target().join("faults"))]
    folder: PathBuf,
}

impl ReplicationFaultsCommand {
    /// Does it.
    ///
    /// # Errors
    /// When there can be no lab, or a case is not passed.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self { only, list, seed, cases, again, json, folder } = self;
        let config = ReplicationFaultsConfig {
            cases: replication_faults::select(&replication_faults::cases(seed, cases), &only)?,
            passed: if again { Passed::Again } else { Passed::Skip },
            folder,
        };
        if list {
            return list_cases(&config, json);
        }
        netns::enter().context("make network namespaces, which the lab needs")?;
        let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
        // Leaving the select drops the run, and with it the lab; what was passed is kept.
        let outcome = tokio::select! {
            outcome = replication_faults::run(&config, |news| tell(&news, json)) => outcome?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; the same command goes on from here"),
            _ = hangup.recv() => anyhow::bail!("hung up"),
            _ = terminate.recv() => anyhow::bail!("terminated"),
        };
        if json {
            print_line(&serde_json::to_string(&outcome.sum)?);
        } else {
            for failed in &outcome.failed {
                print_line(&format!(
                    "{}: {}\n    logs: {}",
                    failed.case,
                    failed.complaints.join("\n    "),
                    failed.logs
                ));
            }
            let Sum { cases, passed, fsck_failures, content_mismatches, guest_io_errors, stuck, .. } = &outcome.sum;
            print_line(&format!(
                "{passed} passed of {cases} run; file systems not sound {fsck_failures}, contents not equal {content_mismatches}, \
                 I/O errors of guests {guest_io_errors}, stuck {stuck}; slowest write {} ms",
                outcome.sum.slowest_write_ms
            ));
            for file in &outcome.files {
                print_line(&file.display().to_string());
            }
        }
        anyhow::ensure!(outcome.failed.is_empty(), "{} cases are not passed", outcome.failed.len());
        Ok(())
    }
}

fn list_cases(config: &ReplicationFaultsConfig, json: bool) -> anyhow::Result<()> {
    let known = replication_faults::known(&config.folder)?;
    for case in &config.cases {
        let (name, strike) = (case.to_string(), case.strike());
        let state = known.get(&name).map(|result| if result.passed { "passed" } else { "failed" });
        let (cue, delay_ms, lasts_ms) = (strike.cue.name(), strike.delay.as_millis(), strike.lasts.as_millis());
        print_line(&match json {
            true => serde_json::json!({"case": name, "cue": cue, "state": state}).to_string(),
            false => {
                format!("{name:<38}{cue:<10}+{delay_ms:>4} ms, for {lasts_ms:>5} ms   {}", state.unwrap_or("not run"))
            }
        });
    }
    Ok(())
}

fn tell(news: &News<'_>, json: bool) {
    let line = match news {
        News::Ended(result) if json => serde_json::to_string(result).unwrap_or_default(),
        _ if json => return,
        News::Lab => "starting a lab, its guest and its replication".to_owned(),
        News::Begins { number, of, case } => {
            let strike = case.strike();
            let (cue, delay, lasts) = (strike.cue.name(), strike.delay.as_millis(), strike.lasts.as_millis());
            format!("[{number}/{of}] {case}: {cue} + {delay} ms, for {lasts} ms")
        }
        News::Ended(result) => ended(result),
    };
    print_line(&line);
}

fn ended(result: &CaseResult) -> String {
    let complaints: String = result.complaints.iter().map(|complaint| format!("\n    {complaint}")).collect();
    let figure = |value: Option<u64>| value.map_or("?".to_owned(), |value| value.to_string());
    format!(
        "    {}: {} in {} s: at point {} ({}) with {} operations; went on after {} ms with {} bytes; slowest write {} ms{complaints}",
        result.case,
        if result.passed { "passed" } else { "FAILED" },
        result.duration_ms / 1000,
        figure(result.point_at_fault),
        result.phase_at_fault,
        figure(result.operations_at_fault),
        figure(result.resumed_ms),
        figure(result.resumed_wan_bytes),
        result.slowest_write_ms,
    )
}
