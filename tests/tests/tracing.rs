//! One trace follows a migration from the command line across the controller and both workers, and arrives at an OTLP collector.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use support::{PATIENCE, Story, VM, wait_for};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Site a's host; b and c reach it over the WAN.
const COLLECTOR: &str = "10.77.1.1:4317";

/// Names of spans by who sent them, for each trace.
type Traces = BTreeMap<Vec<u8>, BTreeSet<(String, String)>>;

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Traces>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut traces = self.0.lock().unwrap();
        for sent in request.into_inner().resource_spans {
            let attributes = sent.resource.unwrap_or_default().attributes;
            let text = |key: &str| {
                let found = attributes.iter().find(|attribute| attribute.key == key)?;
                match found.value.clone()?.value? {
                    Value::StringValue(text) => Some(text),
                    _ => None,
                }
            };
            let who = format!("{} {}", text("service.name").unwrap(), text("service.instance.id").unwrap());
            for span in sent.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                traces.entry(span.trace_id).or_default().insert((who.clone(), span.name));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_follows_a_migration_from_the_command_across_controller_and_both_workers() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let config = LabConfig { otlp_endpoint: Some(format!("http://{COLLECTOR}")), ..LabConfig::default() };
    let story = Story::begin(config, 200_000_000).await;
    let namespace = story.lab.network().namespace("a").to_owned();
    let listener = netns::within(&namespace, || std::net::TcpListener::bind(COLLECTOR)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
    let collector = Collector::default();
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
    let serving = tokio::spawn(server.serve_with_incoming(incoming));

    let mut command = story.lab.ctl_command("a");
    command
        .args(["migrate", VM, "--to", "b", "--watch"])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{COLLECTOR}"));
    let output = tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{output:?}");
    wait_for("one trace with spans of all four", || async {
        let traces = collector.0.lock().unwrap().clone();
        let has = |trace: &BTreeSet<(String, String)>, who: &str, name: &str| {
            trace.iter().any(|(sender, span)| sender.starts_with(who) && span == name)
        };
        let whole = traces.values().find(|trace| {
            has(trace, "pageportctl", "command")
                && has(trace, "pageport-controller", "create_migration")
                && ["worker-a", "worker-b"].iter().all(|worker| {
                    let who = format!("pageport-worker {worker}");
                    has(trace, &who, "migration") && has(trace, &who, "phase")
                })
        });
        whole.map(|_| ()).ok_or_else(|| format!("{:?}", traces.values().collect::<Vec<_>>()))
    })
    .await;
    serving.abort();
}
