//! The fake of the membership service: who the controllers are.

use pageport_proto::v1;
use pageport_proto::v1::membership_service_server::MembershipService;
use tonic::{Request, Response, Status};

use super::{Boxed, Fake, Reply};

#[tonic::async_trait]
impl MembershipService for Fake {
    type AddMemberStream = Boxed<v1::AddMemberResponse>;
    type BackupStream = Boxed<v1::BackupResponse>;

    async fn transfer_leadership(
        &self,
        _: Request<v1::TransferLeadershipRequest>,
    ) -> Reply<v1::TransferLeadershipResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn add_member(&self, _: Request<v1::AddMemberRequest>) -> Reply<Self::AddMemberStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn remove_member(&self, _: Request<v1::RemoveMemberRequest>) -> Reply<v1::RemoveMemberResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn backup(&self, _: Request<v1::BackupRequest>) -> Reply<Self::BackupStream> {
        let parts = self.script().backups.pop_front().unwrap_or_default();
        let parts = parts.into_iter().map(Ok).chain([Err(Status::unavailable("the leader is gone"))]);
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }
}
