//! Entry point of the lab's tools.

use std::io::Write;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use pageport_lab::baseline::vm::FreePageHints;
use pageport_lab::demo::opponents::Opponents;
use pageport_lab::demo::{self, DemoConfig, End};
use pageport_lab::lab::guest::{DEMO, GuestImages, SMALL};
use pageport_lab::lab::network::{Mode, Network};
use pageport_lab::netns;
use pageport_lab::paths;
use pageport_lab::wan::config::WanConfig;
use pageport_lab::wan::emulator::Emulator;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use controller_command::ControllerCommand;
use faults_command::FaultsCommand;
use replication_command::ReplicationCommand;
use replication_faults_command::ReplicationFaultsCommand;

mod controller_command;
mod faults_command;
mod replication_command;

mod replication_faults_command;

#[derive(Parser)]
#[command(version, about = "Sites on one machine, a WAN between them, real guests")]
struct Args {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run the WAN emulator until it is asked to stop.
    Wan {
        /// JSON configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Build the guests' images, so that tests and the demo find them.
    Guest,
    /// Only QEMU's own ways, as JSON: needs no daemons.
    Baseline {
        /// A guest of 256 MiB instead of 2 GiB.
        #[arg(long)]
        small: bool,
        /// Let them skip what the guest says is free.
        #[arg(long)]
        free_page_hints: bool,
        /// On the loopback, even when there could be namespaces.
        #[arg(long)]
        loopback: bool,
    },
    Faults(FaultsCommand),
    BenchReplication(ReplicationCommand),
    BenchController(ControllerCommand),
    FaultsReplication(ReplicationFaultsCommand),
    /// Move a guest over the WAN and compare with QEMU's own ways.
    Demo {
        /// A guest of 256 MiB instead of 2 GiB.
        #[arg(long)]
        small: bool,
        /// Let QEMU's own ways skip what the guest says is free.
        #[arg(long)]
        free_page_hints: bool,
        /// On the loopback, even when there could be namespaces.
        #[arg(long)]
        loopback: bool,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let Args { command } = Args::parse();
    match command {
        Cmd::Wan { config } => {
            let emulator = Emulator::open(&WanConfig::load(&config)?)?;
            tokio::task::spawn_blocking(|| emulator.run()).await??;
        }
        Cmd::Guest => {
            GuestImages::build(SMALL)?;
            GuestImages::build(DEMO)?;
        }
        Cmd::Baseline { small, free_page_hints, loopback } => {
            let mode = mode(loopback);
            let DemoConfig { variant, link, hints, .. } =
                DemoConfig::from_environment(small, hints(free_page_hints), mode);
            let images = GuestImages::build(variant)?;
            let (folder, disks) = (tempfile::tempdir()?, tempfile::tempdir_in(paths::lab())?);
            let network = match mode {
                Mode::Namespaces => Network::create(folder.path(), link)?,
                Mode::Loopback => Network::on_loopback(folder.path(), link)?,
            };
            let opponents = Opponents { images: &images, variant, accelerator: "tcg".into(), hints };
            let (precopy, zstd) = opponents.run(&network, folder.path(), &disks.path().join("opponent.raw")).await?;
            let figures = serde_json::json!({"qemu_precopy": precopy, "qemu_multifd_zstd": zstd});
            writeln!(std::io::stdout(), "{figures:#}")?;
        }
        Cmd::Faults(command) => return command.run().await,
        Cmd::BenchReplication(command) => return command.run().await,
        Cmd::BenchController(command) => return command.run().await,
        Cmd::FaultsReplication(command) => return command.run().await,
        Cmd::Demo { small, free_page_hints, loopback } => {
            let config = DemoConfig::from_environment(small, hints(free_page_hints), mode(loopback));
            let unattended = config.end == End::AtOnce;
            let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
            // Leaving the select drops the demo, and with it the lab.
            tokio::select! {
                ended = demo::run(config) => return Ok(ended?),
                _ = tokio::signal::ctrl_c() => {}
                _ = hangup.recv() => {}
                _ = terminate.recv() => {}
            }
            anyhow::ensure!(!unattended, "interrupted");
        }
    }
    Ok(())
}

/// Namespaces, as root or in a user namespace of our own; the loopback when that cannot be or is asked for.
fn mode(loopback: bool) -> Mode {
    if loopback {
        return Mode::Loopback;
    }
    match netns::enter() {
        Ok(()) => Mode::Namespaces,
        Err(reason) => {
            tracing::warn!(%reason, "no network namespaces: falling back to the loopback");
            Mode::Loopback
        }
    }
}

fn hints(on: bool) -> FreePageHints {
    if on { FreePageHints::On } else { FreePageHints::Off }
}

/// Who closed standard output does not want to know.
fn print_line(line: &str) {
    writeln!(std::io::stdout().lock(), "{line}").ok();
}
