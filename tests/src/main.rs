//! Entry point of the lab's tools.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use pageport_lab::wan::config::WanConfig;
use pageport_lab::wan::emulator::Emulator;

#[derive(Parser)]
#[command(version, about = "Sites on one machine, a WAN between them, real guests")]
struct Args {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run the WAN emulator until it is ended.
    Wan {
        /// JSON configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match Args::parse().command {
        Cmd::Wan { config } => Ok(Emulator::open(&WanConfig::load(&config)?)?.run()?),
    }
}
