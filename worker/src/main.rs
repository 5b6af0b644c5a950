//! `pageport-worker`: the daemon on each hypervisor host.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use pageport_common::{config, telemetry};
use pageport_worker::agent;
use pageport_worker::config::{Config, RawConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The Pageport daemon on a hypervisor host: runs VMs, moves them, keeps replicas of others.
///
/// Guests outlive it: stopping or restarting the worker does not touch them.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; see deploy/config/worker.toml for a commented example.
    #[arg(long, default_value = "/etc/pageport/worker.toml")]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let raw: RawConfig = config::load(&arguments.config)?;
    let config = Config::try_from(raw)?;
    if arguments.check_config {
        pageport_common::tls::Identity::load(&config.tls)?;
        return Ok(());
    }
    let _telemetry = telemetry::init("pageport-worker", config.name.as_str(), &config.telemetry)?;
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("worker stops; guests go on");
        stopping.cancel();
    });
    agent::run(config, stop).await.context("run the worker")
}
