//! The command's own span, and its trace context on every request: what a command causes is found under one trace.
//!
//! | variable | |
//! |---|---|
//! | `TRACEPARENT` | a W3C trace context that the command's span becomes a child of: a runbook's or a pipeline's |
//! | `OTEL_EXPORTER_OTLP_ENDPOINT` | the collector that the span goes to; without it the context is sent all the same |
//!
//! Telemetry never fails a command: an endpoint that cannot be used is noted, and a collector that does not answer costs at
//! most [`EXPORT_DEADLINE`] at the end.

use std::time::Duration;

use pageport_common::telemetry::{self, TelemetryGuard};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tracing::{Span, info_span};

use crate::error::one_line;
use crate::render::note;

const SERVICE: &str = "pageportctl";
const PARENT: &str = "TRACEPARENT";
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const EXPORT_DEADLINE: Duration = Duration::from_secs(2);

/// A connection whose requests carry the trace context.
pub type Traced = InterceptedService<Channel, Inject>;

/// Puts the present span's context into each request.
#[derive(Debug, Clone, Copy)]
pub struct Inject;

impl Interceptor for Inject {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        telemetry::inject(request.metadata_mut());
        Ok(request)
    }
}

/// The trace of one command.
pub struct Trace {
    guard: Option<TelemetryGuard>,
}

impl Trace {
    /// Starts it. Call once, inside the runtime.
    pub fn begin() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let started = match telemetry::init_tool(SERVICE, variable(ENDPOINT).as_deref()) {
            Err(error) => {
                note(&format!("no spans are sent: {ENDPOINT}: {}", one_line(&error)));
                None
            }
            Ok(guard) => Some(guard),
        };
        Self { guard: started }
    }

    /// The span of the command.
    pub fn span(command: &str) -> Span {
        let span = info_span!("command", command);
        if let Ok(parent) = std::env::var(PARENT) {
            telemetry::adopt_traceparent(&span, &parent);
        }
        span
    }

    /// Sends what there is to send.
    pub async fn end(self) {
        let Some(guard) = self.guard else { return };
        // It blocks, and the exporter needs the runtime meanwhile.
        let sending = tokio::task::spawn_blocking(move || drop(guard));
        // A collector that does not answer is not worth waiting for.
        let _ = tokio::time::timeout(EXPORT_DEADLINE, sending).await;
    }
}
