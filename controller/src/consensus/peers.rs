//! Raft messages between controllers, as opaque bytes on one client stream per peer and direction.
//!
//! The peers are the members, wherever they are now; until a controller that joins has been told who they are, those that its
//! configuration names. Each message says whose store it comes from, and which store its addressee is known by: a controller that was
//! removed, or that has lost its store and begun another, is told so instead of being listened to ([`TurnedAway`]).
//!
//! Guarantees: sending never waits (a full queue drops, raft sends again); a peer that cannot be reached is reported to
//! raft, and so is every snapshot, sent or not. It does not look into the messages beyond their addressee.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use pageport_common::tls::CONTROLLER_NAME;
use pageport_ownership::Generation;
use pageport_proto::StoreId;
use pageport_proto::v1::RaftAck;
use pageport_proto::v1::RaftEnvelope;
use pageport_proto::v1::raft_transport_service_client::RaftTransportServiceClient;
use pageport_proto::v1::raft_transport_service_server::RaftTransportService;
use prost_011::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::membership::{Member, Membership, TurnedAway};
use super::{Consensus, Delivered, Input};
use crate::dial::Dialer;

/// Largest message: a snapshot travels as one.
pub const MAX_ENVELOPE_BYTES: usize = 64 << 20;
const QUEUE: usize = 1024;
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// A peer's stream without a message for this long is closed: heartbeats come several times a second.
const IDLE: Duration = Duration::from_secs(30);

/// Metadata key of a refusal for good, and its values.
const TURNED_AWAY_KEY: &str = "pageport-turned-away";
const REMOVED: &str = "removed";
const OTHER_STORE: &str = "other-store";
const OLDER_GENERATION: &str = "older-generation";

#[derive(Debug)]
struct Outgoing {
    envelope: RaftEnvelope,
    snapshot: bool,
}

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
    queue: mpsc::Sender<Outgoing>,
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
            tokio::spawn(carry(peer, channel, outgoing, self.core.clone()));
            self.ways.insert(peer, Way { address: address.to_owned(), store: member.store, queue });
        }
    }

    /// Sends messages to whom they are for.
    pub fn send(&self, messages: Vec<Message>) {
        for message in messages {
            let peer = message.to;
            let snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
            let text = |store: Option<StoreId>| store.map(|store| store.to_string()).unwrap_or_default();
            let queued = self.ways.get(&peer).map(|way| {
                let message = Bytes::from(message.encode_to_vec());
                let (store, to_store) = (text(self.store), text(way.store));
                let generation = if self.knows_members { said(self.generation) } else { 0 };
                let envelope = RaftEnvelope { message, from: self.own, store, to_store, generation };
                way.queue.try_send(Outgoing { envelope, snapshot })
            });
            if !matches!(queued, Some(Ok(()))) {
                report(&self.core, peer, snapshot, Delivered::No);
            }
        }
    }
}

/// As it stands in an envelope, where 0 is not known.
fn said(generation: Generation) -> u32 {
    u32::from(generation.0) + 1
}

/// Tells raft how a message fared. A full inbox loses the word: the next message's fate tells the same.
fn report(core: &mpsc::Sender<Input>, peer: u64, snapshot: bool, delivered: Delivered) {
    let input = match (snapshot, delivered) {
        (true, delivered) => Input::SnapshotSent { peer, delivered },
        (false, Delivered::No) => Input::Unreachable { peer },
        (false, Delivered::Yes) => return,
    };
    if core.try_send(input).is_err() {
        tracing::debug!(peer, "the core's inbox is full");
    }
}

/// Carries messages to one peer for as long as there are any.
async fn carry(peer: u64, channel: Channel, mut outgoing: mpsc::Receiver<Outgoing>, core: mpsc::Sender<Input>) {
    let mut client = RaftTransportServiceClient::new(channel).max_encoding_message_size(MAX_ENVELOPE_BYTES);
    while let Some(first) = outgoing.recv().await {
        let (stream, messages) = mpsc::channel(QUEUE);
        let call = client.send(ReceiverStream::new(messages));
        tokio::pin!(call);
        let mut next = Some(first);
        loop {
            if let Some(Outgoing { envelope, snapshot }) = next.take() {
                let sent = stream.try_send(envelope);
                let delivered = if sent.is_ok() { Delivered::Yes } else { Delivered::No };
                report(&core, peer, snapshot, delivered);
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
        report(&core, peer, false, Delivered::No);
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct RaftTransport {
    consensus: Consensus,
}

impl RaftTransport {
    /// Hands all messages to this core.
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }
}

#[tonic::async_trait]
impl RaftTransportService for RaftTransport {
    async fn send(&self, request: Request<Streaming<RaftEnvelope>>) -> Result<Response<RaftAck>, Status> {
        crate::peer::require(&request, CONTROLLER_NAME)?;
        let mut messages = request.into_inner();
        loop {
            let message = tokio::time::timeout(IDLE, messages.message()).await;
            let message = message.map_err(|_| Status::deadline_exceeded("no raft message for 30 s"))??;
            let Some(envelope) = message else { return Ok(Response::new(RaftAck {})) };
            let own = match self.consensus.membership().is_unknown() {
                true => 0,
                false => said(self.consensus.applied().generation),
            };
            if own != 0 && envelope.generation != 0 && envelope.generation < own {
                return Err(refusal(envelope.from, TurnedAway::OlderGeneration));
            }
            if own != 0 && envelope.generation > own {
                let told = self.consensus.turned_away(envelope.from, TurnedAway::OlderGeneration).await;
                told.map_err(|error| Status::unavailable(error.to_string()))?;
                continue;
            }
            let store = envelope.store.parse().ok();
            if let Some(why) = self.consensus.membership().turns_away(envelope.from, store) {
                return Err(refusal(envelope.from, why));
            }
            let known_by = envelope.to_store.parse::<StoreId>().ok();
            let taken = match known_by.is_some_and(|known_by| known_by != self.consensus.store()) {
                true => self.consensus.turned_away(envelope.from, TurnedAway::OtherStore).await,
                false => self.consensus.step(envelope.message.to_vec(), store).await,
            };
            taken.map_err(|error| Status::unavailable(error.to_string()))?;
        }
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
