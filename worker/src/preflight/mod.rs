//! Preflight: what would hinder a move, found before any byte of it moves.
//!
//! ```text
//!   question of the controllers ─┐                           destination
//!   connect phase of a move ─────┴─▶ look ── PreflightHello ─▶ answer: its host, what it would refuse, the way back
//!                                     │ ◀── PreflightReply ───
//!                                     └─▶ judge (pure) ─▶ findings, each with its fix
//! ```
//! Who asks gets the findings; a move goes on only if none blocks, and its record keeps the warnings. What cannot be looked at, as when the peer is
//! older than preflights, is a warning: nothing that works is held up by a look at it. Everything has a deadline.

pub mod answer;
pub mod facts;
pub mod judge;

use std::sync::Arc;
use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::v1::{
    Check, Finding, HostWanted, PreflightAssignment, PreflightHello, PreflightReply, PreflightReport, Severity,
    StreamHello, VmSpec, stream_hello,
};

use crate::clock::unix_ms_now;
use crate::hypervisor::command_line::DEFAULT_MACHINE;
use crate::node::Node;
use crate::replica::copy::{CopyError, images};
use crate::transport::{
    MessageError, MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection, TransportError, priority,
};
use facts::{Destination, FactsError, Host};
use judge::{Facts, judge};

/// The destination tries the way back, and looks at its host.
const ANSWER_LIMIT: Duration = Duration::from_secs(8);

/// A move that is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// The VM, which runs here.
    pub vm: VmId,
    /// What it is.
    pub spec: &'a VmSpec,
    /// The destination.
    pub peer_worker: &'a str,
    /// Where it is reached.
    pub peer_address: &'a str,
}

/// Why the destination did not say what it is.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error(transparent)]
    Disk(#[from] CopyError),
}

/// Looks at both ends of a move.
pub async fn look(node: &Node, way: Way<'_>) -> Vec<Finding> {
    let findings = match node.endpoint.connect(way.peer_worker, way.peer_address).await {
        Ok(connection) => {
            let findings = with(node, way, &connection).await;
            connection.close("the preflight is over");
            findings
        }
        Err(error) => vec![no_link(&error), own_certificate(node)],
    };
    for finding in findings.iter().filter(|finding| finding.severity() != Severity::Ok) {
        let Finding { seen, fix, .. } = finding;
        tracing::warn!(vm_id = %way.vm, peer = way.peer_worker, check = ?finding.check(), seen, fix, "preflight");
    }
    findings
}

/// Those that keep a move from being made, as one sentence.
pub fn hindrance(findings: &[Finding]) -> Option<String> {
    let blocking = findings.iter().filter(|finding| finding.severity() == Severity::Blocks);
    let sentences: Vec<_> = blocking.map(|Finding { seen, fix, .. }| format!("{seen}: {fix}")).collect();
    (!sentences.is_empty()).then(|| sentences.join("; "))
}

/// Those that a move is made in spite of.
pub fn warnings(findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().filter(|finding| finding.severity() == Severity::Warning).collect()
}

/// Answers a question of the controllers.
pub async fn report(node: Arc<Node>, order: PreflightAssignment, spec: Option<VmSpec>) {
    let PreflightAssignment { seq, vm_id, peer_worker, peer_address } = order;
    let findings = match (vm_id.parse(), spec) {
        (Ok(vm), Some(spec)) => {
            let way = Way { vm, spec: &spec, peer_worker: &peer_worker, peer_address: &peer_address };
            look(&node, way).await
        }
        _ => vec![Finding::refused(Check::Workers, "the worker does not know the vm, which has moved: ask again")],
    };
    node.preflights.answer(seq, PreflightReport { seq, findings });
}

async fn with(node: &Node, way: Way<'_>, connection: &PeerConnection) -> Vec<Finding> {
    let Way { spec, peer_worker: to, .. } = way;
    let wanted = HostWanted { machine: machine(spec).to_owned(), cpu: spec.cpu.clone() };
    let asked_unix_ms = unix_ms_now();
    let (source, destination) = tokio::join!(facts::of(node, &wanted), ask(node, way, wanted.clone(), connection));
    let answered_unix_ms = unix_ms_now();
    let spec = VmSpec { machine: wanted.machine, ..spec.clone() };
    let source = Host::try_from(source).map_err(LookError::from);
    match source.and_then(|source| Ok((source, destination?))) {
        Ok((source, destination)) => {
            let certificate_ends = connection.peer_certificate_ends().or(destination.host.certificate_ends);
            let host = Host { certificate_ends, ..destination.host };
            judge(&Facts {
                spec: &spec,
                from: node.config.name.as_str(),
                to,
                source: &source,
                destination: &Destination { host, ..destination },
                asked_unix_ms,
                answered_unix_ms,
                round_trip: connection.round_trip(),
            })
        }
        Err(error) => vec![own_certificate(node), no_answer(to, &error)],
    }
}

