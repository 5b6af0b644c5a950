//! Raft messages between controllers, as opaque bytes on one client stream per peer and direction.
//!
//! The peers are the members, wherever they are now; until a controller that joins has been told who they are, those that its
//! configuration names. Each message says whose store it comes from, and which store its addressee is known by: a controller that was
//! removed, or that has lost its store and begun another, is told so instead of being listened to ([`TurnedAway`]).
//!
//! Guarantees: sending never waits (a full queue drops, raft sends again); a peer that cannot be reached is reported to
//! raft, and so is every snapshot, which goes in parts beside the other messages ([`super::shipping`]). It does not look into the messages
//! beyond their addressee.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pageport_common::tls::CONTROLLER_NAME;
use pageport_ownership::Generation;
use pageport_proto::StoreId;
use pageport_proto::v1::RaftAck;
use pageport_proto::v1::raft_transport_service_client::RaftTransportServiceClient;
use pageport_proto::v1::raft_transport_service_server::RaftTransportService;
use pageport_proto::v1::{RaftEnvelope, SnapshotPart, SnapshotProgress};
use prost_011::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::membership::{Member, Membership, TurnedAway};
use super::shipping::{self, Dock, Label, Shipment};
use super::{Consensus, ConsensusError, Delivered, Input};
use crate::dial::Dialer;

/// Largest message but a snapshot: raft gathers entries up to one MiB.
pub const MAX_ENVELOPE_BYTES: usize = 8 << 20;
const QUEUE: usize = 1024;
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// A peer's stream without a message for this long is closed: heartbeats come several times a second.
const IDLE: Duration = Duration::from_secs(30);

/// Metadata key of a refusal for good, and its values.
const TURNED_AWAY_KEY: &str = "pageport-turned-away";
const REMOVED: &str = "removed";
const OTHER_STORE: &str = "other-store";
const OLDER_GENERATION: &str = "older-generation";

/// The ways to all peers.
#[derive(Debug)]
pub struct Peers {
    own: u64,
    store: Option<StoreId>,
    generation: Generation,
    /// Known members: until then a controller that joins says no generation.
    knows_members: bool,
    dialer: Dialer,
    core: mpsc::Sender<Input>,
    configured: Vec<Member>,
    ways: BTreeMap<u64, Way>,
}

/// The task that carries messages to an address ends with this.
#[derive(Debug)]
struct Way {
    address: String,
    /// By which the peer is known.
    store: Option<StoreId>,
    queue: mpsc::Sender<RaftEnvelope>,
    channel: Channel,
    /// The snapshot that is on its way.
    shipping: Option<JoinHandle<()>>,
}

impl Peers {
    /// Of the node `own`; `configured` are the peers until it is known who the members are.
    pub fn new(own: u64, dialer: Dialer, core: mpsc::Sender<Input>, configured: Vec<Member>) -> Self {
        let (store, generation, knows_members) = (None, Generation::default(), false);
        Self { own, store, generation, knows_members, dialer, core, configured, ways: BTreeMap::new() }
    }

    /// The store of the node.
    pub fn of_store(self, store: StoreId) -> Self {
        Self { store: Some(store), ..self }
    }

    /// The generation of what the node has applied.
    pub fn of_generation(&mut self, generation: Generation) {
        self.generation = generation;
    }

    /// Starts a task for each peer that is new or elsewhere, and ends those for others once their messages are out.
    pub fn follow(&mut self, membership: &Membership) {
        self.knows_members = !membership.is_unknown();
        let members: Vec<&Member> = match membership.is_unknown() {
            true => self.configured.iter().collect(),
            false => membership.members().map(|(member, _)| member).collect(),
        };
        let wanted = members.into_iter().filter(|member| member.id != self.own);
        let wanted: BTreeMap<u64, &Member> = wanted.map(|member| (member.id, member)).collect();
        self.ways.retain(|peer, way| wanted.get(peer).is_some_and(|member| member.address == way.address));
        for (peer, member) in wanted {
            if let Some(way) = self.ways.get_mut(&peer) {
                way.store = member.store;
                continue;
            }
            let address = member.address.as_str();
            let channel = match self.dialer.dial(address) {
                Ok(channel) => channel,
                Err(error) => {
                    tracing::error!(peer, error = &error as &dyn std::error::Error, "peer not dialled");
                    continue;
                }
            };
            let (queue, outgoing) = mpsc::channel(QUEUE);
            tokio::spawn(carry(peer, channel.clone(), outgoing, self.core.clone()));
            let (address, store) = (address.to_owned(), member.store);
            self.ways.insert(peer, Way { address, store, queue, channel, shipping: None });
        }
    }

