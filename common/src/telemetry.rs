//! Logs and traces.
//!
//! Every daemon calls [`init`] once, a tool [`init_tool`], and keeps the [`TelemetryGuard`] until it ends. Logs go to standard error; spans go
//! to an OTLP collector when an endpoint is configured. One trace follows a migration across controller and workers:
//! its W3C trace context travels in gRPC metadata, in worker assignments and in the first message of each QUIC stream.
//!
//! ```text
//! pageportctl ──metadata──▶ controller ──assignment.traceparent──▶ source ──StreamHello.traceparent──▶ destination
//! ```

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::Deserialize;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

const TRACEPARENT: &str = "traceparent";
/// Crates whose own spans would trace the tracing.
const SELF_TRACING: [&str; 5] = ["h2", "hyper", "opentelemetry", "tonic", "tower"];

/// `[telemetry]` of every daemon.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// gRPC address of an OTLP collector, such as `http://127.0.0.1:4317`; absent: no export.
    pub otlp_endpoint: Option<String>,
    /// Filter as in `RUST_LOG`, which wins when set.
    pub log: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp_endpoint: None, log: "info".to_owned() }
    }
}

/// Why telemetry did not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `telemetry.log` is no filter.
    #[error("configuration key `telemetry.log`: {filter:?} is not a log filter; try \"info\"")]
    Filter {
        /// What was given.
        filter: String,
        /// Why.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The exporter could not be built.
    #[error("configuration key `telemetry.otlp_endpoint`: {endpoint:?} cannot be used")]
    Exporter {
        /// What was given.
        endpoint: String,
        /// Why.
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
}

/// Flushes what has not been exported when dropped.
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "spans not yet exported are lost");
        }
    }
}

/// Installs the log writer and, if configured, the exporter. Call once, inside the tokio runtime.
///
/// # Errors
/// An unusable filter or endpoint.
pub fn init(service: &'static str, node: &str, config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let text = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log.clone());
    let filter = EnvFilter::try_new(&text).map_err(|source| TelemetryError::Filter { filter: text, source })?;
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(true).with_ansi(false);
    let provider = config.otlp_endpoint.as_deref().map(|endpoint| exporter(service, node, endpoint)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_filter(filter_fn(|meta| !SELF_TRACING.iter().any(|name| meta.target().starts_with(name))))
    });
    tracing_subscriber::registry().with(logs.with_filter(filter)).with(spans).init();
    Ok(TelemetryGuard { provider })
}

/// For a tool that lives as long as one command: no logs, and a trace context of its own even where nothing is exported, so
/// that what it orders can be found by it. Call once, inside the tokio runtime.
///
/// # Errors
/// An unusable endpoint.
pub fn init_tool(service: &'static str, otlp_endpoint: Option<&str>) -> Result<TelemetryGuard, TelemetryError> {
    let provider = match otlp_endpoint {
        Some(endpoint) => exporter(service, "", endpoint)?,
        None => SdkTracerProvider::builder().build(),
    };
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_filter(filter_fn(|meta| !SELF_TRACING.iter().any(|name| meta.target().starts_with(name))));
    tracing_subscriber::registry().with(spans).init();
    Ok(TelemetryGuard { provider: Some(provider) })
}

fn exporter(service: &'static str, node: &str, endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.to_owned(), source })?;
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attribute(opentelemetry::KeyValue::new("service.instance.id", node.to_owned()))
        .build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// The W3C `traceparent` of a span; empty when tracing is off.
pub fn traceparent_of(span: &Span) -> String {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT).unwrap_or_default()
}

/// Makes `span` a child of the trace context that came with a message. An empty or malformed one is ignored: telemetry
/// never fails the work.
pub fn adopt_traceparent(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    if span.set_parent(TraceContextPropagator::new().extract(&carrier)).is_err() {
        tracing::debug!(traceparent, "trace context not adopted");
    }
}

/// Puts the current span's trace context into gRPC metadata, if there is one.
pub fn inject(metadata: &mut MetadataMap) {
    let traceparent = traceparent_of(&Span::current());
    if let (false, Ok(value)) = (traceparent.is_empty(), traceparent.parse()) {
        metadata.insert(TRACEPARENT, value);
    }
}

/// The trace context that came in gRPC metadata; empty when there is none.
pub fn extract(metadata: &MetadataMap) -> String {
    metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}
