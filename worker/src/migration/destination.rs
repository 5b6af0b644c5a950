//! The destination of a move: its phases in order.
//!
//! | phase | does | on failure |
//! |---|---|---|
//! | `admit` | asks the controllers, starts a hypervisor that waits | abort with the reason |
//! | `receive` | rebuilds the stream into the hypervisor | ends the hypervisor, abort |
//! | `load` | compares digests, brings the replica to stable storage, vouches: `Ready` | ends the hypervisor, abort |
//! | `resume` | on release: durable `Own`, then runs | never drops the image on its own |
//!
//! Once it has vouched, only the source's `Abort` (sent after its durable revocation) or the controllers end the image.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_common::telemetry;
use pageport_ownership::{Epoch, Event, Guest, Nonce, Record};
use pageport_proto::VmId;
use pageport_proto::v1::{
    Abort, Accepted, AskAuthorisationRequest, ClockReply, MigrationHello, Ready, Refused, ReplicationDisk, Resumed,
    StreamEnd, StreamHello, ToDestination, ToSource, VmSpec, stream_hello, to_destination, to_source,
};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::incoming::{Held, Incoming, IncomingError, Written};
use crate::agent::controllers::ControllerError;
use crate::clock::{at_ns, now_ns};
use crate::failpoint;
use crate::hypervisor::accel::refuse_live_move;
use crate::hypervisor::{HypervisorError, MigrationStatus, Vm};
use crate::memory::KeptPages;
use crate::memory::arrived::Arrived;
use crate::node::Node;
use crate::replica::points::MAX_DISK_BYTES;
use crate::replica::store::{ReplicaDisk, ReplicaError};
use crate::replication::mark::{Mark, lineage_of};
use crate::transport::{MessageError, MessageReader, MessageWriter, PeerConnection, TransportError};
use crate::vms::{ManagedVm, VmError};