    /// Sends messages to whom they are for.
    pub fn send(&mut self, messages: Vec<Message>) {
        for mut message in messages {
            let peer = message.to;
            let data = (message.get_msg_type() == MessageType::MsgSnapshot)
                .then(|| Bytes::from(std::mem::take(&mut message.mut_snapshot().data)));
            let envelope = self.envelope(&message);
            let way = self.ways.get_mut(&peer);
            match (way, data) {
                (Some(way), Some(data)) => way.ship(peer, Shipment { envelope, data }, &self.core),
                (None, Some(_)) => tell(&self.core, Input::SnapshotSent { peer, delivered: Delivered::No }),
                (way, None) => {
                    if way.is_none_or(|way| way.queue.try_send(envelope).is_err()) {
                        tell(&self.core, Input::Unreachable { peer });
                    }
                }
            }
        }
    }

    fn envelope(&self, message: &Message) -> RaftEnvelope {
        let text = |store: Option<StoreId>| store.map(|store| store.to_string()).unwrap_or_default();
        RaftEnvelope {
            message: Bytes::from(message.encode_to_vec()),
            from: self.own,
            store: text(self.store),
            to_store: text(self.ways.get(&message.to).and_then(|way| way.store)),
            generation: if self.knows_members { said(self.generation) } else { 0 },
        }
    }
}

impl Way {
    /// Starts to send a snapshot, unless one is on its way: its end is told to raft, which sends what is needed then.
    fn ship(&mut self, peer: u64, shipment: Shipment, core: &mpsc::Sender<Input>) {
        if self.shipping.as_ref().is_some_and(|shipping| !shipping.is_finished()) {
            return;
        }
        let (channel, core) = (self.channel.clone(), core.clone());
        self.shipping = Some(tokio::spawn(async move {
            let bytes = shipment.data.len();
            let shipped = shipping::ship(channel, shipment).await;
            if let Err(status) = &shipped {
                tracing::info!(peer, code = ?status.code(), message = status.message(), "snapshot not sent");
                if let Some(why) = turned_away(status) {
                    let _ = core.send(Input::TurnedAway { by: peer, why }).await;
                }
            } else {
                tracing::info!(peer, bytes, "snapshot sent");
            }
            let delivered = if shipped.is_ok() { Delivered::Yes } else { Delivered::No };
            // A core that has ended needs no telling. A word that got lost would leave the peer without any more messages.
            let _ = core.send(Input::SnapshotSent { peer, delivered }).await;
        }));
    }
}

/// As it stands in an envelope, where 0 is not known.
fn said(generation: Generation) -> u32 {
    u32::from(generation.0) + 1
}

/// Tells raft. A full inbox loses the word: the next message's fate tells the same.
fn tell(core: &mpsc::Sender<Input>, input: Input) {
    if let Err(lost) = core.try_send(input) {
        tracing::debug!(%lost, "the core's inbox is full");
    }
}

