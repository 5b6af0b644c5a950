//! `pageport-lab bench-controller`: measures three controllers with a large fleet.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use pageport_lab::controller_bench::{self, BenchConfig, Effort, Known, Size, plot};
use pageport_lab::{netns, paths};
use tokio::signal::unix::{SignalKind, signal};

/// Measure three controllers as the fleet grows.
///
/// Three real controllers, each at a site of its own, 50 ms of round trip between them, and simulated workers with real connections,
/// certificates and heartbeats. Measured are the latency of a command, commands per second, how soon another controller leads when
/// the leader is killed, what the leader uses, restarts, snapshots, and planning the evacuation of a site. A size that was measured
/// at this commit is not measured again. Takes some minutes; needs network namespaces. Controllers and load share this
/// machine's processors.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ControllerCommand {
    /// A size, as WORKERS/VMS; may be given again.
    #[arg(long = "fleet", value_name = "WORKERS/VMS", default_values = ["100/1000", "300/3000", "1000/10000"])]
    fleets: Vec<Size>,
    /// Also what was measured at this commit.
    #[arg(long)]
    again: bool,
    /// Clients that give commands at once.
    #[arg(long, value_name = "N", default_value_t = Effort::default().clients as u16,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    clients: u16,
    /// Leaders that are killed.
    #[arg(long, value_name = "N", default_value_t = Effort::default().failovers as u16,
          value_parser = clap::value_parser!(u16).range(1..=100))]
    failovers: u16,
    /// Print the figures as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Where the figures are written as JSON in any case; each size as soon as it is known, into controller.jsonl beside it.
    #[arg(long, value_name = "FILE", default_value_os_t = paths::target().join("bench/controller.json"))]
    figures: PathBuf,
    /// Where the plot is written.
    #[arg(long, value_name = "FILE", default_value_os_t = paths::target().join("bench/controller.svg"))]
    plot: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  pageport-lab bench-controller                                       100, 300 and 1000 workers with ten VMs each
  pageport-lab bench-controller --fleet 30/300 --failovers 2          a quick look
  pageport-lab bench-controller --fleet 1000/10000 --again --json | jq .failover_s

Figures depend on the machine and on what else it does: take them while nothing else runs.";

impl ControllerCommand {
    /// Does it.
    ///
    /// # Errors
    /// When there are no figures.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self { fleets, again, clients, failovers, json, figures, plot: picture } = self;
        netns::enter().context("make network namespaces, which the benchmark needs")?;
        let effort = Effort { clients: clients.into(), failovers: failovers.into(), ..Effort::default() };
        let known = if again { Known::Again } else { Known::Keep };
        let folder = figures.parent().unwrap_or(Path::new(".")).to_owned();
        let config = BenchConfig { sizes: fleets, effort, planned: Size::LARGE, known, folder };
        let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
        // Leaving the select drops the run, and with it all that it started; sizes that were measured are kept.
        let report = tokio::select! {
            report = controller_bench::run(&config, &tell) => report?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; the same command goes on from here"),
            _ = hangup.recv() => anyhow::bail!("hung up"),
            _ = terminate.recv() => anyhow::bail!("terminated"),
        };
        let text = serde_json::to_string_pretty(&report)? + "\n";
        for (file, content) in [(&figures, &text), (&picture, &plot::plot(&report))] {
            std::fs::write(file, content).with_context(|| format!("write {}", file.display()))?;
        }
        let files = format!("figures: {}\nplot: {}\n", figures.display(), picture.display());
        let shown = if json { text } else { format!("\n{}{files}", report.table()) };
        std::io::stdout().write_all(shown.as_bytes())?;
        Ok(())
    }
}

/// A closed output ends nothing.
fn tell(text: &str) {
    writeln!(std::io::stderr().lock(), "{text}").ok();
}
