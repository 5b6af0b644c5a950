//! `pageport-lab bench-replication`: measures standing replication next to QEMU's own ways.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use pageport_lab::lab::LabConfig;
use pageport_lab::replication_bench::{self, BenchConfig};
use pageport_lab::wan::link::Shape;
use pageport_lab::{netns, paths};
use tokio::signal::unix::{SignalKind, signal};

/// Measure replication next to qemu-img convert and QEMU's own mirror and backup.
///
/// A guest runs from a disk that holds a part of this machine's /usr. Its disk is copied whole to another site, then what the
/// guest has changed, then it writes all the time: by Pageport, by QEMU's mirror and by QEMU's backup with a bitmap, each to an
/// NBD export where it is QEMU's, and twice whole by qemu-img convert. Time, bytes on the link and processor time are measured,
/// and every replica is compared with its disk. Takes some minutes; needs network namespaces.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ReplicationCommand {
    /// Size of the disk, in bytes; three tenths of it are files.
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 30,
          value_parser = clap::value_parser!(u64).range(BenchConfig::LEAST_DISK_BYTES..))]
    disk_bytes: u64,
    /// Rate of the link, in bits per second, each way; its delay is 25 ms.
    #[arg(long, value_name = "BPS", default_value_t = 200_000_000, value_parser = clap::value_parser!(u64).range(1_000_000..))]
    rate: u64,
    /// Print the figures as JSON instead of a table; what happens is told on standard error.
    #[arg(long)]
    json: bool,
    /// Where the figures are written as JSON in any case.
    #[arg(long, value_name = "FILE", default_value_os_t = paths::target().join("bench/replication.json"))]
    figures: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  pageport-lab bench-replication                            a disk of 2 GiB over 200 Mbit/s
  pageport-lab bench-replication --rate 1000000000          a fast link: what limits then?
  pageport-lab bench-replication --disk-bytes 1073741824 --json | jq .ratios

A ratio is the opponent's figure divided by Pageport's: above 1 Pageport is the better. Ratios within one run count; absolute
times depend on the machine and on what else it does.";

impl ReplicationCommand {
    /// Does it.
    ///
    /// # Errors
    /// When there are no figures, or a replica was not the disk.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self { disk_bytes, rate, json, figures } = self;
        netns::enter().context("make network namespaces, which the benchmark needs")?;
        let link = Shape { rate_bps: rate, queue_bytes: None, ..LabConfig::default().link };
        let tell = move |text: &str| tell(text, json);
        let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
        // Leaving the select drops the run, and with it all that it started.
        let report = tokio::select! {
            report = replication_bench::run(BenchConfig { disk_bytes, link }, &tell) => report?,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            _ = hangup.recv() => anyhow::bail!("hung up"),
            _ = terminate.recv() => anyhow::bail!("terminated"),
        };
        let text = serde_json::to_string_pretty(&report)? + "\n";
        let folder = figures.parent().unwrap_or(&figures);
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        std::fs::write(&figures, &text).with_context(|| format!("write {}", figures.display()))?;
        let shown = if json { text } else { format!("\n{}figures: {}\n", report.table(), figures.display()) };
        std::io::stdout().write_all(shown.as_bytes())?;
        anyhow::ensure!(report.all_equal(), "a replica was not the disk: see replica_equal in {}", figures.display());
        Ok(())
    }
}

/// A closed output ends nothing.
fn tell(text: &str, json: bool) {
    if json {
        writeln!(std::io::stderr().lock(), "{text}").ok();
    } else {
        writeln!(std::io::stdout().lock(), "{text}").ok();
    }
}
