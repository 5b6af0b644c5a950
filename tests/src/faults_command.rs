//! `pageport-lab faults`: the fault matrix on the command line.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use pageport_lab::faults::{self, FaultsConfig, News, Passed};
use pageport_lab::{netns, paths};
use tokio::signal::unix::{SignalKind, signal};

use crate::print_line;

/// Strike a move with every fault at every point, on real processes.
///
/// Each case moves a guest between two sites, holds the move at a point, strikes, lets go and heals; then exactly one guest must
/// run, the same as before, where the move's outcome says, and nothing may be left behind. Results are appended to
/// target/faults/results.jsonl; what is passed at this commit is not run again. Exit code 1 when a case is not passed.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageport-lab faults                                      the whole matrix, or what is left of it
  pageport-lab faults --only memory --only /kill-leader    all at one point, and one fault at all points
  pageport-lab faults --only hand-over/cut-both --again    one case, even if it is passed
  pageport-lab faults --only //self-fence                  all with a VM that fences itself
  pageport-lab faults --list                               all cases, with what is known of them

A failed case keeps its daemons' logs: see \"logs\" of its line. Runs with different --only may go on at the same time.")]
pub struct FaultsCommand {
    /// A case as --list names it, or POINT, /FAULT, //self-fence, //keep-running; may be given again.
    #[arg(long, value_name = "POINT/FAULT")]
    only: Vec<String>,
    /// Say what there is and what is known of it, and run nothing.
    #[arg(long)]
    list: bool,
    /// Also what is passed already.
    #[arg(long)]
    again: bool,
    /// One JSON object per case on standard output, the sum as the last line; no table.
    #[arg(long)]
    json: bool,
    /// How many labs work side by side.
    #[arg(long, default_value_t = faults::LANES)]
    lanes: usize,
    /// How long a stopped process stays stopped: longer than a lease.
    #[arg(long, value_name = "SECONDS", default_value_t = faults::LEASE.as_secs())]
    lease_seconds: u64,
    /// Draw the order of the cases from this; 0: the order of the table.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where results are kept.
    #[arg(long, value_name = "FOLDER", default_value_os_t = paths::target().join("faults"))]
    folder: PathBuf,
}

impl FaultsCommand {
    /// Does it.
    ///
    /// # Errors
    /// When there can be no matrix, or a case is not passed.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self { only, list, again, json, lanes, lease_seconds, seed, folder } = self;
        let config = FaultsConfig {
            pairs: faults::select(&only)?,
            passed: if again { Passed::Again } else { Passed::Skip },
            lease: std::time::Duration::from_secs(lease_seconds),
            lanes,
            seed,
            folder,
        };
        if list {
            return list_faults(&config, json);
        }
        netns::enter().context("make network namespaces, which the matrix needs")?;
        let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
        // Leaving the select drops the run, and with it the lab; what was passed is kept.
        let outcome = tokio::select! {
            outcome = faults::run(&config, move |news| tell(&news, json)) => outcome?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; the same command goes on from here"),
            _ = hangup.recv() => anyhow::bail!("hung up"),
            _ = terminate.recv() => anyhow::bail!("terminated"),
        };
        let mut out = std::io::stdout();
        if json {
            writeln!(out, "{}", serde_json::to_string(&outcome.matrix)?)?;
        } else {
            writeln!(out, "\n{}\n\n{}\n", faults::render(&outcome.newest), faults::LEGEND)?;
            for failed in &outcome.failed {
                writeln!(out, "{}: {}\n    logs: {}", failed.pair, failed.complaints.join("\n    "), failed.logs)?;
            }
            let matrix = &outcome.matrix;
            let faults::Matrix { cases, passed, pairs, double_running, lost_vms, orphans, .. } = matrix;
            writeln!(
                out,
                "{passed} passed of {cases} run, of {pairs} cases; double running {double_running}, lost VMs {lost_vms}, orphans {orphans}"
            )?;
            for file in &outcome.files {
                writeln!(out, "{}", file.display())?;
            }
        }
        anyhow::ensure!(outcome.failed.is_empty(), "{} cases are not passed", outcome.failed.len());
        Ok(())
    }
}

fn list_faults(config: &FaultsConfig, json: bool) -> anyhow::Result<()> {
    let known = faults::known(&config.folder)?;
    for pair in &config.pairs {
        let name = pair.to_string();
        let state = known.get(&name).map(|result| if result.passed { "passed" } else { "failed" });
        print_line(&match json {
            true => serde_json::json!({"pair": name, "state": state}).to_string(),
            false => format!("{name:<50}{}", state.unwrap_or("not run")),
        });
    }
    Ok(())
}

fn tell(news: &News<'_>, json: bool) {
    let line = match news {
        News::Ended(result) if json => serde_json::to_string(result).unwrap_or_default(),
        _ if json => return,
        News::Lab => "starting a lab and its guest".to_owned(),
        News::Begins { number, of, pair } => format!("[{number}/{of}] {pair}"),
        News::Ended(result) => {
            let fenced = if result.fenced { ", ended with its lease or taken over" } else { "" };
            let seconds = result.duration_ms / 1000;
            let complaints: String = result.complaints.iter().map(|complaint| format!("\n    {complaint}")).collect();
            let end = if result.passed {
                format!("passed: the move {}{fenced}", result.outcome)
            } else {
                "FAILED".to_owned()
            };
            format!("    {}: {end} in {seconds} s{complaints}", result.pair)
        }
    };
    print_line(&line);
}
