//! Changes of the controllers themselves: answered by the leader, for operators alone.
//!
//! ```text
//!   AddMember:     learner ─▶ has it caught up? (told four times a second) ─▶ voter ─▶ done
//!   RemoveMember:  leads it? ─yes─▶ another leads, UNAVAILABLE: the same request to that one ─▶ removed
//! ```
//! Guarantees: each step is an entry of the log, and the same request finds what is done already. Whoever stops following an
//! addition leaves a learner behind, which does not vote; the same request goes on with it. A new controller that is silent
//! for [`SILENT_FOR`] ends the stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pageport_common::backup;
use pageport_proto::v1;
use pageport_proto::v1::add_member_response::Phase;
use pageport_proto::v1::membership_service_server::MembershipService;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::cluster::members;
use super::error::ApiError;
use super::unix_ms;
use crate::backup::Backup;
use crate::consensus::membership::{ChangeError, Member, Membership, Order, Quorum};
use crate::consensus::{Consensus, ConsensusError};
use crate::model::State;
use crate::peer;

/// A controller that is being added and says nothing for so long ends the wait for it.
pub const SILENT_FOR: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(250);
const QUEUE: usize = 4;

/// Changes the members, and who leads.
#[derive(Debug, Clone)]
pub struct Members {
    consensus: Consensus,
}

impl Members {
    /// Of the cluster that this node is part of.
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    async fn answer(&self, membership: &Membership) -> Vec<v1::ClusterMember> {
        let standing = self.consensus.standing().await.ok();
        members(membership, self.consensus.status().leader, standing.as_ref())
    }
}

/// A new member on its way to vote.
struct Addition {
    members: Members,
    id: u64,
    address: String,
    updates: mpsc::Sender<Result<v1::AddMemberResponse, Status>>,
    last_heard: Instant,
}

impl Addition {
    async fn run(mut self) {
        if let Err(error) = self.follow().await {
            // Who no longer listens needs no reason.
            let _ = self.updates.send(Err(error.into())).await;
        }
    }

    async fn follow(&mut self) -> Result<(), ApiError> {
        loop {
            let standing = self.members.consensus.standing().await?;
            let peer = standing.peer(self.id);
            let answers = peer.is_some_and(|peer| peer.answers());
            let update = v1::AddMemberResponse {
                phase: Phase::CatchingUp.into(),
                has_entries: peer.map_or(0, |peer| peer.matched),
                of_entries: standing.last,
                answers,
                members: vec![],
            };
            if self.updates.send(Ok(update)).await.is_err() {
                return Ok(());
            }
            match self.members.consensus.change(Order::Promote(self.id)).await {
                Ok(membership) => return self.done(&membership, standing.last).await,
                Err(ChangeError::NotNear { .. } | ChangeError::Busy) => {}
                Err(error) => return Err(error.into()),
            }
            if answers {
                self.last_heard = Instant::now();
            } else if self.last_heard.elapsed() > SILENT_FOR {
                return Err(ApiError::MemberSilent { member: self.id, address: self.address.clone() });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn done(&self, membership: &Membership, entries: u64) -> Result<(), ApiError> {
        tracing::info!(member = self.id, address = self.address, "controller added");
        let update = v1::AddMemberResponse {
            phase: Phase::Done.into(),
            has_entries: entries,
            of_entries: entries,
            answers: true,
            members: self.members.answer(membership).await,
        };
        // Who no longer listens asks again, and finds it done.
        let _ = self.updates.send(Ok(update)).await;
        Ok(())
    }
}

async fn send_file(file: Vec<u8>, parts: mpsc::Sender<Result<v1::BackupResponse, Status>>) {
    let file = Bytes::from(file);
    let total_bytes = file.len() as u64;
    for part in backup::parts(file.len()) {
        let part = v1::BackupResponse { offset: part.start as u64, total_bytes, chunk: file.slice(part) };
        // Who no longer listens asks again.
        if parts.send(Ok(part)).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl MembershipService for Members {
    type AddMemberStream = ReceiverStream<Result<v1::AddMemberResponse, Status>>;
    type BackupStream = ReceiverStream<Result<v1::BackupResponse, Status>>;

    async fn backup(&self, request: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let operator = peer::operator(&request)?;
        let state = self.consensus.read().await.map_err(ApiError::from)?;
        let status = self.consensus.status();
        let backup = Backup {
            taken_unix_ms: unix_ms(),
            index: status.applied,
            term: status.term,
            membership: Membership::clone(&self.consensus.membership()),
            state: State::clone(&state),
        };
        let file = backup.to_file().map_err(|error| Status::internal(error.to_string()))?;
        tracing::info!(operator, bytes = file.len(), index = backup.index, "backup taken");
        let (parts, stream) = mpsc::channel(QUEUE);
        tokio::spawn(send_file(file, parts));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn transfer_leadership(
        &self,
        request: Request<v1::TransferLeadershipRequest>,
    ) -> Result<Response<v1::TransferLeadershipResponse>, Status> {
        let operator = peer::operator(&request)?;
        let to = Some(request.get_ref().to).filter(|member| *member != 0);
        tracing::info!(operator, to, "asked to hand leadership over");
        let (leader, term) = self.consensus.transfer_leadership(to).await.map_err(ApiError::from)?;
        Ok(Response::new(v1::TransferLeadershipResponse { leader, term }))
    }

    async fn add_member(
        &self,
        request: Request<v1::AddMemberRequest>,
    ) -> Result<Response<Self::AddMemberStream>, Status> {
        let operator = peer::operator(&request)?;
        let v1::AddMemberRequest { id, site, address } = request.into_inner();
        tracing::info!(operator, id, site, address, "asked to add a controller");
        let site = site.parse().map_err(|source| ApiError::BadId { field: "site", source })?;
        let member = Member::new(id, site, address.clone());
        self.consensus.change(Order::Add(member)).await.map_err(ApiError::from)?;
        let (updates, stream) = mpsc::channel(QUEUE);
        let addition = Addition { members: self.clone(), id, address, updates, last_heard: Instant::now() };
        tokio::spawn(addition.run());
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn remove_member(
        &self,
        request: Request<v1::RemoveMemberRequest>,
    ) -> Result<Response<v1::RemoveMemberResponse>, Status> {
        let operator = peer::operator(&request)?;
        let v1::RemoveMemberRequest { id, force } = request.into_inner();
        tracing::info!(operator, id, force, "asked to remove a controller");
        let quorum = if force { Quorum::Risk } else { Quorum::Keep };
        let membership: Arc<Membership> = match self.consensus.change(Order::Remove { id, quorum }).await {
            Err(ChangeError::Leads { member }) => {
                let (heir, _) = self.consensus.transfer_leadership(None).await.map_err(ApiError::from)?;
                tracing::info!(member, heir, "the leader is to be removed: another leads now");
                return Err(ApiError::from(ConsensusError::NotLeader).into());
            }
            changed => changed.map_err(ApiError::from)?,
        };
        Ok(Response::new(v1::RemoveMemberResponse { members: self.answer(&membership).await }))
    }
}