/// Carries messages to one peer until there can be no more. The stream is open also while there are none: between followers there are
/// none until they elect a leader, and the handshakes of both ways would cost a vote four more round trips.
async fn carry(peer: u64, channel: Channel, mut outgoing: mpsc::Receiver<RaftEnvelope>, core: mpsc::Sender<Input>) {
    let mut client = RaftTransportServiceClient::new(channel).max_encoding_message_size(MAX_ENVELOPE_BYTES);
    loop {
        let (stream, messages) = mpsc::channel(QUEUE);
        let call = client.send(ReceiverStream::new(messages));
        tokio::pin!(call);
        let mut next = None;
        loop {
            if let Some(envelope) = next.take()
                && stream.try_send(envelope).is_err()
            {
                tell(&core, Input::Unreachable { peer });
            }
            tokio::select! {
                ended = &mut call => {
                    if let Err(status) = ended {
                        tracing::debug!(peer, code = ?status.code(), message = status.message(), "peer not reached");
                        if let Some(why) = turned_away(&status) {
                            // A core that has ended needs no telling.
                            let _ = core.send(Input::TurnedAway { by: peer, why }).await;
                            return;
                        }
                    }
                    break;
                }
                message = outgoing.recv() => match message {
                    Some(message) => next = Some(message),
                    None => return,
                },
            }
        }
        tell(&core, Input::Unreachable { peer });
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// The receiving side.
#[derive(Debug, Clone)]
pub struct RaftTransport {
    consensus: Consensus,
    dock: Arc<Mutex<Dock>>,
}

/// What becomes of a message.
enum Heard {
    /// It is for the core, and comes from this store.
    Take(Option<StoreId>),
    /// This node is the one that must end.
    Drop,
}

impl RaftTransport {
    /// Hands all messages to this core; parts of snapshots are kept in `folder`.
    pub fn new(consensus: Consensus, folder: PathBuf) -> Self {
        Self { consensus, dock: Arc::new(Mutex::new(Dock::new(folder))) }
    }

    /// Is the sender listened to?
    async fn hear(&self, envelope: &RaftEnvelope) -> Result<Heard, Status> {
        let store = envelope.store.parse().ok();
        let membership = self.consensus.membership();
        let own = if membership.is_unknown() { 0 } else { said(self.consensus.applied().generation) };
        if own != 0 && envelope.generation != 0 && envelope.generation < own {
            return Err(refusal(envelope.from, TurnedAway::OlderGeneration));
        }
        if let Some(why) = membership.turns_away(envelope.from, store) {
            return Err(refusal(envelope.from, why));
        }
        let known_by = envelope.to_store.parse::<StoreId>().ok();
        let other_store = known_by.is_some_and(|known_by| known_by != self.consensus.store());
        let why = match own != 0 && envelope.generation > own {
            true => TurnedAway::OlderGeneration,
            false if other_store => TurnedAway::OtherStore,
            false => return Ok(Heard::Take(store)),
        };
        self.consensus.turned_away(envelope.from, why).await.map_err(unavailable)?;
        Ok(Heard::Drop)
    }

    async fn receive(
        &self,
        mut parts: Streaming<SnapshotPart>,
        progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
    ) -> Result<(), Status> {
        let first = shipping::next(&mut parts).await?;
        let envelope = first.envelope.ok_or_else(|| Status::invalid_argument("a snapshot begins with its message"))?;
        let Heard::Take(store) = self.hear(&envelope).await? else { return Ok(()) };
        let mut message = Message::decode(envelope.message.as_ref())
            .map_err(|error| Status::invalid_argument(format!("no raft message: {error}")))?;
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let label = Label { index, term, total_bytes: first.total_bytes, crc32: first.crc32 };
        let busy = |_| Status::unavailable("another snapshot is on its way here");
        let mut dock = self.dock.clone().try_lock_owned().map_err(busy)?;
        let mut have = tokio::task::block_in_place(|| dock.begin(label))?;
        tracing::info!(from = envelope.from, index, have, of = label.total_bytes, "a snapshot comes in");
        say(progress, shipping::progress(have, false)).await?;
        while have < label.total_bytes {
            let part = shipping::next(&mut parts).await?;
            have = tokio::task::block_in_place(|| dock.take(part.offset, &part.chunk, part.crc32))?;
        }
        message.mut_snapshot().data = tokio::task::block_in_place(|| dock.finish())?;
        self.consensus.step(message.encode_to_vec(), store).await.map_err(unavailable)?;
        say(progress, shipping::progress(have, true)).await
    }
}

fn unavailable(error: ConsensusError) -> Status {
    Status::unavailable(error.to_string())
}

async fn say(progress: &mpsc::Sender<Result<SnapshotProgress, Status>>, word: SnapshotProgress) -> Result<(), Status> {
    progress.send(Ok(word)).await.map_err(|_| Status::cancelled("the sender is gone"))
}

#[tonic::async_trait]
impl RaftTransportService for RaftTransport {
    type SendSnapshotStream = ReceiverStream<Result<SnapshotProgress, Status>>;

    async fn send(&self, request: Request<Streaming<RaftEnvelope>>) -> Result<Response<RaftAck>, Status> {
        crate::peer::require(&request, CONTROLLER_NAME)?;
        let mut messages = request.into_inner();
        loop {
            let message = tokio::time::timeout(IDLE, messages.message()).await;
            let message = message.map_err(|_| Status::deadline_exceeded("no raft message for 30 s"))??;
            let Some(envelope) = message else { return Ok(Response::new(RaftAck {})) };
            if let Heard::Take(store) = self.hear(&envelope).await? {
                self.consensus.step(envelope.message.to_vec(), store).await.map_err(unavailable)?;
            }
        }
    }

    async fn send_snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<Self::SendSnapshotStream>, Status> {
        crate::peer::require(&request, CONTROLLER_NAME)?;
        let (progress, stream) = mpsc::channel(2);
        let (transport, parts) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            if let Err(status) = transport.receive(parts, &progress).await {
                tracing::info!(code = ?status.code(), message = status.message(), "a snapshot did not come in");
                // The sender may be gone: then nobody needs the reason.
                let _ = progress.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn refusal(member: u64, why: TurnedAway) -> Status {
    let (why, value) = match why {
        TurnedAway::Removed => ("was removed from the cluster", REMOVED),
        TurnedAway::OtherStore => ("is known with another store", OTHER_STORE),
        TurnedAway::OlderGeneration => ("is of a cluster that was given up for a backup", OLDER_GENERATION),
    };
    let mut status = Status::failed_precondition(format!("controller {member} {why}"));
    status.metadata_mut().insert(TURNED_AWAY_KEY, MetadataValue::from_static(value));
    status
}

fn turned_away(status: &Status) -> Option<TurnedAway> {
    match status.metadata().get(TURNED_AWAY_KEY)?.to_str().ok()? {
        REMOVED => Some(TurnedAway::Removed),
        OTHER_STORE => Some(TurnedAway::OtherStore),
        OLDER_GENERATION => Some(TurnedAway::OlderGeneration),
        _ => None,
    }
}
