//! What other workers ask of this one: to receive a migration, to keep a replica.

use std::sync::Arc;
use std::time::Duration;

use pageport_ownership::{Guest, Record};
use pageport_proto::VmId;
use pageport_proto::ids::is_name;
use pageport_proto::v1::{DiskFailure, DiskHello, DiskReply, StreamHello, disk_reply, stream_hello};
use tracing::Instrument;

use crate::migration::destination;
use crate::node::Node;
use crate::preflight;
use crate::replica::points::LeaseEnd;
use crate::replica::serve::{InPlace, serve_disk};
use crate::replication;
use crate::replication::serve::SessionDisk;
use crate::transport::probe;
use crate::transport::{MessageReader, MessageWriter, PROTOCOL_VERSION, PeerConnection};

/// A stream that says nothing for this long after it was opened is closed.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Why a disk stream is refused.
#[derive(Debug, thiserror::Error)]
enum RefusedDisk {
    #[error("the request names no vm")]
    Vm,
    #[error("{name:?} is not a disk name")]
    Name { name: String },
    #[error("this site runs vm {vm} itself: its disks are no replicas")]
    Owned { vm: VmId },
    #[error(transparent)]
    Replica(#[from] crate::replica::store::ReplicaError),
    #[error("the replication session of the disk stream is not known: it has ended")]
    NoSession,
    #[error(transparent)]
    Points(#[from] crate::replica::groups::GroupsError),
    #[error(transparent)]
    Known(#[from] crate::vms::VmError),
}

/// Serves peers for ever.
pub async fn run(node: Arc<Node>) {
    while let Some(connection) = node.endpoint.accept().await {
        tokio::spawn(serve(node.clone(), connection));
    }
}

async fn serve(node: Arc<Node>, connection: PeerConnection) {
    // The connection's end is how a peer says that it is done.
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (node, connection) = (node.clone(), connection.clone());
        tokio::spawn(async move {
            let (mut reader, writer) = (MessageReader::new(recv), MessageWriter::new(send));
            let hello: StreamHello = match reader.receive_within(HELLO_LIMIT).await {
                Ok(hello) => hello,
                Err(error) => {
                    tracing::warn!(error = %crate::error::with_causes(&error), "a peer's stream has no beginning");
                    return;
                }
            };
            if hello.protocol_version != PROTOCOL_VERSION {
                tracing::warn!(
                    theirs = hello.protocol_version,
                    ours = PROTOCOL_VERSION,
                    "peer speaks another protocol"
                );
                connection.close("protocol version not supported");
                return;
            }
            match hello.kind {
                Some(stream_hello::Kind::Migration(migration)) => {
                    destination::serve(node, connection, migration, &hello.traceparent, reader, writer).await;
                }
                Some(stream_hello::Kind::Disk(disk)) => {
                    let span = tracing::info_span!("replica", vm_id = %disk.vm_id, disk = %disk.disk);
                    pageport_common::telemetry::adopt_traceparent(&span, &hello.traceparent);
                    keep_replica(node, disk, reader, writer).instrument(span).await;
                }
                Some(stream_hello::Kind::Replication(replication)) => {
                    let span = tracing::info_span!("replication", vm_id = %replication.vm_id, role = "destination");
                    pageport_common::telemetry::adopt_traceparent(&span, &hello.traceparent);
                    replication::serve::serve(node, replication, reader, writer).instrument(span).await;
                }
                Some(stream_hello::Kind::Probe(_)) => {
                    if let Err(error) = probe::answer(reader, writer).await {
                        tracing::info!(error = %crate::error::with_causes(&error), "a probe of the path broke off");
                    }
                }
                Some(stream_hello::Kind::Preflight(asked)) => {
                    if let Err(error) = preflight::answer::answer(&node, asked, writer).await {
                        tracing::warn!(error = %crate::error::with_causes(&error), "a preflight is not answered");
                        connection.close("preflight not answered");
                    }
                }
                _ => connection.close("unexpected stream"),
            }
        });
    }
}

async fn keep_replica(node: Arc<Node>, hello: DiskHello, mut reader: MessageReader, mut writer: MessageWriter) {
    let target =
        if hello.session == 0 { open(&node, &hello).await.map(Target::InPlace) } else { in_session(&node, &hello) };
    let served = match target {
        Ok(Target::InPlace(replica)) => serve_disk(&hello, Arc::new(replica), &mut reader, &mut writer).await,
        Ok(Target::Session(disk)) => serve_disk(&hello, Arc::new(disk), &mut reader, &mut writer).await,
        Err(refused) => {
            let reason = crate::error::with_causes(&refused);
            tracing::warn!(reason, "disk stream refused");
            let failure = DiskReply { kind: Some(disk_reply::Kind::Failure(DiskFailure { reason, not_held: false })) };
            writer.send(&failure).await.map_err(Into::into)
        }
    };
    if let Err(error) = served {
        tracing::warn!(error = %crate::error::with_causes(&error), "disk stream ended early");
    }
    node.changed.notify_one();
}

/// Where a disk's stream goes.
enum Target {
    InPlace(InPlace),
    Session(SessionDisk),
}

fn in_session(node: &Node, hello: &DiskHello) -> Result<Target, RefusedDisk> {
    let vm: VmId = hello.vm_id.parse().map_err(|_| RefusedDisk::Vm)?;
    node.sessions.disk(vm, hello).map(Target::Session).ok_or(RefusedDisk::NoSession)
}

async fn open(node: &Node, hello: &DiskHello) -> Result<InPlace, RefusedDisk> {
    let vm: VmId = hello.vm_id.parse().map_err(|_| RefusedDisk::Vm)?;
    if !is_name(&hello.disk) {
        return Err(RefusedDisk::Name { name: hello.disk.clone() });
    }
    let known = node.vms.get_or_create(vm)?;
    let ours = |record: Record, guest| record.owned().is_some() || matches!(guest, Guest::Running | Guest::Paused);
    let (record, guest) = known.decided().await;
    if ours(record, guest) {
        return Err(RefusedDisk::Owned { vm });
    }
    let disk = tokio::task::block_in_place(|| -> Result<_, RefusedDisk> {
        node.replicas.must_be_flat(vm)?;
        // Written in place it is at none of its recovery points any more.
        node.groups.forget(vm, &LeaseEnd::Seeded)?;
        node.replicas.make_room(vm, &[(&hello.disk, hello.allocated_bytes)])?;
        let opened = node.replicas.open_for_writing(vm, &hello.disk, hello.size_bytes, hello.allocated_bytes);
        node.replicas.expect_only_what_is_made(vm)?;
        Ok(opened?)
    })?;
    // Once more, now that the disk is open: had the VM been given to this worker meanwhile, nobody else would close it.
    let (record, guest) = known.decided().await;
    if ours(record, guest) {
        node.replicas.close(vm);
        return Err(RefusedDisk::Owned { vm });
    }
    Ok(InPlace(disk))
}
