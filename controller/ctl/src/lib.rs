//! `pageportctl`: the command line for operators and runbooks.
//!
//! ```text
//!  flags > environment > config file ─▶ settings ─▶ client (any controller that answers) ─▶ commands ─▶ render
//!                                                        └─ one request id per command, kept over retries
//! ```
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done; under `--watch`: the migration, the seed or the first copy completed; a watched status was interrupted |
//! | 1 | refused, failed or not reachable; one line `error: ...` on standard error |
//! | 2 | the command line itself is wrong |
//! | 130 | interrupted; what was ordered goes on |
//!
//! Results go to standard output, progress and notes to standard error (with `--json`: JSON lines on standard output
//! and nothing but notes and errors beside them). Holds no state and decides nothing: the controllers do.

pub mod cli;
pub mod client;
pub mod commands;
pub mod config;
pub mod console;
pub mod error;
pub mod host;
pub mod place;
pub mod quantity;
pub mod reason;
pub mod render;
pub mod size;
pub mod terminal;
pub mod terms;
pub mod trace;
pub mod vmfile;
pub mod watch;

use std::process::ExitCode;

use clap::Parser;
use tracing::Instrument;

use crate::cli::{Cli, ClusterCommand, Command};
use crate::error::CtlError;
use crate::render::Output;
use crate::trace::Trace;

const INTERRUPTED: u8 = 130;

/// Parses the command line, runs the command and says how the process ends.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return exit(Err(CtlError::Runtime { source })),
    };
    let result = runtime.block_on(async {
        let trace = Trace::begin();
        let span = Trace::span(cli.command.name());
        let result = run(cli).instrument(span).await;
        trace.end().await;
        result
    });
    // Whatever still blocks (reading a terminal, sending spans) must not keep us.
    runtime.shutdown_background();
    exit(result)
}

async fn run(mut cli: Cli) -> Result<(), CtlError> {
    let output = Output::new(cli.json);
    match &cli.command {
        // There are no controllers to ask.
        Command::Cluster(ClusterCommand::Restore { file, at: None, controller_config }) => {
            return commands::restore::here(output, file, controller_config).await;
        }
        Command::Cluster(ClusterCommand::Restore { at: Some(address), .. }) => {
            cli.connection.controllers = vec![address.clone()];
        }
        _ => {}
    }
    let settings = config::Settings::resolve(&cli.connection)?;
    let controllers = client::Controllers::new(&settings)?;
    commands::run(cli.command, controllers, output).await
}

fn exit(result: Result<(), CtlError>) -> ExitCode {
    match result {
        // Whoever read our output has left (`| head`): not worth a word.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::SUCCESS,
        Err(CtlError::Interrupted { hint }) => {
            render::note(&hint);
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            render::note(&format!("error: {}", error::one_line(&error)));
            ExitCode::FAILURE
        }
    }
}
