//! `pageport-controller`: entry point. Everything else is the library's.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use pageport_common::telemetry;
use pageport_common::tls::Identity;
use pageport_controller::backup::{Backup, is_blank, restore};
use pageport_controller::config::Config;
use pageport_controller::server::{Listeners, await_restore, run};
use pageport_proto::v1::RestoreResponse;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a controller that would end the same way again (it was removed, or its data is damaged or lost): the unit does not start it
/// again. (`EX_CONFIG` of sysexits.)
const EXIT_FINAL: u8 = 78;

/// The replicated brain of Pageport.
#[derive(Debug, Parser)]
#[command(name = "pageport-controller", version)]
struct Args {
    /// Configuration file (TOML); deploy/config/controller.toml explains each key.
    #[arg(long, default_value = "/etc/pageport/controller.toml")]
    config: PathBuf,
    /// Check the configuration and the certificates, and exit.
    #[arg(long)]
    check_config: bool,
    /// Make the data of the first controller of a new cluster from a file of "pageportctl cluster backup", and exit.
    ///
    /// For the case that the controllers are lost: while one of them runs nothing is lost, and none of them may run again. data_dir must be
    /// empty, and the number (id) one that none of them had. Start this controller then, and add others to it. Every VM is unknown until each worker of
    /// the backup has reported, or was declared dead with "pageportctl worker declare-dead".
    #[arg(long, value_name = "FILE", conflicts_with = "check_config")]
    restore: Option<PathBuf>,
    /// With an empty data_dir: wait until an operator sends a backup ("pageportctl cluster restore FILE --at HOST:PORT"), and go on as the first
    /// controller of a new cluster. As for --restore otherwise. With data: run as ever.
    #[arg(long, conflicts_with_all = ["check_config", "restore"])]
    await_restore: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let config = Config::load(&args.config)?;
    let identity = Identity::load(&config.tls)?;
    if args.check_config {
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(file) = &args.restore {
        let restored = RestoreResponse::from(restore(&config, Backup::read(file)?)?);
        let next = "start this controller, and add others to it with \"pageportctl cluster add\"";
        write!(std::io::stdout(), "{}", restored.in_words(next))?;
        return Ok(ExitCode::SUCCESS);
    }
    let _telemetry = telemetry::init("pageport-controller", &config.id.to_string(), &config.telemetry)?;
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stopping.cancel();
    });
    if args.await_restore && is_blank(&config)? {
        let Listeners { api, web } = Listeners::bind(&config).await?;
        // The page has nothing to show yet.
        drop(web);
        if !await_restore(&config, &identity, api, stop.clone()).await? {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let listeners = Listeners::bind(&config).await?;
    match run(config, &identity, listeners, stop).await {
        Err(error) if error.is_final() => {
            // When standard error is closed nobody reads it.
            let _ = writeln!(std::io::stderr(), "Error: {:?}", anyhow::Error::from(error));
            Ok(ExitCode::from(EXIT_FINAL))
        }
        ended => Ok(ended.map(|()| ExitCode::SUCCESS)?),
    }
}