async fn ask(
    node: &Node,
    way: Way<'_>,
    wanted: HostWanted,
    connection: &PeerConnection,
) -> Result<Destination, LookError> {
    let bridges = way.spec.nics.iter().map(|nic| nic.bridge.clone()).collect();
    let hello = PreflightHello {
        vm_id: way.vm.to_string(),
        source_worker: node.config.name.to_string(),
        source_address: node.config.advertised.peer.to_string(),
        wanted: Some(wanted),
        bridges,
        disks: images(node, way.vm, way.spec)?,
        memory_bytes: way.spec.memory_bytes,
    };
    Ok(exchange(connection, hello).await?.try_into()?)
}

/// A peer that is older than preflights closes the connection.
async fn exchange(connection: &PeerConnection, hello: PreflightHello) -> Result<PreflightReply, LookError> {
    let (send, recv) = connection.open_bi(priority::CONTROL).await?;
    let kind = Some(stream_hello::Kind::Preflight(hello));
    let hello = StreamHello { protocol_version: PROTOCOL_VERSION, traceparent: String::new(), kind };
    MessageWriter::new(send).send(&hello).await?;
    Ok(MessageReader::new(recv).receive_within(ANSWER_LIMIT).await?)
}

fn machine(spec: &VmSpec) -> &str {
    if spec.machine.is_empty() { DEFAULT_MACHINE } else { &spec.machine }
}

fn no_link(error: &TransportError) -> Finding {
    Finding::blocks(
        Check::Link,
        crate::error::with_causes(error),
        "let UDP through to the destination's advertised.peer, see that pageport-worker runs there, and that both certificates are of one authority and good",
    )
}

fn no_answer(to: &str, error: &LookError) -> Finding {
    let why = format!("{to} does not say what it is: {}", crate::error::with_causes(error));
    let fix = format!("if pageport-worker on {to} is of an older version, upgrade it; else look at its log");
    Finding::unchecked(Check::Workers, why, fix)
}

fn own_certificate(node: &Node) -> Finding {
    judge::certificates(&[(node.config.name.as_str(), node.endpoint.certificate_ends())], unix_ms_now() / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::ConnectedPair;

    #[tokio::test]
    async fn a_peer_that_is_older_is_a_warning_and_is_not_waited_for() {
        let pair = ConnectedPair::new().await;
        let far = pair.destination.clone();
        let older = tokio::spawn(async move {
            let (_send, recv) = far.accept_bi().await.unwrap();
            let hello: StreamHello = MessageReader::new(recv).receive().await.unwrap();
            assert!(matches!(hello.kind, Some(stream_hello::Kind::Preflight(_))), "{hello:?}");
            // As one does that knows no such kind.
            far.close("unexpected stream");
        });
        let error = exchange(&pair.source, PreflightHello::default()).await.unwrap_err();
        assert!(!matches!(error, LookError::Message(MessageError::Silent { .. })), "{error:?}");
        let finding = no_answer("worker-b", &error);
        assert_eq!(finding.severity(), Severity::Warning, "{finding:?}");
        assert!(
            finding.seen.starts_with("not checked: worker-b") && finding.seen.contains("unexpected stream"),
            "{finding:?}"
        );
        older.await.unwrap();
    }

    #[test]
    fn what_blocks_is_told_with_its_fix_and_what_warns_is_kept() {
        let findings = vec![
            Finding::ok(Check::Link, "up"),
            Finding::blocks(Check::Memory, "full", "make room"),
            Finding::warns(Check::Clocks, "apart", "run NTP"),
            Finding::blocks(Check::Bridges, "no br0", "make it"),
        ];
        assert_eq!(hindrance(&findings).as_deref(), Some("full: make room; no br0: make it"));
        let kept = warnings(findings);
        assert_eq!(hindrance(&kept), None);
        assert_eq!(kept.iter().map(Finding::check).collect::<Vec<_>>(), [Check::Clocks]);
    }
}
