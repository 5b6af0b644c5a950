//! The controllers themselves; answered by whichever node is asked.

use pageport_proto::v1;
use pageport_proto::v1::cluster_service_server::ClusterService;
use tonic::{Request, Response, Status};

use crate::consensus::Consensus;
use crate::consensus::membership::{Member, Membership};
use crate::consensus::standing::{Role, Standing};

/// Tells where this node stands.
#[derive(Debug, Clone)]
pub struct Cluster {
    consensus: Consensus,
}

impl Cluster {
    /// Of this node.
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }
}

/// The members, and how far they are if that is known here.
pub fn members(membership: &Membership, leader: Option<u64>, standing: Option<&Standing>) -> Vec<v1::ClusterMember> {
    let member = |(member, role): (&Member, Role)| {
        let known = standing.and_then(|standing| Some((standing, standing.peer(member.id)?)));
        v1::ClusterMember {
            id: member.id,
            site: member.site.to_string(),
            address: member.address.clone(),
            leader: leader == Some(member.id),
            learner: role == Role::Learner,
            lacks_entries: known.map(|(standing, peer)| standing.behind(peer)),
            silent_ms: known.and_then(|(_, peer)| peer.silent).map(|silent| silent.as_millis() as u64),
        }
    };
    let mut members: Vec<_> = membership.members().map(member).collect();
    members.sort_by_key(|member| member.id);
    members
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn get_cluster_status(
        &self,
        _: Request<v1::GetClusterStatusRequest>,
    ) -> Result<Response<v1::GetClusterStatusResponse>, Status> {
        let status = self.consensus.status();
        let standing = self.consensus.standing().await.ok();
        let state = self.consensus.applied();
        Ok(Response::new(v1::GetClusterStatusResponse {
            members: members(&self.consensus.membership(), status.leader, standing.as_ref()),
            term: status.term,
            committed_index: status.committed,
            applied_index: status.applied,
            answered_by: status.id,
            generation: state.generation.0.into(),
            vms_unknown: state.recovering.len() as u32,
            awaited_workers: state.awaited().iter().map(ToString::to_string).collect(),
        }))
    }
}