/// The source opens its streams right after its hypervisor has begun; its disks come first.
const STREAMS_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// From the last byte written until the hypervisor has taken it all.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// How long the controllers may have no leader before a move is refused: an election takes seconds.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Between two rounds of questions.
const ASK_PAUSE: Duration = Duration::from_millis(500);
/// Words of the source that wait for their phase; it sends a handful.
const CONTROL_QUEUE: usize = 16;
const RESUME_LIMIT: Duration = Duration::from_secs(10);
/// The guest stands still meanwhile, unless the lease is there already, as it should be.
const LEASE_LIMIT: Duration = Duration::from_secs(5);
/// Memory that a host keeps for itself, in bytes.
const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// Why this side gave up, or refused to begin.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The hello makes no sense.
    #[error("the source's request makes no sense: {what}")]
    Request {
        /// What does not.
        what: &'static str,
    },
    /// The controllers were not heard.
    #[error("ask the controllers whether this move may come here")]
    Controllers(#[from] ControllerError),
    /// The controllers said no.
    #[error("the controllers do not authorise this move: {reason}")]
    NotAuthorised {
        /// Their words.
        reason: String,
    },
    /// This host's record forbids it.
    #[error("the vm's ownership record here does not permit this move: {record:?}")]
    NotPermitted {
        /// The record.
        record: Record,
    },
    /// This host's hypervisor must not receive.
    #[error("{reason}")]
    Hypervisor {
        /// Why.
        reason: String,
    },
    /// Too little memory.
    #[error(
        "no memory for a guest of {needed_bytes} bytes, since only {available_bytes} bytes are available on the destination's host: stop or move \
         something there, or choose another worker"
    )]
    NoMemory {
        /// The guest's.
        needed_bytes: u64,
        /// The host's.
        available_bytes: u64,
    },
    /// The host's memory cannot be looked at.
    #[error("look at this host's memory")]
    Memory(#[source] std::io::Error),
    /// The disks.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The hypervisor.
    #[error("drive the hypervisor")]
    Qemu(#[from] HypervisorError),
    /// The hypervisor's socket.
    #[error("connect to the hypervisor")]
    Socket(#[source] std::io::Error),
    /// The streams.
    #[error("accept the source's streams")]
    Streams(#[from] TransportError),
    /// The control stream.
    #[error("talk to the source")]
    Control(#[from] MessageError),
    /// The memory.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// Something else was rebuilt than was sent.
    #[error("the stream that was rebuilt is not the one that was sent")]
    DigestMismatch,
    /// The source gave up.
    #[error("the source gave up: {reason}")]
    SourceAborted {
        /// Its words.
        reason: String,
    },
    /// The connection ended before the image was complete.
    #[error("the connection to the source ended before the image was complete")]
    Lost,
    /// A replica could not be brought to stable storage.
    #[error("bring the replica {disk} to stable storage")]
    Sync {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A replica could not be made as large as its disk.
    #[error("make the replica {disk} as large as the disk")]
    Grow {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not in time.
    #[error("{what} took longer than {} s", limit.as_secs())]
    TooLong {
        /// What.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
}

/// Serves one migration, from its hello to its end.
pub async fn serve(
    node: Arc<Node>,
    connection: PeerConnection,
    hello: MigrationHello,
    traceparent: &str,
    reader: MessageReader,
    writer: MessageWriter,
) {
    let span = tracing::info_span!(
        "migration",
        migration_id = %hello.migration_id,
        vm_id = %hello.vm_id,
        epoch = hello.epoch,
        role = "destination"
    );
    telemetry::adopt_traceparent(&span, traceparent);
    async {
        let (answers, queue) = mpsc::unbounded_channel();
        let writing = AbortOnDropHandle::new(tokio::spawn(write_answers(writer, queue)));
        let (words, control) = mpsc::channel(CONTROL_QUEUE);
        let reading = tokio::spawn(read_control(reader, answers.clone(), words));
        let mut arrival = Arrival {
            node,
            connection: connection.clone(),
            control,
            answers,
            _reading: AbortOnDropHandle::new(reading),
        };
        match arrival.run(&hello).await {
            Ok(()) => tracing::info!("migration ended at its destination"),
            Err(error) => {
                let reason = crate::error::with_causes(&error);
                tracing::warn!(reason, "migration not taken");
                arrival.say(to_source::Kind::Abort(Abort { reason }));
            }
        }
        drop(arrival);
        // The source closes the connection when it has heard the last word.
        let _ = writing.await;
        let closing = tokio::time::timeout(RESUME_LIMIT, connection.closed()).await;
        if closing.is_err() {
            connection.close("migration ended");
        }
    }
    .instrument(span)
    .await;
}

async fn write_answers(mut writer: MessageWriter, mut queue: mpsc::UnboundedReceiver<to_source::Kind>) {
    while let Some(kind) = queue.recv().await {
        if writer.send(&ToSource { kind: Some(kind) }).await.is_err() {
            return;
        }
    }
}

/// Answers clock probes at once; everything else waits in order for its phase.
async fn read_control(
    mut reader: MessageReader,
    answers: mpsc::UnboundedSender<to_source::Kind>,
    words: mpsc::Sender<Result<to_destination::Kind, MessageError>>,
) {
    loop {
        let message = reader.receive::<ToDestination>().await;
        let word = match message.and_then(|message| message.kind.ok_or(MessageError::Empty)) {
            Ok(to_destination::Kind::ClockProbe(probe)) => {
                let reply = ClockReply { source_ns: probe.source_ns, destination_ns: now_ns() };
                if answers.send(to_source::Kind::ClockReply(reply)).is_err() {
                    return;
                }
                continue;
            }
            other => other,
        };
        let ended = word.is_err();
        if words.send(word).await.is_err() || ended {
            return;
        }
    }
}

struct Arrival {
    node: Arc<Node>,
    connection: PeerConnection,
    control: mpsc::Receiver<Result<to_destination::Kind, MessageError>>,
    answers: mpsc::UnboundedSender<to_source::Kind>,
    _reading: AbortOnDropHandle<()>,
}

/// A move that was admitted.
struct Admitted {
    vm: Arc<ManagedVm>,
    epoch: Epoch,
    qemu: Vm,
    names: Vec<String>,
    disks: Vec<Arc<ReplicaDisk>>,
}

impl Admitted {
    /// From its first instruction here on it is noted what the guest writes: the source keeps the disks as they are now, and
    /// replication back to it begins with that.
    async fn mark_the_way_back(&self, hello: &MigrationHello) {
        let Ok(migration) = hello.migration_id.parse() else { return };
        let mark = Mark { worker: hello.source_worker.clone(), lineage: lineage_of(migration), point: 1 };
        if let Err(error) = self.qemu.add_bitmap(&self.names, &mark.to_string()).await {
            // Replication compares the disks then.
            tracing::warn!(error = %crate::error::with_causes(&error), "the way back is not marked");
        }
    }
}

impl Arrival {
    async fn run(&mut self, hello: &MigrationHello) -> Result<(), DestinationError> {
        let admitted = self.phase("admit", async |this| this.admit(hello).await).await?;
        let held = self.held(&admitted, hello);
        let kept_pages = held.kept.as_ref().map_or(0, KeptPages::count);
        self.say(to_source::Kind::Accepted(Accepted { kept_pages }));
        let loaded = async {
            let (end, arrived) = self.phase("receive", async |this| this.receive(&admitted, hello, held).await).await?;
            self.phase("load", async |this| this.load(&admitted, hello, &end).await).await?;
            Ok::<_, DestinationError>(arrived)
        };
        let arrived = match loaded.await {
            Ok(arrived) => arrived,
            Err(error) => {
                admitted.vm.drop_image(&admitted.qemu).await?;
                return Err(error);
            }
        };
        self.phase("resume", async |this| this.resume(&admitted).await).await?;
        self.node.memory.came(admitted.vm.id(), arrived);
        Ok(())
    }

    async fn phase<T>(
        &mut self,
        name: &'static str,
        body: impl AsyncFnOnce(&mut Self) -> Result<T, DestinationError>,
    ) -> Result<T, DestinationError> {
        let began = Instant::now();
        failpoint::reach("destination", name).await;
        let outcome = body(self).instrument(tracing::info_span!("phase", phase = name)).await;
        tracing::info!(
            phase = name,
            duration_ms = began.elapsed().as_millis() as u64,
            ok = outcome.is_ok(),
            "phase ended"
        );
        outcome
    }

    async fn admit(&mut self, hello: &MigrationHello) -> Result<Admitted, DestinationError> {
        let request = |what| DestinationError::Request { what };
        let id: VmId = hello.vm_id.parse().map_err(|_| request("the vm's id is none"))?;
        let epoch = Epoch::from_raw(hello.epoch);
        if let Some(reason) = refuse_live_move(self.node.qemu_version, self.node.hypervisor.accelerator) {
            return Err(DestinationError::Hypervisor { reason });
        }
        let vm = self.node.vms.get_or_create(id)?;
        let mut spec = self.authorised(&vm, hello).await?;
        // Its source has called before and was restarted since: what came then will never be whole.
        if vm.drop_unfinished_image().await? {
            spec = self.authorised(&vm, hello).await?;
        }
        let status = vm.status();
        let admissible = status.volatile.authorised == Some(epoch) && status.volatile.guest == Guest::Absent;
        if !admissible {
            return Err(DestinationError::NotPermitted { record: status.record });
        }
        check_memory(spec.memory_bytes)?;
        // The definition comes from the controllers, not from the peer.
        vm.set_spec(&spec).await?;
        self.node.lease_wanted.notify_one();
        self.grow_replicas(id, hello)?;
        let qemu = vm.load_image(&spec).await?;
        let prepared = async {
            let disks = self.replica_disks(id, &spec)?;
            qemu.listen_incoming(&qemu.paths().incoming()).await?;
            Ok(disks)
        };
        match prepared.await {
            Ok(disks) => {
                let names = spec.disks.iter().map(|disk| disk.name.clone()).collect();
                Ok(Admitted { vm, epoch, qemu, names, disks })
            }
            Err(error) => {
                vm.drop_image(&qemu).await?;
                Err(error)
            }
        }
    }

    async fn authorised(&self, vm: &Arc<ManagedVm>, hello: &MigrationHello) -> Result<VmSpec, DestinationError> {
        let nonce = rand::random();
        vm.step(Event::Asked(Nonce(nonce))).await?;
        let question = AskAuthorisationRequest {
            worker: self.node.config.name.to_string(),
            vm_id: hello.vm_id.clone(),
            migration_id: hello.migration_id.clone(),
            epoch: hello.epoch,
            nonce,
            store_id: self.node.store.id.to_string(),
        };
        let give_up = Instant::now() + ASK_LIMIT;
        let answer = loop {
            match self.node.controllers.ask_authorisation(question.clone()).await {
                Err(error @ ControllerError::NoLeader { .. }) if Instant::now() < give_up => {
                    tracing::info!(error = %crate::error::with_causes(&error), "the question is asked again");
                    tokio::time::sleep(ASK_PAUSE).await;
                }
                answer => break answer?,
            }
        };
        if !answer.authorised {
            return Err(DestinationError::NotAuthorised { reason: answer.reason });
        }
        let epoch = Epoch::from_raw(hello.epoch);
        vm.step(Event::AuthReply { nonce: Nonce(answer.nonce), epoch }).await?;
        answer.spec.ok_or(DestinationError::Request { what: "the controllers sent no definition" })
    }

    /// The hypervisor must find the replicas as large as the disks are: it does not look again. What becomes of a move that breaks off is cut
    /// to its newest recovery point.
    fn grow_replicas(&self, vm: VmId, hello: &MigrationHello) -> Result<(), DestinationError> {
        tokio::task::block_in_place(|| {
            for ReplicationDisk { name, size_bytes, .. } in &hello.disks {
                if *size_bytes > MAX_DISK_BYTES {
                    return Err(DestinationError::Request { what: "a disk is too large" });
                }
                let replica = self.node.replicas.open_existing(vm, name)?;
                replica.must_not_shrink(*size_bytes)?;
                let grown = replica.grow(*size_bytes);
                grown.map_err(|source| DestinationError::Grow { disk: replica.to_string(), source })?;
            }
            Ok(())
        })
    }

    /// The replicas, opened as the disk sessions will find them.
    fn replica_disks(&self, vm: VmId, spec: &VmSpec) -> Result<Vec<Arc<ReplicaDisk>>, DestinationError> {
        let replicas = self.node.replicas.clone();
        let names: Vec<String> = spec.disks.iter().map(|disk| disk.name.clone()).collect();
        tokio::task::block_in_place(|| {
            let open = |name: &String| Ok(replicas.open_existing(vm, name)?);
            names.iter().map(open).collect()
        })
    }

    /// What the source's pages may refer to.
    fn held(&self, admitted: &Admitted, hello: &MigrationHello) -> Held {
        let migration = hello.kept_from_migration.parse().ok();
        let kept = migration.and_then(|migration| self.node.memory.open(admitted.vm.id(), migration));
        Held { disks: admitted.disks.clone(), kept }
    }

    async fn receive(
        &mut self,
        admitted: &Admitted,
        hello: &MigrationHello,
        held: Held,
    ) -> Result<(StreamEnd, Arrived), DestinationError> {
        let migration = hello.migration_id.parse();
        let migration = migration.map_err(|_| DestinationError::Request { what: "the migration's id is none" })?;
        let arrived = Arrived::of(migration, &hello.source_worker);
        let (memory, fallback) = self.accept_streams().await?;
        let socket = UnixStream::connect(admitted.qemu.paths().incoming()).map_err(DestinationError::Socket)?;
        let mut incoming = Incoming::start(memory, fallback, socket, held, arrived, self.answers.clone())?;
        // The end may be announced before the last batch is written, or after.
        let (Written { digest, arrived }, end) = tokio::select! {
            written = incoming.written_all() => (written?, self.stream_end().await?),
            end = self.stream_end() => (incoming.written_all().await?, end?),
        };
        let agrees = end.digest[..] == digest.value()[..]
            && (end.batches, end.raw_bytes) == (digest.batches(), digest.raw_bytes());
        if agrees { Ok((end, arrived)) } else { Err(DestinationError::DigestMismatch) }
    }

    /// The memory and the fallback stream, in whichever order they come.
    async fn accept_streams(&mut self) -> Result<(quinn::RecvStream, quinn::RecvStream), DestinationError> {
        let (mut memory, mut fallback) = (None, None);
        let limit = STREAMS_LIMIT;
        let deadline = tokio::time::Instant::now() + limit;
        while memory.is_none() || fallback.is_none() {
            let connection = &self.connection;
            let accept = async {
                let mut reader = MessageReader::new(connection.accept_uni().await?);
                let hello: StreamHello = reader.receive_within(RESUME_LIMIT).await?;
                Ok::<_, DestinationError>((hello.kind, reader.into_stream()))
            };
            let (kind, stream) = tokio::select! {
                accepted = accept => accepted?,
                early = stream_end(&mut self.control) => {
                    early?;
                    return Err(DestinationError::Request { what: "the stream ends before it begins" });
                }
                () = tokio::time::sleep_until(deadline) => {
                    return Err(DestinationError::TooLong { what: "the beginning of the memory stream", limit });
                }
            };
            match kind {
                Some(stream_hello::Kind::Memory(_)) if memory.is_none() => memory = Some(stream),
                Some(stream_hello::Kind::Fallback(_)) if fallback.is_none() => fallback = Some(stream),
                _ => return Err(DestinationError::Request { what: "an unexpected stream" }),
            }
        }
        memory.zip(fallback).ok_or(DestinationError::Lost)
    }

    async fn load(
        &mut self,
        admitted: &Admitted,
        hello: &MigrationHello,
        end: &StreamEnd,
    ) -> Result<(), DestinationError> {
        let Admitted { vm, epoch, qemu, disks, .. } = admitted;
        qemu.wait_migration(MigrationStatus::Completed, LOAD_LIMIT).await?;
        for disk in disks {
            let disk = disk.clone();
            let name = disk.to_string();
            let flushed = tokio::task::spawn_blocking(move || disk.flush()).await.map_err(std::io::Error::other);
            flushed.and_then(|flushed| flushed).map_err(|source| DestinationError::Sync { disk: name, source })?;
        }
        admitted.mark_the_way_back(hello).await;
        self.wait_for_lease(vm, *epoch).await?;
        let record = vm.loaded(qemu, *epoch).await?;
        if vm.status().volatile.guest != Guest::Loaded(*epoch) {
            return Err(DestinationError::NotPermitted { record });
        }
        self.say(to_source::Kind::Ready(Ready { epoch: epoch.raw(), digest: end.digest.clone() }));
        Ok(())
    }

    /// A guest that fences itself could not run here without a lease: better found out before the source lets go.
    async fn wait_for_lease(&self, vm: &ManagedVm, epoch: Epoch) -> Result<(), DestinationError> {
        let limit = LEASE_LIMIT;
        let mut status = vm.watch();
        self.node.lease_wanted.notify_one();
        let leased = status.wait_for(|now| now.volatile.standing.permits(epoch));
        let leased = tokio::time::timeout(limit, leased).await;
        leased.map(drop).map_err(|_| DestinationError::TooLong { what: "the lease for a vm that fences itself", limit })
    }

    async fn resume(&mut self, admitted: &Admitted) -> Result<(), DestinationError> {
        let Admitted { vm, epoch, qemu, .. } = admitted;
        let mut status = vm.watch();
        let heard = async {
            loop {
                match self.control.recv().await {
                    Some(Ok(to_destination::Kind::Release(release))) => {
                        vm.step(Event::Release(Epoch::from_raw(release.epoch))).await?;
                    }
                    Some(Ok(to_destination::Kind::Abort(abort))) => {
                        // Sent only after the source's revocation was durable.
                        vm.step(Event::Revoked(*epoch)).await?;
                        return Err(DestinationError::SourceAborted { reason: abort.reason });
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => {
                        tracing::warn!("the source is not heard; waiting for the controllers' word");
                        return std::future::pending().await;
                    }
                }
            }
        };
        let settled = status.wait_for(|now| now.volatile.guest != Guest::Loaded(*epoch));
        tokio::select! {
            heard = heard => return heard,
            _ = settled => {}
        }
        let record = vm.status().record;
        match record {
            Record::Own { own, .. } if own == *epoch => {
                failpoint::reach("destination", "acquired").await;
                let resumed_ns = resumed_at(qemu).await?;
                self.say(to_source::Kind::Resumed(Resumed { epoch: epoch.raw(), resumed_ns }));
            }
            _ => {
                let reason = "the image was dropped".to_owned();
                self.say(to_source::Kind::Refused(Refused { epoch: epoch.raw(), reason }));
            }
        }
        Ok(())
    }

    async fn stream_end(&mut self) -> Result<StreamEnd, DestinationError> {
        stream_end(&mut self.control).await
    }

    fn say(&self, kind: to_source::Kind) {
        // A control stream that is gone is noticed by who reads it.
        let _ = self.answers.send(kind);
    }
}

/// While the image is not complete: the end of the stream, or a reason to stop. Cancel-safe.
async fn stream_end(
    control: &mut mpsc::Receiver<Result<to_destination::Kind, MessageError>>,
) -> Result<StreamEnd, DestinationError> {
    match control.recv().await {
        None | Some(Err(MessageError::Closed)) => Err(DestinationError::Lost),
        Some(Err(error)) => Err(error.into()),
        Some(Ok(to_destination::Kind::StreamEnd(end))) => Ok(end),
        Some(Ok(to_destination::Kind::Abort(abort))) => Err(DestinationError::SourceAborted { reason: abort.reason }),
        Some(Ok(to_destination::Kind::Release(_) | to_destination::Kind::ClockProbe(_))) => {
            Err(DestinationError::Request { what: "a message out of turn" })
        }
    }
}

/// When the guest began to run here, by this worker's clock.
async fn resumed_at(qemu: &Vm) -> Result<u64, DestinationError> {
    let limit = RESUME_LIMIT;
    let mut marks = qemu.marks();
    let resumed = tokio::time::timeout(limit, marks.wait_for(|marks| marks.resumed.is_some())).await;
    let marks = resumed.map_err(|_| DestinationError::TooLong { what: "the guest's resumption", limit })?;
    let at = marks.ok().and_then(|marks| marks.resumed);
    Ok(at.map_or_else(now_ns, |at| at_ns(at.received)))
}

/// Refuses a guest of so many bytes that this host has no memory for.
///
/// # Errors
/// [`DestinationError::NoMemory`]; the host cannot be looked at.
pub fn check_memory(needed_bytes: u64) -> Result<(), DestinationError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(DestinationError::Memory)?;
    let kib = |line: &str| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    let available_bytes = text.lines().find_map(kib).unwrap_or(u64::MAX >> 10) << 10;
    if needed_bytes.saturating_add(HOST_RESERVE_BYTES) > available_bytes {
        return Err(DestinationError::NoMemory { needed_bytes, available_bytes });
    }
    Ok(())
}
